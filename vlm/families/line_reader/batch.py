"""Lines as rows and batches of one width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlm.losses.ctc import least_columns
from vlm.tokenizers.columns import STRIDE


@dataclass(frozen=True, kw_only=True, slots=True)
class LineBatch:
    """Lines of one width.

    pixels: float[V, 3, H, W].
    ids: int64[sum of lengths], the characters of all lines, one after another; none to be read.
    lengths: int64[V], characters of each line. names: each line's own name.
    """

    pixels: Tensor
    ids: Tensor
    lengths: Tensor
    names: tuple[str, ...]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LineBatch:
        """The batch on a device; pixels also in `dtype` (None keeps theirs)."""
        return replace(
            self,
            pixels=self.pixels.to(device, dtype),
            ids=self.ids.to(device),
            lengths=self.lengths.to(device),
        )


@dataclass(frozen=True, slots=True)
class LineRow:
    """One line: pixels float[3, H, W], its characters as ids, and how many of them were cut (none
    are)."""

    name: str
    pixels: Tensor
    ids: tuple[int, ...]
    cut: int = 0

    @property
    def views(self) -> tuple[tuple[Tensor, tuple[int, int]], ...]:
        """Its one view with its (image, view) numbers, as other rows have them."""
        return ((self.pixels, (0, 0)),)

    @property
    def length(self) -> int:
        """Columns of its pixels, by which its tokens go."""
        return self.pixels.shape[-1]

    def with_text(self, count: int) -> LineRow:
        """Raises ValueError: a line is read by its pixels alone."""
        raise ValueError("a line reader's rows have no text tokens; leave --tokens out")

    @property
    def fits(self) -> bool:
        """Whether the image has tokens enough for the text; such a line is not learned from."""
        return least_columns(self.ids) <= self.pixels.shape[-1] // STRIDE


def collate_lines(rows: Sequence[LineRow]) -> LineBatch:
    """Lines of one width. Raises ValueError where they have several."""
    widths = {row.pixels.shape[-1] for row in rows}
    if len(widths) != 1:
        raise ValueError(f"expected lines of one width, found {sorted(widths)}")
    return LineBatch(
        pixels=torch.stack([row.pixels for row in rows]),
        ids=torch.tensor([id for row in rows for id in row.ids], dtype=torch.long),
        lengths=torch.tensor([len(row.ids) for row in rows]),
        names=tuple(row.name for row in rows),
    )


def by_width(widths: Sequence[int]) -> list[list[int]]:
    """Numbers of lines in groups of one width, narrow ones first, each group in order.

    >>> by_width([100, 300, 100])
    [[0, 2], [1]]
    """
    groups: dict[int, list[int]] = {}
    for number, width in enumerate(widths):
        groups.setdefault(width, []).append(number)
    return [groups[width] for width in sorted(groups)]
