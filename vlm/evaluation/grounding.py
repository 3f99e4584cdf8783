"""How well a model says where phrases are: accuracy at IoU 0.5 and COCO's average precision.

    vlm eval grounding RUN --data scenes:200:seed=77:task=ground:size=mixed
    vlm eval grounding RUN --data "coco:instances_val2017.json?root=val2017"

Data are any source whose rows have boxes; each different label of an image is a phrase. A phrase
is found where its best-scored box overlaps one of its true boxes by half or more. Average precision
takes all boxes. With `--ask present` only what is on an image is asked for, so that a box for
something that is not there cannot count against a model: such metrics stand apart from a
detector's, which `--ask all` asks for (COCO files only).

In --out: result.json, predictions.jsonl (every image) and images.png (some, with their boxes).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from vlm.box_codecs import config_of
from vlm.config import to_dict
from vlm.data.boxes import check_boxes
from vlm.data.check import check_start
from vlm.data.example import Box, Skipped
from vlm.data.sources import CocoSource
from vlm.data.sources.base import Source
from vlm.draw import draw_boxes, draw_page
from vlm.evaluation import base
from vlm.families.decoder_only.ground import find, require_prompt
from vlm.metrics.share import wilson, with_ci
from vlm.pixels import open_image

if TYPE_CHECKING:
    from vlm.metrics.boxes import BoxTable


@dataclass(frozen=True, kw_only=True)
class Settings(base.Settings):
    """What is evaluated."""

    data: str
    """A source whose rows have boxes, such as scenes:200:seed=77 or coco:FILE.json?root=FOLDER."""
    bad_boxes: Literal["stop", "skip"] = "stop"
    """Boxes of COCO's files that cannot be one: stop, or lose these boxes."""
    ask: Literal["present", "all"] = "present"
    """What is asked of an image: the labels that are on it, or all labels of a COCO file."""
    prompt: str | None = None
    """The question, with {phrase} in it; None takes the one that the model was trained on."""
    constrained: bool = False
    """Let the model write nothing but whole boxes, of <loc> tokens."""
    max_new_tokens: int | None = None
    """Longest answer; None has room for 32 boxes, which are four tokens each where they are <loc>
    tokens."""
    batch: int = 16
    """Images, and phrases, at once."""
    out: Path | None = None
    """Folder for the results; None: `grounding` in the run."""
    images: int = 16
    """How many images are drawn."""


class GroundingEvaluation(base.Evaluation[Settings]):
    """How many phrases are found, and the average precision of the boxes."""

    task = "grounding"
    settings_type = Settings
    ability = "ground"
    least: ClassVar = {"batch": 1, "max_new_tokens": 1, "images": 0}
    libraries = ("pycocotools",)
    metrics_module = "vlm.metrics.boxes"

    def check(self) -> None:
        super().check()
        settings = self.settings
        if settings.prompt is not None:
            try:
                require_prompt(settings.prompt)
            except ValueError as error:
                raise ValueError(f"--prompt: {error}") from error
        if settings.out is None and not Path(settings.model).is_dir():
            raise ValueError(f"--out: name a folder for the result, as {settings.model} is none")

    @property
    def out(self) -> Path:
        return self.settings.out or Path(self.settings.model) / "grounding"

    @property
    def files(self) -> tuple[str, ...]:
        return "predictions.jsonl", *["images.png"][: self.settings.images]

    def open(self, say: Callable[..., None]) -> None:
        settings = self.settings
        self.sources = [self.open_source("data", settings.data, bad_boxes=settings.bad_boxes)]
        check_start(self.sources, None, say)
        source = self.source
        if settings.ask == "all" and not isinstance(source, CocoSource):
            raise ValueError(
                f"--ask all: expected a COCO file, which lists its labels: {source.name}"
            )
        self.rows = self.items = self.spread(source)
        if not any(source[row].boxes for row in self.rows):
            raise ValueError(
                f"{source.name}: expected boxes to find, found none in {len(self.rows)} rows"
            )

    def predict(self, model: Any, indices: range) -> list[tuple[int, Any]]:
        settings = self.settings
        records: list[dict[str, Any]] = []
        found: list[tuple[int, Any]] = []
        for index in indices:
            part = images_of(self.source, self.rows[index], index, settings.ask)
            records += part
            if not part:
                name = self.source.row_name(self.rows[index])
                found.append((index, Skipped(name, "no boxes")))
        answers = find(
            model,
            [record.pop("opened") for record in records],
            [record["phrases"] for record in records],
            self.batch,
            prompt=settings.prompt,
            constrained=settings.constrained,
            max_new_tokens=settings.max_new_tokens,
        )
        for record, answered in zip(records, answers):
            record["answers"] = [asdict(answer) for answer in answered]
            found.append((record["at"], record))
        return found

    def score(
        self, model: Any, predictions: list[dict[str, Any]], accelerator: Accelerator
    ) -> dict[str, Any]:
        self.require_some(predictions)
        without = len(self.rows) - len({record["at"] for record in predictions})
        faults = (answer["fault"] for record in predictions for answer in record["answers"])
        self.faults = dict(Counter(fault for fault in faults if fault))
        return {**box_metrics(predictions), "rows_without_boxes": without}

    def details(self, model: Any) -> dict[str, Any]:
        processor = model.processor
        return {
            "prompt": self.settings.prompt or model.ground_prompt,
            "system": processor.system,
            "box_codec": config_of(processor.box_codec),
            "preprocessing": to_dict(processor.pixel_spec),
            "faults": self.faults,
        }

    def show(self, result: dict[str, Any], console: Console) -> None:
        values = result["metrics"]
        table = Table("metric", "value", title=f"{result['model']} on {base.data_of(result)}")
        for key, what in (
            ("accuracy", "phrases found, IoU ≥ 0.5"),
            ("accuracy_one_true_box", "… of those with one true box"),
        ):
            if values[key] is not None:
                table.add_row(what, base.percent_with_ci(values, key))
        asked = "labels on the image" if self.settings.ask == "present" else "all labels"
        for key in ("ap", "ap50", "ap75"):
            table.add_row(f"{key.upper()} (asked: {asked})", f"{values[key]:.3f}")
        table.add_row("images", str(values["images"]))
        phrases, boxes = ("phrases_asked", "n"), ("predicted_boxes", "true_boxes")
        table.add_row("phrases asked / present", " / ".join(str(values[key]) for key in phrases))
        table.add_row("boxes predicted / true", " / ".join(str(values[key]) for key in boxes))
        table.add_row("answers not read whole", str(values["unreadable_answers"]))
        for fault, count in result["faults"].items():
            table.add_row(f"… {fault}", str(count))
        console.print(table)

    def write(self, predictions: list[dict[str, Any]]) -> None:
        lines = (json.dumps(record, ensure_ascii=False) for record in predictions)
        (self.out / "predictions.jsonl").write_text("".join(f"{line}\n" for line in lines))
        shown = predictions[: self.settings.images]
        if shown:
            drawings = [self._draw(record) for record in shown]
            draw_page(drawings, [record["name"] for record in shown], self.out / "images.png")

    def _draw(self, record: dict[str, Any]) -> Any:
        """An image with its predicted and true boxes."""
        predicted = [
            Box(0, tuple(box["xyxy_px"]), box["label"], box["score"])
            for answer in record["answers"]
            for box in answer["boxes"]
        ]
        true = [Box(0, tuple(xyxy), label) for label, xyxy in record["true"]]
        image = open_image(self.source[record["row"]].images[record["image"]])
        return draw_boxes(image, predicted, true)


def images_of(source: Source, row: int, at: int, ask: str) -> list[dict[str, Any]]:
    """The images of a row that have boxes, with what to ask and what is true.

    at: the row's index among those that are evaluated. ask: "present" or "all".
    Raises BadRow where a box cannot be one of its image.
    """
    example = source[row]
    images = [open_image(one_image) for one_image in example.images]
    sizes_hw = [(one_image.height, one_image.width) for one_image in images]
    boxes = check_boxes(example.boxes, sizes_hw, example.name)
    crowds = source.crowds(row) if isinstance(source, CocoSource) else ()
    records = []
    for image, one_image in enumerate(images):
        true = [box for box in boxes if box.image == image]
        if true:
            present = dict.fromkeys(box.label for box in true)
            records.append(
                {
                    "at": at,
                    "row": row,
                    "name": example.name,
                    "image": image,
                    "opened": one_image,
                    "phrases": list(source.labels if ask == "all" else present),
                    "true": [(box.label, box.xyxy_px) for box in true],
                    "crowds": [(box.label, box.xyxy_px) for box in crowds],
                }
            )
    return records


def box_metrics(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of all images: accuracy at IoU 0.5 with its 95 % interval, COCO's average
    precision, and counts. n: the phrases that are there, whose share of hits accuracy is.

    accuracy_one_true_box, of phrases with one true box, is None where no phrase has one.
    """
    from vlm.metrics.boxes import BoxTable, coco_precision, phrases_found  # of the extra eval

    answers = [(i, answer) for i, r in enumerate(records) for answer in r["answers"]]
    asked = []
    for i, answer in answers:
        true = [xyxy for label, xyxy in records[i]["true"] if label == answer["phrase"]]
        if true:
            boxes = [box["xyxy_px"] for box in answer["boxes"]]
            asked.append((boxes, [box["score"] for box in answer["boxes"]], true))
    found = phrases_found(*zip(*asked))
    single = [hit for hit, (_, _, true) in zip(found.tolist(), asked) if len(true) == 1]
    numbers: dict[str, int] = {}

    def table(rows: list[tuple[int, str, tuple, float]], crowd: list[bool] | None) -> BoxTable:
        return BoxTable(
            image=np.array([row[0] for row in rows], np.int64),
            label=np.array([numbers.setdefault(row[1], len(numbers)) for row in rows], np.int64),
            boxes_xyxy_px=np.array([row[2] for row in rows], np.float64).reshape(-1, 4),
            score=np.array([row[3] for row in rows], np.float64),
            crowd=None if crowd is None else np.array(crowd),
        )

    true = [(i, label, box, 1.0) for i, r in enumerate(records) for label, box in r["true"]]
    crowds = [(i, label, box, 1.0) for i, r in enumerate(records) for label, box in r["crowds"]]
    predicted = [
        (i, box["label"], box["xyxy_px"], box["score"])
        for i, answer in answers
        for box in answer["boxes"]
    ]
    crowd = [False] * len(true) + [True] * len(crowds)
    precision = coco_precision(table(true + crowds, crowd), table(predicted, None))
    name = "accuracy_one_true_box"
    one_true_box: dict[str, Any] = {name: None, f"{name}_ci": None}
    if single:
        one_true_box = with_ci(name, wilson(sum(single), len(single)))
    return {
        "n": len(asked),
        **with_ci("accuracy", wilson(int(found.sum()), len(found))),
        **one_true_box,
        **precision,
        "images": len(records),
        "phrases_asked": len(answers),
        "n_one_true_box": len(single),
        "true_boxes": len(true),
        "crowds": len(crowds),
        "predicted_boxes": len(predicted),
        "unreadable_answers": sum(bool(answer["fault"]) for _, answer in answers),
    }
