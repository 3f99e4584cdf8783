"""Image tokens from SAM's encoder, its last and its first global features convolved to one grid.

The high-resolution tower of DeepSeek-VL 7B. SAM's blocks look at windows, except for a few that
look at the whole map. Two maps are taken: the last block's through SAM's own neck, and the first
global block's through a second neck. Each is resized to four times the wanted grid and halved
twice by the same two convolutions; the second is added, times a learned factor.

Source: DeepSeek-VL (arXiv 2403.05525), section 2.2; the second neck and the factor are those of
deepseek-ai/DeepSeek-VL, `deepseek_vl/models/sam.py`, `ImageEncoderViT`.

Shapes: V view, L image tokens per view, D width, H W pixel rows and columns, h w patch rows and
columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.compat.transformers import random_weights, sam_neck
from vlm.image_tokens import ImageTokenizer, ImageTokens
from vlm.pixels import PixelSpec
from vlm.tokenizers.parts import named_parts
from vlm.tokenizers.transformers import BOOKKEEPING, sam_states

STRIDE = 4
"""What the two convolutions shrink a side by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamHybridConfig:
    """What rebuilds a `SamHybridTokenizer` without a download.

    vision_config: the configuration of transformers' SAM encoder, `model_type` included.
    grid_hw: rows and columns of the tokens, whatever the pixels' size.
    pixel_spec: the preprocessing.
    """

    vision_config: dict[str, Any]
    grid_hw: tuple[int, int]
    pixel_spec: PixelSpec

    def __post_init__(self) -> None:
        kind = self.vision_config.get("model_type")
        if kind != "sam_vision_model":
            raise ValueError(f"vision model_type must be sam_vision_model, found {kind!r}")
        if len(self.grid_hw) != 2 or min(self.grid_hw) < 1:
            raise ValueError(
                f"grid_hw must be (rows, columns), both positive, found {self.grid_hw}"
            )


Config = SamHybridConfig


class SamHybridTokenizer(ImageTokenizer):
    """Two maps of SAM's encoder as tokens on `grid_hw`, four times as wide as SAM's neck.

    backbone: transformers' SamVisionModel, finished. The options are those of `SamHybridConfig`.
    Raises ValueError for an encoder without a global block.
    """

    def __init__(
        self, backbone: nn.Module, pixel_spec: PixelSpec, *, grid_hw: tuple[int, int]
    ) -> None:
        super().__init__()
        values = backbone.config.to_dict()
        self.config = SamHybridConfig(
            vision_config={key: values[key] for key in values.keys() - BOOKKEEPING},
            grid_hw=grid_hw,
            pixel_spec=pixel_spec,
        )
        if not backbone.config.global_attn_indexes:
            raise ValueError("global_attn_indexes is empty: SAM's first global block is needed")
        width = backbone.config.output_channels
        self.pixel_spec = pixel_spec
        self.dim = width * STRIDE
        self.backbone = backbone
        self.global_neck = sam_neck(backbone.config)
        self.shrink = nn.Sequential(_halve(width), _halve(2 * width))
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, pixels: Tensor) -> ImageTokens:
        """pixels: float[V, 3, H, W]. Tokens float[V, L, D], row by row."""
        encoder = self.backbone.vision_encoder
        first_global = self.backbone.config.global_attn_indexes[0] + 1  # 0 is the embeddings
        for number, state_VhwE in enumerate(sam_states(encoder, pixels)):
            if number == first_global:
                middle_VhwE = state_VhwE
        last = self._to_grid(encoder.neck(state_VhwE))
        middle = self._to_grid(self.global_neck(middle_VhwE))
        fused = last + middle * self.alpha
        return ImageTokens(tokens=fused.flatten(2).transpose(1, 2), grid_hw=self.config.grid_hw)

    def parts(self) -> dict[str, nn.Module]:
        return named_parts(
            self,
            {
                "embed": (
                    "backbone.vision_encoder.pos_embed",
                    "backbone.vision_encoder.patch_embed",
                ),
                "blocks": ("backbone.vision_encoder.layers",),
                "neck": ("backbone.vision_encoder.neck",),
                "global_neck": ("global_neck",),
                "shrink": ("shrink",),
                "alpha": ("alpha",),
            },
        )

    def _to_grid(self, features: Tensor) -> Tensor:
        """A map float[V, D, h, w] on `grid_hw`, widened."""
        size = tuple(side * STRIDE for side in self.config.grid_hw)
        return self.shrink(F.interpolate(features, size, mode="bilinear", align_corners=False))


def build(config: SamHybridConfig) -> SamHybridTokenizer:
    """The tokenizer of `config` with random weights, the factor 0; downloads nothing."""
    vision_config = transformers.SamVisionConfig(**config.vision_config)
    backbone = random_weights(transformers.SamVisionModel, vision_config, "sdpa")
    return SamHybridTokenizer(backbone, config.pixel_spec, grid_hw=config.grid_hw)


def _halve(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1, bias=False)
