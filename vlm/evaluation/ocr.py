"""Reading of text: character and word error rates, exact lines and speed, beside other projects'.

    vlm eval ocr line-reader
    vlm eval ocr line-reader --data lines.tsv --peer tesseract --peer rapidocr
    vlm eval ocr line-reader --data pages.tsv --page --peer tesseract

All readers read the same images, decoded beforehand; what is timed is reading alone, after a
warm-up. A peer that can be run in several ways is, and its fastest counts. Rows are shared among
processes in batches of a fixed size, and metrics computed over all lines, so that any number of
processes gives the same ones. --page compares whole pages: true texts hold \\n where a line ends,
and white space of any kind is one space, so that the order of lines matters but not their breaks.

In --out: result.json, lines.jsonl (every line), worst.png (the model's worst lines, or else the
first peer's), reliability-lines.png and reliability-words.png (confidence against what is right).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from tyro import conf

from vlm.data.check import check_start
from vlm.data.sources.base import Source
from vlm.draw import draw_lines, draw_reliability
from vlm.evaluation import base
from vlm.evaluation.ocr_peers import PEERS, Reader
from vlm.evaluation.ocr_reading import Model, Seen, read_all
from vlm.metrics.calibration import Calibration, calibration
from vlm.metrics.share import with_ci
from vlm.pixels import open_image

if TYPE_CHECKING:
    from vlm.metrics.text import Comparison

WORST = 20
"""Lines on the page of the worst."""


@dataclass(frozen=True, kw_only=True)
class Settings(base.Settings):
    """What is evaluated."""

    model: str | None = None
    """A packaged reader, a run folder, a model folder or a hub id; None: the peers alone."""
    data: tuple[str, ...] = ("lines:400:split=validation:fonts=held_out:kind=one",)
    """Images of lines, or of pages, with their text: any sources that the recipes take."""
    peer: conf.UseAppendAction[tuple[Literal["tesseract", "rapidocr", "rapidocr-lines"], ...]] = ()
    """What else reads the same; may be given several times."""
    rows: int | None = None
    """How many rows of each source, spread evenly over it; None takes all."""
    page: bool = False
    """Images are whole pages, and texts hold \\n where their lines end."""
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
    """Rows without a text, or with an image that cannot be read: stop and name the row, or
    skip and count them."""
    draws: int = 1000
    """Bootstrap samples of lines behind the 95 % intervals."""
    seed: int = 0
    """Of these samples."""
    threads: int | None = None
    """CPU threads of each process, and cores of each peer; None shares the machine's cores among
    its processes."""


class OcrEvaluation(base.Evaluation[Settings]):
    """Error rates and speed of a model and of other readers."""

    task = "ocr"
    settings_type = Settings
    ability = "ocr"
    least: ClassVar = {"batch": 1, "repeats": 1, "draws": 1}
    libraries = ("jiwer",)
    metrics_module = "vlm.metrics.text"
    files = ("lines.jsonl", "worst.png", "reliability-*.png")

    def check(self) -> None:
        super().check()
        if self.settings.model is None and not self.settings.peer:
            raise ValueError("expected --model, or --peer, or both, found neither")

    def open(self, say: Callable[..., None]) -> None:
        self.sources = [self.open_source("data", spec) for spec in self.settings.data]
        check_start(self.sources, None, say)
        self.rows = self.items = [
            (number, row)
            for number, source in enumerate(self.sources)
            for row in self.spread(source)
        ]
        cores, page = torch.get_num_threads(), self.settings.page
        self.peers: list[Reader] = []
        for name in dict.fromkeys(self.settings.peer):
            options = {"language": self.settings.language} if name == "tesseract" else {}
            self.peers.append(PEERS[name](cores, page=page, **options))

    def load(self, device: torch.device) -> Any:
        """The model, None for peers alone; it and the peers are the readers."""
        settings, model = self.settings, None
        self.readers = list(self.peers)
        if settings.model is not None:
            model = super().load(device)
            self.readers[:0] = [Model(settings.model, model, settings.batch, settings.page)]
        return model

    def predict_all(self, model: Any, accelerator: Accelerator) -> list[Seen]:
        settings = self.settings
        lines, skipped, self.speeds = read_all(
            self.readers, self.sources, self.rows, accelerator,
            page=settings.page, bad_rows=settings.bad_rows, repeats=settings.repeats,
        )  # fmt: skip
        self.skipped += skipped
        self.require_some(lines)
        return lines

    def score(
        self, model: Any, predictions: list[Seen], accelerator: Accelerator
    ) -> dict[str, Any] | None:
        """The metrics of the model, None where there are peers alone; those of peers are in
        `details`."""
        from vlm.metrics.text import cer_difference, compare_texts  # of the extra ocr

        settings, lines = self.settings, predictions
        self.names = [reader.name for reader in self.readers]
        truths = [line.truth for line in lines]
        self.compared = {
            name: compare_texts(
                truths, [line.said[name].text for line in lines], normalisation=settings.normalise
            )
            for name in self.names
        }
        self.sure = {n: confidence_of(self.compared[n], lines, n, settings) for n in self.names}
        draws = {"draws": settings.draws, "seed": settings.seed}
        groups = groups_of(lines, self.sources)
        self.reports: dict[str, dict[str, Any]] = {}
        for reader in self.readers:
            compared, sure = self.compared[reader.name], self.sure[reader.name]
            ece = {kind: sure[kind].error if kind in sure else None for kind in ("lines", "words")}
            self.reports[reader.name] = {
                "metrics": {
                    **compared.result(**draws).metrics(),
                    **{f"ece_{kind}": error for kind, error in ece.items()},
                },
                **by_groups(compared, groups, draws),
                "speed": self.speeds[reader.name],
                "reader": reader.about(),
            }
        first, *others = self.names
        for name in others:
            found = cer_difference(self.compared[first], self.compared[name], **draws)
            self.reports[name] |= {"compared_to": first, **with_ci("cer_difference", found)}
        return None if model is None else self.reports[first]["metrics"]

    def details(self, model: Any) -> dict[str, Any]:
        from vlm.metrics.text import NORMALISATIONS  # of the extra ocr

        normalise = self.settings.normalise
        peers = dict(self.reports)
        own = {} if model is None else peers.pop(self.names[0])
        return {
            **own,
            "baselines": peers,
            "page": self.settings.page,
            "normalisation": {"name": normalise, "meaning": NORMALISATIONS[normalise].meaning},
            "threads": torch.get_num_threads(),
        }

    def show(self, result: dict[str, Any], console: Console) -> None:
        own = {} if result["model"] is None else {result["model"]: result}
        readers = own | result["baselines"]
        metrics = [found["metrics"] for found in readers.values()]
        what = "pages" if result["page"] else "lines"
        title = f"{metrics[0]['n']} {what}; {result['normalisation']['meaning']}"
        table = Table("metric", *readers, title=title)
        for name, key in (("CER", "cer"), ("WER", "wer"), ("exact", "exact_match")):
            cells = []
            for found in metrics:
                low, high = found[f"{key}_ci"]
                cells.append(f"{found[key]:.2%} ({low:.2%} to {high:.2%})")
            table.add_row(name, *cells)
        speeds = [found["speed"] for found in readers.values()]
        table.add_row(
            f"{what} a second", *(f"{s['lines_per_second']:.1f} ({s['way']})" for s in speeds)
        )
        for kind in ("lines", "words"):
            errors = [found[f"ece_{kind}"] for found in metrics]
            if any(error is not None for error in errors):
                cells = ("" if error is None else f"{error:.3f}" for error in errors)
                table.add_row(f"ECE of {kind}", *cells)
        for kind, groups in next(iter(readers.values()))["groups"].items():
            table.add_section()
            for group, found in groups.items():
                cells = (f"{one['groups'][kind][group]['cer']:.2%}" for one in readers.values())
                table.add_row(f"CER, {group} ({found['n']})", *cells)
        console.print(table)
        for name, found in readers.items():
            if "cer_difference" in found:
                rate, (low, high) = found["cer_difference"], found["cer_difference_ci"]
                line = f"{found['compared_to']} less {name}: {rate:+.2%} CER "
                console.print(f"{line}({low:+.2%} to {high:+.2%})", markup=False)
        for name, found in readers.items():
            for way, speed in found["speed"]["ways"].items():
                line = f"{name}, {way}: {speed['lines_per_second']:.1f} {what} a second"
                console.print(line, markup=False)

    def write(self, predictions: list[Seen]) -> None:
        rates = {name: one.line_cer.tolist() for name, one in self.compared.items()}
        with (self.out / "lines.jsonl").open("w", encoding="utf-8") as file:
            for number, line in enumerate(predictions):
                reads = {
                    name: {"text": said.text, "cer": rates[name][number],
                           "confidence": said.confidence}
                    for name, said in line.said.items()
                }  # fmt: skip
                values = {"row": line.name, "font": line.font, "hand": line.hand,
                          "wear": line.wear, "text": line.truth, "read": reads}  # fmt: skip
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self._draw(predictions)

    def _draw(self, lines: Sequence[Seen]) -> None:
        """The worst lines of the first reader, and its confidence against what is right."""
        reader, compared = self.names[0], self.compared[self.names[0]]
        for old in self.out.glob("reliability-*.png"):
            old.unlink()
        for what, one in self.sure[reader].items():
            path = self.out / f"reliability-{what}.png"
            draw_reliability(one, f"{reader}: {what}", path, "confidence", what)
        edits = compared.edits.sum(1)
        worst = [int(at) for at in np.argsort(-edits, kind="stable")[:WORST] if edits[at]]
        path = self.out / "worst.png"
        if self.settings.page or not worst:
            path.unlink(missing_ok=True)
            return
        draw_lines(
            [open_image(self.sources[lines[at].data][lines[at].row].images[0]) for at in worst],
            [compared.truths[at] for at in worst],
            [compared.reads[at] for at in worst],
            path,
            [f"{lines[at].name}  {lines[at].font}  {edits[at]} edits" for at in worst],
        )


def groups_of(lines: Sequence[Seen], sources: Sequence[Source]) -> dict[str, list[str]]:
    """By what lines are told apart, and the group of each; what sets none apart is skipped."""
    from vlm.metrics.text import length_group  # of the extra ocr

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
    from vlm.metrics.text import words_right  # of the extra ocr

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


def by_groups(
    compared: Comparison, groups: dict[str, list[str]], draws: dict[str, int]
) -> dict[str, Any]:
    """The metrics of one reader by groups of lines, and its confusions, for JSON."""
    found = {
        kind: {
            group: result.metrics()
            for group, result in sorted(compared.by_group(values, **draws).items(), key=_place)
        }
        for kind, values in groups.items()
    }
    return {
        "groups": found,
        "confusions": [list(confusion) for confusion in compared.confusions()],
    }


def _place(item: tuple[str, Any]) -> tuple[int, str]:
    """Groups in the order of the numbers that they begin with, else of their names."""
    first = item[0].split()[-1] if item[0].startswith("over ") else item[0].split()[0]
    return (int(first) if first.isdigit() else 0, item[0])
