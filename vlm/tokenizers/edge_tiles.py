"""An image whose long side is brought to a size, cut into tiles, each a view of another tokenizer.

Idefics3's and SmolVLM's rule: the long side becomes `long_px`, both sides are stretched up to whole
tiles, the tiles follow row by row, and the whole image, stretched to one tile, comes last.

Shapes: V view, H W pixel rows and columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn

from vlm import tokenizers
from vlm.geometry import Resize
from vlm.image_tokens import ImageTokenizer, ImageTokens, Pixels
from vlm.pixels import PixelSpec

MOST_PX = 4096
"""The longest side of an image after its first resize, whatever is asked.
Source: transformers, `image_processing_idefics3.py`, `MAX_IMAGE_SIZE`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeTilesSpec:
    """An image as tiles, row by row, then the whole; as one view where it fills one tile alone.

    tile: preprocessing of one view, square, by fit "stretch".
    long_px: the long side after the first resize; small images are enlarged to it too.
    splits: whether there are tiles at all; else each image is one view.
    Raises ValueError showing the field and its value.
    """

    tile: PixelSpec
    long_px: int
    splits: bool

    def __post_init__(self) -> None:
        h, w = self.tile.size_hw
        if h != w or self.tile.fit != "stretch" or self.tile.resize_hw is not None:
            raise ValueError(f"tile: expected a square by fit 'stretch', found {self.tile}")
        if self.long_px < 1:
            raise ValueError(f"long_px must be at least 1, found {self.long_px}")

    def layout(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles of an image of `size_hw` pixels; 1, 1 where it is one view."""
        if not self.splits:
            return 1, 1
        side = self.tile.size_hw[0]
        H, W = self._long_hw(size_hw)
        aspect = W / H
        if W >= H:
            columns = math.ceil(W / side)
            return math.ceil(int(columns * side / aspect) / side), columns
        rows = math.ceil(H / side)
        return rows, math.ceil(int(rows * side * aspect) / side)

    def view_sizes(self, size_hw: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The pixel size of each view, all alike."""
        rows, columns = self.layout(size_hw)
        count = rows * columns
        return (self.tile.size_hw,) * (count + (count > 1))

    def resize_record(self, size_hw: tuple[int, int]) -> Resize:
        """Where the pixels of an image go in the whole of its tiles."""
        return self.tile.with_size(self._whole_hw(size_hw)).resize_record(size_hw)

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """The views of an RGB image, each float32[3, H, W]."""
        size_hw, side = (image.height, image.width), self.tile.size_hw[0]
        image = _resized(self.tile, image, self._long_hw(size_hw))
        rows, columns = self.layout(size_hw)
        if rows * columns == 1:
            return self.tile(image)
        image = _resized(self.tile, image, self._whole_hw(size_hw))
        tiles = [
            image.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
            for y in range(rows)
            for x in range(columns)
        ]
        return [view for part in (*tiles, image) for view in self.tile(part)]

    def unnormalise(self, pixels: Tensor) -> Tensor:
        """Normalised pixels of views as images to look at, see `PixelSpec.unnormalise`."""
        return self.tile.unnormalise(pixels)

    def _whole_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of pixels of all tiles together."""
        rows, columns = self.layout(size_hw)
        side = self.tile.size_hw[0]
        return rows * side, columns * side

    def _long_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns after the first resize: the short side cut to whole pixels, then up to
        an even number.

        Source: transformers, `image_processing_idefics3.py`, `get_resize_output_image_size`.
        """
        (H, W), long = size_hw, self.long_px
        aspect = W / H
        if W >= H:
            short = int(long / aspect)
            H, W = max(short + short % 2, 1), long
        else:
            short = int(long * aspect)
            H, W = long, max(short + short % 2, 1)
        aspect = W / H
        if W >= H and W > MOST_PX:
            H, W = max(int(MOST_PX / aspect), 1), MOST_PX
        elif H > W and H > MOST_PX:
            H, W = MOST_PX, max(int(MOST_PX * aspect), 1)
        return H, W


def _resized(tile: PixelSpec, image: Image.Image, size_hw: tuple[int, int]) -> Image.Image:
    """An image brought to rows and columns by the filter and backend of a view."""
    pixels = tile.with_size(size_hw).resize_u8(image)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeTilesConfig:
    """What rebuilds an `EdgeTilesTokenizer`.

    inner: what `vlm.tokenizers.config_to_dict` gives of the tokenizer of each view.
    long_px, splits: as in `EdgeTilesSpec`.
    """

    inner: dict[str, Any]
    long_px: int
    splits: bool


Config = EdgeTilesConfig


class EdgeTilesTokenizer(ImageTokenizer):
    """Another tokenizer over the tiles of an image and its whole.

    inner: a finished tokenizer whose preprocessing stretches images to a square.
    long_px, splits: as in `EdgeTilesSpec`.
    """

    def __init__(self, inner: ImageTokenizer, *, long_px: int, splits: bool) -> None:
        super().__init__()
        self.pixel_spec = EdgeTilesSpec(tile=inner.pixel_spec, long_px=long_px, splits=splits)
        self.inner = inner
        self.dim, self.pooled_dim = inner.dim, inner.pooled_dim

    @property
    def config(self) -> EdgeTilesConfig:
        spec = self.pixel_spec
        return EdgeTilesConfig(
            inner=tokenizers.config_to_dict(self.inner), long_px=spec.long_px, splits=spec.splits
        )

    def forward(self, pixels: Pixels) -> ImageTokens:
        """The inner tokens of V views, pixels float[V, 3, H, W]: each view on its own."""
        return self.inner(pixels)

    def parts(self) -> dict[str, nn.Module]:
        return dict(self.inner.parts())


def build(config: EdgeTilesConfig) -> EdgeTilesTokenizer:
    """The tokenizer of `config`, its inner one with random weights; downloads nothing."""
    return EdgeTilesTokenizer(
        tokenizers.build(config.inner), long_px=config.long_px, splits=config.splits
    )
