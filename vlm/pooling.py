"""Poolings: from the image tokens of a view to one vector.

A pooling says how wide its vector is for a given image tokenizer (`width`), and refuses a
tokenizer that lacks what it reads, before anything is computed.

Shapes: V view, L image tokens per view, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.config import from_dict, to_dict
from vlm.image_tokens import ImageTokenizer, ImageTokens

PROBE_HW = (256, 192)
"""Rows and columns of the image whose token shapes are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoConfig:
    """Of a pooling without parameters."""


class _Fixed(nn.Module):
    """A pooling without parameters."""

    Config = NoConfig

    def __init__(self, config: NoConfig | None = None) -> None:
        super().__init__()
        self.config = config or NoConfig()


class OwnPool(_Fixed):
    """The vector that the image tokenizer pools itself (CLIP: class token, SigLIP: its head)."""

    def width(self, tokenizer: ImageTokenizer) -> int:
        """The width of its vectors. Raises ValueError where the tokenizer pools nothing."""
        if tokenizer.pooled_dim is None:
            raise ValueError(
                "pool 'own' reads the image tokenizer's pooled vector, but "
                f"{type(tokenizer).__name__} has none: build it with pooled=True, or take the pool "
                "'class', 'mean' or 'attention'"
            )
        return tokenizer.pooled_dim

    def forward(self, images: ImageTokens) -> Tensor:
        """The vector of each view, float[V, D], as the tokenizer gave it."""
        return images.pooled


class ClassPool(_Fixed):
    """The first of the tokens before the grid: a ViT's class token, as it is."""

    def width(self, tokenizer: ImageTokenizer) -> int:
        """The width of its vectors. Raises ValueError where there are no prefix tokens."""
        shape = tokenizer.shapes_for(PROBE_HW)[0]
        if not shape.prefix:
            raise ValueError(
                f"pool 'class' reads a class token before the grid, found {shape}: build the image "
                "tokenizer with prefix='keep', or take the pool 'mean' or 'attention'"
            )
        return tokenizer.dim

    def forward(self, images: ImageTokens) -> Tensor:
        """The vector of each view: float[V, D] of tokens float[V, L, D], in their dtype."""
        return images.tokens[:, 0]


class MeanPool(_Fixed):
    """The mean of a view's patch tokens, without padding and prefix tokens; of all valid tokens
    where they have no grid."""

    def width(self, tokenizer: ImageTokenizer) -> int:
        """The width of its vectors."""
        return tokenizer.dim

    def forward(self, images: ImageTokens) -> Tensor:
        """The vector of each view: float[V, D] of tokens float[V, L, D], in their dtype. Where
        they are padded, `valid` is bool[V, L], False at padding."""
        prefix = images.shape.prefix
        tokens = images.tokens[:, prefix:]
        if images.valid is None:
            return tokens.mean(1)
        valid = images.valid[:, prefix:, None].to(tokens.dtype)
        return (tokens * valid).sum(1) / valid.sum(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPoolConfig:
    """`in_width`: of the image tokens, which the vector keeps. eps: of the layer norm."""

    in_width: int
    heads: int
    mlp_width: int
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.in_width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.in_width}")


class AttentionPool(nn.Module):
    """One learned probe reads the tokens by multi-head attention; then a norm and a perceptron,
    added to what was read.

    Source: SigLIP's head; google-research/big_vision, `models/vit.py`, `MAPHead`.
    """

    Config = AttentionPoolConfig

    def __init__(self, config: AttentionPoolConfig) -> None:
        super().__init__()
        self.config = config
        width = config.in_width
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.eps)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_width),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_width, width),
        )
        nn.init.xavier_uniform_(self.probe)

    def width(self, tokenizer: ImageTokenizer) -> int:
        """The width of its vectors. Raises ValueError where the tokenizer's is another."""
        if tokenizer.dim != self.config.in_width:
            raise ValueError(
                f"pool 'attention' was made for tokens {self.config.in_width} wide, the image "
                f"tokenizer gives {tokenizer.dim}"
            )
        return tokenizer.dim

    def forward(self, images: ImageTokens) -> Tensor:
        """The vector of each view: float[V, D] of tokens float[V, L, D], in their dtype. Where
        they are padded, `valid` is bool[V, L], False at padding."""
        V, L, D = images.tokens.shape
        heads = self.config.heads
        q = self.query(self.probe).expand(V, -1, -1).view(V, 1, heads, D // heads)
        k, v = self.key_value(images.tokens).view(V, L, 2, heads, D // heads).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = None if images.valid is None else images.valid[:, None, None, :]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        read = self.out(read.transpose(1, 2).reshape(V, D))
        return read + self.mlp(self.norm(read))


KINDS = {"own": OwnPool, "class": ClassPool, "mean": MeanPool, "attention": AttentionPool}


def build(values: dict[str, Any]) -> nn.Module:
    """A pooling with fresh weights from its configuration, `kind` included."""
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"pool kind {kind!r} is not one of {', '.join(KINDS)}")
    return KINDS[kind](from_dict(KINDS[kind].Config, values, where=f"pool {kind}"))


def config_of(pool: nn.Module) -> dict[str, Any]:
    """The configuration of a pooling, `kind` included: the inverse of `build`."""
    kind = next(kind for kind, cls in KINDS.items() if type(pool) is cls)
    return {"kind": kind, **to_dict(pool.config)}
