"""What the rows of every family have in common, and what is done to the text of any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from vlm.image_tokens import Pixels


class EncodedRow(Protocol):
    """An example as one family's processor makes it, ready to be batched.

    name: the example's own name. ids: what is read or learned. views: pixels of each view with its
    (image, view) numbers. cut: the number of text tokens that had to go to fit the context.
    """

    name: str
    ids: Tensor | Sequence[int]
    views: Sequence[tuple[Pixels, tuple[int, int]]]
    cut: int

    @property
    def length(self) -> int:
        """What the memory of a row grows with: positions of its stream, or columns of its line."""

    def with_text(self, count: int) -> EncodedRow:
        """The row with `count` text tokens, at least 1: cut at its end, or with more of what its
        end holds.

        Raises ValueError where it cannot have so many, as rows without text.
        """


def stretched(values: Tensor, length: int) -> Tensor:
    """Values [T] cut at their end to [length], or with more of the last one.

    >>> stretched(torch.tensor([1, 2]), 4).tolist(), stretched(torch.tensor([1, 2]), 1).tolist()
    ([1, 2, 2, 2], [1])
    """
    more = length - len(values)
    return values[:length] if more < 0 else torch.cat([values, values[-1:].expand(more)])


def require_text(count: int) -> None:
    """Raises ValueError for less than one text token."""
    if count < 1:
        raise ValueError(f"text tokens must be at least 1, found {count}")
