"""Retrieval between pictures and captions: recall, median rank and mAP, in both directions.

    python eval/retrieval.py --model runs/contrastive
    python eval/retrieval.py --model openai/clip-vit-base-patch32 --data clip_benchmark:FOLDER:test
    accelerate launch --multi_gpu --num_processes 2 eval/retrieval.py --model runs/contrastive

Rows that show the same picture (a file, or bytes, of equal content) are one image with several
captions, and so is a row with several answers or a list of captions. All captions of an image are
right, and all others wrong; of equal scores the wrong ones come first. Rows are streamed, only
vectors are kept, and the figures are exact, so that any number of processes gives the same ones.

In --out: result.json and hits.png, a page of queries with their best hits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import vlm
from vlm.commands.evaluation import require_writable, show_left_out, start
from vlm.commands.model import require_least
from vlm.config import to_dict
from vlm.data.check import check_start, say_on
from vlm.data.sources import open_source
from vlm.data.sources.base import Source
from vlm.draw import Hit, draw_hits
from vlm.metrics.retrieval import Direction, RetrievalResult, retrieval, top_k
from vlm.pixels import open_image
from vlm.precision import Precision, dtype_name
from vlm.retrieval.embed_captions import Found, captions_of, embed_pairs
from vlm.retrieval.embed_rows import Reading, require_contrastive, sum_of_all
from vlm.training.run_folder import versions
from vlm.training.runs.held_out import held_out_rows
from vlm.training.runs.launch import share_cores

KS = (1, 5, 10)
QUERIES, HITS = 6, 5
"""Queries of each kind on the page, and the hits beside each."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is evaluated."""

    model: str
    """A run folder, a model folder or a hub id of a contrastive model."""
    data: str = "sample:transfer"
    """Pictures with captions: any source that the recipes take, or clip_benchmark:FOLDER:SPLIT."""
    rows: int | None = None
    """How many rows, spread evenly over the data; None takes all."""
    template: str = "{}"
    """What a caption is put into, such as "a photo of {}"."""
    out: Path = Path("runs/eval-retrieval")
    """Where results go; earlier ones there are replaced."""
    batch: int = 64
    """Pictures, and captions, embedded at once."""
    workers: int = 1
    """Processes that read and decode pictures, for each process that computes."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """Rows without a caption, or with a picture that cannot be read: stop and name the row, or
    leave them out and count them."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows that are left out although they change what a row means."""
    draws: int = 1000
    """Bootstrap samples of images behind the 95 % intervals."""
    seed: int = 0
    """Of these samples."""
    precision: Precision = "auto"
    """auto keeps the model's own where the device is fast in it, else takes fp32."""
    threads: int | None = None
    """CPU threads of each process; None shares the machine's cores among its processes."""


def chance(right: Sequence[int], candidates: int, k: int) -> float:
    """The recall at k of candidates in random order, for queries with `right` right ones each.

    >>> chance([1, 1], 10, 5), chance([2], 4, 2)
    (0.5, 0.8333333333333333)
    """
    right = np.asarray(right, np.float64)
    missed = np.ones_like(right)
    for taken in range(min(k, candidates)):
        missed *= np.maximum(candidates - right - taken, 0) / (candidates - taken)
    return float(1 - missed.mean())


def chances(found: Found) -> dict[str, dict[str, float]]:
    """The recalls of candidates in random order, both ways."""
    of_images = np.bincount(found.image_of_text.numpy())
    return {
        "image_to_text": {f"recall@{k}": chance(of_images, len(found.texts), k) for k in KS},
        "text_to_image": {f"recall@{k}": chance([1], len(found.images), k) for k in KS},
    }


def evaluate(settings: Settings) -> dict[str, Any]:
    """One evaluation, from settings to results; they are also written to `settings.out`."""
    started = time.monotonic()
    require_least(settings, batch=1, rows=1, draws=1, threads=1, workers=0)
    if "{}" not in settings.template:
        raise ValueError(
            f"--template: expected {{}} at the caption's place, found {settings.template!r}"
        )
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    share_cores(accelerator, settings.threads)
    main, ranks = accelerator.is_main_process, accelerator.num_processes
    require_writable(settings.out)
    source = open_source(settings.data, many=True, ignore_keys=settings.ignore_keys)
    check_start([source], None, say_on(main))
    model = vlm.load(
        settings.model, device=str(accelerator.device), dtype=dtype_name(settings.precision)
    )
    model = require_contrastive(model, f"--model {settings.model}")
    rows = held_out_rows(source, len(source) if settings.rows is None else settings.rows)
    reading = Reading(batch=settings.batch, workers=settings.workers, bad_rows=settings.bad_rows)
    found = embed_pairs(model, source, rows, settings.template, accelerator, reading)
    measured = retrieval(
        found.images,
        found.texts,
        found.image_of_text,
        ks=KS,
        rank=accelerator.process_index,
        ranks=ranks,
        total=None if ranks == 1 else lambda counts: sum_of_all(accelerator, counts),
        draws=settings.draws,
        seed=settings.seed,
        show=main,
    )
    processor = model.processor
    result = {
        "model": settings.model,
        "data": source.name,
        "rows": len(rows),
        "template": settings.template,
        "preprocessing": to_dict(processor.pixel_spec),
        "text": {
            "length": processor.length,
            "pad_to_length": processor.pad_to_length,
            "lower_case": processor.lower_case,
        },
        "ties": "wrong candidates come before right ones of equal score",
        "seed": settings.seed,
        "draws": settings.draws,
        "batch": settings.batch,
        "dtype": str(next(model.module.text.parameters()).dtype).removeprefix("torch."),
        "device": accelerator.device.type,
        "processes": ranks,
        "figures": {
            "images": len(found.images),
            "texts": len(found.texts),
            **measured.figures(),
            "chance": chances(found),
        },
        "texts_cut": found.texts_cut,
        "tokens_cut": found.tokens_cut,
        "skipped": len(found.skipped),
        "examples_skipped": [f"{one.name}: {one.reason}" for one in found.skipped[:20]],
        "versions": versions(),
    }
    if main:
        result["minutes"] = (time.monotonic() - started) / 60
        (settings.out / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
        show(result, settings.out)
        draw(source, found, measured, settings.out / "hits.png")  # reads rows again, and may fail
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def draw(source: Source, found: Found, measured: RetrievalResult, path: Path) -> None:
    """A page of images with their best texts, and of texts with their best images."""

    def picture(image: int):
        return open_image(source[found.image_row[image]].images[0])

    def text(number: int) -> str:
        row, nth = found.text_row[number]
        return captions_of(source[row])[nth]

    def hits(query: Tensor, candidates: Tensor, right: set[int], show) -> list[Hit]:
        scores, best = top_k(query[None], candidates, min(HITS, len(candidates)))
        return [
            Hit(show(c), score, c in right)
            for c, score in zip(best[0].tolist(), scores[0].tolist())
        ]

    def note(direction: Direction, at: int) -> str:
        return f"right one at rank {direction.rank[at]}"

    queries, rows, notes = [], [], []
    to_image, to_text = measured.text_to_image, measured.image_to_text
    for at in _spread(len(to_image.query)):
        number = int(to_image.query[at])
        right = {int(found.image_of_text[number])}
        queries.append(text(number))
        rows.append(hits(found.texts[number], found.images, right, picture))
        notes.append(note(to_image, at))
    for at in _spread(len(to_text.query)):
        number = int(to_text.query[at])
        right = set((found.image_of_text == number).nonzero()[:, 0].tolist())
        queries.append(picture(number))
        rows.append(hits(found.images[number], found.texts, right, text))
        notes.append(note(to_text, at))
    draw_hits(queries, rows, path, notes)


def _spread(count: int) -> list[int]:
    shown = min(QUERIES, count)
    return [i * count // shown for i in range(shown)]


def show(result: dict[str, Any], out: Path) -> None:
    """The figures as a table, and where everything lies."""
    figures = result["figures"]
    ways = ("image_to_text", "text_to_image")
    title = f"{figures['images']} images and {figures['texts']} texts of {escape(result['data'])}"
    table = Table("figure", *(way.replace("_", " ") for way in ways), title=title)
    for k in KS:
        cells = []
        for way in ways:
            low, high = figures[way][f"recall@{k}_95"]
            cells.append(f"{figures[way][f'recall@{k}']:.1%} ({low:.1%} to {high:.1%})")
        table.add_row(f"recall@{k}", *cells)
        luck = (f"{figures['chance'][way][f'recall@{k}']:.1%}" for way in ways)
        table.add_row("  by chance", *luck, style="dim")
    for name, what, form in (
        ("median rank", "median_rank", "{:g}"),
        ("mAP", "mean_average_precision", "{:.4f}"),
        ("queries", "queries", "{}"),
        ("candidates", "candidates", "{}"),
    ):
        table.add_row(name, *(form.format(figures[way][what]) for way in ways))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    if result["texts_cut"]:
        console.print(
            f"{result['texts_cut']} of {figures['texts']} texts were longer than "
            f"{result['text']['length']} tokens: {result['tokens_cut']} tokens were cut"
        )
    show_left_out(result, console)
    console.print(f"{out}: result.json, hits.png", markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    start(Settings, evaluate, __doc__, arguments)


if __name__ == "__main__":
    main()
