"""Lines as several readers read them, with the time that each takes.

Rows are shared among processes in batches of UNIT, and each reader is given one at once.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from vlm.config import to_dict
from vlm.data.example import BadRow, Skipped
from vlm.data.sources.base import Source
from vlm.evaluation.ocr_peers import Reader, Said
from vlm.families.registry import FAMILIES
from vlm.ocr.results import Reading, Transcript, words_of
from vlm.pixels import BadImage, open_image
from vlm.ranks import batches_of_rank, gather_in_order, gather_list
from vlm.retrieval.embed_rows import only_image

UNIT = 128
"""Lines that are read at once."""
WARM_UP = 8
"""Lines that each reader reads before it is timed."""


@dataclass(slots=True)
class Seen:
    """A line and what was read of it.

    data: which of the sources, row: its row there. hand: whether it is handwriting, None where the
    source does not say; font, and wear (what the image suffers from), "" likewise. said: by
    reader.
    """

    data: int
    row: int
    name: str
    truth: str
    font: str = ""
    wear: str = ""
    hand: bool | None = None
    said: dict[str, Said] = field(default_factory=dict)


class Model:
    """What `vlm.load` gives, as a reader: `read_lines` of models of lines, else `ocr`.

    page: images are whole pages; a model of lines then finds their lines.
    Raises ValueError for a model that does not read.
    """

    ways = ("batched",)

    def __init__(self, name: str, model: Any, batch: int, page: bool) -> None:
        self.name, self.model, self.batch, self.page = name, model, batch, page
        self.of_lines = "read_lines" in FAMILIES[model.module.family].tasks

    def about(self) -> dict[str, Any]:
        spec = self.model.processor.pixel_spec
        return {
            "preprocessing": to_dict(spec),
            "dtype": str(next(self.model.module.parameters()).dtype).removeprefix("torch."),
            "batch": self.batch,
            "cores": torch.get_num_threads(),
        }

    def prepare(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        return list(images)

    def read(self, prepared: Sequence[Image.Image], way: str) -> list[Said]:
        if self.of_lines and not self.page:
            found = self.model.read_lines(prepared, batch_size=self.batch)
            return [_transcribed(one, image) for one, image in zip(found, prepared, strict=True)]
        options = {"layout": "page"} if self.of_lines else {}
        found = self.model.ocr(prepared, batch_size=self.batch, **options)
        return [_read(one) for one in found]


def _read(reading: Reading) -> Said:
    sure = math.prod(line.confidence for line in reading.lines)
    return Said(reading.text, sure, tuple((w.text, w.confidence) for w in reading.words))


def _transcribed(transcript: Transcript, image: Image.Image) -> Said:
    W, H = image.size
    corners = ((0, 0), (W, 0), (W, H), (0, H))
    words = words_of(transcript.tokens, (0, 0, W, H), corners)
    return Said(
        transcript.text, transcript.confidence, tuple((w.text, w.confidence) for w in words)
    )


@dataclass(slots=True)
class Timing:
    """Seconds of one way of reading, and whether it could read all; other: lines whose text is not
    that of the reader's first way."""

    seconds: float = 0.0
    lines: int = 0
    possible: bool = True
    other: int = 0


def look(source: Source, data: int, row: int, page: bool) -> tuple[Seen, Image.Image]:
    """A row's line, still to be read, and its image. Raises BadRow or BadImage."""
    example = source[row]
    if not example.answer.strip():
        raise BadRow(f"{example.name}: expected a text, found none")
    truth = example.answer.replace("\\n", "\n") if page else example.answer
    seen = Seen(data, row, example.name, truth)
    if hasattr(source, "font_of"):
        seen.font = source.font_of(row)
    if hasattr(source, "wear_of"):
        seen.wear = source.wear_of(row)
    if hasattr(source, "hand_of"):
        seen.hand = source.hand_of(row)
    return seen, open_image(only_image(example))


def read_all(
    readers: Sequence[Reader],
    sources: Sequence[Source],
    rows: Sequence[tuple[int, int]],
    accelerator: Accelerator,
    *,
    page: bool,
    bad_rows: str,
    repeats: int,
) -> tuple[list[Seen], list[Skipped], dict[str, dict[str, Any]]]:
    """All lines as read by all readers, on every process; rows skipped; and each reader's speed.

    rows: the number of a source, and of a row in it. page: whether \\n in a text ends a line.
    bad_rows: "raise" for the first row that cannot be read, or "skip". repeats: how often each
    reader reads; the median time counts.
    """
    seen: list[tuple[int, Seen]] = []
    skipped: list[tuple[int, Skipped]] = []
    clock = {reader.name: {way: Timing() for way in reader.ways} for reader in readers}
    warm = False
    for unit in batches_of_rank(accelerator, len(rows), UNIT, "reading"):
        found, images = [], []
        for index in unit:
            data, row = rows[index]
            try:
                line, image = look(sources[data], data, row, page)
            except (BadRow, BadImage) as error:
                if bad_rows == "raise":
                    raise
                name = sources[data].row_name(row)
                reason = str(error).removeprefix(f"{name}: ")
                skipped.append((index, Skipped(name, reason)))
                continue
            found.append((index, line))
            images.append(image)
        if not found:
            continue
        for reader in readers:
            if not warm:
                for way in reader.ways:
                    reader.read(reader.prepare(images[:WARM_UP]), way)
            for (_, line), said in zip(found, _timed(reader, images, clock, repeats)):
                line.said[reader.name] = said
        warm = True
        seen += found
    everyone = gather_in_order(accelerator, seen)
    left_out = gather_in_order(accelerator, skipped)
    clocks = gather_list(accelerator, [clock])
    speeds = _slowest(clocks, readers) if everyone else {}
    return [s for _, s in everyone], [s for _, s in left_out], speeds


def _timed(
    reader: Reader, images: list[Image.Image], clock: dict[str, dict[str, Timing]], repeats: int
) -> list[Said]:
    """What the reader says of a unit's images, each way timed as often as is asked for."""
    prepared, first = reader.prepare(images), None
    for way in reader.ways:
        timing, times, said = clock[reader.name][way], [], None
        for _ in range(repeats):
            started = time.perf_counter()
            said = reader.read(prepared, way)
            times.append(time.perf_counter() - started)
            if said is None:
                break
        if said is None:
            timing.possible = False
            continue
        first = first or said
        timing.seconds += statistics.median(times)
        timing.lines += len(images)
        timing.other += sum(a.text != b.text for a, b in zip(first, said))
    return first


def _slowest(
    clocks: Sequence[dict[str, dict[str, Timing]]], readers: Sequence[Reader]
) -> dict[str, dict[str, Any]]:
    """Each reader's speed by ways, over all processes: they end when the slowest does."""
    speeds = {}
    for reader in readers:
        ways = {}
        for way in reader.ways:
            timings = [clock[reader.name][way] for clock in clocks]
            seconds = max(timing.seconds for timing in timings)
            if seconds and all(timing.possible for timing in timings):
                lines = sum(timing.lines for timing in timings)
                other = sum(timing.other for timing in timings)
                ways[way] = {"seconds": seconds, "lines_per_second": lines / seconds,
                             "lines_of_other_text": other}  # fmt: skip
        if not ways:
            raise ValueError(f"{reader.name}: none of its ways could read the rows")
        best = max(ways, key=lambda way: ways[way]["lines_per_second"])
        speeds[reader.name] = {"way": best, **ways[best], "ways": ways}
    return speeds
