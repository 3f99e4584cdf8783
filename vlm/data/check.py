"""What is wrong in a source's rows, found without training: texts read, images' headers, boxes.

Images are not decoded, so damage after a header stays unseen. Rows are told apart by what is
wrong with them: messages that differ by names and numbers alone are of one kind.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tqdm import tqdm

from vlm.console import plain_console
from vlm.data.boxes import check_boxes
from vlm.data.example import BadRow, BadSource, Example
from vlm.data.sources.base import FIRST, Fault, Source
from vlm.data.sources.keys import UnreadKey, UnreadKeys
from vlm.pixels import BadImage, image_size

START_ROWS = 1000
"""Rows of a source that a run looks at before it begins."""
_CHUNK = 256
_NAMES = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|/\S+|\d+(?:\.\d+)?")


@dataclass(slots=True)
class Report:
    """What was found in a source.

    rows: how many were read, of `total`. bad: how many of them cannot be used. kinds: what is wrong
    with them -> how many, and the first messages. faults: what was found when it opened. unread:
    keys that are not read; changing: those of them that change what a row means. asked: rows that
    say something before their first answer, in a question or a system message; system_messages:
    those with the latter.
    """

    name: str
    total: int
    rows: int = 0
    bad: int = 0
    kinds: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    unread: dict[str, UnreadKey] = field(default_factory=dict)
    changing: tuple[str, ...] = ()
    asked: int = 0
    system_messages: int = 0
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether every row that was read can be used as it is meant."""
        return not (self.bad or self.changing or any(fault.harmful for fault in self.faults))

    def add(self, other: Report) -> None:
        """Adds what was found in further rows of the source."""
        self.rows += other.rows
        self.bad += other.bad
        self.asked += other.asked
        self.system_messages += other.system_messages
        for kind, (count, first) in other.kinds.items():
            held, firsts = self.kinds.get(kind, (0, []))
            self.kinds[kind] = (held + count, [*firsts, *first][:FIRST])


def check_row(source: Source, row: int) -> Example:
    """A row, read as far as its images' headers. Raises BadRow or BadImage saying what is wrong,
    BadSource as its source does."""
    example = source[row]
    try:
        sizes_hw = [image_size(image) for image in example.images]
    except BadImage as error:
        if str(error).startswith(f"{example.name}: "):  # the image is named with its row
            raise
        raise BadImage(f"{example.name}: {error}") from error
    check_boxes(example.boxes, sizes_hw, example.name)
    return example


def check_rows(source: Source, rows: Sequence[int]) -> Report:
    """What is wrong with some rows of a source, in this process."""
    report = Report(source.name, len(source))
    for row in rows:
        report.rows += 1
        try:
            turns = check_row(source, row).turns
            said = {turn.role for turn in turns if turn.text.strip()}
            report.asked += not said.isdisjoint(("user", "system"))
            report.system_messages += "system" in said
        except (BadRow, BadImage) as error:
            report.bad += 1
            name = source.row_name(row)
            message = str(error)
            kind = kind_of(message.removeprefix(f"{name}: "))
            count, first = report.kinds.get(kind, (0, []))
            report.kinds[kind] = (count + 1, [*first, message][:FIRST])
    return report


def kind_of(message: str) -> str:
    """What a message says is wrong, without the names and numbers of one row.

    >>> kind_of("turn 3: expected an answer, found no text: no answer")
    'turn …: expected an answer'
    >>> kind_of("image file 'a.png' is not under /data/images")
    'image file … is not under …'
    """
    return _NAMES.sub("…", message.partition(", found")[0])


def check_source(source: Source, rows: int | None = None, workers: int = 1) -> Report:
    """What is wrong in a source: in its first rows (None: in all), read by several processes, with
    a progress bar where it takes long. Keys that change what a row means are counted, not refused.
    """
    started = time.monotonic()
    count = len(source) if rows is None else min(rows, len(source))
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    workers = min(workers, len(chunks))
    report = Report(source.name, len(source), faults=source.faults)
    keys = UnreadKeys() if source.unread is None else source.unread
    keys.stops = False
    with tqdm(total=count, desc=source.name, unit="row", disable=count < 5000, leave=False) as bar:
        for found, unread in _checked(source, chunks, workers):
            report.add(found)
            keys.add(unread)
            bar.update(found.rows)
    keys.stops = True
    report.unread, report.changing = keys.found, keys.changing()
    report.seconds = time.monotonic() - started
    return report


def _checked(
    source: Source, chunks: Sequence[range], workers: int
) -> Iterator[tuple[Report, dict[str, UnreadKey]]]:
    """What is wrong with each run of rows, and what other processes found of keys."""
    if workers <= 1:
        yield from ((check_rows(source, chunk), {}) for chunk in chunks)
        return
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=(source,)) as pool:
        yield from pool.map(_check_chunk, chunks)


def _begin(source: Source) -> None:
    global _source
    _source = source


def _check_chunk(chunk: range) -> tuple[Report, dict[str, UnreadKey]]:
    """In a process of the pool: what is wrong with a run of rows, and the keys in it alone."""
    if _source.unread is None:
        return check_rows(_source, chunk), {}
    _source.unread.found = {}
    return check_rows(_source, chunk), _source.unread.found


def check_start(
    sources: Sequence[Source],
    bad_rows: str | None,
    say: Callable[..., None],
    rows: int = START_ROWS,
    *,
    reads_prompts: bool = True,
    reads_system: bool = True,
) -> None:
    """Looks at the first rows of each source before anything is computed, and says what was found
    when it opened, which keys are not read, and which rows are skipped; one line where all is
    well. Sources that draw their rows are passed over.

    bad_rows: "raise" stops at rows that cannot be used, "skip" counts them; None leaves them to
        whoever reads them. say: prints a text, as rich's `Console.print` does. From here on a key
        that was not met yet is told on stderr by the process that meets it. reads_prompts: whether
        the model reads what stands before an answer; reads_system: whether it reads the system
        message among it. Where it does not, that is said.
    Raises BadRow for the first bad row, with the count of others, and BadSource for keys that
    change what a row means.
    """
    drawn = [source.drawn for source in sources]
    reports = [check_source(s, rows) for s, is_drawn in zip(sources, drawn) if not is_drawn]
    for report in reports:
        for line in lines_of(report):
            say(line, highlight=False, markup=False)
        if report.asked and not reads_prompts:
            said = f"{report.asked:,} of {report.rows:,} rows checked have a question or a system"
            text = f"{report.name}: {said} message, which this model does not read; answers are"
            say(text, highlight=False, markup=False)
        elif report.system_messages and not reads_system:
            said = f"{report.system_messages:,} of {report.rows:,} rows checked have a system"
            text = f"{report.name}: {said} message, which this model does not read; the rest is"
            say(text, highlight=False, markup=False)
    for report in reports:
        if report.changing:
            key = report.changing[0]
            held = report.unread[key]
            raise BadSource(
                f"{report.name}: rows have keys that are not read and change what they mean: "
                f"{', '.join(report.changing)}; {held.name} has {key!r} = {held.value}. Leave them "
                f"out with --ignore-keys {' '.join(report.changing)}"
            )
        if report.bad and bad_rows == "raise":
            raise BadRow(_refusal(report))
        if report.bad and bad_rows == "skip":
            first = next(iter(report.kinds.values()))[1][0]
            text = f"{report.name}: {report.bad:,} of the first {report.rows:,} rows skipped"
            say(f"{text}, such as {first}", highlight=False, markup=False)
    for source in sources:
        if source.unread is not None:
            source.unread.tells = True
    if reports and not any(r.bad or r.unread or r.faults for r in reports):
        looked = ", ".join(f"{report.rows:,} of {report.name}" for report in reports)
        say(f"rows checked, without fault: {looked}", highlight=False, markup=False)


def say_on(main: bool) -> Callable[..., None]:
    """What prints a text for people on stderr: on the main process alone."""
    return plain_console(file=sys.stderr, quiet=not main, soft_wrap=True).print


def lines_of(report: Report) -> list[str]:
    """What to say of a source's opening and of keys that are not read, a line each."""
    lines = [f"{report.name}: {fault}" for fault in report.faults]
    for key, held in report.unread.items():
        count = f"{held.count:,} times in {report.rows:,} rows checked"
        lines.append(f"{report.name}: key {key!r} is not read: {count}, {held.name}: {held.value}")
    return lines


def _refusal(report: Report) -> str:
    """The first bad row in its own words, and how many more there are."""
    first = next(iter(report.kinds.values()))[1][0]
    if report.bad == 1:
        return first
    return (
        f"{first} (one of {report.bad:,} such among the first {report.rows:,} rows of "
        f"{report.name}; `vlm check-data` lists them, --bad-rows skip skips them)"
    )
