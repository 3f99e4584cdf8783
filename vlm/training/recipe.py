"""What the decoder-only recipes share: their settings, and a run from settings to result.

A recipe file states its stage as a value and its own defaults; everything else is here.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from tqdm import tqdm

from vlm.data.example import BadRow, Skipped
from vlm.data.mixture import Mixture, MixtureDataset
from vlm.data.sources import BadSource, open_source
from vlm.data.sources.base import Source
from vlm.inference.tasks import Model
from vlm.pixels import BadImage, open_image
from vlm.systems.composed import CAPTION_PROMPT
from vlm.training.checkpoint import CheckpointError
from vlm.training.evaluate import image_gain_on
from vlm.training.fit import Interrupted, Pace, fit
from vlm.training.run import Run, RunError, draw_captions
from vlm.training.stages import Stage, StageError
from vlm.weights import WeightsError

PICTURES = 16
UNSHARDED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a decoder-only run."""

    out: Path
    """The run's folder: settings, metrics, plots, checkpoints and the model."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`, with the same settings."""

    vision: str = "demo"
    """Image tokenizer: "demo" (an ImageNet backbone that needs no hub), or "kind:id", such as
    transformers:google/siglip-base-patch16-224, timm:vit_base_patch14_dinov2,
    open_clip:ViT-B-32:laion2b_s34b_b79k."""
    image_px: tuple[int, int] | None = None
    """Rows and columns that pictures are brought to; None keeps the image tokenizer's own."""
    vision_layer: int = -1
    """Which of its layers: -1 the final features; -2 is LLaVA's choice for CLIP."""
    text: str = "demo"
    """Language model: "demo" (SmolLM2-135M-Instruct, no hub needed), a hub id or a folder."""
    adaptor: Literal["linear", "mlp", "pixel_shuffle", "resampler"] = "pixel_shuffle"
    """What stands between them. pixel_shuffle makes one token of each block of neighbours, which
    cuts the cost of an image by shuffle_ratio squared; its grid must divide."""
    adaptor_depth: int = 2
    """Layers of the adaptor."""
    shuffle_ratio: int = 2
    """pixel_shuffle: sides of the blocks that become one token."""
    queries: int = 64
    """resampler: tokens that it gives for each view."""

    train: tuple[str, ...] = ("sample:train",)
    """Training data, any number of: sample:train, PATH.jsonl, PATH-{0000..0009}.tar, FOLDER,
    datasets:ORG/NAME:SPLIT, scenes:1000:seed=3; options behind "?": rows.tar?caption=text."""
    weights: tuple[float, ...] | None = None
    """Share of each in the mixture; None goes by their sizes."""
    held_out: str = "sample:transfer"
    """Data to evaluate on: by default drawings by another vendor than the training ones."""
    held_out_rows: int = 400
    """How many of its rows the closing evaluation takes, and those during training a quarter of;
    0 evaluates nothing."""
    prompt: str = CAPTION_PROMPT
    """The user's text after an image where rows hold a caption alone."""
    system: str | None = ""
    """System message where a conversation has none; "" is an empty one, None the template's own."""
    max_tokens: int | None = None
    """Longest row, image places included; None takes the language model's context."""
    overflow: Literal["drop", "shrink"] = "drop"
    """Rows that are longer: left out, or their text cut from the end; both are counted."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """Rows that cannot be read: stop and name the row, or leave them out and count them."""

    steps: int
    """Optimizer steps."""
    batch: int
    """Examples of a step, over all processes."""
    micro_batch: int | None = None
    """Examples of one forward pass on one process; None takes all of its share at once."""
    warmup: float = 0.05
    """Share of the steps in which the learning rates rise."""
    weight_decay: float = 0.0
    """On matrices only."""
    clip: float = 1.0
    """Largest gradient norm."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 keeps fp32 masters of what is trained."""
    seed: int = 0
    """Of the adaptor's first weights and of the order of the data."""
    threads: int | None = None
    """CPU threads of each process; None shares the machine's cores among its processes (where
    there is a GPU: torch's own choice). `accelerate launch` alone would leave each process one."""
    workers: int = 1
    """Processes that read and decode pictures, for each training process."""
    eval_every: int = 50
    """Steps between evaluations on a quarter of the held-out rows; 0 evaluates at the end only."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves at the end only."""


FREE = ("out", "resume", "threads", "workers", "eval_every", "save_every", "micro_batch",
        "held_out", "held_out_rows")  # fmt: skip
"""Settings that may change when a run is resumed: they decide nothing that is learned."""

ERRORS = (BadRow, BadImage, BadSource, CheckpointError, RunError, StageError, WeightsError,
          OSError, ValueError, RuntimeError)  # fmt: skip


def deciding(settings: Settings) -> dict[str, Any]:
    """The settings that decide what is learned, as plain values."""
    values = dataclasses.asdict(settings)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k not in FREE}


def build_model(settings: Settings) -> Model:
    """The model that the settings compose, with pretrained parts and a fresh adaptor."""
    import vlm

    return vlm.build(
        vision=settings.vision,
        text=settings.text,
        adaptor=settings.adaptor,
        adaptor_depth=settings.adaptor_depth,
        shuffle_ratio=settings.shuffle_ratio,
        queries=settings.queries,
        system=settings.system,
        caption_prompt=settings.prompt,
        max_tokens=settings.max_tokens,
        overflow=settings.overflow,
        size_hw=settings.image_px,
        vision_layer=settings.vision_layer,
        seed=settings.seed,
    )


def training_data(settings: Settings) -> MixtureDataset:
    """The mixture of the settings' sources."""
    sources = [open_source(spec, prompt=settings.prompt) for spec in settings.train]
    mixture = Mixture(sources, settings.weights, settings.seed)
    return MixtureDataset(sources, mixture, settings.bad_rows)


def held_out_rows(source: Source, count: int) -> list[int]:
    """`count` rows spread evenly over a source; all of them where it has fewer.

    >>> from vlm.data.sources import open_source
    >>> held_out_rows(open_source("scenes:10"), 4)
    [0, 2, 5, 7]
    """
    count = min(count, len(source))
    return [i * len(source) // count for i in range(count)]


def usable_rows(model: Model, source: Source, rows: list[int], bad_rows: str, say) -> list[int]:
    """Those of the held-out rows that can be evaluated: readable, short enough, with an image.

    What is left out is said. Raises BadRow or BadImage for the first unreadable one unless
    `bad_rows` is "skip", and ValueError where fewer than two are left.
    """
    usable, reasons = [], []
    for row in tqdm(rows, desc="reading held-out rows", disable=len(rows) < 1000, leave=False):
        try:
            encoded = model.processor.encode(source[row])
        except (BadRow, BadImage) as error:
            if bad_rows == "raise":
                raise
            encoded = Skipped(source.row_name(row), str(error))
        if isinstance(encoded, Skipped):
            reasons.append(f"{encoded.name}: {encoded.reason}")
        elif not encoded.views:
            reasons.append(f"{encoded.name}: no image")
        else:
            usable.append(row)
    if reasons:
        say(f"{len(reasons)} of {len(rows)} held-out rows left out, such as:\n  {reasons[0]}")
    if rows and len(usable) < 2:
        raise ValueError(
            f"{source.name}: expected at least two held-out rows with an image, found "
            f"{len(usable)} of {len(rows)}; name others with --held-out, or evaluate none with "
            "--held-out-rows 0"
        )
    return usable


def run(settings: Settings, stage: Callable[[Settings, int], Stage]) -> dict[str, Any]:
    """One run from settings to result: trains, evaluates, captions, saves.

    stage: makes the stage from the settings and the examples of one forward pass.
    """
    started = time.monotonic()
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
    )
    if accelerator.distributed_type not in UNSHARDED:
        raise ValueError(
            f"this accelerate configuration asks for {accelerator.distributed_type.value}; the "
            "recipes run on one process or on replicas (MULTI_GPU, MULTI_CPU)"
        )
    share_cores(accelerator, settings.threads)
    say = Console(file=sys.stderr, quiet=not accelerator.is_main_process, soft_wrap=True).print
    share, rest = divmod(settings.batch, accelerator.num_processes)
    if rest:
        raise ValueError(
            f"batch {settings.batch} does not divide over {accelerator.num_processes} processes"
        )
    plan = stage(settings, settings.micro_batch or share)
    data = training_data(settings)
    source = open_source(settings.held_out, prompt=settings.prompt)
    say(
        f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)} on "
        f"{accelerator.device.type}, {torch.get_num_threads()} threads and {share} examples of "
        "each step on each"
    )
    run_folder = Run(
        settings.out,
        dataclasses.asdict(settings),
        deciding(settings),
        main=accelerator.is_main_process,
        resume=settings.resume,
    )
    with accelerator.main_process_first():
        model = build_model(settings)
    rows = held_out_rows(source, settings.held_out_rows) if settings.held_out_rows else []
    rows = usable_rows(model, source, rows, settings.bad_rows, say)
    evaluate = _Evaluate(model, source, rows, accelerator) if rows else None
    try:
        progress = fit(
            model,
            plan,
            data,
            run_folder,
            accelerator,
            precision=settings.precision,
            pace=Pace(
                workers=settings.workers,
                eval_every=settings.eval_every,
                save_every=settings.save_every,
            ),
            resume=settings.resume,
            evaluate=evaluate,
        )
    except Interrupted:
        run_folder.close()
        raise
    if accelerator.is_main_process:
        model.save(settings.out / "model")
    result = vars(progress) | {"held_out": source.name}
    if evaluate:
        gain = evaluate(full=True)
        run_folder.log(progress.step, {"eval": gain, "final": True})
        result |= gain
    if accelerator.is_main_process:
        if evaluate:
            show_some(model, source, rows, accelerator, settings.out, say)
        result["minutes"] = (time.monotonic() - started) / 60
        run_folder.write_result(result)
        run_folder.close()
        report(say, settings, result)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def share_cores(accelerator: Accelerator, threads: int | None) -> None:
    """Gives this process `threads` CPU threads; None: its share of the cores it may use, unless it
    computes on a GPU."""
    if threads is None and accelerator.device.type != "cpu":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads or max(1, cores // neighbours))


class _Evaluate:
    """The held-out figures: on a quarter of the rows during training, on all at the end."""

    def __init__(self, model: Model, source: Source, rows: list[int], accelerator) -> None:
        self.model, self.source, self.rows, self.accelerator = model, source, rows, accelerator

    def __call__(self, full: bool = False) -> dict[str, float]:
        rows = self.rows if full or len(self.rows) < 8 else self.rows[::4]
        return image_gain_on(self.model, self.source, rows, self.accelerator)


def show_some(model: Model, source: Source, rows: list[int], accelerator, out: Path, say) -> None:
    """Writes samples.png: some held-out pictures with their true and generated answers, and a few
    of the pictures themselves, named after their row, to try the model on."""
    examples = [source[row] for row in rows[:: max(1, len(rows) // PICTURES)][:PICTURES]]
    pictures = [open_image(example.images[0]) for example in examples]
    with accelerator.autocast():
        written = model.answer_examples(examples, max_new_tokens=32)
    true = [example.answer for example in examples]
    draw_captions(pictures, true, written, out / "samples.png")
    (out / "pictures").mkdir(exist_ok=True)
    paths = [out / "pictures" / f"{number}.png" for number in range(4)]
    for picture, path in zip(pictures, paths):
        picture.save(path)
    say()
    for said, wrote in list(zip(true, written))[:6]:
        say(f"  true: {_short(said):34} generated: {_short(wrote)}", highlight=False, markup=False)
    say(f"\nnext: vlm caption {paths[0]} --model {out}", highlight=False)


def report(say, settings: Settings, result: dict[str, Any]) -> None:
    """The run's result, for people."""
    left_out = []
    if result["skipped"]:
        left_out.append(f"{result['skipped']} rows skipped, such as:")
        left_out += [f"  {line}" for line in result["examples_skipped"][:5]]
    if result["cut_tokens"]:
        left_out.append(f"{result['cut_tokens']} text tokens cut to fit the context")
    if result["unscored"]:
        left_out.append(f"{result['unscored']} rows had no scored token")
    say("\n".join(left_out or ["no training row was left out"]), highlight=False, markup=False)
    say(f"{settings.out}: loss.png, samples.png, metrics.jsonl, model/", highlight=False)
    if "gain" in result:
        say(
            f"image gain on {result['held_out']}: {result['gain']:.2f} "
            f"± {result['gain_se']:.2f} nats per caption "
            f"(wrong image {result['wrong']:.2f}, right image {result['right']:.2f}, "
            f"{result['captions']} captions)",
            style="bold",
        )


def start(settings_class: type[Settings], stage: Callable[[Settings, int], Stage]) -> None:
    """A recipe's main: settings from the command line, one clear line where something is wrong."""
    settings = tyro.cli(settings_class, description=sys.modules["__main__"].__doc__)
    try:
        run(settings, stage)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    except ERRORS as error:
        if isinstance(error, RuntimeError) and type(error).__module__ == "builtins":
            raise  # a fault of the program or the machine: show where
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _short(text: str) -> str:
    return textwrap.shorten(text, 60)
