"""An image on a canvas of whole square tiles, as Mllama sees it.

The canvas is one view: its size says how many tiles it has, and how they lie. Of the canvases that
hold an image the one is taken that enlarges it least; where none does, the one that shrinks it
least. The image keeps its aspect and lies at the top left; the rest is black.

Shapes: H W pixel rows and columns, h w tile rows and columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vlm.geometry import Resize
from vlm.pixels.spec import PixelSpec


def layouts(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of every canvas of at most `max_tiles` tiles, in the order of their ids,
    which count from 1.

    >>> layouts(4)
    ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
    """
    sides = range(1, max_tiles + 1)
    return tuple((h, w) for h in sides for w in sides if h * w <= max_tiles)


@dataclass(frozen=True, kw_only=True, slots=True)
class CanvasSpec:
    """An image on a canvas of whole tiles, one view.

    tile: preprocessing of one tile, square, by fit "stretch".
    max_tiles: most tiles of a canvas.
    Raises ValueError showing the field and its value.
    """

    tile: PixelSpec
    max_tiles: int

    def __post_init__(self) -> None:
        h, w = self.tile.size_hw
        if h != w or self.tile.fit != "stretch" or self.tile.resize_hw is not None:
            raise ValueError(f"tile: expected a square by fit 'stretch', found {self.tile}")
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1, found {self.max_tiles}")

    @property
    def side_px(self) -> int:
        """Rows, and columns, of a tile."""
        return self.tile.size_hw[0]

    def layout(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles for an image of `size_hw` pixels: of the canvases that hold it
        the one that enlarges it least, where none does the one that shrinks it least; among equals
        the one of fewest tiles, then the first of `layouts`.

        Source: transformers, `image_processing_mllama.py`, `get_optimal_tiled_canvas`.

        >>> spec = CanvasSpec(tile=PixelSpec(size_hw=(560, 560), fit="stretch",
        ...     resample="bilinear", mean=(0, 0, 0), std=(1, 1, 1)), max_tiles=4)
        >>> spec.layout((300, 900)), spec.layout((2000, 600)), spec.layout((20, 20))
        ((1, 2), (4, 1), (1, 1))
        """
        (H, W), side = size_hw, self.side_px
        scales = {(h, w): min(h * side / H, w * side / W) for h, w in layouts(self.max_tiles)}
        best = min((scale for scale in scales.values() if scale >= 1), default=None)
        if best is None:
            best = max(scales.values())
        return min((hw for hw, scale in scales.items() if scale == best), key=math.prod)

    def view_sizes(self, size_hw: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the one view: the canvas."""
        h, w = self.layout(size_hw)
        return ((h * self.side_px, w * self.side_px),)

    def resize_record(self, size_hw: tuple[int, int]) -> Resize:
        """Where the pixels of an image go on its canvas."""
        (rows, columns), (canvas_hw,) = self._inner_hw(size_hw), self.view_sizes(size_hw)
        scale_xy = (columns / size_hw[1], rows / size_hw[0])
        return Resize(size_hw, canvas_hw, scale_xy, (0.0, 0.0))

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """The one view of an RGB image, float32[3, H, W]."""
        size_hw = (image.height, image.width)
        (H, W), (rows, columns) = self.view_sizes(size_hw)[0], self._inner_hw(size_hw)
        canvas = torch.zeros(3, H, W, dtype=torch.uint8)
        canvas[:, :rows, :columns] = self.tile.with_size((rows, columns)).resize_u8(image)
        return [self.tile.normalise(canvas)]

    def unnormalise(self, pixels: Tensor) -> Tensor:
        """Normalised pixels of views as images to look at, see `PixelSpec.unnormalise`."""
        return self.tile.unnormalise(pixels)

    def _inner_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of an image on its canvas: it is enlarged until its larger side reaches
        a tile's, if it is smaller, and shrunk as far as the canvas needs.

        Source: transformers, `image_processing_mllama.py`, `get_image_size_fit_to_canvas`.
        """
        (H, W), ((canvas_h, canvas_w),) = size_hw, self.view_sizes(size_hw)
        most_h = min(max(H, self.side_px), canvas_h)
        most_w = min(max(W, self.side_px), canvas_w)
        if most_w / W < most_h / H:
            return min(math.floor(H * (most_w / W)) or 1, most_h), most_w
        return most_h, min(math.floor(W * (most_h / H)) or 1, most_w)
