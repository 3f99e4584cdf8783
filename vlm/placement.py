"""Image runs in the text stream: the batch that decoder families read, and how tokens are placed.

A row of a batch is one stream of places. A place holds a text id, or IMAGE where an image token
stands. IMAGE is no id of any vocabulary, so text that happens to spell an image mark can never be
taken for an image.

A row is one example, padded to the longest of the batch; or, packed, the only row holds all
examples end to end, and none of them sees another.

Shapes: B row, S example, T place, V view, P packed image tokens, N target, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm.image_tokens import ViewGroup

IMAGE = -1
"""Stands in `ids` where an image token is placed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Examples as padded rows, or end to end in one packed row, with the views of their images.

    ids: int64[B, T], text ids, IMAGE at image places, any valid id at padding.
    valid: bool[B, T], False at padding, which is all on one side.
    scored: bool[B, T], True where the id is a target of the loss; never at IMAGE, padding or the
        first place of an example.
    groups: the views of all images, grouped by pixel size; empty for text alone. Their owners are
        numbers of examples.
    names: each example's own name, for messages and records.
    padding: "right" or "left", the side that padding lies on.
    bounds: int32[S + 1], where each example of a packed row begins, and the row's end; None where
        each has a row of its own.
    ghosts: blank views that go through the image tokenizer and the adaptor and are placed nowhere,
        so that sharded processes make the same calls whatever their rows hold.
    """

    ids: Tensor
    valid: Tensor
    scored: Tensor
    groups: tuple[ViewGroup, ...]
    names: tuple[str, ...]
    padding: str = "right"
    bounds: Tensor | None = None
    ghosts: tuple[ViewGroup, ...] = ()

    @property
    def example(self) -> Tensor:
        """The number of each place's example among `names`, int64[B, T]."""
        numbers = torch.arange(len(self.names), device=self.ids.device)
        if self.bounds is None:
            return numbers[:, None].expand(self.ids.shape)
        T = self.ids.shape[1]
        return numbers.repeat_interleave(self.bounds.diff(), output_size=T)[None]

    @property
    def positions(self) -> Tensor:
        """The number of each place within its example, from 0, int64[B, T]; padding gets 0."""
        if self.bounds is None:
            return positions(self.valid)
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        return places - self.bounds[self.example]

    @property
    def prefix(self) -> Tensor:
        """The places before an example's first target, bool[B, T]: image and prompt."""
        seen = self.scored.cumsum(1)
        if self.bounds is not None:
            seen = seen - seen[0, self.bounds[:-1]][self.example]
        return self.valid & (seen == 0)

    @property
    def targets(self) -> Tensor:
        """The ids to predict, int64[N], row by row."""
        return self.ids[self.scored]

    @property
    def target_rows(self) -> Tensor:
        """The number of each target's example among `names`, int64[N]."""
        return self.example[self.scored]

    def to(self, device: torch.device | str, pixel_dtype: torch.dtype | None = None) -> Batch:
        """The batch on a device; pixels also in `pixel_dtype` (None keeps theirs)."""
        return replace(
            self,
            ids=self.ids.to(device),
            valid=self.valid.to(device),
            scored=self.scored.to(device),
            groups=tuple(group.to(device, pixel_dtype) for group in self.groups),
            bounds=None if self.bounds is None else self.bounds.to(device),
            ghosts=tuple(group.to(device, pixel_dtype) for group in self.ghosts),
        )


def place(
    text: Tensor,
    is_image: Tensor,
    tokens: Tensor,
    example: Tensor,
    names: Sequence[str],
    bounds: Tensor | None = None,
) -> Tensor:
    """The stream of vectors: image tokens at their places, text vectors elsewhere.

    text: float[B, T, D]; what it holds at image places is ignored.
    is_image: bool[B, T], True at image places.
    tokens: float[P, D], in stream order; example: int64[P], the example of each.
    names: each example's name, for messages. bounds: of a packed row, as in `Batch`.
    Raises ValueError where an example has more or fewer places than tokens, naming every such one
    and both numbers.

    >>> text = torch.zeros(1, 3, 1)
    >>> is_image = torch.tensor([[False, True, True]])
    >>> image_tokens = torch.tensor([[5.0], [7.0]])
    >>> place(text, is_image, image_tokens, torch.tensor([0, 0]), ["row"])[0, :, 0].tolist()
    [0.0, 5.0, 7.0]
    """
    found = torch.bincount(example, minlength=len(names))
    if bounds is None:
        places = is_image.sum(1)
    else:
        places = F.pad(is_image[0].cumsum(0), (1, 0))[bounds].diff()
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
