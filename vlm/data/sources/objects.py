"""Boxes as ms-swift writes them: lists beside the turns, and marks in the turns where they belong.

Source: ms-swift's documentation, "Custom Dataset", section Grounding: `<ref-object>` and `<bbox>`
are replaced by the items of `ref` and `bbox` in their order, through all turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlm.data.boxes import check_box, four_numbers
from vlm.data.example import BadRow, Box, Turn
from vlm.pixels import BadImage, image_size
from vlm.pixels.image_ref import ImageRef

REF_MARK, BOX_MARK = "<ref-object>", "<bbox>"
KEYS = ("ref", "bbox", "bbox_type", "image_id")
SCALES = {"norm1000": 1000.0, "norm1": 1.0}
"""Kinds of coordinates that are shares of the image -> what its whole side is in them."""
_MARKS = re.compile(f"({re.escape(REF_MARK)}|{re.escape(BOX_MARK)})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """The texts that `<ref-object>` marks stand for, and the boxes of `<bbox>` marks."""

    refs: tuple[str, ...]
    boxes: tuple[Box, ...]


def read_objects(value: Any, name: str, images: Sequence[ImageRef]) -> Objects:
    """What a row's `objects` hold.

    A box's label is the text of the same number where there are as many texts as boxes, or the one
    text; else it has none ("").
    images: the row's, of which headers are read where coordinates are shares of them.
    Raises BadRow for other keys, and for boxes that `vlm.data.boxes` refuses.
    """
    place = f"{name}: objects"
    if not isinstance(value, Mapping) or not set(value) <= set(KEYS) or "bbox" not in value:
        found = sorted(map(str, value)) if isinstance(value, Mapping) else str(value)[:80]
        raise BadRow(
            f"{place}: expected the keys ref and bbox, with bbox_type and image_id where needed, "
            f"found {found}; --ignore-keys objects reads the row without"
        )
    refs, boxes = value.get("ref") or [], value["bbox"]
    kind, owners = value.get("bbox_type") or "real", value.get("image_id")
    if not isinstance(refs, list) or not all(isinstance(ref, str) and ref.strip() for ref in refs):
        raise BadRow(f"{place}: expected ref to be a list of texts, found {str(refs)[:80]}")
    if not isinstance(boxes, list):
        raise BadRow(f"{place}: expected bbox to be a list of boxes, found {str(boxes)[:80]}")
    if kind not in ("real", *SCALES):
        raise BadRow(
            f"{place}: expected bbox_type to be real, {' or '.join(SCALES)}, found {kind!r}"
        )
    owners = [0] * len(boxes) if owners is None else owners
    if (
        not isinstance(owners, list)
        or len(owners) != len(boxes)
        or not all(isinstance(i, int) and not isinstance(i, bool) for i in owners)
    ):
        raise BadRow(
            f"{place}: expected image_id to be the image's number for each of {len(boxes)} "
            f"boxes, found {str(owners)[:80]}"
        )
    bad = [i for i in owners if not 0 <= i < len(images)]
    if bad:
        raise BadRow(f"{place}: a box names image {bad[0]}, the row has {len(images)}")
    labels = refs if len(refs) == len(boxes) else (refs if len(refs) == 1 else [""]) * len(boxes)
    sizes = {i: _size_hw(images[i]) for i in set(owners)} if kind in SCALES else {}
    return Objects(
        refs=tuple(refs),
        boxes=tuple(
            Box(i, _corners(box, f"{place}: bbox {n} ({label!r})", kind, sizes.get(i)), label)
            for n, (i, box, label) in enumerate(zip(owners, boxes, labels))
        ),
    )


def place_objects(turns: Sequence[Turn], objects: Objects, name: str) -> tuple[Turn, ...]:
    """The turns with each mark replaced: by its text, or by its box's number.

    Raises BadRow where there are not as many marks as texts and boxes.

    >>> where = Objects(refs=("the cat",), boxes=(Box(0, (0, 0, 9, 9), "the cat"),))
    >>> asked = Turn("user", (None, "Find <ref-object>."))
    >>> [t.content for t in place_objects((asked, Turn("assistant", ("<bbox>",))), where, "r")]
    [(None, 'Find the cat.'), (0,)]
    """
    text = "".join(turn.text for turn in turns)
    for mark, key, given in (
        (REF_MARK, "ref", len(objects.refs)),
        (BOX_MARK, "bbox", len(objects.boxes)),
    ):
        if text.count(mark) != given:
            raise BadRow(
                f"{name}: expected one {mark} mark in the turns for each of objects' {key}, found "
                f"{text.count(mark)} marks and {given} of {key}"
            )
    refs, numbers = iter(objects.refs), iter(range(len(objects.boxes)))
    placed = []
    for turn in turns:
        content: list[str | int | None] = []
        for part in turn.content:
            pieces = _MARKS.split(part) if isinstance(part, str) else [part]
            for piece in pieces:
                if piece == BOX_MARK:
                    content.append(next(numbers))
                    continue
                piece = next(refs) if piece == REF_MARK else piece
                if isinstance(piece, str) and content and isinstance(content[-1], str):
                    content[-1] += piece
                elif piece != "":
                    content.append(piece)
        placed.append(replace(turn, content=tuple(content)))
    return tuple(placed)


def _corners(
    box: Any, place: str, kind: str, size_hw: tuple[int, int] | None
) -> tuple[float, float, float, float]:
    if size_hw is None:
        return check_box(box, place)
    whole = SCALES[kind]
    x0, y0, x1, y1 = four_numbers(box, place)
    if not 0 <= min(x0, y0, x1, y1) <= max(x0, y0, x1, y1) <= whole:
        raise BadRow(f"{place}: expected {kind} coordinates, 0 to {whole:g}, found {box}")
    height, width = size_hw
    scaled = x0 * width / whole, y0 * height / whole, x1 * width / whole, y1 * height / whole
    return check_box(scaled, place, size_hw)


def _size_hw(image: ImageRef) -> tuple[int, int]:
    try:
        return image_size(image)
    except BadImage as error:
        raise BadRow(str(error)) from error
