"""`vlm check-data`: what is wrong in data, before anything is trained on them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from vlm.data.check import Report


@dataclass(frozen=True, kw_only=True)
class CheckData:
    """Read all rows of data as far as their images' headers, and print what is wrong with them.

    Texts, boxes, and the size and format of images are looked at; images are not decoded. Ends
    with exit code 1 where a row or box cannot be used, or a key that is not read changes what its
    row means.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Data as recipes take them with --train: PATH.jsonl, PATH-{0000..0009}.tar, PATH.tsv, FOLDER,
    coco:ANNOTATIONS.json, datasets:ORG/NAME:SPLIT."""
    rows: int | None = None
    """How many of the first rows of each; None reads all."""
    workers: int | None = None
    """Processes that read; None takes one for each core."""
    bad_boxes: Literal["stop", "skip"] = "stop"
    """Boxes of COCO's files that cannot be one: faults, or told alone, as runs skip them."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows that are skipped although they change what a row means."""

    def run(self) -> None:
        from vlm.console import plain_console

        for name in ("rows", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, found {value}")
        if not self.sources:
            raise ValueError("expected data to check, such as rows.jsonl, found none")
        if not all(spec.strip() for spec in self.sources):
            raise ValueError("expected data to check, such as rows.jsonl, found an empty name")
        console = plain_console(soft_wrap=True)
        clean = [self._check(spec, console) for spec in self.sources]
        if not all(clean):
            sys.exit(1)

    def _check(self, spec: str, console: Console) -> bool:
        """Whether a source is without fault; prints what was found."""
        from vlm.data.check import check_source
        from vlm.data.sources import BadSource, open_source
        from vlm.precision import cores

        bad_boxes = "tell" if self.bad_boxes == "stop" else "skip"
        try:
            source = open_source(spec, bad_boxes=bad_boxes, ignore_keys=self.ignore_keys)
            report = check_source(source, self.rows, self.workers or cores())
        except BadSource as error:
            console.print(f"{spec}: cannot be read: {error}", style="bold red", markup=False)
            return False
        show_report(report, console)
        return report.clean


def show_report(report: Report, console: Console) -> None:
    """Prints what was found in a source: a line, and tables of faults and of keys."""
    from rich.table import Table
    from rich.text import Text

    speed = report.rows / max(report.seconds, 1e-9)
    part = "" if report.rows == report.total else f" of {report.total:,}"
    state = "without fault" if report.clean else f"{report.bad:,} cannot be used"
    console.print(
        f"{report.name}: {report.rows:,}{part} rows checked in {report.seconds:,.1f} s "
        f"({speed:,.0f} rows/s), {state}",
        style="bold green" if report.clean else "bold red",
        markup=False,
    )
    faults = [(kind, count, first) for kind, (count, first) in report.kinds.items()]
    faults += [(fault.kind, fault.count, list(fault.first)) for fault in report.faults]
    if faults:
        table = Table("what is wrong", "count", "first")
        table.columns[1].justify = "right"
        for kind, count, first in sorted(faults, key=lambda fault: -fault[1]):
            table.add_row(Text(kind), f"{count:,}", Text("\n".join(first)))
        console.print(table)
    if report.unread:
        table = Table("key that is not read", "count", "first", "value")
        table.columns[1].justify = "right"
        for key, held in sorted(report.unread.items(), key=lambda item: -item[1].count):
            mark = " (changes the row)" if key in report.changing else ""
            table.add_row(
                Text(f"{key}{mark}"), f"{held.count:,}", Text(held.name), Text(held.value)
            )
        console.print(table)
