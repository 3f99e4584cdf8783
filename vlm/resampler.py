"""Resamplers: a fixed number of learned vectors read any number of image tokens.

`Resampler` is the plain one, which composed models take: queries attend to image tokens alone. In
each block of a `Perceiver` latents attend to the image tokens and to themselves at once: keys and
values are made of both, one after the other. Flamingo, Idefics v1 (LayerNorm, a plain MLP, heads
that may be normed) and Idefics2 (RMSNorm, fewer heads of keys than of queries, a gated MLP) differ
in values of one configuration. They are kinds of `vlm.adaptors`.

Shapes: V view, L image tokens per view, Q learned query or latent, S key position, A head, K
key/value head, F features per head, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.image_tokens import ImageTokens, TokenShape


class GatedFeedForward(nn.Module):
    """down(SiLU(gate(x)) * up(x)), without bias. Names are those of language models' gated MLPs,
    which `vlm.kernels.norm_mlp` knows."""

    def __init__(self, in_width: int, hidden_width: int, out_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(in_width, hidden_width, bias=False)
        self.up_proj = nn.Linear(in_width, hidden_width, bias=False)
        self.down_proj = nn.Linear(hidden_width, out_width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedMLPConfig:
    """A gated MLP: SiLU, no bias. hidden_width: of the gate."""

    in_width: int
    hidden_width: int
    out_width: int


class GatedMLP(nn.Module):
    """The same gated MLP on every token; token count and grid stay."""

    Config = GatedMLPConfig

    def __init__(self, config: GatedMLPConfig) -> None:
        super().__init__()
        self.config = config
        self.mlp = GatedFeedForward(config.in_width, config.hidden_width, config.out_width)

    def shape_for(self, shape: TokenShape) -> TokenShape:
        return shape

    def forward(self, images: ImageTokens) -> ImageTokens:
        return images.with_tokens(self.mlp(images.tokens), images.shape)


class SquaredReLU(nn.Module):
    """relu(x) squared."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS = {"relu": nn.ReLU, "squared_relu": SquaredReLU, "gelu": nn.GELU}
"""Activations of a plain MLP without bias: Idefics v1's, Flamingo's, OpenFlamingo's."""
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


@dataclass(frozen=True, kw_only=True, slots=True)
class PerceiverConfig:
    """`latents` learned vectors read each view through `depth` blocks.

    width: of image tokens and latents. heads: of queries; kv_heads: of keys and values, each read
    by heads / kv_heads of queries. head_width: features of a head, whatever width and heads are.
    mlp: "gated", or the activation of a plain MLP; mlp_width: between its layers.
    norm: "layer" or "rms"; eps: of every norm.
    head_norm: whether queries and keys pass a LayerNorm head by head.
    Raises ValueError showing the field and its value.
    """

    width: int
    latents: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: Literal["gated", "relu", "squared_relu", "gelu"]
    mlp_width: int
    norm: Literal["layer", "rms"]
    eps: float
    head_norm: bool = False

    def __post_init__(self) -> None:
        for field, allowed in (("mlp", ("gated", *ACTIVATIONS)), ("norm", tuple(NORMS))):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {', '.join(allowed)}, found {getattr(self, field)!r}"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide heads, found kv_heads {self.kv_heads} and heads {self.heads}"
            )
        if self.latents < 1 or self.depth < 1:
            raise ValueError(
                f"latents and depth must be at least 1, found {self.latents} and {self.depth}"
            )

    @property
    def in_width(self) -> int:
        return self.width

    @property
    def out_width(self) -> int:
        return self.width


class PerceiverBlock(nn.Module):
    """Pre-norm attention of latents to image tokens and themselves, then an MLP."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.head_width, self.groups = config.head_width, config.heads // config.kv_heads
        D, keys = config.width, config.kv_heads * config.head_width
        norm = NORMS[config.norm]
        self.norm_latents = norm(D, eps=config.eps)
        self.norm_context = norm(D, eps=config.eps)
        self.query = nn.Linear(D, config.heads * config.head_width, bias=False)
        self.key = nn.Linear(D, keys, bias=False)
        self.value = nn.Linear(D, keys, bias=False)
        self.out = nn.Linear(config.heads * config.head_width, D, bias=False)
        self.norm_query, self.norm_key = nn.Identity(), nn.Identity()
        if config.head_norm:
            self.norm_query = nn.LayerNorm(config.head_width, eps=config.eps)
            self.norm_key = nn.LayerNorm(config.head_width, eps=config.eps)
        self.norm_mlp = norm(D, eps=config.eps)
        self.mlp = _feed_forward(config)

    def forward(self, latents: Tensor, context: Tensor, seen: Tensor | None) -> Tensor:
        """Latents float[V, Q, D]. context: float[V, L, D]. seen: bool[V, L + Q], which tokens and
        latents are read; None: all."""
        own_VQD = self.norm_latents(latents)
        both_VSD = torch.cat([self.norm_context(context), own_VQD], dim=1)
        query_VAQF = self.norm_query(self._heads(self.query(own_VQD)))
        key_VKSF = self.norm_key(self._heads(self.key(both_VSD)))
        value_VKSF = self._heads(self.value(both_VSD))
        read_VAQF = F.scaled_dot_product_attention(
            query_VAQF,
            key_VKSF.repeat_interleave(self.groups, dim=1),
            value_VKSF.repeat_interleave(self.groups, dim=1),
            attn_mask=None if seen is None else seen[:, None, None, :],
        )
        latents = latents + self.out(read_VAQF.transpose(1, 2).flatten(2))
        return latents + self.mlp(self.norm_mlp(latents))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


def _feed_forward(config: PerceiverConfig) -> nn.Module:
    D = config.width
    if config.mlp == "gated":
        return GatedFeedForward(D, config.mlp_width, D)
    return nn.Sequential(
        nn.Linear(D, config.mlp_width, bias=False),
        ACTIVATIONS[config.mlp](),
        nn.Linear(config.mlp_width, D, bias=False),
    )


class Perceiver(nn.Module):
    """A fixed number of tokens for each view, whatever its size, read by latents that attend to the
    image tokens and to themselves.

    Positions come from the image tokens themselves. Source: Flamingo (arXiv 2204.14198, section
    3.1 and appendix A.1.1, for one image); transformers, `idefics/perceiver.py` and
    `modeling_idefics2.py`, `Idefics2PerceiverResampler`.
    """

    Config = PerceiverConfig

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.randn(config.latents, config.width) * 0.02)
        self.blocks = nn.ModuleList(PerceiverBlock(config) for _ in range(config.depth))
        self.norm = NORMS[config.norm](config.width, eps=config.eps)

    def shape_for(self, shape: TokenShape) -> TokenShape:
        return TokenShape(self.config.latents, None)

    def forward(self, images: ImageTokens) -> ImageTokens:
        context = images.tokens
        latents = self.latents.to(context.dtype).expand(len(context), -1, -1)
        seen = images.valid
        if seen is not None:
            seen = torch.cat([seen, seen.new_ones(latents.shape[:2])], dim=1)
        for block in self.blocks:
            latents = block(latents, context, seen)
        return images.with_tokens(self.norm(latents), self.shape_for(images.shape))


@dataclass(frozen=True, kw_only=True, slots=True)
class ResamplerConfig:
    """`queries` learned queries read each view through `depth` cross-attention blocks."""

    in_width: int
    out_width: int
    queries: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        if self.out_width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.out_width}")


class ResamplerBlock(nn.Module):
    """Pre-norm cross-attention from queries to image tokens, then a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query = nn.LayerNorm(width)
        self.norm_image = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, images: Tensor, valid: Tensor | None) -> Tensor:
        """queries float[V, Q, D], images float[V, L, D], valid bool[V, L] or None."""
        V, Q, D = queries.shape
        q, kv = self.query(self.norm_query(queries)), self.key_value(self.norm_image(images))
        k, v = kv.chunk(2, dim=-1)
        q, k, v = (t.view(V, -1, self.heads, D // self.heads).transpose(1, 2) for t in (q, k, v))
        mask = None if valid is None else valid[:, None, None, :]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        queries = queries + self.out(read.transpose(1, 2).reshape(V, Q, D))
        return queries + self.mlp(self.norm_mlp(queries))


class Resampler(nn.Module):
    """Any number of image tokens becomes a fixed number, whatever the image's size.

    Positions come from the image tokens themselves. Source: the perceiver resampler of Flamingo
    (arXiv 2204.14198, section 3.1) in its single-image form.
    """

    Config = ResamplerConfig

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.in_width, config.out_width)
        self.queries = nn.Parameter(torch.randn(config.queries, config.out_width) * 0.02)
        self.blocks = nn.ModuleList(
            ResamplerBlock(config.out_width, config.heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.out_width)

    def shape_for(self, shape: TokenShape) -> TokenShape:
        return TokenShape(self.config.queries, None)

    def forward(self, images: ImageTokens) -> ImageTokens:
        context = self.project(images.tokens)
        queries = self.queries.to(context.dtype).expand(len(context), -1, -1)
        for block in self.blocks:
            queries = block(queries, context, images.valid)
        tokens = self.norm(queries)
        return images.with_tokens(tokens, TokenShape(self.config.queries, None))
