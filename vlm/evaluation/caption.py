"""Captions of held-out images: exact match, CIDEr-D and BLEU-4, beside the nearest neighbour's.

    vlm eval caption runs/stage1
    vlm eval caption runs/stage1 --baseline sample:train

Rows that ask the same of the same image are one: their answers are its references. Captions are
greedy. All metrics are computed over all captions, so that any number of processes gives the same
ones. What is kept in memory are texts alone.

--baseline SOURCE adds what needs no language model: the caption of that source's image which is
nearest to each (see `vlm.evaluation.nearest_caption`). Its backbone is --baseline-vision and never
the model's own, which training may have changed.

In --out: result.json, captions.jsonl (every caption) and captions.png (some, with images).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vlm.config import to_dict
from vlm.data.check import check_start
from vlm.data.example import BadRow, Example, Skipped
from vlm.data.sources.base import Source
from vlm.evaluation import base
from vlm.evaluation.nearest_caption import nearest_rows
from vlm.families.decoder_only.generate import GREEDY
from vlm.image_tokens import ImageTokenizer
from vlm.pixels import BadImage, open_image
from vlm.systems.pretrained import load_vision
from vlm.training.run_folder import draw_captions

IMAGES = 16
"""Images on the page of captions."""
NEAREST = "nearest_neighbour"
"""The baseline's name in result.json."""


@dataclass(frozen=True, kw_only=True)
class Settings(base.Settings):
    """What is evaluated."""

    data: str = "sample:transfer"
    """Images with captions: any source that the recipes take."""
    prompt: str | None = None
    """What asks for a caption in rows that hold a caption alone; None: the model's own prompt."""
    baseline: str | None = None
    """Images with captions whose nearest is the baseline's answer, such as sample:train."""
    baseline_vision: str = "demo"
    """The baseline's pretrained backbone: "demo", or "kind:id" as in the recipes."""
    baseline_px: tuple[int, int] | None = None
    """Rows and columns that the baseline brings images to; None keeps the backbone's own."""
    out: Path = Path("runs/eval-caption")
    """Where results go; earlier ones there are replaced."""
    batch: int = 16
    """Images captioned at once."""
    max_new_tokens: int = 32
    """Longest caption."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """Rows that cannot be read or are longer than the context: stop and name the row, or skip and
    count them. Rows without an image or an answer are always skipped and counted."""
    bad_boxes: Literal["stop", "skip"] = "stop"
    """Boxes of COCO's files that cannot be one: stop, or lose these boxes."""


@dataclass(slots=True)
class Captioned:
    """An image: the row that shows it first, the references of all rows that do, and what the model
    wrote. nearest: the baseline's row and caption, where there is a baseline."""

    row: int
    name: str
    references: list[str] = field(default_factory=list)
    caption: str = ""
    nearest: tuple[str, str] | None = None

    @property
    def pair(self) -> tuple[str, list[str]]:
        return self.caption, self.references


class CaptionEvaluation(base.Evaluation[Settings]):
    """How near greedy captions come to their references."""

    task = "caption"
    settings_type = Settings
    ability = "caption"
    least: ClassVar = {"batch": 1, "max_new_tokens": 1}
    libraries = ("pycocoevalcap", "sacrebleu")
    metrics_module = "vlm.metrics.caption"
    files = ("captions.jsonl", "captions.png")

    def check(self) -> None:
        super().check()
        settings = self.settings
        if settings.baseline is None:
            for name in ("baseline_vision", "baseline_px"):
                if getattr(settings, name) != Settings.__dataclass_fields__[name].default:
                    option = name.replace("_", "-")
                    raise ValueError(f"--{option}: expected --baseline SOURCE too, found none")
        for size in settings.baseline_px or ():
            if size < 1:
                raise ValueError(f"--baseline-px must be at least 1, found {size}")

    def open(self, say: Callable[..., None]) -> None:
        settings = self.settings
        specs = {"data": settings.data} | (
            {} if settings.baseline is None else {"baseline": settings.baseline}
        )
        self.specs, options = specs, {"bad_boxes": settings.bad_boxes}
        self.opened = {k: self.open_source(k, spec, **options) for k, spec in specs.items()}
        check_start(list(self.opened.values()), None, say)
        self.sources = [self.opened["data"]]
        self.rows = self.spread(self.source)
        self.vision: ImageTokenizer | None = None
        if settings.baseline is not None:
            try:
                self.vision = load_vision(settings.baseline_vision, settings.baseline_px)
            except ValueError as error:
                raise ValueError(f"--baseline-vision: {error}") from error

    def predict_all(self, model: Any, accelerator: Accelerator) -> list[Captioned]:
        settings, main = self.settings, accelerator.is_main_process
        self.prompt = model.caption_prompt if settings.prompt is None else settings.prompt
        prompted = {k: self._with_prompt(k) for k in self.opened}
        self.sources = [prompted["data"]]
        self.items, skipped = read_questions(self.source, self.rows, settings.bad_rows, main)
        self.skipped += skipped
        found = super().predict_all(model, accelerator)
        self.require_some(found)
        if self.vision is not None:
            self._find_nearest(found, prompted["baseline"], accelerator)
        return found

    def _with_prompt(self, option: str) -> Source:
        """A source opened anew, now that the prompt is known; keys go on being counted."""
        options = {"bad_boxes": self.settings.bad_boxes, "prompt": self.prompt}
        source = self.open_source(option, self.specs[option], **options)
        source.unread = self.opened[option].unread
        return source

    def predict(self, model: Any, indices: range) -> list[tuple[int, Captioned | Skipped]]:
        found: list[tuple[int, Captioned | Skipped]] = []
        kept, encoded = [], []
        for index in indices:
            item = self.items[index]
            try:
                question = self.source[item.row].question()
                encoded.append(model.processor.encode_prompt(question))
                kept.append(index)
            except (BadRow, BadImage) as error:
                found.append((index, self.skip(item.name, error)))
        options = {"max_new_tokens": self.settings.max_new_tokens}
        for index, written in zip(kept, model.write_after(encoded, self.batch, **options)):
            self.items[index].caption = written.text
            found.append((index, self.items[index]))
        return found

    def _find_nearest(
        self, found: Sequence[Captioned], known: Source, accelerator: Accelerator
    ) -> None:
        """Gives each image the row of `known` that the baseline takes its caption from."""
        self.vision = self.vision.float().to(accelerator.device)
        rows, self.baseline_skipped = nearest_rows(
            self.vision, self.source, [item.row for item in found], known, accelerator,
            batch=self.batch, bad_rows=self.settings.bad_rows,
        )  # fmt: skip
        self.baseline_name = known.name
        for item, row in zip(found, rows):
            item.nearest = (known.row_name(row), known[row].answer)

    def score(
        self, model: Any, predictions: list[Captioned], accelerator: Accelerator
    ) -> dict[str, Any]:
        from vlm.metrics.caption import caption_metrics  # of the extra eval

        self.baselines: dict[str, Any] = {}
        if self.vision is not None:
            pairs = [(item.nearest[1], item.references) for item in predictions]
            self.baselines[NEAREST] = {
                "data": [self.baseline_name],
                "vision": self.settings.baseline_vision,
                "preprocessing": to_dict(self.vision.pixel_spec),
                "metrics": caption_metrics(pairs),
                "skipped": len(self.baseline_skipped),
            }
        return caption_metrics([item.pair for item in predictions])

    def details(self, model: Any) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "system": model.processor.system,
            "preprocessing": to_dict(model.processor.pixel_spec),
            "decoding": {**GREEDY, "max_new_tokens": self.settings.max_new_tokens},
            "baselines": self.baselines,
        }

    def show(self, result: dict[str, Any], console: Console) -> None:
        baselines = result["baselines"]
        columns = {"model": result["metrics"]} | {k: b["metrics"] for k, b in baselines.items()}
        title = f"{result['metrics']['n']} images of {base.data_of(result)}"
        table = Table("metric", *columns, title=title)
        for name, what in (
            ("exact match", "exact_match"), ("CIDEr-D", "cider"), ("BLEU-4", "bleu4"),
        ):  # fmt: skip
            cells = []
            for metrics in columns.values():
                low, high = metrics[f"{what}_ci"]
                cells.append(f"{metrics[what]:.3f} ({low:.3f} to {high:.3f})")
            table.add_row(name, *cells)
        console.print(table)
        for baseline in baselines.values():
            if baseline["skipped"]:
                console.print(f"{baseline['skipped']} rows of the baseline skipped")

    def write(self, predictions: list[Captioned]) -> None:
        from vlm.metrics.caption import cider_d, exact_matches  # of the extra eval

        pairs = [item.pair for item in predictions]
        scores, right = cider_d(pairs).tolist(), exact_matches(pairs).tolist()
        with (self.out / "captions.jsonl").open("w", encoding="utf-8") as file:
            for item, score, equal in zip(predictions, scores, right):
                line = {"row": item.name, "references": item.references, "caption": item.caption,
                        "exact_match": equal, "cider": score}  # fmt: skip
                if item.nearest:
                    line |= {"nearest": item.nearest[0], "nearest_caption": item.nearest[1]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        shown = predictions[:: max(1, len(predictions) // IMAGES)][:IMAGES]
        draw_captions(
            [open_image(self.source[item.row].images[0]) for item in shown],
            [" / ".join(item.references[:3]) for item in shown],
            [item.caption for item in shown],
            self.out / "captions.png",
        )


def read_questions(
    source: Source, rows: Sequence[int], bad_rows: str, show: bool
) -> tuple[list[Captioned], list[Skipped]]:
    """What is asked of which images, in the order of rows; and the rows that are skipped.

    bad_rows: "raise" for the first row that cannot be read, or "skip". show: a bar over many rows.
    """
    asked: dict[bytes, Captioned] = {}
    skipped: list[Skipped] = []
    for row in tqdm(rows, desc="reading rows", disable=not show or len(rows) < 1000, leave=False):
        name = source.row_name(row)
        try:
            example = source[row]
        except (BadRow, BadImage) as error:
            if bad_rows == "raise":
                raise
            skipped.append(Skipped(name, str(error).removeprefix(f"{name}: ")))
            continue
        if not example.answer.strip() or not example.question().images:
            missing = "answer" if not example.answer.strip() else "image"
            skipped.append(Skipped(name, f"no {missing}"))
            continue
        question = asked.setdefault(_identity(example.question()), Captioned(row, name))
        question.references.append(example.answer)
    return list(asked.values()), skipped


def _identity(question: Example) -> bytes:
    """Equal for questions of equal text about the same files or bytes."""
    digest = hashlib.sha256(repr(question.turns).encode())
    for image in question.images:
        held = isinstance(image.data, bytes)
        digest.update(hashlib.sha256(image.data if held else str(image.data).encode()).digest())
    return digest.digest()
