"""The contract between images and text: what an image tokenizer gives, and what every family takes.

An image is cut into one or more *views* (one for most models, several for tiled ones); each view
becomes L tokens. All views of a batch lie flattened on one axis, whatever image and example they
come from. This file knows no backbone, no text and no training.

Shapes: V view, L image tokens per view, P packed image tokens of all views, D width,
H W pixel rows and columns, h w patch rows and columns.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vlm.pixels import PixelSpec

Pixels = Tensor | tuple["Pixels", ...]
"""Normalised pixels: float[V, 3, H, W], or a tuple of these where several towers see each view."""


class TokenShape(NamedTuple):
    """How many tokens one view gives: `length`, of which the last h * w lie on `grid_hw` (row by
    row) and the ones before it are prefix tokens (class, distillation, register). `grid_hw` is
    None where tokens have no order in space (learned queries)."""

    length: int
    grid_hw: tuple[int, int] | None

    @property
    def prefix(self) -> int:
        """Number of tokens before the grid; 0 where there is no grid."""
        return 0 if self.grid_hw is None else self.length - self.grid_hw[0] * self.grid_hw[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokens:
    """The tokens of V views.

    tokens: float[V, L, D].
    grid_hw: patch rows and columns of the last h * w tokens; None for unordered queries.
    valid: bool[V, L], False at padding; None means that all are valid.
    pooled: float[V, D'], one vector for each view where the backbone has a pooling; else None.
    owner: int64[V, 3], (example in the batch, image in the example, view in the image) of each
        view; None until a family or collator, which know it, say so.
    """

    tokens: Tensor
    grid_hw: tuple[int, int] | None
    valid: Tensor | None = None
    pooled: Tensor | None = None
    owner: Tensor | None = None

    @property
    def shape(self) -> TokenShape:
        return TokenShape(self.tokens.shape[1], self.grid_hw)

    def owned_by(self, owner: Tensor) -> ImageTokens:
        """The same tokens, with the owner int64[V, 3] of each view."""
        return replace(self, owner=owner)

    def with_tokens(self, tokens: Tensor, shape: TokenShape) -> ImageTokens:
        """The same views with other tokens: float[V, shape.length, D]. Keeps owner, and valid where
        the shape stays; drops pooled, which belongs to the old width."""
        if tokens.shape[1] != shape.length:
            raise ValueError(
                f"tokens have length {tokens.shape[1]}, their shape says {shape.length}"
            )
        valid = self.valid if shape == self.shape else None
        return replace(self, tokens=tokens, grid_hw=shape.grid_hw, valid=valid, pooled=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewGroup:
    """The views of a batch that share one pixel size, so that they stack.

    pixels: float[V, 3, H, W], or a tuple of these; int64[V, 2, L] where the views are texts that a
        docked text encoder reads (`vlm.families.decoder_only.docked_text`).
    owner: int64[V, 3], as in ImageTokens.
    """

    pixels: Pixels
    owner: Tensor

    @property
    def is_text(self) -> bool:
        """Whether the views are texts."""
        return is_text(self.pixels)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ViewGroup:
        """The group on a device, pixels also in `dtype` (None keeps theirs)."""
        dtype = None if self.is_text else dtype
        return ViewGroup(
            pixels=map_pixels(lambda t: t.to(device, dtype), self.pixels),
            owner=self.owner.to(device),
        )


def is_text(pixels: Pixels) -> bool:
    """Whether a view, or several, is a text for a docked encoder, and not an image."""
    return isinstance(pixels, Tensor) and not pixels.is_floating_point()


def map_pixels(function, pixels: Pixels) -> Pixels:
    """`pixels` with `function` applied to every tensor in it."""
    if isinstance(pixels, Tensor):
        return function(pixels)
    return tuple(map_pixels(function, part) for part in pixels)


def pixel_shape(pixels: Pixels) -> tuple:
    """The shape of `pixels`; of those of several towers, the shape of each."""
    if isinstance(pixels, Tensor):
        return tuple(pixels.shape)
    return tuple(map(pixel_shape, pixels))


def pixel_hw(pixels: Pixels) -> tuple[int, int]:
    """Rows and columns of the first (for pairs: the high-resolution) tensor of `pixels`."""
    while not isinstance(pixels, Tensor):
        pixels = pixels[0]
    return pixels.shape[-2], pixels.shape[-1]


def pack(groups: list[ImageTokens]) -> tuple[Tensor, Tensor]:
    """All valid tokens in stream order: by example, then image, then view.

    groups: ImageTokens of one width, each with its owner.
    Returns (tokens float[P, D], example int64[P]): the packed tokens and each one's example.
    """
    widths = {group.tokens.shape[-1] for group in groups}
    if len(widths) != 1:
        raise ValueError(f"groups to pack must share one width, found {sorted(widths)}")
    if any(group.owner is None for group in groups):
        raise ValueError("groups to pack must say the owner of each view, found None")
    tokens, owners, lengths = [], [], []
    for group in groups:
        V, L, D = group.tokens.shape
        if group.valid is None:
            tokens.append(group.tokens.reshape(V * L, D))
            lengths.append(torch.full((V,), L, device=group.tokens.device))
        else:
            tokens.append(group.tokens[group.valid])
            lengths.append(group.valid.sum(1))
        owners.append(group.owner)
    tokens_PD, owner_V3, lengths_V = torch.cat(tokens), torch.cat(owners), torch.cat(lengths)
    example_P = owner_V3[:, 0].repeat_interleave(lengths_V)
    order_V = stream_order(owner_V3)
    if bool((order_V[1:] > order_V[:-1]).all()):
        return tokens_PD, example_P
    view_P = torch.arange(len(owner_V3), device=tokens_PD.device).repeat_interleave(lengths_V)
    rank_V = torch.empty_like(order_V)
    rank_V[order_V] = torch.arange(len(order_V), device=order_V.device)
    order_P = torch.argsort(rank_V[view_P], stable=True)
    return tokens_PD[order_P], example_P[order_P]


def stream_order(owner: Tensor) -> Tensor:
    """The permutation int64[V] that sorts owner int64[V, 3] by example, then image, then view.

    >>> stream_order(torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0]])).tolist()
    [2, 1, 0]
    """
    order = torch.arange(len(owner), device=owner.device)
    for column in (2, 1, 0):
        order = order[torch.argsort(owner[order, column], stable=True)]
    return order


class ImageTokenizer(nn.Module, ABC):
    """Turns pixels into image tokens; owns its preprocessing.

    A subclass sets `dim` (width D of its tokens), `pooled_dim` (width of `pooled`, or None) and
    `pixel_spec` (how an image becomes its pixels), and implements `forward` and `parts`. One of two
    towers sets `high_resolution` and `low_resolution`, the names of their sub-modules; what sees
    high resolution beside its tower has a name that begins alike.
    """

    high_resolution: ClassVar[str | None] = None
    low_resolution: ClassVar[str | None] = None
    dim: int
    pooled_dim: int | None = None
    pixel_spec: PixelSpec

    def __init__(self) -> None:
        super().__init__()
        self._shapes: dict[tuple, TokenShape] = {}
        self._meta: list[ImageTokenizer] = []  # in a list, so that it is no sub-module

    @abstractmethod
    def forward(self, pixels: Pixels) -> ImageTokens:
        """The tokens of V views, pixels as `pixel_spec` makes them."""

    @abstractmethod
    def parts(self) -> Mapping[str, nn.Module]:
        """Sub-modules by name, in the order of computation, for freezing and sharding; together
        they hold every parameter, each once."""

    def shapes_for(self, size_hw: tuple[int, int]) -> tuple[TokenShape, ...]:
        """The shape of each view of an image of `size_hw` pixels, before any compute.

        Exact by construction: the tokenizer's own code runs on the meta device, where tensors
        have shapes and no data. Remembered for each pixel size.
        """
        shapes = []
        for view_hw in self.pixel_spec.view_sizes(size_hw):
            if view_hw not in self._shapes:
                self._shapes[view_hw] = self._meta_shape(view_hw)
            shapes.append(self._shapes[view_hw])
        return tuple(shapes)

    def tokens_for(self, size_hw: tuple[int, int]) -> int:
        """The exact number of tokens of an image of `size_hw` pixels, all views together."""
        return sum(shape.length for shape in self.shapes_for(size_hw))

    def _meta_shape(self, view_hw: tuple) -> TokenShape:
        if not self._meta:
            self._meta.append(meta_twin(self))
        twin = self._meta[0]
        with torch.no_grad():
            dtype = next((p.dtype for p in twin.parameters()), torch.float32)
            return twin(meta_pixels(view_hw, dtype)).shape

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_meta": []}


def meta_twin(module: nn.Module) -> nn.Module:
    """A copy of `module` in evaluation mode whose parameters and buffers have shapes, no values."""
    memo = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(module, memo).eval()


def meta_pixels(view_hw: tuple, dtype: torch.dtype) -> Pixels:
    """Pixels of one view on the meta device; nested sizes, one for each tower, give a tuple."""
    return blank_pixels(view_hw, device="meta", dtype=dtype)


def blank_pixels(view_hw: tuple, **options) -> Pixels:
    """Pixels of one view that are all zero; nested sizes, one for each tower, give a tuple.

    options: of `torch.zeros`.
    """
    if isinstance(view_hw[0], tuple):
        return tuple(blank_pixels(part, **options) for part in view_hw)
    return torch.zeros(1, 3, *view_hw, **options)


def group_views(rows: Sequence[Any]) -> tuple[ViewGroup, ...]:
    """The views of rows of any family (`views`), those of one pixel size together, each with its
    owner."""
    groups: dict[tuple, tuple[list, list]] = {}
    for b, row in enumerate(rows):
        for pixels, (image, view) in row.views:
            views, owners = groups.setdefault(pixel_shape(pixels), ([], []))
            views.append(pixels)
            owners.append((b, image, view))
    return tuple(
        ViewGroup(pixels=_stack(views), owner=torch.tensor(owners))
        for views, owners in groups.values()
    )


def _stack(views: Sequence[Pixels]) -> Pixels:
    if isinstance(views[0], Tensor):
        return torch.stack(list(views))
    return tuple(_stack(part) for part in zip(*views))
