"""Reading of text: character and word error rates, exact lines and speed, beside other projects'.

    python eval/ocr.py --model line-reader
    python eval/ocr.py --model line-reader --data lines.tsv --peer tesseract --peer rapidocr
    python eval/ocr.py --model line-reader --data pages.tsv --page --peer tesseract
    accelerate launch --multi_gpu --num_processes 2 eval/ocr.py --model runs/reader

All readers read the same pictures, decoded beforehand; what is timed is reading alone, after a
warm-up. A peer that can be run in several ways is, and its fastest counts. Rows are dealt to
processes in runs of a fixed size, and figures computed over all lines, so that any number of
processes gives the same ones. --page compares whole pages: true texts hold \\n where a line ends,
and white space of any kind is one space, so that the order of lines matters but not their breaks.

In --out: result.json, lines.jsonl (every line), worst.png (the model's worst lines, or else the
first peer's), reliability-lines.png and reliability-words.png (confidence against what is right).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from ocr_peers import PEERS, Reader
from ocr_reading import Model, Seen, read_all
from rich.console import Console
from rich.table import Table
from tyro import conf

import vlm
from vlm.commands.evaluation import require_writable, show_left_out, start
from vlm.data.check import check_start, say_on
from vlm.data.sources import open_source
from vlm.data.sources.base import Source
from vlm.draw import draw_lines, draw_reliability
from vlm.metrics.calibration import Calibration, calibration
from vlm.metrics.text import (
    NORMALISATIONS,
    Comparison,
    cer_difference,
    compare_texts,
    length_group,
    words_right,
)
from vlm.pixels import open_image
from vlm.precision import Precision, dtype_name
from vlm.training.run_folder import versions
from vlm.training.runs.held_out import held_out_rows
from vlm.training.runs.launch import share_cores

WORST = 20
"""Lines on the page of the worst."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is evaluated."""

    model: str | None = None
    """A packaged reader, a run folder, a model folder or a hub id; None: the peers alone."""
    data: tuple[str, ...] = ("lines:400:split=validation:fonts=held_out:kind=one",)
    """Pictures of lines, or of pages, with their text: any sources that the recipes take."""
    peer: conf.UseAppendAction[tuple[Literal["tesseract", "rapidocr", "rapidocr-lines"], ...]] = ()
    """What else reads the same; may be given several times."""
    rows: int | None = None
    """How many rows of each source, spread evenly over it; None takes all."""
    page: bool = False
    """Pictures are whole pages, and texts hold \\n where their lines end."""
    normalise: Literal["none", "nfc", "nfkc", "lower"] = "nfc"
    """What is done to both texts before they are compared; white space is always joined."""
    out: Path = Path("runs/eval-ocr")
    """Where results go; earlier ones there are replaced."""
    batch: int = 32
    """Lines that the model reads at once."""
    repeats: int = 3
    """How often each reader reads everything; the median time counts."""
    language: str = "eng"
    """Tesseract's name of the language."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """Rows without a text, or with a picture that cannot be read: stop and name the row, or leave
    them out and count them."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows that are left out although they change what a row means."""
    draws: int = 1000
    """Bootstrap samples of lines behind the 95 % intervals."""
    seed: int = 0
    """Of these samples."""
    precision: Precision = "auto"
    """auto keeps the model's own where the device is fast in it, else takes fp32."""
    threads: int | None = None
    """CPU threads of each process, and cores of each peer; None shares the machine's cores among
    its processes."""


def readers_of(settings: Settings, device: str) -> list[Reader]:
    """The model, then the peers in the order given."""
    cores = torch.get_num_threads()
    readers: list[Reader] = []
    if settings.model is not None:
        model = vlm.load(settings.model, device=device, dtype=dtype_name(settings.precision))
        readers.append(Model(settings.model, model, settings.batch, settings.page))
    for name in dict.fromkeys(settings.peer):
        options = {"language": settings.language} if name == "tesseract" else {}
        readers.append(PEERS[name](cores, page=settings.page, **options))
    return readers


def groups_of(lines: Sequence[Seen], sources: Sequence[Source]) -> dict[str, list[str]]:
    """By what lines are told apart, and the group of each; what sets none apart is left out."""
    kinds = {True: "handwriting", False: "printed", None: "not said"}
    groups = {
        "data": [sources[line.data].name for line in lines],
        "kind": [kinds[line.hand] for line in lines],
        "font": [line.font or "not said" for line in lines],
        "wear": [line.wear or "not said" for line in lines],
        "length": [length_group(line.truth) for line in lines],
    }
    return {name: values for name, values in groups.items() if len(set(values)) > 1}


def confidence_of(
    compared: Comparison, lines: Sequence[Seen], reader: str, settings: Settings
) -> dict[str, Calibration]:
    """The calibration of "lines" and of "words" that have a confidence; of none of a page, whose
    words have no certain place in the truth."""
    said = [line.said[reader] for line in lines]
    if settings.page or any(one.confidence is None for one in said):
        return {}
    found = {"lines": calibration([one.confidence for one in said], compared.exact)}
    words = [pair for one in said for pair in one.words]
    if words:
        right = [
            words_right(line.truth, [text for text, _ in one.words], settings.normalise)
            for line, one in zip(lines, said)
        ]
        found["words"] = calibration([p for _, p in words], np.concatenate(right))
    return found


def figures_of(
    compared: Comparison, groups: dict[str, list[str]], draws: dict[str, int]
) -> dict[str, Any]:
    """The figures of one reader, of all lines and by groups, for JSON."""
    by = {
        kind: {
            group: result.figures()
            for group, result in sorted(compared.by_group(values, **draws).items(), key=_place)
        }
        for kind, values in groups.items()
    }
    return {
        "figures": compared.result(**draws).figures(),
        "by": by,
        "confusions": [list(confusion) for confusion in compared.confusions()],
    }


def evaluate(settings: Settings) -> dict[str, Any]:
    """One evaluation, from settings to results; they are also written to `settings.out`."""
    started = time.monotonic()
    _check(settings)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    share_cores(accelerator, settings.threads)
    main = accelerator.is_main_process
    require_writable(settings.out)
    sources = [open_source(spec, ignore_keys=settings.ignore_keys) for spec in settings.data]
    check_start(sources, None, say_on(main))
    readers = readers_of(settings, str(accelerator.device))
    rows = [
        (data, row)
        for data, source in enumerate(sources)
        for row in held_out_rows(source, settings.rows or len(source))
    ]
    lines, skipped, speeds = read_all(
        readers, sources, rows, accelerator,
        page=settings.page, bad_rows=settings.bad_rows, repeats=settings.repeats,
    )  # fmt: skip
    if not lines:
        reason = f"{skipped[0].name}: {skipped[0].reason}"
        raise ValueError(f"none of {len(rows)} rows can be read, such as {reason}")
    names, truths = [reader.name for reader in readers], [line.truth for line in lines]
    compared = {
        name: compare_texts(
            truths, [line.said[name].text for line in lines], normalisation=settings.normalise
        )
        for name in names
    }
    groups = groups_of(lines, sources)
    draws = {"draws": settings.draws, "seed": settings.seed}
    sure = {name: confidence_of(compared[name], lines, name, settings) for name in names}
    found = {
        reader.name: {
            **reader.about(),
            **figures_of(compared[reader.name], groups, draws),
            "speed": speeds[reader.name],
            "ece": {what: one.error for what, one in sure[reader.name].items()},
        }
        for reader in readers
    }
    result = {
        "model": settings.model,
        "data": [source.name for source in sources],
        "rows": len(rows),
        "lines": len(lines),
        "page": settings.page,
        "normalisation": {
            "name": settings.normalise,
            "meaning": NORMALISATIONS[settings.normalise].meaning,
        },
        "draws": settings.draws,
        "seed": settings.seed,
        "repeats": settings.repeats,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "readers": found,
        "cer_less_than": {
            name: list(cer_difference(compared[names[0]], compared[name], **draws))
            for name in names[1:]
        },
        "skipped": len(skipped),
        "examples_skipped": [f"{one.name}: {one.reason}" for one in skipped[:20]],
        "versions": versions() | {"jiwer": version("jiwer")},
    }
    if main:
        result["minutes"] = (time.monotonic() - started) / 60
        write_results(settings, result, lines, compared)
        show(result, settings.out)
        draw(settings, sources, lines, compared[names[0]], sure[names[0]], names[0])
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def _check(settings: Settings) -> None:
    for name in ("rows", "batch", "repeats", "draws", "threads"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected 1 or more, found {value}")
    if settings.model is None and not settings.peer:
        raise ValueError("expected --model, or --peer, or both, found neither")


def _place(item: tuple[str, Any]) -> tuple[int, str]:
    """Groups in the order of the numbers that they begin with, else of their names."""
    first = item[0].split()[-1] if item[0].startswith("over ") else item[0].split()[0]
    return (int(first) if first.isdigit() else 0, item[0])


def write_results(
    settings: Settings,
    result: dict[str, Any],
    lines: Sequence[Seen],
    compared: dict[str, Comparison],
) -> None:
    """result.json and lines.jsonl."""
    (settings.out / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    rates = {name: one.line_cer.tolist() for name, one in compared.items()}
    with (settings.out / "lines.jsonl").open("w", encoding="utf-8") as file:
        for number, line in enumerate(lines):
            reads = {
                name: {"text": said.text, "cer": rates[name][number], "confidence": said.confidence}
                for name, said in line.said.items()
            }
            values = {"row": line.name, "font": line.font, "hand": line.hand,
                      "wear": line.wear, "text": line.truth, "read": reads}  # fmt: skip
            file.write(json.dumps(values, ensure_ascii=False) + "\n")


def draw(
    settings: Settings,
    sources: Sequence[Source],
    lines: Sequence[Seen],
    compared: Comparison,
    calibrations: dict[str, Calibration],
    reader: str,
) -> None:
    """The worst lines of a reader, and its confidence against what is right."""
    for old in settings.out.glob("reliability-*.png"):
        old.unlink()
    for what, one in calibrations.items():
        path = settings.out / f"reliability-{what}.png"
        draw_reliability(one, f"{reader}: {what}", path, "confidence", what)
    edits = compared.edits.sum(1)
    worst = [int(at) for at in np.argsort(-edits, kind="stable")[:WORST] if edits[at]]
    path = settings.out / "worst.png"
    if settings.page or not worst:
        path.unlink(missing_ok=True)
        return
    draw_lines(
        [open_image(sources[lines[at].data][lines[at].row].images[0]) for at in worst],
        [compared.truths[at] for at in worst],
        [compared.reads[at] for at in worst],
        path,
        [f"{lines[at].name}  {lines[at].font}  {edits[at]} edits" for at in worst],
    )


def show(result: dict[str, Any], out: Path) -> None:
    """The figures as tables, and where everything lies."""
    readers = result["readers"]
    what = "pages" if result["page"] else "lines"
    title = f"{result['lines']} {what}; {result['normalisation']['meaning']}"
    table = Table("figure", *readers, title=title)
    for name, key in (("CER", "cer"), ("WER", "wer"), ("exact", "exact_match")):
        cells = []
        for found in readers.values():
            low, high = found["figures"][f"{key}_95"]
            cells.append(f"{found['figures'][key]:.2%} ({low:.2%} to {high:.2%})")
        table.add_row(name, *cells)
    speeds = [found["speed"] for found in readers.values()]
    table.add_row(
        f"{what} a second", *(f"{s['lines_per_second']:.1f} ({s['way']})" for s in speeds)
    )
    for kind in ("lines", "words"):
        errors = [found["ece"].get(kind) for found in readers.values()]
        if any(error is not None for error in errors):
            cells = ("" if error is None else f"{error:.3f}" for error in errors)
            table.add_row(f"ECE of {kind}", *cells)
    first = next(iter(readers.values()))
    for kind, groups in first["by"].items():
        table.add_section()
        for group, figures in groups.items():
            cells = (f"{found['by'][kind][group]['cer']:.2%}" for found in readers.values())
            table.add_row(f"CER, {group} ({figures['lines']})", *cells)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for name, (rate, low, high) in result["cer_less_than"].items():
        line = f"{next(iter(readers))} less {name}: {rate:+.2%} CER ({low:+.2%} to {high:+.2%})"
        console.print(line, markup=False)
    for name, found in readers.items():
        for way, speed in found["speed"]["ways"].items():
            line = f"{name}, {way}: {speed['lines_per_second']:.1f} {what} a second"
            console.print(line, markup=False)
    show_left_out(result, console)
    console.print(f"{out}: result.json, lines.jsonl and drawings", markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    start(Settings, evaluate, __doc__, arguments)


if __name__ == "__main__":
    main()
