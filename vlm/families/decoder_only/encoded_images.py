"""Encoded images as a value: what an engine takes apart and puts together, whatever reads them.

Families whose module keeps image tokens in another form have a class of their own with the same
methods (`vlm.families.cross_attended.memory.Memory`).

Shapes: P packed image tokens, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class EncodedImages(NamedTuple):
    """The image tokens of a batch in stream order.

    tokens: float[P, D]. example: int64[P], the example of each.
    """

    tokens: Tensor
    example: Tensor

    def sizes(self, examples: int) -> list[int]:
        """For each of so many examples the number that another's images must have to stand in for
        its own; 0 where it has none."""
        return torch.bincount(self.example, minlength=examples).tolist()

    def of(self, example: int) -> EncodedImages:
        """The images of one example, as those of example 0."""
        tokens = self.tokens[self.example == example]
        return EncodedImages(tokens, self.example.new_zeros(len(tokens)))

    @classmethod
    def side_by_side(cls, parts: Sequence[EncodedImages]) -> EncodedImages:
        """The images of `parts`, at least one part, each of one example: as those of examples 0, 1,
        2 and so on.

        >>> part = EncodedImages(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
        >>> EncodedImages.side_by_side([part, part]).example.tolist()
        [0, 0, 1, 1]
        """
        example = torch.cat([part.example + number for number, part in enumerate(parts)])
        return cls(torch.cat([part.tokens for part in parts]), example)

    @classmethod
    def in_one_example(cls, parts: Sequence[EncodedImages]) -> EncodedImages:
        """The images of `parts`, at least one part, each of one example: as those of example 0, in
        their order."""
        return cls(
            torch.cat([part.tokens for part in parts]), torch.cat([part.example for part in parts])
        )
