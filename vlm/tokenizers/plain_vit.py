"""Image tokens from a plain ViT: no class token, no closing norm, and a position table of one size
that is interpolated to the grid of each image.

Qwen-VL's tower. No class of transformers, timm or open_clip holds its weights as they are: CLIP's
has a class token, and all keep a table of the grid's own size, or resize it with another filter.

Shapes: V view, L image tokens per view, E width, A head, F width of a head, h w patch rows and
columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.compat.transformers import GradientCheckpointingLayer
from vlm.image_tokens import ImageTokenizer, ImageTokens
from vlm.pixels import PixelSpec
from vlm.position_tables import resize_table
from vlm.tokenizers.parts import named_parts


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainViTConfig:
    """What rebuilds a `PlainViT`.

    width, depth, heads, mlp_width: of the blocks. patch_px: side of a patch. table_hw: rows and
    columns of the position table. norm_eps: of every LayerNorm. pixel_spec: the preprocessing.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch_px: int
    table_hw: tuple[int, int]
    norm_eps: float
    pixel_spec: PixelSpec

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.width}")
        if any(side % self.patch_px for side in self.pixel_spec.size_hw):
            raise ValueError(
                f"pixel_spec.size_hw must be multiples of patch_px {self.patch_px}, found "
                f"{self.pixel_spec.size_hw}"
            )


Config = PlainViTConfig


class Block(GradientCheckpointingLayer):
    """Pre-norm self-attention and a two-layer MLP with exact GELU.

    Rows of `qkv` lie head by head: query, key and value of the first head, then of the second.
    """

    def __init__(self, config: PlainViTConfig) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=eps)
        self.mlp_in = nn.Linear(width, config.mlp_width)
        self.mlp_out = nn.Linear(config.mlp_width, width)

    def forward(self, x_VLE: Tensor) -> Tensor:
        V, L, E = x_VLE.shape
        qkv = self.qkv(self.norm_attention(x_VLE)).view(V, L, self.heads, 3, E // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [V, A, L, F]
        read = F.scaled_dot_product_attention(q, k, v)
        x_VLE = x_VLE + self.out(read.transpose(1, 2).reshape(V, L, E))
        return x_VLE + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x_VLE))))


class PlainViT(ImageTokenizer):
    """The states of the last block, one token for each patch, row by row. Its options are those of
    `PlainViTConfig`."""

    def __init__(self, config: PlainViTConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.width
        self.pixel_spec = config.pixel_spec
        h, w = config.table_hw
        self.patch = nn.Conv2d(3, config.width, config.patch_px, config.patch_px, bias=False)
        self.positions = nn.Parameter(torch.randn(h * w, config.width) * config.width**-0.5)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, pixels: Tensor) -> ImageTokens:
        """pixels: float[V, 3, H, W]. Tokens float[V, L, E]."""
        patches = self.patch(pixels)
        grid_hw = (patches.shape[-2], patches.shape[-1])
        positions = resize_table(self.positions, self.config.table_hw, grid_hw)
        x_VLE = self.norm(patches.flatten(2).transpose(1, 2) + positions)
        for block in self.blocks:
            x_VLE = block(x_VLE)
        return ImageTokens(tokens=x_VLE, grid_hw=grid_hw)

    def parts(self) -> dict[str, nn.Module]:
        return named_parts(self, {"embed": ("patch", "positions", "norm"), "blocks": ("blocks",)})


def build(config: PlainViTConfig) -> PlainViT:
    """The tokenizer of `config` with random weights; downloads nothing."""
    return PlainViT(config)
