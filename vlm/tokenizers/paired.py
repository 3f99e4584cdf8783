"""Two towers that see one image at two sizes, their tokens joined on one grid.

DeepSeek-VL 7B's arrangement: a high-resolution tower (SAM) and a low-resolution one (SigLIP). A
neck brings the high tower's tokens to the low tower's grid; both are joined feature by feature,
high first. Both towers own their preprocessing.

Shapes: V view, L image tokens per view, D width, H W pixel rows and columns, h w patch rows and
columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vlm import tokenizers
from vlm.geometry import Resize
from vlm.image_tokens import ImageTokenizer, ImageTokens
from vlm.pixels import PixelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedSpec:
    """One image as pixels for two towers.

    high, low: each tower's preprocessing.
    low_from: what `low` is applied to: the "picture", or "high": the high tower's resized and
        padded image, before its normalisation (DeepSeek-VL 7B).
    """

    high: PixelSpec
    low: PixelSpec
    low_from: Literal["picture", "high"]

    def __post_init__(self) -> None:
        if self.low_from not in ("picture", "high"):
            raise ValueError(f"low_from must be 'picture' or 'high', found {self.low_from!r}")

    def view_sizes(self, size_hw: tuple[int, int]) -> tuple[tuple, ...]:
        """For each view its two pixel sizes, ((H, W) of high, (H, W) of low)."""
        low_hw = self.high.size_hw if self.low_from == "high" else size_hw
        return tuple(zip(self.high.view_sizes(size_hw), self.low.view_sizes(low_hw), strict=True))

    def resize_record(self, size_hw: tuple[int, int]) -> Resize:
        """Where the pixels of an image of `size_hw` go in the high tower's view."""
        return self.high.resize_record(size_hw)

    def __call__(self, image: Image.Image) -> list[tuple[Tensor, Tensor]]:
        """The views of an RGB image: for each (high, low), float32[3, H, W] both."""
        low_image = image
        if self.low_from == "high":
            low_image = Image.fromarray(self.high.resize_u8(image).permute(1, 2, 0).numpy())
        return list(zip(self.high(image), self.low(low_image), strict=True))

    def unnormalise(self, pixels: tuple[Tensor, Tensor]) -> Tensor:
        """What the high tower sees of views as images to look at, see `PixelSpec.unnormalise`."""
        return self.high.unnormalise(pixels[0])


class AverageNeck(nn.Module):
    """Brings a grid of tokens to a coarser one by averaging the tokens that fall on each cell.

    Where the new grid is finer on an axis, cells repeat. `dim`, the width, stays; so does order.
    """

    kind = "average"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, tokens: ImageTokens, grid_hw: tuple[int, int]) -> Tensor:
        """tokens: L = h * w on their grid, no prefix. Returns float[V, h * w of grid_hw, D]."""
        return F.adaptive_avg_pool2d(_as_map(tokens), grid_hw).flatten(2).transpose(1, 2)


class BilinearNeck(nn.Module):
    """Brings a grid of tokens to another by bilinear interpolation, antialiased when it shrinks.

    `dim`, the width, stays.
    """

    kind = "bilinear"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, tokens: ImageTokens, grid_hw: tuple[int, int]) -> Tensor:
        """tokens: L = h * w on their grid, no prefix. Returns float[V, h * w of grid_hw, D]."""
        resized = F.interpolate(
            _as_map(tokens), grid_hw, mode="bilinear", antialias=True, align_corners=False
        )
        return resized.flatten(2).transpose(1, 2)


class SameGridNeck(nn.Module):
    """Takes tokens as they are, where the high tower gives the low tower's grid by itself."""

    kind = "same"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, tokens: ImageTokens, grid_hw: tuple[int, int]) -> Tensor:
        """Returns float[V, h * w, D] unchanged. Raises ValueError showing grids that differ."""
        if tokens.grid_hw != grid_hw:
            raise ValueError(
                f"neck 'same': the high tower's grid {tokens.grid_hw} is not the low tower's "
                f"{grid_hw}"
            )
        return tokens.tokens


NECKS = {neck.kind: neck for neck in (AverageNeck, BilinearNeck, SameGridNeck)}
"""Name in a configuration -> class of neck; constructed with `dim`, the high tower's width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedConfig:
    """What rebuilds a `PairedTokenizer` whose neck is one of `NECKS`.

    high, low: what `vlm.tokenizers.config_to_dict` gives of each tower.
    low_from: as in `PairedSpec`.
    neck: name of the neck in `NECKS`.
    """

    high: dict[str, Any]
    low: dict[str, Any]
    low_from: Literal["picture", "high"]
    neck: str


Config = PairedConfig


class PairedTokenizer(ImageTokenizer):
    """The tokens of two towers joined feature by feature on the low tower's grid, high first.

    high, low: finished tokenizers that give a grid without prefix tokens.
    low_from: as in `PairedSpec`.
    high_neck: called with the high tower's ImageTokens and the low grid; returns
        float[V, h * w, high_neck.dim].
    `pooled` is the low tower's where it has one, for contrastive use; else None.
    """

    high_resolution, low_resolution = "high", "low"

    def __init__(
        self,
        high: ImageTokenizer,
        low: ImageTokenizer,
        *,
        low_from: Literal["picture", "high"],
        high_neck: nn.Module,
    ) -> None:
        super().__init__()
        self.pixel_spec = PairedSpec(high=high.pixel_spec, low=low.pixel_spec, low_from=low_from)
        self.high, self.low, self.high_neck = high, low, high_neck
        self.low_from = low_from
        self.dim = high_neck.dim + low.dim
        self.pooled_dim = low.pooled_dim

    @property
    def config(self) -> PairedConfig:
        """Raises ValueError for a neck that `NECKS` does not have."""
        kind = getattr(self.high_neck, "kind", None)
        if NECKS.get(kind) is not type(self.high_neck):
            raise ValueError(
                f"no configuration can name a {type(self.high_neck).__name__}; known necks are "
                f"{', '.join(NECKS)}"
            )
        return PairedConfig(
            high=tokenizers.config_to_dict(self.high),
            low=tokenizers.config_to_dict(self.low),
            low_from=self.low_from,
            neck=kind,
        )

    def forward(self, pixels: tuple[Tensor, Tensor]) -> ImageTokens:
        """pixels: (high, low), float[V, 3, H, W] of each tower's size.

        Raises ValueError where a tower gives prefix tokens or no grid.
        """
        high, low = self.high(pixels[0]), self.low(pixels[1])
        for name, tokens in (("high", high), ("low", low)):
            if tokens.grid_hw is None or tokens.shape.prefix:
                raise ValueError(
                    f"the {name} tower must give a grid without prefix tokens, found {tokens.shape}"
                )
        fused = torch.cat([self.high_neck(high, low.grid_hw), low.tokens], dim=-1)
        return ImageTokens(tokens=fused, grid_hw=low.grid_hw, pooled=low.pooled)

    def parts(self) -> dict[str, nn.Module]:
        high = {f"high.{name}": part for name, part in self.high.parts().items()}
        low = {f"low.{name}": part for name, part in self.low.parts().items()}
        has_weights = any(True for _ in self.high_neck.parameters())
        return high | ({"high_neck": self.high_neck} if has_weights else {}) | low


def build(config: PairedConfig) -> PairedTokenizer:
    """The tokenizer of `config`, both towers with random weights; downloads nothing."""
    if config.neck not in NECKS:
        raise ValueError(f"unknown neck {config.neck!r}; known are {', '.join(NECKS)}")
    high, low = tokenizers.build(config.high), tokenizers.build(config.low)
    return PairedTokenizer(
        high, low, low_from=config.low_from, high_neck=NECKS[config.neck](high.dim)
    )


def _as_map(tokens: ImageTokens) -> Tensor:
    """Tokens of a grid without prefix as float[V, D, h, w]."""
    V, _, D = tokens.tokens.shape
    return tokens.tokens.transpose(1, 2).reshape(V, D, *tokens.grid_hw)
