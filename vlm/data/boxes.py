"""What a true box must be, whatever source it comes from.

A box outside its image, without area, or in another frame (fractions, thousandths, a resized
image's pixels) trains a model wrongly and silently: here it is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from vlm.data.example import BadRow, Box

SLACK_PX = 1.0
"""How far a box may reach beyond its image, where it is cut: published sets round coordinates."""


def check_box(
    xyxy_px: Any, place: str, size_hw: tuple[int, int] | None = None
) -> tuple[float, float, float, float]:
    """The box x0, y0, x1, y1 in its image's own pixels, cut at the border.

    xyxy_px: four numbers. place: which box this is; it starts every message.
    size_hw: rows and columns of the image; None where they are not known yet, when only what
        holds for every image is checked.
    Raises BadRow where it is no four finite numbers, is inverted or without area, reaches more
    than SLACK_PX out of the image, or looks like fractions of the image.

    >>> check_box([10, 20, 30.5, 40.2], "row 1", (40, 60))
    (10.0, 20.0, 30.5, 40.0)
    """
    box = four_numbers(xyxy_px, place)
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        raise BadRow(
            f"{place}: expected x0 < x1 and y0 < y1, found the inverted box {_write(box)} (is it "
            "x, y, width, height, or y before x?)"
        )
    if x0 == x1 or y0 == y1:
        raise BadRow(f"{place}: expected x0 < x1 and y0 < y1, found {_write(box)}, without area")
    if min(box) >= 0 and max(box) <= 1 and size_hw != (1, 1):
        raise BadRow(
            f"{place}: expected pixels of the image, found {_write(box)}, which looks like "
            "fractions of it: multiply x by its width and y by its height"
        )
    if min(box) < -SLACK_PX:
        raise BadRow(f"{place}: expected a box inside its image, found {_write(box)}")
    x0, y0 = max(x0, 0.0), max(y0, 0.0)
    if size_hw is not None:
        height, width = size_hw
        if x1 > width + SLACK_PX or y1 > height + SLACK_PX:
            raise BadRow(
                f"{place}: expected a box inside its image of {width} × {height} pixels (width × "
                f"height), found {_write(box)}; coordinates are the original image's pixels, not "
                "thousandths and not those of a resized one"
            )
        x1, y1 = min(x1, float(width)), min(y1, float(height))
    if x0 >= x1 or y0 >= y1:
        raise BadRow(f"{place}: expected a box inside its image, found {_write(box)}, beside it")
    return x0, y0, x1, y1


def check_boxes(
    boxes: Sequence[Box], sizes_hw: Sequence[tuple[int, int]], name: str
) -> tuple[Box, ...]:
    """A row's boxes, each cut at the border of its image.

    sizes_hw: rows and columns of each of the row's images. name: the row's.
    Raises BadRow naming the row, the box's number and its label.
    """
    return tuple(
        Box(
            box.image,
            check_box(box.xyxy_px, f"{name}: box {i} ({box.label!r})", sizes_hw[box.image]),
            box.label,
            box.score,
        )
        for i, box in enumerate(boxes)
    )


def four_numbers(values: Any, place: str) -> tuple[float, ...]:
    """The values as floats. Raises BadRow where they are no four finite numbers."""
    usable = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == 4
    if not usable or not all(isinstance(v, Real) and not isinstance(v, bool) for v in values):
        raise BadRow(f"{place}: expected a box of four numbers, found {str(values)[:80]}")
    if not all(map(math.isfinite, values)):
        raise BadRow(f"{place}: expected a box of four finite numbers, found {_write(values)}")
    return tuple(map(float, values))


def _write(box: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"
