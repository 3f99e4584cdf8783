"""What all ways of writing boxes share: the protocol, what is read of an answer, and frames.

Boxes are x0, y0, x1, y1 in the pixels of the image as it came, on pixel edges, the end exclusive,
as in `vlm.geometry`. A codec alone knows the numbers that its text holds. Answers are read without
ever raising: what cannot be read gives no box and a fault.

Shapes: N box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm.geometry import Resize, table

NO_BOX = "no box"
MALFORMED = "a malformed box"
NO_AREA = "a box without area"

FRAMES = ("input", "image")
"""What a side of 0 to 1 spans: the image as the image tokenizer sees it, padding and all, or the
image as it came."""

NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)"
"""A number in a text, as a regular expression's group."""


@dataclass(frozen=True, slots=True)
class ReadBox:
    """A box of an answer.

    xyxy_px: in the pixels of the image as it came, cut at its border. spans: the characters of the
    answer, (start, end), that write its numbers.
    """

    xyxy_px: tuple[float, float, float, float]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ReadBoxes:
    """The boxes of an answer, in the order written. fault: why something written is no box: NO_BOX
    (there was nothing to read), MALFORMED (one could not be read), NO_AREA (one is empty or
    inverted); None where all was read."""

    boxes: tuple[ReadBox, ...]
    fault: str | None


class BoxCodec(Protocol):
    """How a model writes boxes: a frozen value that a folder's config.json names by its kind.

    box_tokens: how many ids to allow for a box, by which the longest answer is set.
    """

    box_tokens: ClassVar[int]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens that write numbers, each of which must be one id; none where text does."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Texts around boxes and labels. With `tokens` they are kept in an answer where they are
        special tokens of the text tokenizer."""

    def write(
        self,
        boxes_xyxy_px: ArrayLike,
        resize: Resize,
        labels: Sequence[str] | None = None,
        before: str = "",
    ) -> str:
        """Boxes of one image, [N, 4] in its own pixels, after a text that is given back with them.

        resize: how the image came into the image tokenizer's view. labels: of each box, "" for
            none; None for none at all. A codec that writes labels writes those of neighbours once.
        before: the text that the boxes follow. A label with which it ends is the first box's own,
            and not written twice.
        """

    def read(self, text: str, resize: Resize) -> ReadBoxes:
        """The boxes in an answer's text, whose end token is gone; any text may stand between them.
        Never raises."""


def to_shares(boxes_xyxy_px: ArrayLike, resize: Resize, frame: str) -> NDArray[np.float64]:
    """Boxes of the image as it came, [N, 4], as shares of a frame: float64[N, 4], 0 to 1 within."""
    boxes, size_hw = table(boxes_xyxy_px, 4, "boxes"), resize.input_hw
    if frame == "input":
        boxes, size_hw = resize.boxes(boxes), resize.output_hw
    return boxes / np.tile(size_hw[::-1], 2)


def from_shares(shares: ArrayLike, resize: Resize, frame: str) -> NDArray[np.float64]:
    """Boxes as shares of a frame, [N, 4], in the pixels of the image as it came, cut at its border:
    float64[N, 4]."""
    shares = table(shares, 4, "shares")
    if frame == "input":
        return resize.invert_boxes(shares * np.tile(resize.output_hw[::-1], 2), clip=True)
    sides = np.tile(resize.input_hw[::-1], 2)
    return (shares * sides).clip(0, sides)


def read_boxes(
    boxes_xyxy_px: NDArray[np.float64],
    spans: Sequence[tuple[tuple[int, int], ...]],
    malformed: bool,
) -> ReadBoxes:
    """What was read: boxes float64[N, 4] with the characters of each; those without area are left
    out. malformed: whether something else was no box."""
    kept = tuple(
        ReadBox(tuple(box), own)
        for box, own in zip(boxes_xyxy_px.tolist(), spans, strict=True)
        if box[0] < box[2] and box[1] < box[3]
    )
    if malformed:
        return ReadBoxes(kept, MALFORMED)
    if not spans:
        return ReadBoxes((), NO_BOX)
    return ReadBoxes(kept, None if len(kept) == len(spans) else NO_AREA)
