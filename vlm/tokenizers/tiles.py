"""One image cut into tiles by rows and columns, each a view of another tokenizer.

Small print survives where one view of the whole image would lose it. The image is resized to
the whole of the tiles, so that tiles join without a seam; a thumbnail of it comes last.

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


def tile_grid(
    size_hw: tuple[int, int], tile_hw: tuple[int, int], max_tiles: int
) -> tuple[int, int]:
    """Rows and columns of tiles for an image of `size_hw` pixels, at most `max_tiles` in all.

    The layout whose aspect is nearest to the image's, which alone decides for an image that is
    not square; among equally near ones the largest that enlarges the image to no more than twice
    its pixels.

    >>> tile_grid((400, 800), (384, 384), 6)
    (1, 2)
    >>> tile_grid((2000, 1000), (384, 384), 9)
    (4, 2)
    >>> tile_grid((100, 100), (384, 384), 9)
    (1, 1)
    """
    (H, W), (tile_h, tile_w) = size_hw, tile_hw
    layouts = [
        (rows, columns)
        for rows in range(1, max_tiles + 1)
        for columns in range(1, max_tiles // rows + 1)
    ]

    def badness(layout: tuple[int, int]) -> tuple[float, bool, int]:
        rows, columns = layout
        distortion = abs(math.log((rows * tile_h * W) / (columns * tile_w * H)))
        enlarges = rows * columns * tile_h * tile_w > 2 * H * W
        count = rows * columns
        return round(distortion, 9), enlarges, count if enlarges else -count

    return min(layouts, key=badness)


@dataclass(frozen=True, kw_only=True, slots=True)
class TilesSpec:
    """An image as tiles, row by row, then a thumbnail of the whole.

    tile: preprocessing of one view; its fit ("stretch" or "pad") also brings the image to the
        whole of the tiles.
    max_tiles: most tiles, the thumbnail not counted.
    thumbnail: whether the whole image follows as one more view; never where there is one tile,
        which shows it already.
    """

    tile: PixelSpec
    max_tiles: int
    thumbnail: bool

    def __post_init__(self) -> None:
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1, found {self.max_tiles}")
        fit = getattr(self.tile, "fit", None)
        if fit not in ("stretch", "pad") or self.tile.resize_hw not in (None, self.tile.size_hw):
            raise ValueError(
                "tiles need a preprocessing that shows the whole image (fit 'stretch' or 'pad', "
                f"resize_hw None), found {self.tile}"
            )

    def layout(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles of an image of `size_hw` pixels."""
        return tile_grid(size_hw, self.tile.size_hw, self.max_tiles)

    def view_sizes(self, size_hw: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The pixel size of each view, all alike."""
        rows, columns = self.layout(size_hw)
        count = rows * columns
        return (self.tile.size_hw,) * (count + (self.thumbnail and count > 1))

    def resize_record(self, size_hw: tuple[int, int]) -> Resize:
        """Where the pixels of an image go in the whole of its tiles."""
        return self._whole(size_hw).resize_record(size_hw)

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """The views of an RGB image, each float32[3, H, W]."""
        rows, columns = self.layout((image.height, image.width))
        H, W = self.tile.size_hw
        (whole,) = self._whole((image.height, image.width))(image)
        views = [
            whole[:, row * H : (row + 1) * H, column * W : (column + 1) * W].contiguous()
            for row in range(rows)
            for column in range(columns)
        ]
        return views + (self.tile(image) if self.thumbnail and len(views) > 1 else [])

    def unnormalise(self, pixels: Tensor) -> Tensor:
        """Normalised pixels of views as images to look at, see `PixelSpec.unnormalise`."""
        return self.tile.unnormalise(pixels)

    def _whole(self, size_hw: tuple[int, int]) -> PixelSpec:
        """The preprocessing that brings an image to the whole of its tiles."""
        (rows, columns), (H, W) = self.layout(size_hw), self.tile.size_hw
        return self.tile.with_size((rows * H, columns * W))


@dataclass(frozen=True, kw_only=True, slots=True)
class TilesConfig:
    """What rebuilds a `TilesTokenizer`.

    inner: what `vlm.tokenizers.config_to_dict` gives of the tokenizer of each view.
    max_tiles, thumbnail: as in `TilesSpec`.
    """

    inner: dict[str, Any]
    max_tiles: int
    thumbnail: bool


Config = TilesConfig


class TilesTokenizer(ImageTokenizer):
    """Another tokenizer over the tiles and thumbnail of an image.

    inner: a finished tokenizer whose preprocessing shows the whole image.
    max_tiles, thumbnail: as in `TilesSpec`.
    """

    def __init__(self, inner: ImageTokenizer, *, max_tiles: int, thumbnail: bool) -> None:
        super().__init__()
        self.pixel_spec = TilesSpec(tile=inner.pixel_spec, max_tiles=max_tiles, thumbnail=thumbnail)
        self.inner = inner
        self.dim, self.pooled_dim = inner.dim, inner.pooled_dim

    @property
    def config(self) -> TilesConfig:
        spec = self.pixel_spec
        return TilesConfig(
            inner=tokenizers.config_to_dict(self.inner),
            max_tiles=spec.max_tiles,
            thumbnail=spec.thumbnail,
        )

    def forward(self, pixels: Pixels) -> ImageTokens:
        """The inner tokens of V views, pixels float[V, 3, H, W]: each view on its own."""
        return self.inner(pixels)

    def parts(self) -> dict[str, nn.Module]:
        return dict(self.inner.parts())


def build(config: TilesConfig) -> TilesTokenizer:
    """The tokenizer of `config`, its inner one with random weights; downloads nothing."""
    return TilesTokenizer(
        tokenizers.build(config.inner), max_tiles=config.max_tiles, thumbnail=config.thumbnail
    )
