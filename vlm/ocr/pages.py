"""Images of pages or of single lines in, readings out, by any model that reads lines.

The lines of several images are read together, so that batches are full; of how many, so that
neither the number of images nor their size fills the memory, `read_each` decides.
Columns are read from left to right, whatever way a script runs; texts are in logical order (see
`vlm.ocr.results`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from PIL import Image

from vlm.ocr.line_detection.detect import MARGIN, Corners, Found, cut, find_lines, runs_sideways
from vlm.ocr.reading_order import order
from vlm.ocr.results import Line, Reading, Transcript, XyxyPx, words_of
from vlm.ocr.streaming import batches, check_images, filter_with_warning, open_each

Layout = Literal["auto", "line", "page"]
LINE_SHAPE = 2.0
"""How many times as wide as high an image is that may be one line."""
FILLED = 0.4
"""The share of an image's height that its one line fills at least for it to be a line's own."""
BLANK_SPREAD = 6.0
"""Grey levels between the darkest and the lightest pixels (1 in 1,000 skipped) of a blank image."""
LINE_FROM = 6.0
"""How many times as wide as high an image is that holds no page of lines."""
WINDOW = 16
"""Batches of lines that are read together, at least, where there are as many."""
WINDOW_PIXELS = 64_000_000
"""Pixels of the images that are held together, at most, a single larger one not counted:
about 16 pages of 200 dots to the inch."""


class LineReader(Protocol):
    """What reads lines: one transcript an image, in their order."""

    def read_lines(
        self, images: list[Image.Image], batch_size: int, **options
    ) -> list[Transcript]: ...


class _Cut(NamedTuple):
    """One line to be read. margin: of the line's height, around it on its image. whole: whether
    the line is the whole image, so that it stays even where nothing is read on it."""

    image: Image.Image
    corners_px: Corners
    margin: float
    whole: bool


class _Plan(NamedTuple):
    """What messages call a page, its (rows, columns), and the ways in which it may be read, each as
    its lines in order."""

    name: str
    size_hw: tuple[int, int]
    ways: list[list[_Cut]]


def read_pages(
    reader: LineReader,
    images: Iterable,
    layout: Layout = "auto",
    batch_size: int = 16,
    min_confidence: float = 0.0,
    **options,
) -> list[Reading]:
    """What `reader` reads on each image, line by line in reading order: the list of what
    `read_each`, which the arguments and errors are of, yields."""
    return list(read_each(reader, images, layout, batch_size, min_confidence, **options))


def read_each(
    reader: LineReader,
    images: Iterable,
    layout: Layout = "auto",
    batch_size: int = 16,
    min_confidence: float = 0.0,
    **options,
) -> Iterator[Reading]:
    """Yields what `reader` reads on each image, line by line in reading order.

    images: what `vlm.pixels.open_image` takes. They are taken and opened as they are needed, until
        their lines make WINDOW batches or their pixels come to WINDOW_PIXELS; these are read
        together, and their readings yielded before the next image is taken.
    layout: "page" finds the lines of each image. "line" takes each image as one line whatever
        it shows, and warns where several lines are found on one that is less than LINE_FROM times
        as wide as high. "auto" takes an image as one line where at most one row of text is found
        on it and it has a line's shape, or where that row fills it; else it reads the lines that
        are found.
    min_confidence: lines below it are skipped, with a warning that names the image and says
        how many.
    options: for `reader.read_lines`.

    An image on which no line is found, a blank image among them, gives a Reading without lines,
    except with "line". Found lines on which the model reads nothing are skipped. Text turned by 90
    degrees, alone or on a whole page, is read in both directions beside the upright way, and the
    way of the highest confidence is kept; corners then begin at the text's own top left. Characters
    stacked upright on each other are read as lines of one character.

    Raises at once ValueError for another layout or a confidence outside 0 to 1, and BadImage for a
    file in a sequence of images that is missing or no image's; BadImage for an image that turns out
    to be damaged comes after the readings of those before it.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout: expected {', '.join(get_args(Layout))}, found {layout!r}")
    check_images(images, min_confidence)
    return _each(reader, images, layout, batch_size, min_confidence, options)


def _each(
    reader: LineReader,
    images: Iterable,
    layout: Layout,
    batch_size: int,
    min_confidence: float,
    options: dict,
) -> Iterator[Reading]:
    plans = (
        _Plan(name, (image.height, image.width), _ways(image, layout, name))
        for name, image in open_each(images)
    )

    def is_full(held: list[_Plan]) -> bool:
        lines = sum(len(way) for plan in held for way in plan.ways)
        pixels = sum(math.prod(plan.size_hw) for plan in held)
        return lines >= WINDOW * batch_size or pixels >= WINDOW_PIXELS

    for held in batches(plans, is_full):
        names = [plan.name for plan in held]
        readings = _read(reader, held, batch_size, options)
        del held  # before the images of the next ones are cut
        for name, reading in zip(names, readings):
            yield filter_with_warning(reading, name, min_confidence)


def _read(
    reader: LineReader, plans: Sequence[_Plan], batch_size: int, options: dict
) -> list[Reading]:
    """What is read on pages, their lines read together."""
    cuts = [one for plan in plans for way in plan.ways for one in way]
    transcripts = iter(
        reader.read_lines([one.image for one in cuts], batch_size=batch_size, **options)
        if cuts
        else ()
    )
    readings = []
    for _, size_hw, ways in plans:
        tried = [
            Reading(
                tuple(line for one in way if (line := _line(one, next(transcripts))) is not None),
                size_hw,
            )
            for way in ways
        ]
        readings.append(max(tried, key=_trust))
    return readings


def _trust(reading: Reading) -> float:
    """A reading that says nothing comes after any other."""
    return reading.confidence if reading.text.strip() else -1.0


def _ways(image: Image.Image, layout: Layout, name: str) -> list[list[_Cut]]:
    """The ways in which an image may be read, each as its lines in order; mostly one."""
    if layout == "line":
        long = image.width >= LINE_FROM * image.height  # and lines need not be looked for
        rows = 1 if long else _rows(find_lines(image))
        if rows > 1:
            warnings.warn(
                f"{name}: {rows} lines of text are found, and it is read as one: a full page given "
                'to a line model; layout "page" reads its lines',
                stacklevel=3,
            )
        return [[_whole(image)]]
    upright = _way(image, layout)
    if (not upright and _is_blank(image)) or not runs_sideways(image):
        return [upright]
    ways = [upright]
    for turn in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270):
        turned = _way(image.transpose(turn), layout)
        back = [tuple(_turned_back(corner, turn, image.size) for corner in one.corners_px)
                for one in turned]  # fmt: skip
        ways.append([one._replace(corners_px=corners) for one, corners in zip(turned, back)])
    return ways


def _way(image: Image.Image, layout: Layout) -> list[_Cut]:
    """An image's lines in order, as it stands."""
    found = find_lines(image)
    if layout == "auto" and _is_line(image, found):
        return [] if not found and _is_blank(image) else [_whole(image)]
    return [_Cut(cut(image, one), one.corners_px, MARGIN, False) for one in order(found)]


def _whole(image: Image.Image) -> _Cut:
    width, height = image.size
    corners = ((0.0, 0.0), (float(width), 0.0), (float(width), float(height)), (0.0, float(height)))
    return _Cut(image, corners, 0.0, True)


def _is_line(image: Image.Image, found: Sequence[Found]) -> bool:
    """Whether an image shows one line and little else."""
    if _rows(found) > 1:
        return False
    if not found:
        return image.width >= LINE_SHAPE * image.height
    tops, bottoms = zip(*((one.xyxy_px[1], one.xyxy_px[3]) for one in found))
    return max(bottoms) - min(tops) >= FILLED * image.height


def _rows(found: Sequence[Found]) -> int:
    """How many lines stand above one another; those side by side count once."""
    ends: list[float] = []
    for one in sorted(found, key=lambda one: one.xyxy_px[3]):
        _, top, _, bottom = one.xyxy_px
        if not ends or top >= ends[-1] - 0.3 * (bottom - top):
            ends.append(bottom)
    return len(ends)


def _is_blank(image: Image.Image) -> bool:
    grey = np.asarray(image.convert("L"))
    low, high = np.percentile(grey, (0.1, 99.9))
    return high - low < BLANK_SPREAD


def _turned_back(
    corner: tuple[float, float], turn: Image.Transpose, size: tuple[int, int]
) -> tuple[float, float]:
    """Where a point of a turned image lies on the image itself, of (width, height) `size`."""
    u, v = corner
    if turn == Image.Transpose.ROTATE_90:  # counter-clockwise
        return size[0] - v, u
    return v, size[1] - u


def _line(one: _Cut, transcript: Transcript) -> Line | None:
    """A line on the caller's image; None where one was found and nothing read on it."""
    if not one.whole and not transcript.text.strip():
        return None
    xs, ys = zip(*one.corners_px)
    box: XyxyPx = (min(xs), min(ys), max(xs), max(ys))
    a, b, _, d = one.corners_px
    length = math.dist(a, b)
    # A span is a share of the image that was read, which is wider than the line by two margins.
    out = one.margin * math.dist(a, d)
    tokens = [
        token
        if token.span is None
        else replace(token, span=tuple(_share(at, length, out) for at in token.span))
        for token in transcript.tokens
    ]
    words = words_of(tokens, box, one.corners_px)
    return Line(transcript.text, transcript.confidence, words, box, one.corners_px)


def _share(at: float, length: float, out: float) -> float:
    """A share of a line's image as a share of the line."""
    return min(1.0, max(0.0, (at * (length + 2 * out) - out) / max(length, 1e-6)))
