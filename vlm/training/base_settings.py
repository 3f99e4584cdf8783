"""Settings that every recipe has: data, schedule, precision, and the run's folder."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from vlm.data.mixture import MixtureDataset
from vlm.data.sources import Source, open_source
from vlm.precision import Precision
from vlm.training.checkpoints.checkpoint import KEEP
from vlm.training.sharding import Shard
from vlm.training.stages import Stage

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

Augmentation = Literal["none", "light", "strong"]
MemoryCheck = Literal["stop", "warn", "off"]


class Usual(float):
    """A learning rate that nobody named: the recipe's own. What is given on a command line, in a
    file or by a caller is a plain number, so that a rate which nothing reads can be refused."""


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """Settings of any run.

    pack: the most positions of a packed row; None in recipes that pack no rows.
    """

    pack: ClassVar[int | None] = None

    out: Path
    """The run's folder: settings, metrics, plots, checkpoints and the model."""
    resume: bool = False
    """Go on from the newest whole checkpoint in `out`, with the same settings."""
    change: tuple[str, ...] = ()
    """Settings that may differ when going on, by name, such as: rate steps; "data" allows that
    files were changed. Whatever differs without being named is listed and refused."""

    train: tuple[str, ...] = ("sample:train",)
    """Training data, any number of: sample:train, PATH.jsonl, PATH-{0000..0009}.tar, FOLDER,
    coco:ANNOTATIONS.json, datasets:ORG/NAME:SPLIT, scenes:1000:seed=3; options after "?":
    rows.tar?caption=text."""
    weights: tuple[float, ...] | None = None
    """Share of each among them; None goes by their sizes."""
    augment: Augmentation = "none"
    """How far training images are changed at random: windows, colours, blur; boxes move along."""
    held_out: str = "sample:transfer"
    """Data to evaluate on: by default drawings by another vendor than the training ones."""
    held_out_rows: int = 400
    """How many of its rows the closing evaluation takes, and those during training a quarter of;
    0 evaluates nothing."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """Rows that cannot be read: stop and name the row, or skip them and count them."""
    bad_boxes: Literal["stop", "skip"] = "stop"
    """Boxes of COCO's files that cannot be one: stop before the first step, or lose these boxes."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows that are skipped although they change what a row means, such as: tools
    rejected. Without this they stop the run."""
    shard: Shard = "no"
    """Shard every weight, gradient and optimizer state over all processes ("all"), or over those of
    one machine with a copy on each machine ("node"): for models that do not fit one GPU. An
    accelerate configuration that asks for FSDP turns it on. What is learned stays the same.
    Evaluations hold the whole model, in 16 bits, on every process: where it does not fit, set
    held_out_rows to 0 (and text_held_out_rows, where there is one)."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more
    time, the same gradients."""
    memory_check: MemoryCheck | None = None
    """What the memory preflight does where a step's estimated peak memory is more than there is:
    stop the run before its first step, warn and go on, or off, which estimates nothing. None stops
    on CPUs and warns on other devices, where estimates were not compared with measurements."""

    steps: int
    """Optimizer steps."""
    batch: int
    """Examples of a step, over all processes."""
    micro_batch: int | None = None
    """Examples of one forward pass on one process; None takes all of its share at once."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the learning rates rise."""
    min_lr_ratio: float = 0.1
    """Final learning rate over its peak, reached by a cosine; 1 keeps the peak."""
    weight_decay: float = 0.0
    """On matrices only."""
    clip: float = 1.0
    """Largest gradient norm."""
    precision: Precision = "auto"
    """What a step computes in. auto takes bf16 where the device multiplies faster in it, else fp32,
    by a short measurement; a run that is resumed keeps its own. bf16 keeps fp32 masters of what is
    trained."""
    seed: int = 0
    """Of the first weights of new parts and of the order of the data."""
    threads: int | None = None
    """CPU threads of each process; None shares the machine's cores among its processes (where
    there is a GPU: torch's own choice). `accelerate launch` alone would leave each process one."""
    workers: int = 1
    """Processes that read and decode images, for each training process."""
    eval_every: int = 50
    """Steps between evaluations on a quarter of the held-out rows; 0 evaluates at the end only."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = KEEP
    """How many checkpoints are kept, the newest."""

    def open(self, spec: str, prompt: str = "") -> Source:
        """The source that `spec` names, opened as the settings say."""
        return open_source(
            spec, prompt=prompt, bad_boxes=self.bad_boxes, ignore_keys=self.ignore_keys
        )

    def build(self) -> Any:
        """The model to train, or its parts: its `module` and its `processor`."""
        raise NotImplementedError

    def data(self) -> MixtureDataset:
        """The mixture of the settings' sources, for training."""
        raise NotImplementedError

    def unread_rates(self) -> dict[str, str]:
        """Settings of learning rates that nothing learns at -> why not."""
        return {}

    def given(self, names: Iterable[str]) -> list[str]:
        """Those of the settings `names` that are not at their defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def require_not_given(self, way: str, names: Iterable[str]) -> None:
        """Raises ValueError naming those of the settings `names` that were given. way: what does
        not read them, for people, such as "start 'runs/a'"."""
        if given := self.given(names):
            raise ValueError(f"{way} does not read {given}; leave them out")

    def memory_remedies(self) -> tuple[str, ...]:
        """What of the recipe's own options may make a step take less memory, for people, each with
        the option in brackets."""
        return ()

    def stage(
        self, name: str, rates: tuple[tuple[str, float | None], ...], micro_batch: int
    ) -> Stage:
        """The stage of these rates, with the schedule of the settings."""
        return Stage(
            name=name,
            rates=rates,
            steps=self.steps,
            batch=self.batch,
            micro_batch=micro_batch,
            warmup_steps=round(self.warmup_ratio * self.steps),
            min_lr_ratio=self.min_lr_ratio,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )


LEAST = {"steps": 1, "batch": 1, "micro_batch": 1, "pack": 1, "threads": 1, "keep": 1, "workers": 0,
         "eval_every": 0, "save_every": 0, "held_out_rows": 0, "text_held_out_rows": 0,
         "weight_decay": 0}  # fmt: skip
"""The least that a setting may be, where a recipe has it."""


def require_ranges(settings: Any) -> None:
    """Raises ValueError naming a setting that is out of its range."""
    for name, least in LEAST.items():
        value = getattr(settings, name, None)
        if value is not None and not value >= least:  # NaN is neither
            raise ValueError(f"{name} must be at least {least}, found {value}")
    if not settings.clip > 0:
        raise ValueError(f"clip must be above 0 (inf clips nothing), found {settings.clip}")


def require_read_rates(settings: BaseSettings) -> None:
    """Raises ValueError naming a learning rate that was given for a part that does not learn."""
    for name, why in settings.unread_rates().items():
        rate = getattr(settings, name)
        if rate is not None and not isinstance(rate, Usual):
            option = name.replace("_", "-")
            raise ValueError(
                f"--{option} {float(rate):g}: nothing learns at this rate, as {why}; leave "
                "it out, or let that part learn"
            )


FREE = ("out", "resume", "change", "keep", "threads", "workers", "eval_every", "save_every",
        "micro_batch", "pack", "balance", "token_cache", "shard", "held_out", "held_out_rows",
        "text_held_out", "text_held_out_rows", "checkpoint_activations", "memory_check",
        "merge")  # fmt: skip
"""Settings that may change when a run is resumed: they decide nothing that is learned."""


LATER = {"bad_boxes": "stop", "ignore_keys": (), "docked": None, "span_share": 0.0,
         "cross_every": None}  # fmt: skip
"""Settings that runs of earlier versions do not have, and what they did: left out of the run
identity where they say that, so that such a run goes on."""


def deciding(settings: BaseSettings) -> dict[str, Any]:
    """The settings that decide what is learned, as plain values."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(settings).items()
        if name not in FREE and not (name in LATER and value == LATER[name])
    }


def recorded(settings: BaseSettings) -> dict[str, Any]:
    """What settings.json holds: every setting, and under "recipe" where their class is: FILE:CLASS,
    of our own recipes recipes/NAME.py:CLASS, or MODULE:CLASS inside this package."""
    cls = type(settings)
    if cls.__module__.partition(".")[0] == "vlm":
        module = cls.__module__
    else:
        file = Path(getattr(sys.modules[cls.__module__], "__file__", None) or "").resolve()
        module = f"recipes/{file.name}" if file.parent == RECIPES else str(file)
    return {"recipe": f"{module}:{cls.__qualname__}", **dataclasses.asdict(settings)}


def require_share(name: str, value: float) -> None:
    """Raises ValueError where a setting that is a share of the steps is none."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a share of the steps, 0 to 1, found {value}")
