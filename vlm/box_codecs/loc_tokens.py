"""Boxes as four `<loc>` tokens: PaliGemma's, and those that `--loc-bins` gives any language model.

Source: arXiv 2407.07726, section 3.2.5; big_vision, `configs/proj/paligemma/README.md`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm.box_codecs.codec import FRAMES, ReadBoxes, from_shares, read_boxes, to_shares
from vlm.geometry import Resize, table

ORDERS = {"yxyx": (1, 0, 3, 2), "xyxy": (0, 1, 2, 3)}
"""Order of a box's four tokens -> which of x0, y0, x1, y1 each is. A swap is its own inverse."""
_TOKEN = re.compile(r"<loc([0-9]{4})>")


@dataclass(frozen=True, kw_only=True, slots=True)
class LocTokens:
    """Boxes as four tokens each, `<loc0000>` to the last bin; labels are not written.

    bins: equal parts of each axis of the frame; a coordinate is read back as its bin's middle, so
        that it is off by half a bin at most.
    order: "yxyx" (top, left, bottom, right: PaliGemma's) or "xyxy".
    frame: what 0 to 1 spans: "input", the image as the image tokenizer sees it, padding and all;
        or "image", the image as it came. A box's part outside the frame is cut.

    >>> loc, same = LocTokens(bins=10), Resize((100, 200), (100, 200), (1, 1), (0, 0))
    >>> loc.write([(20, 10, 160, 100)], same)
    '<loc0001><loc0001><loc0009><loc0008>'
    >>> loc.decode([[1, 1, 9, 8]], same).tolist()
    [[30.0, 15.0, 170.0, 95.0]]
    """

    box_tokens: ClassVar[int] = 4
    tags: ClassVar[tuple[str, ...]] = ()

    bins: int = 1024
    order: str = "yxyx"
    frame: str = "input"

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= 10_000:
            raise ValueError(f"bins must be 2 to 10000, found {self.bins}")
        if self.order not in ORDERS:
            raise ValueError(f"order is one of {', '.join(ORDERS)}, found {self.order!r}")
        if self.frame not in FRAMES:
            raise ValueError(f"frame is one of {', '.join(FRAMES)}, found {self.frame!r}")

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token of each bin, in order."""
        return tuple(map(_loc, range(self.bins)))

    def encode(self, boxes_xyxy_px: ArrayLike, resize: Resize) -> NDArray[np.int64]:
        """Boxes of the image as it came, [N, 4], as bins in this order: int64[N, 4].

        resize: how the image came into the image tokenizer's view.
        """
        shares = to_shares(boxes_xyxy_px, resize, self.frame)
        bins = np.floor(shares * self.bins).clip(0, self.bins - 1).astype(np.int64)
        return bins[:, ORDERS[self.order]]

    def decode(self, bins: ArrayLike, resize: Resize) -> NDArray[np.float64]:
        """Bins in this order, [N, 4], as boxes in the pixels of the image as it came, cut at its
        border: float64[N, 4]. A box may come out empty or inverted, as it was written."""
        shares = (table(bins, 4, "bins")[:, ORDERS[self.order]] + 0.5) / self.bins
        return from_shares(shares, resize, self.frame)

    def write(
        self,
        boxes_xyxy_px: ArrayLike,
        resize: Resize,
        labels: Sequence[str] | None = None,
        before: str = "",
    ) -> str:
        """See `BoxCodec.write`."""
        bins = self.encode(boxes_xyxy_px, resize)
        return before + "".join(map(_loc, bins.flatten().tolist()))

    def read(self, text: str, resize: Resize) -> ReadBoxes:
        """See `BoxCodec.read`. Where tokens in a row are not in fours, none of the answer is taken:
        which of them belong together is not known."""
        runs: list[list[re.Match]] = []
        for match in _TOKEN.finditer(text):
            if int(match[1]) >= self.bins:
                continue
            if not runs or runs[-1][-1].end() != match.start():
                runs.append([])
            runs[-1].append(match)
        if any(len(run) % 4 for run in runs):
            return read_boxes(np.empty((0, 4)), (), malformed=True)
        fours = [run[i : i + 4] for run in runs for i in range(0, len(run), 4)]
        boxes = self.decode([[int(match[1]) for match in four] for four in fours], resize)
        return read_boxes(boxes, [tuple(m.span() for m in four) for four in fours], False)


def _loc(number: int) -> str:
    return f"<loc{number:04d}>"
