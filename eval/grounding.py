"""How well a model says where phrases are: accuracy at IoU 0.5 and COCO's average precision.

    python eval/grounding.py --model RUN --data scenes:200:seed=77:task=ground:size=mixed
    python eval/grounding.py --model RUN --data "coco:instances_val2017.json?root=val2017"
    accelerate launch --multi_gpu --num_processes 2 eval/grounding.py ...    # the same figures

Data are any source whose rows have boxes; each different label of a picture is a phrase. A phrase
is found where its best-scored box overlaps one of its true boxes by half or more. Average precision
takes all boxes. With `--ask present` only what is on a picture is asked for, so that a box for
something that is not there cannot count against a model: such figures stand apart from a
detector's, which `--ask all` asks for (COCO files only).
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import vlm
from vlm.commands.evaluation import require_writable
from vlm.commands.model import require_least
from vlm.data.boxes import check_boxes
from vlm.data.check import check_start, say_on
from vlm.data.example import Box
from vlm.data.sources import CocoSource, open_source
from vlm.data.sources.base import Source
from vlm.draw import draw_boxes, draw_page
from vlm.families.decoder_only.ground import MAX_NEW_TOKENS, find, require_prompt
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.metrics.boxes import BoxTable, coco_precision, phrases_found
from vlm.metrics.share import wilson
from vlm.pixels import open_image
from vlm.precision import Precision, dtype_name
from vlm.training.run_folder import versions
from vlm.training.runs.launch import share_cores


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of an evaluation of grounding."""

    model: str
    """A run folder, a model folder or a hub id."""
    data: str
    """A source whose rows have boxes, such as scenes:200:seed=77 or coco:FILE.json?root=FOLDER."""
    bad_boxes: Literal["stop", "skip"] = "stop"
    """Boxes of COCO's files that cannot be one: stop, or lose these boxes."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows that are left out although they change what a row means."""
    rows: int | None = None
    """How many rows, drawn by `seed`; None takes all."""
    seed: int = 0
    """Which rows."""
    ask: Literal["present", "all"] = "present"
    """What is asked of a picture: the labels that are on it, or all labels of a COCO file."""
    prompt: str | None = None
    """The question, with {phrase} in it; None takes the one that the model was trained on."""
    constrained: bool = False
    """Let the model write nothing but whole boxes."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """Longest answer; a box takes four tokens."""
    batch_size: int = 16
    """Pictures, and phrases, at once."""
    out: Path | None = None
    """Folder for result.json, predictions.jsonl and pictures.png; None: `grounding` in the run."""
    pictures: int = 16
    """How many pictures are drawn."""
    precision: Precision = "auto"
    """auto keeps the model's own where the device is fast in it, else takes fp32."""


def ask_rows(
    model: DecoderOnlyModel,
    source: Source,
    rows: list[int],
    settings: Settings,
    accelerator: Accelerator,
) -> list[dict[str, Any]]:
    """What the model answers about each picture of the rows, in their order, on every rank.

    Batches of consecutive rows are dealt out to the ranks, so that a batch is the same on any
    number of them and no row is seen twice.
    """
    starts = range(0, len(rows), settings.batch_size)
    mine = starts[accelerator.process_index :: accelerator.num_processes]
    records = []
    for start in tqdm(mine, desc="batches", disable=not accelerator.is_main_process):
        part = [
            record
            for at in range(start, min(start + settings.batch_size, len(rows)))
            for record in read_pictures(source, rows[at], at, settings.ask)
        ]
        answers = find(
            model,
            [record.pop("picture") for record in part],
            [record["phrases"] for record in part],
            settings.batch_size,
            prompt=settings.prompt,
            constrained=settings.constrained,
            max_new_tokens=settings.max_new_tokens,
        )
        for record, found in zip(part, answers):
            record["answers"] = [asdict(answer) for answer in found]
        records += part
    records = gather_object(records)
    return sorted(records, key=lambda record: (record["at"], record["image"]))


def read_pictures(source: Source, row: int, at: int, ask: str) -> list[dict[str, Any]]:
    """The pictures of a row that have boxes, with what to ask and what is true.

    Raises BadRow where a box cannot be one of its picture.
    """
    example = source[row]
    pictures = [open_image(picture) for picture in example.images]
    sizes_hw = [(picture.height, picture.width) for picture in pictures]
    boxes = check_boxes(example.boxes, sizes_hw, example.name)
    crowds = source.crowds(row) if isinstance(source, CocoSource) else ()
    records = []
    for image, picture in enumerate(pictures):
        true = [box for box in boxes if box.image == image]
        if true:
            present = dict.fromkeys(box.label for box in true)
            records.append(
                {
                    "at": at,
                    "row": row,
                    "name": example.name,
                    "image": image,
                    "picture": picture,
                    "phrases": list(source.labels if ask == "all" else present),
                    "true": [(box.label, box.xyxy_px) for box in true],
                    "crowds": [(box.label, box.xyxy_px) for box in crowds],
                }
            )
    return records


def figures(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of merit of all records."""
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
    faults = Counter(answer["fault"] for _, answer in answers if answer["fault"])
    return {
        "accuracy": wilson(int(found.sum()), len(found))._asdict(),
        "accuracy_of_one_true_box": wilson(sum(single), len(single))._asdict() if single else None,
        **precision,
        "pictures": len(records),
        "phrases_asked": len(answers),
        "phrases_present": len(asked),
        "phrases_with_one_true_box": len(single),
        "true_boxes": len(true),
        "crowds": len(crowds),
        "predicted_boxes": len(predicted),
        "unreadable_answers": sum(faults.values()),
        "faults": dict(faults),
    }


def report(result: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    values = result["figures"]
    table = Table("figure", "value", title=f"{result['model']} on {result['data']}")
    for key, what in (
        ("accuracy", "phrases found, IoU ≥ 0.5"),
        ("accuracy_of_one_true_box", "… of those with one true box"),
    ):
        if values[key]:
            share = "{share:.1%} ({low:.1%} to {high:.1%})".format(**values[key])
            table.add_row(what, share)
    asked = "labels on the picture" if result["ask"] == "present" else "all labels"
    for key in ("AP", "AP50", "AP75"):
        table.add_row(f"{key} (asked: {asked})", f"{values[key]:.3f}")
    table.add_row("pictures", str(values["pictures"]))
    phrases, boxes = ("phrases_asked", "phrases_present"), ("predicted_boxes", "true_boxes")
    table.add_row("phrases asked / present", " / ".join(str(values[key]) for key in phrases))
    table.add_row("boxes predicted / true", " / ".join(str(values[key]) for key in boxes))
    table.add_row("answers not read whole", str(values["unreadable_answers"]))
    for fault, count in values["faults"].items():
        table.add_row(f"… {fault}", str(count))
    console.print(table)


def draw(source: Source, records: list[dict[str, Any]], path: Path) -> None:
    """Pictures with predicted and true boxes, as a page."""
    drawings = []
    for record in records:
        predicted = [
            Box(0, tuple(box["xyxy_px"]), box["label"], box["score"])
            for answer in record["answers"]
            for box in answer["boxes"]
        ]
        true = [Box(0, tuple(xyxy), label) for label, xyxy in record["true"]]
        picture = open_image(source[record["row"]].images[record["image"]])
        drawings.append(draw_boxes(picture, predicted, true))
    draw_page(drawings, [record["name"] for record in records], path)


def run(settings: Settings) -> dict[str, Any] | None:
    """The result, written and shown; None on ranks other than the first."""
    require_least(settings, rows=1, batch_size=1, max_new_tokens=1, pictures=0)
    if settings.prompt is not None:
        require_prompt(settings.prompt)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    share_cores(accelerator, None)
    out = settings.out
    if out is None:
        if not Path(settings.model).is_dir():
            raise ValueError(f"--out: name a folder for the result, as {settings.model} is none")
        out = Path(settings.model) / "grounding"
    require_writable(out)
    source = open_source(
        settings.data, bad_boxes=settings.bad_boxes, ignore_keys=settings.ignore_keys
    )
    check_start([source], None, say_on(accelerator.is_main_process))
    if settings.ask == "all" and not isinstance(source, CocoSource):
        raise ValueError(f"--ask all: expected a COCO file, which lists its labels: {source.name}")
    rows = list(range(len(source)))
    if settings.rows is not None:
        if not 1 <= settings.rows <= len(rows):
            raise ValueError(f"--rows: expected 1 to {len(rows)}, found {settings.rows}")
        rows = sorted(random.Random(settings.seed).sample(rows, settings.rows))
    if not source[rows[0]].boxes:
        raise ValueError(f"{source[rows[0]].name}: expected boxes to find, found none")
    model = vlm.load(
        settings.model, device=str(accelerator.device), dtype=dtype_name(settings.precision)
    )
    started = time.monotonic()
    records = ask_rows(model, source, rows, settings, accelerator)
    result = None
    if accelerator.is_main_process:
        processor = model.processor
        result = {
            **asdict(settings),
            "rows": len(rows),
            "out": str(out),
            "prompt": settings.prompt or model.ground_prompt,
            "system": processor.system,
            "loc": asdict(processor.loc),
            "preprocessing": asdict(processor.pixel_spec),
            "computed_in": str(next(model.module.text.parameters()).dtype).removeprefix("torch."),
            "device": str(accelerator.device),
            "processes": accelerator.num_processes,
            "seconds": round(time.monotonic() - started, 1),
            "versions": {**versions(), "pycocotools": version("pycocotools")},
            "figures": {
                **figures(records),
                "rows_without_boxes": len(rows) - len({record["at"] for record in records}),
            },
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        (out / "predictions.jsonl").write_text("".join(f"{line}\n" for line in lines))
        if settings.pictures:
            draw(source, records[: settings.pictures], out / "pictures.png")
        report(result, Console())
        print(f"written to {out}")
    accelerator.end_training()
    return result


if __name__ == "__main__":
    try:
        run(tyro.cli(Settings, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
