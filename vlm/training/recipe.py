"""What the decoder-only recipes share: their settings, and a run from settings to result.

A recipe file states its stage as a value and its own defaults; everything else is here.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from rich.console import Console

from vlm.data.example import BadRow, Example
from vlm.data.mixture import Mixture, MixtureDataset
from vlm.data.sources import BadSource, open_source
from vlm.data.sources.base import Source
from vlm.inference.tasks import Model
from vlm.pixels import BadImage, open_image
from vlm.training.checkpoint import CheckpointError
from vlm.training.evaluate import image_gain_on
from vlm.training.fit import Interrupted, Pace, fit
from vlm.training.run import Run, RunError, draw_captions
from vlm.training.stages import Stage, StageError
from vlm.weights import WeightsError

PICTURES = 16


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
    """How many of its rows the closing evaluation takes; those during training take a quarter."""
    prompt: str = "Describe the picture."
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
    workers: int = 1
    """Processes that read and decode pictures, for each training process."""
    eval_every: int = 50
    """Steps between evaluations on a quarter of the held-out rows; 0 evaluates at the end only."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves at the end only."""


FREE = ("out", "resume", "workers", "eval_every", "save_every", "micro_batch", "held_out",
        "held_out_rows")  # fmt: skip
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


def held_out_rows(source: Source, count: int) -> range:
    """`count` rows spread evenly over a source (all of them where it has fewer)."""
    count = min(count, len(source))
    return range(0, len(source) // count * count, len(source) // count)


def run(settings: Settings, stage: Callable[[Settings, int], Stage]) -> dict[str, Any]:
    """One run from settings to result: trains, evaluates, captions, saves.

    stage: makes the stage from the settings and the examples of one forward pass.
    """
    started = time.monotonic()
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
    )
    say = Console(file=sys.stderr, quiet=not accelerator.is_main_process).print
    share, rest = divmod(settings.batch, accelerator.num_processes)
    if rest:
        raise ValueError(
            f"batch {settings.batch} does not divide over {accelerator.num_processes} processes"
        )
    plan = stage(settings, settings.micro_batch or share)
    data = training_data(settings)
    source = open_source(settings.held_out, prompt=settings.prompt)
    run_folder = Run(
        settings.out,
        dataclasses.asdict(settings),
        deciding(settings),
        main=accelerator.is_main_process,
        resume=settings.resume,
    )
    with accelerator.main_process_first():
        model = build_model(settings)
    rows = list(held_out_rows(source, settings.held_out_rows))
    evaluate = _Evaluate(model, source, rows, accelerator)
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
    gain = evaluate(full=True)
    run_folder.log(progress.step, {"eval": gain, "final": True})
    result = {"held_out": source.name, **gain, **vars(progress)}
    if accelerator.is_main_process:
        model.save(settings.out / "model")
        pictures, true, written = caption_some(model, source, rows, accelerator)
        draw_captions(pictures, true, written, settings.out / "samples.png")
        picture = save_pictures(pictures[:4], true, settings.out / "pictures")
        result["exact_match"] = sum(map(_same, true, written)) / len(true)
        result["minutes"] = (time.monotonic() - started) / 60
        run_folder.write_result(result)
        run_folder.close()
        report(say, settings, result, true, written)
        say(f"next: vlm caption {picture} --model {settings.out}", highlight=False, soft_wrap=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


class _Evaluate:
    """The held-out figures: on a quarter of the rows during training, on all at the end."""

    def __init__(self, model: Model, source: Source, rows: list[int], accelerator) -> None:
        self.model, self.source, self.rows, self.accelerator = model, source, rows, accelerator

    def __call__(self, full: bool = False) -> dict[str, float]:
        rows = self.rows if full else self.rows[: max(2, len(self.rows) // 4)]
        return image_gain_on(self.model, self.source, rows, self.accelerator)


def caption_some(model: Model, source: Source, rows: list[int], accelerator, count: int = PICTURES):
    """Pictures of some held-out rows, their captions, and what the model writes for them."""
    step = max(1, len(rows) // count)
    examples: list[Example] = [source[row] for row in rows[::step][:count]]
    pictures = [open_image(example.images[0]) for example in examples]
    with accelerator.autocast():
        written = model.caption(pictures, max_new_tokens=32)
    return pictures, [example.answer for example in examples], written


def save_pictures(pictures: list, captions: list[str], folder: Path) -> Path:
    """Writes pictures as PNG files named after their captions; gives the first one's path."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{re.sub(r'[^a-z0-9]+', '-', said.lower())}.png" for said in captions]
    for picture, path in zip(pictures, paths):
        picture.save(path)
    return paths[0]


def report(say, settings: Settings, result: dict[str, Any], true, written) -> None:
    """The run's result, for people."""
    say()
    for said, wrote in list(zip(true, written))[:6]:
        say(f"  true: {said:34} generated: {wrote}", highlight=False, markup=False, soft_wrap=True)
    left_out = []
    if result["skipped"]:
        left_out.append(f"{result['skipped']} rows skipped, such as:")
        left_out += [f"  {line}" for line in result["examples_skipped"][:5]]
    if result["cut_tokens"]:
        left_out.append(f"{result['cut_tokens']} text tokens cut to fit the context")
    if result["unscored"]:
        left_out.append(f"{result['unscored']} rows had no scored token")
    say("\n".join(left_out or ["no row was left out"]), highlight=False, markup=False)
    say(
        f"image gain on {result['held_out']}: {result['gain']:.2f} "
        f"± {result['gain_se']:.2f} nats per caption "
        f"(wrong image {result['wrong']:.2f}, right image {result['right']:.2f}, "
        f"{result['captions']} captions)",
        style="bold",
    )
    say(f"{settings.out}: loss.png, samples.png, metrics.jsonl, model/", highlight=False)


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


def _same(a: str, b: str) -> bool:
    return a.strip().lower() == b.strip().lower()
