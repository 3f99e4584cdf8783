"""An adaptor of learned queries that lie on a grid: one cross-attention layer in which queries and
image tokens have 2-D sine positions, so that each query reads mostly around its own place.

Shapes: V view, L image tokens per view, Q learned query, A head, F width of a head, D out width,
h w patch grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.image_tokens import ImageTokens, TokenShape
from vlm.position_tables import resize_table, sine_table


@dataclass(frozen=True, kw_only=True, slots=True)
class GridResamplerConfig:
    """A grid of `queries_hw` learned queries. heads: of the cross-attention. norm_eps: of every
    LayerNorm."""

    in_width: int
    out_width: int
    queries_hw: tuple[int, int]
    heads: int
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.out_width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.out_width}")
        if self.out_width % 4:
            raise ValueError(f"out_width must be a multiple of 4, found {self.out_width}")


class GridResampler(nn.Module):
    """Qwen-VL's adaptor. Keys are given the queries' own table of positions, interpolated to the
    grid of the image tokens, and values none; what is read goes through a LayerNorm and a square
    matrix. Tokens keep no grid.

    Source: arXiv 2308.12966, section 2.1; Qwen/Qwen-VL on the hub, `visual.py`, `Resampler`.
    """

    Config = GridResamplerConfig

    def __init__(self, config: GridResamplerConfig) -> None:
        super().__init__()
        self.config = config
        width, (h, w) = config.out_width, config.queries_hw
        same = config.in_width == width
        self.project = nn.Identity() if same else nn.Linear(config.in_width, width, bias=False)
        self.queries = nn.Parameter(torch.randn(h * w, width) * 0.02)
        self.register_buffer("positions", sine_table(config.queries_hw, width))
        self.norm_queries = nn.LayerNorm(width, eps=config.norm_eps)
        self.norm_images = nn.LayerNorm(width, eps=config.norm_eps)
        self.to_query = nn.Linear(width, width)
        self.to_key = nn.Linear(width, width)
        self.to_value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.projection = nn.Parameter(torch.randn(width, width) * width**-0.5)

    def shape_for(self, shape: TokenShape) -> TokenShape:
        """Raises ValueError for tokens that do not lie on a grid, or have others before it."""
        if shape.grid_hw is None or shape.prefix:
            raise ValueError(
                f"a grid resampler needs a grid without prefix tokens, found {shape}; drop the "
                "prefix tokens in the image tokenizer"
            )
        h, w = self.config.queries_hw
        return TokenShape(h * w, None)

    def forward(self, images: ImageTokens) -> ImageTokens:
        shape = self.shape_for(images.shape)
        context_VLD = self.norm_images(self.project(images.tokens))
        at_queries = self.positions.to(context_VLD)
        at_images = resize_table(at_queries, self.config.queries_hw, images.grid_hw)
        queries_QD = self.norm_queries(self.queries.to(context_VLD)) + at_queries
        q = self._heads(self.to_query(queries_QD)[None]).expand(len(context_VLD), -1, -1, -1)
        k = self._heads(self.to_key(context_VLD + at_images))
        v = self._heads(self.to_value(context_VLD))
        mask = None if images.valid is None else images.valid[:, None, None, :]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        tokens_VQD = self.norm(self.out(read.transpose(1, 2).flatten(2)))
        return images.with_tokens(tokens_VQD @ self.projection.to(tokens_VQD), shape)

    def _heads(self, x: Tensor) -> Tensor:
        """float[V, L, D] as float[V, A, L, F]."""
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
