"""Packed rows to be looked at: whose each position is, and where the borders between examples are.

A row is a band of positions from left to right, with each example's images under its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from vlm.draw import BLACK, GREEN, GREY, TEXT_PX, font_of, shorten

FILLS = {"image": "#4aa8c0", "prompt": "#c9c9c9", "scored": GREEN}
"""Of each kind of position, as `vlm.commands.inspect_batch` names them."""
WORDS = {"image": "image", "prompt": "text that is read", "scored": "text that is learned"}
LEGEND = "a border: nothing after it sees what is before it"
GAP, LINE_PX, OVER_PX, BAND_PX = 14, TEXT_PX + 6, 7, 34


class Segment(NamedTuple):
    """One example of a packed row.

    kinds: of each of its positions, one of FILLS. images: what the model sees of it.
    """

    name: str
    kinds: Sequence[str]
    images: Sequence[Image.Image]


def draw_packed(
    rows: Sequence[Sequence[Segment]],
    most: int,
    path: Path,
    width_px: int = 1200,
    image_px: int = 96,
) -> None:
    """A page of packed rows, as a PNG.

    most: the positions that a row may have; a longer one is an example by itself. width_px: of the
    longest band. image_px: the most height of an image; an example's images are together no
    wider than its positions.
    """
    if not rows:
        raise ValueError("expected a packed row to draw, found none")
    longest = max(most, *(sum(len(segment.kinds) for segment in row) for row in rows))
    row_px = 3 * LINE_PX + 2 * OVER_PX + BAND_PX + image_px + 2 * GAP
    page = Image.new("RGB", (width_px + 2 * GAP, LINE_PX + 2 * GAP + row_px * len(rows)), "white")
    _legend(ImageDraw.Draw(page))
    for number, row in enumerate(rows):
        count = f"{len(row)} example{'s' * (len(row) > 1)}"
        filled = sum(len(segment.kinds) for segment in row)
        title = f"packed row {number + 1}: {count}, {filled} of {most} positions"
        top = LINE_PX + 2 * GAP + number * row_px
        _row(page, row, title, most, width_px / longest, top, image_px)
    page.save(path, "PNG")


def _legend(draw: ImageDraw.ImageDraw) -> None:
    x, font = float(GAP), font_of(TEXT_PX)
    for kind, fill in FILLS.items():
        draw.rectangle((x, GAP + 2, x + TEXT_PX, GAP + TEXT_PX + 2), fill=fill)
        draw.text((x + TEXT_PX + 6, GAP), WORDS[kind], fill=BLACK, font=font)
        x += TEXT_PX + 6 + font.getlength(WORDS[kind]) + 2 * GAP
    draw.line((x, GAP, x, GAP + TEXT_PX + 4), fill=BLACK, width=3)
    draw.text((x + 10, GAP), LEGEND, fill=BLACK, font=font)


def _row(
    page: Image.Image,
    row: Sequence[Segment],
    title: str,
    most: int,
    scale: float,
    top: int,
    image_px: int,
) -> None:
    """One band: title, names, positions, the borders with their numbers, images. scale: pixels of a
    position."""
    draw, small = ImageDraw.Draw(page), font_of(TEXT_PX - 3)
    names, band = top + LINE_PX, top + 2 * LINE_PX + OVER_PX
    foot = band + BAND_PX + OVER_PX
    draw.text((GAP, top), title, fill=BLACK, font=font_of(TEXT_PX))
    draw.rectangle((GAP, band, GAP + most * scale, band + BAND_PX), outline=GREY)
    borders, at = [0], 0
    for segment in row:
        left, width = GAP + at * scale + 4, len(segment.kinds) * scale - 8
        draw.text((left, names), shorten(segment.name, width, small), fill=BLACK, font=small)
        _paste(page, segment.images, (left, foot + LINE_PX), width, image_px)
        for kind, run in groupby(segment.kinds):
            start, at = at, at + len(list(run))
            x0, x1 = GAP + start * scale, GAP + at * scale
            draw.rectangle((x0, band, x1, band + BAND_PX), fill=FILLS[kind])
        borders.append(at)
    edge = GAP + borders[-1] * scale - small.getlength(f"{borders[-1]} ")
    drawn_to = -1.0
    for border in borders:
        x = GAP + border * scale
        draw.line((x, names, x, foot), fill=BLACK, width=3)
        last, end = border == borders[-1], x + small.getlength(f"{border} ")
        if last:  # it ends at its border, and always stands
            draw.text((x, foot), str(border), fill="#666666", font=small, anchor="ra")
        elif x > drawn_to and end <= edge:  # else its number would stand on another
            draw.text((x, foot), str(border), fill="#666666", font=small)
            drawn_to = end


def _paste(
    page: Image.Image,
    images: Sequence[Image.Image],
    corner: tuple[float, float],
    width: float,
    most_px: int,
) -> None:
    """Images side by side, in one scale, within a width and a height."""
    if not images or width < 3 * len(images):
        return
    tallest, wide = max(p.height for p in images), sum(p.width for p in images)
    scale = min(most_px / tallest, (width - 2 * len(images)) / wide)
    x = corner[0]
    for image in images:
        size = tuple(max(1, int(side * scale)) for side in image.size)
        page.paste(image.resize(size, Image.Resampling.LANCZOS), (round(x), round(corner[1])))
        x += size[0] + 2
