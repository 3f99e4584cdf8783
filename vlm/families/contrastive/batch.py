"""Images and their captions as rows and batches.

Shapes: B example, V view, T text position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.families.rows import require_text, stretched
from vlm.image_tokens import Pixels, ViewGroup, group_views


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One image and its caption, ready to be batched.

    name: the example's own name.
    ids: int64[T], pads included where the model reads a fixed length.
    views: pixels of each view, without a view axis, with its (image, view) numbers.
    cut: the number of text tokens that had to go to fit the context.
    valid: bool[T], False at pads; None where there are none.
    pad_id: what stands after the text in a batch with longer ones.
    """

    name: str
    ids: Tensor
    views: list[tuple[Pixels, tuple[int, int]]]
    cut: int = 0
    valid: Tensor | None = None
    pad_id: int = 0

    @property
    def length(self) -> int:
        """Tokens of its text, pads included."""
        return len(self.ids)

    def with_text(self, count: int) -> Pair:
        """The pair with `count` text tokens, at least 1, cut at its end, or with more of what its
        end holds."""
        require_text(count)
        valid = None if self.valid is None else stretched(self.valid, count)
        return replace(self, ids=stretched(self.ids, count), valid=valid)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch:
    """Pairs of one batch: row b of the ids and the views of example b belong together.

    ids: int64[B, T]; valid: bool[B, T], False at pads.
    groups: the views of all images, those of one size together. names: of the examples.
    """

    ids: Tensor
    valid: Tensor
    groups: tuple[ViewGroup, ...]
    names: tuple[str, ...]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PairBatch:
        """The batch on a device, pixels also in `dtype` (None keeps theirs)."""
        return PairBatch(
            ids=self.ids.to(device),
            valid=self.valid.to(device),
            groups=tuple(group.to(device, dtype) for group in self.groups),
            names=self.names,
        )


class Texts(NamedTuple):
    """Texts as ids.

    ids: int64[B, T]; valid: bool[B, T], False at pads.
    cut: the number of tokens of each text that had to go to fit the context.
    """

    ids: Tensor
    valid: Tensor
    cut: tuple[int, ...]


def collate_pairs(pairs: Sequence[Pair]) -> PairBatch:
    """A batch of pairs, in their order, texts padded at their end to the longest."""
    rows = [(pair.ids, pair.valid, pair.pad_id) for pair in pairs]
    ids, valid = stack_ids(rows)
    return PairBatch(
        ids=ids, valid=valid, groups=group_views(pairs), names=tuple(pair.name for pair in pairs)
    )


def stack_ids(
    rows: Sequence[tuple[Tensor, Tensor | None, int]], length: int | None = None, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows of (ids, valid or None, pad id) as ids int64[B, T] and valid bool[B, T]."""
    T = max((len(ids) for ids, _, _ in rows), default=0) if length is None else length
    ids_BT = torch.empty(len(rows), T, dtype=torch.long)
    valid_BT = torch.zeros(len(rows), T, dtype=torch.bool)
    for b, (ids, valid, pad_id) in enumerate(rows):
        start = T - len(ids) if left else 0
        ids_BT[b] = pad_id
        ids_BT[b, start : start + len(ids)] = ids
        valid_BT[b, start : start + len(ids)] = True if valid is None else valid
    return ids_BT, valid_BT
