"""Image runs in the text stream: the batch that decoder families read, and how tokens are placed.

A row of a batch is one stream of places. A place holds a text id, or IMAGE where an image token
stands. IMAGE is no id of any vocabulary, so text that happens to spell an image mark can never be
taken for an image.

Shapes: B example, T text position, V view, P packed image tokens, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlm.image_tokens import ViewGroup

IMAGE = -1
"""Stands in `ids` where an image token is placed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Examples as padded rows, with the views of their images.

    ids: int64[B, T], text ids, IMAGE at image places, any valid id at padding.
    valid: bool[B, T], False at padding, which is all on one side.
    scored: bool[B, T], True where the id is a target of the loss; never at IMAGE, padding or the
        first place of a row.
    groups: the views of all images, grouped by pixel size; empty for text alone.
    names: each row's own name, for messages and records.
    padding: "right" or "left", the side that padding lies on.
    """

    ids: Tensor
    valid: Tensor
    scored: Tensor
    groups: tuple[ViewGroup, ...]
    names: tuple[str, ...]
    padding: str = "right"

    @property
    def prefix(self) -> Tensor:
        """The places before a row's first target, bool[B, T]: image and prompt."""
        return self.valid & (self.scored.cumsum(1) == 0)

    @property
    def targets(self) -> Tensor:
        """The ids to predict, int64[N], row by row."""
        return self.ids[self.scored]

    @property
    def target_rows(self) -> Tensor:
        """The row of each target, int64[N]."""
        return self.scored.nonzero()[:, 0]

    def to(self, device: torch.device | str, pixel_dtype: torch.dtype | None = None) -> Batch:
        """The batch on a device; pixels also in `pixel_dtype` (None keeps theirs)."""
        return replace(
            self,
            ids=self.ids.to(device),
            valid=self.valid.to(device),
            scored=self.scored.to(device),
            groups=tuple(group.to(device, pixel_dtype) for group in self.groups),
        )


def place(
    text: Tensor, is_image: Tensor, tokens: Tensor, example: Tensor, names: Sequence[str]
) -> Tensor:
    """The stream of vectors: image tokens at their places, text vectors elsewhere.

    text: float[B, T, D]; what it holds at image places is ignored.
    is_image: bool[B, T], True at image places.
    tokens: float[P, D], in stream order; example: int64[P], the row of each.
    names: each row's name, for messages.
    Raises ValueError where a row has more or fewer places than tokens, naming every such row and
    both numbers.

    >>> text = torch.zeros(1, 3, 1)
    >>> is_image = torch.tensor([[False, True, True]])
    >>> image_tokens = torch.tensor([[5.0], [7.0]])
    >>> place(text, is_image, image_tokens, torch.tensor([0, 0]), ["row"])[0, :, 0].tolist()
    [0.0, 5.0, 7.0]
    """
    found = torch.bincount(example, minlength=len(names))
    places = is_image.sum(1)
    wrong = (found != places).nonzero()[:, 0].tolist()
    if wrong or len(found) != len(names):
        rows = "; ".join(
            f"{names[row]}: {int(places[row])} image places in the text, "
            f"{int(found[row])} image tokens from its images"
            for row in wrong
        )
        raise ValueError(f"image places and image tokens differ in {len(wrong)} rows: {rows}")
    return text.masked_scatter(is_image[..., None], tokens.to(text.dtype))


def positions(valid: Tensor) -> Tensor:
    """Positions int64[B, T] that count real places from 0 whatever side the padding lies on;
    padding gets 0.

    >>> positions(torch.tensor([[False, True, True]])).tolist()
    [[0, 0, 1]]
    """
    return (valid.long().cumsum(1) - 1).clamp(min=0)
