"""An image as four quarters and the whole, each a view of another tokenizer.

Idefics2's rule (`do_image_splitting`): the image is halved in both directions, the odd pixel of a
side going to the second half; the quarters follow row by row, the whole comes last; each is then
brought to its size by itself.

Shapes: V view, H W pixel rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn

from vlm import tokenizers
from vlm.geometry import Resize
from vlm.image_tokens import ImageTokenizer, ImageTokens, Pixels
from vlm.pixels import BadImage, PixelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class QuartersSpec:
    """An image as its quarters, row by row, then the whole; or as the whole alone.

    view: preprocessing of one view. splits: whether there are quarters.
    Source: transformers, `image_processing_idefics2.py`, `split_images`.
    """

    view: PixelSpec
    splits: bool

    def view_sizes(self, size_hw: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each view. Raises BadImage as a call does."""
        return tuple(
            view_hw
            for x, y, right, bottom in self._boxes(size_hw)
            for view_hw in self.view.view_sizes((bottom - y, right - x))
        )

    def resize_record(self, size_hw: tuple[int, int]) -> Resize:
        """Where the pixels of an image go in the view of the whole."""
        return self.view.resize_record(size_hw)

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """The views of an RGB image, each float32[3, H, W].

        Raises BadImage for an image that is one pixel high or wide, which has no quarters.
        """
        boxes = self._boxes((image.height, image.width))
        return [view for box in boxes for view in self.view(image.crop(box))]

    def unnormalise(self, pixels: Tensor) -> Tensor:
        """Normalised pixels of views as images to look at, see `PixelSpec.unnormalise`."""
        return self.view.unnormalise(pixels)

    def _boxes(self, size_hw: tuple[int, int]) -> list[tuple[int, int, int, int]]:
        """What each view shows of an image: left, top, right, bottom in its pixels."""
        H, W = size_hw
        if not self.splits:
            return [(0, 0, W, H)]
        y, x = H // 2, W // 2
        if not (y and x):
            raise BadImage(
                f"expected an image of at least 2 x 2 pixels, which has quarters, found {H} x {W}"
            )
        return [(0, 0, x, y), (x, 0, W, y), (0, y, x, H), (x, y, W, H), (0, 0, W, H)]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuartersConfig:
    """What rebuilds a `QuartersTokenizer`.

    inner: what `vlm.tokenizers.config_to_dict` gives of the tokenizer of each view.
    splits: as in `QuartersSpec`.
    """

    inner: dict[str, Any]
    splits: bool


Config = QuartersConfig


class QuartersTokenizer(ImageTokenizer):
    """Another tokenizer over the quarters of an image and its whole.

    inner: a finished tokenizer. splits: as in `QuartersSpec`.
    """

    def __init__(self, inner: ImageTokenizer, *, splits: bool) -> None:
        super().__init__()
        self.pixel_spec = QuartersSpec(view=inner.pixel_spec, splits=splits)
        self.inner = inner
        self.dim, self.pooled_dim = inner.dim, inner.pooled_dim

    @property
    def config(self) -> QuartersConfig:
        return QuartersConfig(
            inner=tokenizers.config_to_dict(self.inner), splits=self.pixel_spec.splits
        )

    def forward(self, pixels: Pixels) -> ImageTokens:
        """The inner tokens of V views, pixels float[V, 3, H, W]: each view on its own."""
        return self.inner(pixels)

    def parts(self) -> dict[str, nn.Module]:
        return dict(self.inner.parts())


def build(config: QuartersConfig) -> QuartersTokenizer:
    """The tokenizer of `config`, its inner one with random weights; downloads nothing."""
    return QuartersTokenizer(tokenizers.build(config.inner), splits=config.splits)
