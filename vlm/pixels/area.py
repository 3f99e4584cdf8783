"""Images at their own aspect ratio, both sides in whole blocks and their pixels within limits.

Qwen2-VL's "smart resize": a small image stays small and a large one large, so that the number of
image tokens follows the image. An image that is very much longer than wide is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from vlm.geometry import Resize
from vlm.pixels.decode import BadImage
from vlm.pixels.spec import PixelSpec

MOST_RATIO = 200
"""The most that one side may be of the other.
Source: transformers, `image_processing_qwen2_vl.py`, `smart_resize`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AreaSpec:
    """An image as one view of its own size.

    block: how the view is resized and normalised, by fit "stretch"; its size_hw, a square, is the
        block of pixels that the sides of every view are whole multiples of.
    min_pixels, max_pixels: limits of a view's rows times columns.
    Raises ValueError showing the field and its value.
    """

    block: PixelSpec
    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        h, w = self.block.size_hw
        if h != w or self.block.fit != "stretch" or self.block.resize_hw is not None:
            raise ValueError(f"block: expected a square by fit 'stretch', found {self.block}")
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                "expected 1 <= min_pixels <= max_pixels, found min_pixels "
                f"{self.min_pixels} and max_pixels {self.max_pixels}"
            )

    @property
    def block_px(self) -> int:
        """The side of a block."""
        return self.block.size_hw[0]

    def view_sizes(self, size_hw: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the one view of an image of `size_hw` pixels: each side the nearest
        whole number of blocks, then both scaled alike where the view is outside the limits.

        Raises BadImage for an image of which one side is over `MOST_RATIO` times the other.
        Source: transformers, `image_processing_qwen2_vl.py`, `smart_resize`.
        """
        (H, W), block = size_hw, self.block_px
        if max(H, W) > MOST_RATIO * min(H, W):
            raise BadImage(
                f"expected an image whose long side is at most {MOST_RATIO} times the short one, "
                f"found {H} × {W} (rows × columns)"
            )
        rows, columns = round(H / block) * block, round(W / block) * block
        if rows * columns > self.max_pixels:
            shrink = math.sqrt(H * W / self.max_pixels)
            rows, columns = (
                max(block, math.floor(side / shrink / block) * block) for side in (H, W)
            )
        elif rows * columns < self.min_pixels:
            enlarge = math.sqrt(self.min_pixels / (H * W))
            rows, columns = (math.ceil(side * enlarge / block) * block for side in (H, W))
        return ((rows, columns),)

    def resize_record(self, size_hw: tuple[int, int]) -> Resize:
        """Where the pixels of an image of `size_hw` rows and columns go in the view."""
        return self._view(size_hw).resize_record(size_hw)

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """The one view of an RGB image, float32[3, H, W]; raises as `view_sizes` does."""
        return self._view((image.height, image.width))(image)

    def unnormalise(self, pixels: Tensor) -> Tensor:
        """Normalised pixels as an image to look at, see `PixelSpec.unnormalise`."""
        return self.block.unnormalise(pixels)

    def _view(self, size_hw: tuple[int, int]) -> PixelSpec:
        return self.block.with_size(self.view_sizes(size_hw)[0])
