"""What evaluations share: from settings to result.json, on one process or many.

`run` opens the data and refuses what cannot be before it opens the model, lets each rank predict
its share of the items, gathers the predictions in the order of the rows, scores all of them on
every rank, and writes on the main process. A task is a subclass of `Evaluation`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
import tyro
from accelerate import Accelerator
from rich.console import Console

import vlm
from vlm import assets
from vlm.compat.extras import MissingExtra
from vlm.config import require_least
from vlm.console import plain_console
from vlm.data.check import check_start, say_on
from vlm.data.example import Skipped
from vlm.data.sources import BadSource, open_source
from vlm.data.sources.base import Source
from vlm.families.registry import FAMILIES, families_that
from vlm.precision import Precision, dtype_name
from vlm.ranks import batches_of_rank, gather_in_order
from vlm.renamed import require_new_names
from vlm.training.run_folder import versions
from vlm.training.runs.held_out import held_out_rows
from vlm.training.runs.launch import share_cores

VERSION = 2
"""Of result.json. The first had no version, and other keys in `metrics`."""
EXAMPLES = 20
"""Skipped rows that are named in result.json."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every evaluation is told. A task's own settings add `data` and `out` to these."""

    model: str
    """A run folder, a model folder or a hub id."""
    rows: int | None = None
    """How many rows, spread evenly over the data; None takes all."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows that are skipped although they change what a row means."""
    precision: Precision = "auto"
    """auto keeps the model's own where the device is fast in it, else takes fp32."""
    threads: int | None = None
    """CPU threads of each process; None shares the machine's cores among its processes."""


S = TypeVar("S", bound=Settings)


class Evaluation(ABC, Generic[S]):
    """One evaluation: which rows, what a model predicts for them, how that is scored and shown.

    `run` calls the methods in the order in which they stand. A subclass sets:

    task: its name in `vlm.evaluation.TASKS`. settings_type: the dataclass of its options.
    ability: the method that a model needs, see `vlm.families.registry`. least: options and the
        least that each may be. libraries: whose versions the metrics depend on, beside the usual.
    metrics_module: where its metrics need packages of an extra. `check` imports it, so that help
        needs none of them, and nothing is computed without them; None where it needs no extra.
    files: what is written beside result.json, for people.

    sources, rows, items: the data, the rows that are evaluated, and what is predicted for each of
        which (rows, unless the task groups them). skipped: rows that could not be used.
    """

    task: ClassVar[str]
    settings_type: ClassVar[type[Settings]]
    ability: ClassVar[str]
    least: ClassVar[dict[str, int]] = {}
    libraries: ClassVar[tuple[str, ...]] = ()
    metrics_module: ClassVar[str | None] = None
    files: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: S) -> None:
        self.settings = settings
        self.sources: list[Source] = []
        self.rows: Sequence[Any] = ()
        self.items: Sequence[Any] = ()
        self.skipped: list[Skipped] = []

    @property
    def source(self) -> Source:
        """The source, where there is one alone."""
        return self.sources[0]

    @property
    def out(self) -> Path:
        """The folder of the results."""
        return self.settings.out

    @property
    def batch(self) -> int:
        """Items predicted at once."""
        return self.settings.batch

    def check(self) -> None:
        """Raises ValueError naming an option that cannot be, and MissingExtra naming a package that
        the metrics need; nothing has been opened yet."""
        if self.metrics_module is not None:
            import_module(self.metrics_module)
        require_least(self.settings, rows=1, threads=1, **self.least)

    def open(self, say: Callable[..., None]) -> None:
        """Opens the data and chooses rows; the model is not open yet.

        say: prints a text for people, on the main process.
        Raises ValueError naming what cannot be evaluated.
        """
        self.sources = [self.open_source("data", self.settings.data)]
        check_start(self.sources, None, say)
        self.rows = self.items = self.spread(self.source)

    def load(self, device: torch.device) -> Any:
        """The model. Raises ValueError for one of a family that cannot do the task."""
        name = self.settings.model
        dtype = dtype_name(self.settings.precision)
        model = vlm.load(name, device=str(device), dtype=dtype)
        able = families_that(self.ability)
        if model.module.family not in able:
            said = " or ".join(FAMILIES[family].said for family in able)
            raise ValueError(
                f"--model {name}: expected a model of the family {said}, to evaluate {self.task}; "
                f"found a {model.module.family} one"
            )
        return model

    def predict_all(self, model: Any, accelerator: Accelerator) -> list[Any]:
        """What the model predicts for all items, in their order, on every rank; sets `skipped`.

        Each rank predicts its share by `predict`. A task whose rows are read by workers, or that
        embeds them, does this in its own way.
        """
        found: list[tuple[int, Any]] = []
        for batch in batches_of_rank(accelerator, len(self.items), self.batch, self.task):
            found += self.predict(model, batch)
        return self.gather(found, accelerator)

    def predict(self, model: Any, indices: range) -> list[tuple[int, Any]]:
        """For a batch of indices in `items`, each index with what is predicted, or with Skipped."""
        raise NotImplementedError(f"{type(self).__name__} predicts all items at once")

    @abstractmethod
    def score(
        self, model: Any, predictions: Any, accelerator: Accelerator
    ) -> dict[str, Any] | None:
        """The metrics of all predictions, for JSON: NAME -> number; NAME_ci -> [low, high], its
        95 % confidence interval; n, how many items were scored. None where no model was."""

    def details(self, model: Any) -> dict[str, Any]:
        """What else result.json says: chance, baselines and groups, where the task has them, and
        how it was done, such as prompts, preprocessing and decoding."""
        return {}

    @abstractmethod
    def show(self, result: dict[str, Any], console: Console) -> None:
        """Prints the metrics as a table."""

    def write(self, predictions: Any) -> None:
        """Writes single predictions and images into `out`; result.json is there already."""

    # What subclasses use.

    def open_source(self, option: str, spec: str, **options: Any) -> Source:
        """The source that an option names, whose messages begin with the option."""
        try:
            return open_source(spec, ignore_keys=self.settings.ignore_keys, **options)
        except BadSource as error:
            raise BadSource(f"--{option.replace('_', '-')} {error}") from error

    def spread(self, source: Source) -> list[int]:
        """The rows that are evaluated: as many as asked for, spread evenly."""
        count = self.settings.rows
        return held_out_rows(source, len(source) if count is None else count)

    def gather(self, found: list[tuple[int, Any]], accelerator: Accelerator) -> list[Any]:
        """The predictions of all ranks, in the order of the items; what is Skipped among them is
        added to `skipped`."""
        everything = [value for _, value in gather_in_order(accelerator, found)]
        self.skipped += [value for value in everything if isinstance(value, Skipped)]
        return [value for value in everything if not isinstance(value, Skipped)]

    def skip(self, name: str, error: Exception) -> Skipped:
        """A row that cannot be used, to be counted; raises `error` where rows are not skipped."""
        if self.settings.bad_rows == "raise":
            raise error
        return Skipped(name, str(error).removeprefix(f"{name}: "))

    def require_some(self, kept: Sequence[Any]) -> None:
        """Raises ValueError where no row is left, naming one that was skipped."""
        if not len(kept):
            names = ", ".join(source.name for source in self.sources)
            reason = ""
            if self.skipped:
                reason = f", such as {self.skipped[0].name}: {self.skipped[0].reason}"
            raise ValueError(f"{names}: none of {len(self.rows)} rows can be used{reason}")


def run(evaluation: Evaluation) -> dict[str, Any]:
    """One evaluation, from options to the result, which is also written to `evaluation.out`.

    Keys of the result: version (of these keys), task, model, data (a list), rows, skipped (with
    examples_skipped, the first of them), metrics, precision, device, processes, versions, options
    (all settings as given), minutes, and the task's own `details`, of which chance, baselines and
    groups are there for every task. eval/README.md states the schema. It is the same on every
    process.
    """
    started = time.monotonic()
    settings = evaluation.settings
    evaluation.check()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    share_cores(accelerator, settings.threads)
    require_writable(evaluation.out)
    evaluation.open(say_on(accelerator.is_main_process))
    model = evaluation.load(accelerator.device)
    predictions = evaluation.predict_all(model, accelerator)
    metrics = evaluation.score(model, predictions, accelerator)
    result = {
        "version": VERSION,
        "task": evaluation.task,
        "model": settings.model,
        "data": [source.name for source in evaluation.sources],
        "rows": len(evaluation.rows),
        "skipped": len(evaluation.skipped),
        "examples_skipped": [f"{o.name}: {o.reason}" for o in evaluation.skipped[:EXAMPLES]],
        "metrics": metrics,
        "chance": {},
        "baselines": {},
        "groups": {},
        "precision": None if model is None else dtype_of(model),
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "versions": versions() | {name: version(name) for name in evaluation.libraries},
        "options": dataclasses.asdict(settings),
        **evaluation.details(model),
        "minutes": (time.monotonic() - started) / 60,
    }
    result = json.loads(json.dumps(result, default=str))
    if accelerator.is_main_process:
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        (evaluation.out / "result.json").write_text(text, encoding="utf-8")
        console = plain_console(soft_wrap=True)
        evaluation.show(result, console)
        show_skipped(result, console)
        evaluation.write(predictions)  # reads rows again, and may fail
        files = ", ".join(("result.json", *evaluation.files))
        console.print(f"{evaluation.out}: {files}", markup=False)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def start(evaluation: type[Evaluation], arguments: Sequence[str] | None = None) -> None:
    """One evaluation with options from the command line (None) or from `arguments`; a fault of the
    input ends it with one line and exit code 1."""
    try:
        settings = read_settings(evaluation.settings_type, arguments, description(evaluation))
        run(evaluation(settings))
    except (ValueError, OSError, MissingExtra, assets.FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def read_settings(
    settings_type: type[S], arguments: Sequence[str] | None, about: str, prog: str | None = None
) -> S:
    """Settings from the command line (None) or from `arguments`. about: for help. prog: the
    program's name there.

    Raises ValueError for an option of an earlier version, naming the one of today.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    require_new_names(arguments, {field.name for field in dataclasses.fields(settings_type)})
    return tyro.cli(settings_type, args=arguments, description=about, prog=prog)


def description(evaluation: type[Evaluation]) -> str:
    """What a task's module says of it, for help."""
    return sys.modules[evaluation.__module__].__doc__ or ""


def dtype_of(model: Any) -> str:
    """The dtype that a model's weights are in, of its text part where it has one."""
    part = model.module.parts().get("text", model.module)
    return str(next(part.parameters()).dtype).removeprefix("torch.")


def data_of(result: dict[str, Any]) -> str:
    """The names of a result's data, for titles."""
    return ", ".join(result["data"])


def percent_with_ci(metrics: dict[str, Any], name: str) -> str:
    """A metric that is a share, and its interval, for people.

    >>> percent_with_ci({"cer": 0.5, "cer_ci": [0.25, 0.75]}, "cer")
    '50.0% (25.0% to 75.0%)'
    """
    low, high = metrics[f"{name}_ci"]
    return f"{metrics[name]:.1%} ({low:.1%} to {high:.1%})"


def require_writable(out: Path) -> None:
    """Makes the folder of the results. Raises ValueError where they could not be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out {out}: expected a folder to write to ({error})") from error


def show_skipped(result: dict[str, Any], console: Console) -> None:
    """How many rows could not be used, and why the first of them."""
    skipped = result["skipped"]
    console.print(f"{skipped} of {result['rows']} rows skipped" + (":" if skipped else ""))
    for line in result["examples_skipped"][:5]:
        console.print(f"  {line}", markup=False)
