"""An image as a whole and as tiles of the best of some resolutions, views of another tokenizer.

LLaVA-NeXT's rule ("any resolution"): the image, stretched to one view, comes first; then, its
aspect kept, it is brought into the resolution that loses fewest of its pixels and, among those,
wastes least, put in the middle of black, and cut into tiles row by row.

Shapes: V view, H W pixel rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlm import tokenizers
from vlm.geometry import Resize
from vlm.image_tokens import ImageTokenizer, ImageTokens, Pixels
from vlm.pixels import PixelSpec


def best_resolution(
    size_hw: tuple[int, int], resolutions: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The rows and columns, of those given, in which most pixels of an image of `size_hw` stay
    apart; among equals the smallest, then the first.

    Source: transformers, `image_processing_utils.py`, `select_best_resolution`.

    >>> best_resolution((300, 900), [(672, 672), (336, 1008), (1008, 336)])
    (336, 1008)
    """
    (H, W), best, most, least = size_hw, resolutions[0], 0, math.inf
    for rows, columns in resolutions:
        scale = min(columns / W, rows / H)
        kept = min(int(W * scale) * int(H * scale), W * H)
        wasted = rows * columns - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (rows, columns), kept, wasted
    return best


@dataclass(frozen=True, kw_only=True, slots=True)
class PinpointTilesSpec:
    """An image as a whole, then as tiles, row by row.

    tile: preprocessing of one view, square, by fit "stretch".
    resolutions: rows and columns in pixels that an image may be brought to, in whole tiles.
    Raises ValueError showing the field and its value.
    """

    tile: PixelSpec
    resolutions: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        h, w = self.tile.size_hw
        if h != w or self.tile.fit != "stretch" or self.tile.resize_hw is not None:
            raise ValueError(f"tile: expected a square by fit 'stretch', found {self.tile}")
        wrong = [hw for hw in self.resolutions if len(hw) != 2 or hw[0] % h or hw[1] % h]
        if wrong or not self.resolutions or min(map(min, self.resolutions)) < 1:
            raise ValueError(
                f"resolutions: expected rows and columns in whole tiles of {h}, found "
                f"{wrong or self.resolutions}"
            )

    def layout(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles of an image of `size_hw` pixels."""
        side = self.tile.size_hw[0]
        rows, columns = best_resolution(size_hw, self.resolutions)
        return rows // side, columns // side

    def view_sizes(self, size_hw: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The pixel size of each view, all alike."""
        rows, columns = self.layout(size_hw)
        return (self.tile.size_hw,) * (1 + rows * columns)

    def resize_record(self, size_hw: tuple[int, int]) -> Resize:
        """Where the pixels of an image go in the whole of its tiles."""
        best_hw, (rows, columns), (top, left) = self._placed(size_hw)
        scale_xy = (columns / size_hw[1], rows / size_hw[0])
        return Resize(size_hw, best_hw, scale_xy, (float(left), float(top)))

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """The views of an RGB image, each float32[3, H, W]."""
        (H, W), inner_hw, (top, left) = self._placed((image.height, image.width))
        inner = self.tile.with_size(inner_hw).resize_u8(image)
        joined = torch.zeros(3, H, W, dtype=torch.uint8)
        joined[:, top : top + inner_hw[0], left : left + inner_hw[1]] = inner
        side = self.tile.size_hw[0]
        tiles = [
            self.tile.normalise(joined[:, y : y + side, x : x + side])
            for y in range(0, H, side)
            for x in range(0, W, side)
        ]
        return [*self.tile(image), *tiles]

    def unnormalise(self, pixels: Tensor) -> Tensor:
        """Normalised pixels of views as images to look at, see `PixelSpec.unnormalise`."""
        return self.tile.unnormalise(pixels)

    def _placed(
        self, size_hw: tuple[int, int]
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Rows and columns of the whole of the tiles, those of the image in it, and the row and
        column of the image's corner.

        Source: transformers, `image_processing_utils.py`, `get_patch_output_size`.
        """
        (H, W), best_hw = size_hw, best_resolution(size_hw, self.resolutions)
        rows, columns = best_hw
        if columns / W < rows / H:
            inner_hw = min(math.ceil(H * (columns / W)), rows), columns
        else:
            inner_hw = rows, min(math.ceil(W * (rows / H)), columns)
        return best_hw, inner_hw, ((rows - inner_hw[0]) // 2, (columns - inner_hw[1]) // 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class PinpointTilesConfig:
    """What rebuilds a `PinpointTilesTokenizer`.

    inner: what `vlm.tokenizers.config_to_dict` gives of the tokenizer of each view.
    resolutions: as in `PinpointTilesSpec`.
    """

    inner: dict[str, Any]
    resolutions: tuple[tuple[int, int], ...]


Config = PinpointTilesConfig


class PinpointTilesTokenizer(ImageTokenizer):
    """Another tokenizer over an image and the tiles of its best resolution.

    inner: a finished tokenizer whose preprocessing stretches images to a square.
    resolutions: as in `PinpointTilesSpec`.
    """

    def __init__(self, inner: ImageTokenizer, *, resolutions: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.pixel_spec = PinpointTilesSpec(tile=inner.pixel_spec, resolutions=resolutions)
        self.inner = inner
        self.dim, self.pooled_dim = inner.dim, inner.pooled_dim

    @property
    def config(self) -> PinpointTilesConfig:
        return PinpointTilesConfig(
            inner=tokenizers.config_to_dict(self.inner), resolutions=self.pixel_spec.resolutions
        )

    def forward(self, pixels: Pixels) -> ImageTokens:
        """The inner tokens of V views, pixels float[V, 3, H, W]: each view on its own."""
        return self.inner(pixels)

    def parts(self) -> dict[str, nn.Module]:
        return dict(self.inner.parts())


def build(config: PinpointTilesConfig) -> PinpointTilesTokenizer:
    """The tokenizer of `config`, its inner one with random weights; downloads nothing."""
    return PinpointTilesTokenizer(tokenizers.build(config.inner), resolutions=config.resolutions)
