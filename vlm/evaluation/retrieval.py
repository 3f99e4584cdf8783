"""Retrieval between images and captions: recall, median rank and mAP, in both directions.

    vlm eval retrieval runs/contrastive
    vlm eval retrieval openai/clip-vit-base-patch32 --data clip_benchmark:FOLDER:test

Rows that show the same image (a file, or bytes, of equal content) are one image with several
captions, and so is a row with several answers or a list of captions. All captions of an image are
right, and all others wrong; of equal scores the wrong ones come first. Rows are streamed, only
vectors are kept, and the metrics are exact, so that any number of processes gives the same ones.

In --out: result.json and hits.png, a page of queries with their best hits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vlm.config import to_dict
from vlm.data.check import check_start
from vlm.draw import Hit, draw_hits
from vlm.evaluation import base
from vlm.metrics.retrieval import Direction, RetrievalResult, retrieval, top_k
from vlm.pixels import open_image
from vlm.ranks import reduce_sum
from vlm.retrieval.embed_captions import Found, captions_of, embed_pairs
from vlm.retrieval.embed_rows import Reading

KS = (1, 5, 10)
QUERIES, HITS = 6, 5
"""Queries of each kind on the page, and the hits beside each."""
DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass(frozen=True, kw_only=True)
class Settings(base.Settings):
    """What is evaluated."""

    data: str = "sample:transfer"
    """Images with captions: any source that the recipes take, or clip_benchmark:FOLDER:SPLIT."""
    template: str = "{}"
    """What a caption is put into, such as "a photo of {}"."""
    out: Path = Path("runs/eval-retrieval")
    """Where results go; earlier ones there are replaced."""
    batch: int = 64
    """Images, and captions, embedded at once."""
    workers: int = 1
    """Processes that read and decode images, for each process that computes."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """Rows without a caption, or with an image that cannot be read: stop and name the row, or
    skip and count them."""
    draws: int = 1000
    """Bootstrap samples of images behind the 95 % intervals."""
    seed: int = 0
    """Of these samples."""


class RetrievalEvaluation(base.Evaluation[Settings]):
    """How often the right caption of an image, and image of a caption, is among the nearest."""

    task = "retrieval"
    settings_type = Settings
    ability = "embed_images"
    least: ClassVar = {"batch": 1, "draws": 1, "workers": 0}
    files = ("hits.png",)

    def check(self) -> None:
        super().check()
        template = self.settings.template
        if "{}" not in template:
            raise ValueError(
                f"--template: expected {{}} at the caption's place, found {template!r}"
            )

    def open(self, say: Callable[..., None]) -> None:
        self.sources = [self.open_source("data", self.settings.data, many=True)]
        check_start(self.sources, None, say)
        self.rows = self.spread(self.source)

    def predict_all(self, model: Any, accelerator: Accelerator) -> Found:
        """The vectors of all images and captions, on every rank."""
        options = self.settings
        reading = Reading(batch=options.batch, workers=options.workers, bad_rows=options.bad_rows)
        found = embed_pairs(model, self.source, self.rows, options.template, accelerator, reading)
        self.skipped = found.skipped
        return found

    def score(self, model: Any, predictions: Found, accelerator: Accelerator) -> dict[str, Any]:
        ranks = accelerator.num_processes
        self.found = predictions
        self.measured = retrieval(
            predictions.images,
            predictions.texts,
            predictions.image_of_text,
            ks=KS,
            rank=accelerator.process_index,
            ranks=ranks,
            total=None if ranks == 1 else lambda counts: reduce_sum(accelerator, counts),
            draws=self.settings.draws,
            seed=self.settings.seed,
            show=accelerator.is_main_process,
        )
        return {
            "n": len(predictions.texts),
            "images": len(predictions.images),
            "texts": len(predictions.texts),
            **self.measured.metrics(),
        }

    def details(self, model: Any) -> dict[str, Any]:
        processor = model.processor
        return {
            "chance": chances(self.found),
            "preprocessing": to_dict(processor.pixel_spec),
            "text": {
                "length": processor.length,
                "pad_to_length": processor.pad_to_length,
                "lower_case": processor.lower_case,
            },
            "ties": "wrong candidates come before right ones of equal score",
            "texts_cut": self.found.texts_cut,
            "tokens_cut": self.found.tokens_cut,
        }

    def show(self, result: dict[str, Any], console: Console) -> None:
        metrics, chance = result["metrics"], result["chance"]
        title = f"{metrics['images']} images and {metrics['texts']} texts of "
        table = Table("metric", *(way.replace("_", " ") for way in DIRECTIONS))
        table.title = title + base.data_of(result)
        for k in KS:
            names = [f"{way}_recall_at_{k}" for way in DIRECTIONS]
            table.add_row(f"recall@{k}", *(base.percent_with_ci(metrics, name) for name in names))
            luck = (f"{chance[name]:.1%}" for name in names)
            table.add_row("  by chance", *luck, style="dim")
        for name, what, form in (
            ("median rank", "median_rank", "{:g}"),
            ("mAP", "map", "{:.4f}"),
            ("queries", "n", "{}"),
            ("candidates", "candidates", "{}"),
        ):
            table.add_row(name, *(form.format(metrics[f"{way}_{what}"]) for way in DIRECTIONS))
        console.print(table)
        if result["texts_cut"]:
            console.print(
                f"{result['texts_cut']} of {metrics['texts']} texts were longer than "
                f"{result['text']['length']} tokens: {result['tokens_cut']} tokens were cut"
            )

    def write(self, predictions: Found) -> None:
        draw_page(self.source, predictions, self.measured, self.out / "hits.png")


def chance(right: Sequence[int], candidates: int, k: int) -> float:
    """The recall at k of candidates in random order, for queries with `right` right ones each.

    >>> round(chance([1, 1], 10, 5), 4), round(chance([2], 4, 2), 4)
    (0.5, 0.8333)
    """
    right = np.asarray(right, np.float64)
    missed = np.ones_like(right)
    for taken in range(min(k, candidates)):
        missed *= np.maximum(candidates - right - taken, 0) / (candidates - taken)
    return float(1 - missed.mean())


def chances(found: Found) -> dict[str, float]:
    """The recalls of candidates in random order, by the names of metrics."""
    of_images = np.bincount(found.image_of_text.numpy())
    return {
        **{f"image_to_text_recall_at_{k}": chance(of_images, len(found.texts), k) for k in KS},
        **{f"text_to_image_recall_at_{k}": chance([1], len(found.images), k) for k in KS},
    }


def draw_page(source, found: Found, measured: RetrievalResult, path: Path) -> None:
    """A page of images with their best texts, and of texts with their best images."""

    def image(number: int):
        return open_image(source[found.image_row[number]].images[0])

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
        rows.append(hits(found.texts[number], found.images, right, image))
        notes.append(note(to_image, at))
    for at in _spread(len(to_text.query)):
        number = int(to_text.query[at])
        right = set((found.image_of_text == number).nonzero()[:, 0].tolist())
        queries.append(image(number))
        rows.append(hits(found.images[number], found.texts, right, text))
        notes.append(note(to_text, at))
    draw_hits(queries, rows, path, notes)


def _spread(count: int) -> list[int]:
    shown = min(QUERIES, count)
    return [i * count // shown for i in range(shown)]
