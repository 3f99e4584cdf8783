"""Adaptors: from image tokens of the tokenizer's width to image tokens of the text model's width.

Each adaptor knows how it changes a view's token count (`shape_for`), so that the prompt can
reserve exactly that many positions before anything is computed.
Longer than most files here: each kind is one short class and its configuration, over few helpers.

Shapes: V view, L image tokens per view, D in or out width, h w patch grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.config import from_dict, to_dict
from vlm.grid_resampler import GridResampler
from vlm.image_tokens import ImageTokens, TokenShape
from vlm.resampler import GatedMLP, Perceiver, Resampler


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPConfig:
    """`depth` linear layers with GELU between them: 1 is one linear map, 2 is LLaVA's adaptor.

    hidden_width: width between the layers; unused where depth is 1. bias: of every layer.
    """

    in_width: int
    out_width: int
    depth: int
    hidden_width: int
    bias: bool = True

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"an MLP adaptor needs depth >= 1, found {self.depth}")


def _mlp(config: MLPConfig) -> nn.Sequential:
    widths = [config.in_width] + [config.hidden_width] * (config.depth - 1) + [config.out_width]
    layers: list[nn.Module] = []
    for i in range(config.depth):
        layers += [nn.GELU()] * (i > 0) + [nn.Linear(widths[i], widths[i + 1], config.bias)]
    return nn.Sequential(*layers)


class MLP(nn.Module):
    """The same perceptron on every token; token count and grid stay. Linear where depth is 1."""

    Config = MLPConfig

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = _mlp(config)

    def shape_for(self, shape: TokenShape) -> TokenShape:
        return shape

    def forward(self, images: ImageTokens) -> ImageTokens:
        return images.with_tokens(self.layers(images.tokens), images.shape)


class NewlineMLP(nn.Module):
    """The same perceptron on every token, and before each view's tokens one that is learned, which
    a layout puts at the end of each row of a grid (LLaVA-NeXT's `image_newline`)."""

    Config = MLPConfig

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = _mlp(config)
        self.newline = nn.Parameter(torch.randn(config.out_width) * config.out_width**-0.5)

    def shape_for(self, shape: TokenShape) -> TokenShape:
        return TokenShape(shape.length + 1, shape.grid_hw)

    def forward(self, images: ImageTokens) -> ImageTokens:
        tokens = self.layers(images.tokens)
        newline = self.newline.to(tokens.dtype).expand(len(tokens), 1, -1)
        return images.with_tokens(torch.cat([newline, tokens], dim=1), self.shape_for(images.shape))


@dataclass(frozen=True, kw_only=True, slots=True)
class IdentityConfig:
    """Tokens of one width, which stays."""

    width: int

    @property
    def in_width(self) -> int:
        return self.width

    @property
    def out_width(self) -> int:
        return self.width


class Identity(nn.Module):
    """Image tokens as they are, for text models whose cross-attention takes the tokenizer's width
    (TrOCR, Donut)."""

    Config = IdentityConfig

    def __init__(self, config: IdentityConfig) -> None:
        super().__init__()
        self.config = config

    def shape_for(self, shape: TokenShape) -> TokenShape:
        return shape

    def forward(self, images: ImageTokens) -> ImageTokens:
        return images


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitMLPConfig:
    """For paired tokens, [high | low] along the width: each half has a linear map of its own to
    half of `hidden_width`, then GELU and linear over both (DeepSeek-VL 7B's aligner)."""

    high_width: int
    low_width: int
    hidden_width: int
    out_width: int

    def __post_init__(self) -> None:
        if self.hidden_width % 2:
            raise ValueError(f"hidden_width must be even, found {self.hidden_width}")

    @property
    def in_width(self) -> int:
        return self.high_width + self.low_width


class SplitMLP(nn.Module):
    """Two linear maps, one for each tower of a paired tokenizer, joined high first.

    Source: DeepSeek-VL (arXiv 2403.05525), section 2.2, hybrid vision encoder and adaptor.
    """

    Config = SplitMLPConfig

    def __init__(self, config: SplitMLPConfig) -> None:
        super().__init__()
        self.config = config
        self.high = nn.Linear(config.high_width, config.hidden_width // 2)
        self.low = nn.Linear(config.low_width, config.hidden_width // 2)
        self.out = nn.Linear(config.hidden_width, config.out_width)

    def shape_for(self, shape: TokenShape) -> TokenShape:
        return shape

    def forward(self, images: ImageTokens) -> ImageTokens:
        high, low = images.tokens.split([self.config.high_width, self.config.low_width], dim=-1)
        joined = torch.cat([self.high(high), self.low(low)], dim=-1)
        return images.with_tokens(self.out(F.gelu(joined)), images.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelShuffleConfig:
    """Blocks of `ratio` x `ratio` neighbouring tokens become one token, then an MLP.

    norm: a LayerNorm over each block before the MLP, for backbones whose features are of any
        scale. positions: octaves of sines and cosines of a block's position in the image that are
        put beside it, for backbones that do not say where a feature lies (CNNs); 0 puts none.
    bias: of every layer of the MLP.
    """

    in_width: int
    out_width: int
    ratio: int
    depth: int
    hidden_width: int
    norm: bool = False
    positions: int = 0
    bias: bool = True


class PixelShuffle(nn.Module):
    """Fewer, wider tokens: each block of ratio x ratio patches is concatenated row by row.

    Needs a grid without prefix tokens whose sides are multiples of the ratio. With ratio 2 on a
    4 x 6 grid, 24 tokens become 6 (2 x 3), four times as wide before the MLP.
    """

    Config = PixelShuffleConfig

    def __init__(self, config: PixelShuffleConfig) -> None:
        super().__init__()
        self.config = config
        width = config.in_width * config.ratio**2
        self.norm = nn.LayerNorm(width) if config.norm else nn.Identity()
        self.mlp = _mlp(
            MLPConfig(
                in_width=width + 4 * config.positions,
                out_width=config.out_width,
                depth=config.depth,
                hidden_width=config.hidden_width,
                bias=config.bias,
            )
        )

    def shape_for(self, shape: TokenShape) -> TokenShape:
        """Raises ValueError, showing the grid and the ratio, where blocks do not fit."""
        return _shuffled(shape, self.config.ratio)

    def forward(self, images: ImageTokens) -> ImageTokens:
        shape = self.shape_for(images.shape)
        blocks = self.norm(_joined(images.tokens, shape.grid_hw, self.config.ratio))
        if self.config.positions:
            where = grid_waves(shape.grid_hw, self.config.positions).to(blocks)
            blocks = torch.cat([blocks, where.expand(len(blocks), -1, -1)], dim=-1)
        return images.with_tokens(self.mlp(blocks), shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class NormedShuffleConfig:
    """Each token is normed, then blocks of `ratio` x `ratio` neighbours become one token, then an
    MLP of two layers, as wide between them as a block.

    norm: "layer" or "rms"; eps: of it.
    Raises ValueError for another norm.
    """

    in_width: int
    out_width: int
    ratio: int
    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, found {self.norm!r}")


NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class NormedShuffle(nn.Module):
    """`PixelShuffle` of tokens that are normed before they are joined (the patch mergers of
    Qwen2-VL and Qwen2.5-VL)."""

    Config = NormedShuffleConfig

    def __init__(self, config: NormedShuffleConfig) -> None:
        super().__init__()
        self.config = config
        block = config.in_width * config.ratio**2
        self.norm = NORMS[config.norm](config.in_width, eps=config.eps)
        self.mlp = _mlp(
            MLPConfig(in_width=block, out_width=config.out_width, depth=2, hidden_width=block)
        )

    def shape_for(self, shape: TokenShape) -> TokenShape:
        """Raises ValueError, showing the grid and the ratio, where blocks do not fit."""
        return _shuffled(shape, self.config.ratio)

    def forward(self, images: ImageTokens) -> ImageTokens:
        shape = self.shape_for(images.shape)
        blocks = _joined(self.norm(images.tokens), shape.grid_hw, self.config.ratio)
        return images.with_tokens(self.mlp(blocks), shape)


def _shuffled(shape: TokenShape, r: int) -> TokenShape:
    """The shape after blocks of r x r tokens are joined. Raises ValueError where they do not
    fit."""
    if shape.grid_hw is None or shape.prefix:
        raise ValueError(
            f"pixel shuffle needs a grid without prefix tokens, found {shape}; "
            "drop the prefix tokens in the image tokenizer"
        )
    h, w = shape.grid_hw
    if h % r or w % r:
        raise ValueError(f"pixel shuffle by {r} does not divide the grid {h} x {w}")
    return TokenShape(shape.length // r**2, (h // r, w // r))


def _joined(tokens: Tensor, grid_hw: tuple[int, int], r: int) -> Tensor:
    """Tokens float[V, L, D] as blocks of r x r on the grid `grid_hw`, float[V, h * w, r * r * D]:
    blocks row by row, and the tokens of each too."""
    (h, w), (V, _, D) = grid_hw, tokens.shape
    blocks = tokens.view(V, h, r, w, r, D).transpose(2, 3)
    return blocks.reshape(V, h * w, r * r * D)


def grid_waves(grid_hw: tuple[int, int], octaves: int) -> Tensor:
    """Where each cell of a grid lies in the image: float32[h * w, 4 * octaves], sines and cosines
    of its middle's row and column, 0 to 1 over the image, at half a period and its octaves.

    Equal positions get equal waves whatever the grid, so that a trained adaptor may see other
    grids.
    """
    h, w = grid_hw
    rows = (torch.arange(h, dtype=torch.float32) + 0.5) / h
    columns = (torch.arange(w, dtype=torch.float32) + 0.5) / w
    centres = torch.cartesian_prod(rows, columns)  # [h * w, 2]
    angles = centres[:, :, None] * torch.pi * 2.0 ** torch.arange(octaves)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainConfig:
    """Adaptors one after the other. parts: the configuration of each, `kind` included."""

    parts: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts: expected an adaptor or more, found none")

    @property
    def in_width(self) -> int:
        return _read(self.parts[0])[1].in_width

    @property
    def out_width(self) -> int:
        return _read(self.parts[-1])[1].out_width


class Chain(nn.Module):
    """Adaptors one after the other, such as an MLP and a resampler.

    Raises ValueError naming two widths where one does not take what the one before it gives.
    """

    Config = ChainConfig

    def __init__(self, config: ChainConfig) -> None:
        super().__init__()
        self.config = config
        self.parts = nn.ModuleList(build(part) for part in config.parts)
        for number, (before, after) in enumerate(zip(self.parts, self.parts[1:])):
            if before.config.out_width != after.config.in_width:
                raise ValueError(
                    f"parts[{number + 1}]: expected in_width {before.config.out_width}, as the "
                    f"adaptor before it gives, found {after.config.in_width}"
                )

    def shape_for(self, shape: TokenShape) -> TokenShape:
        for part in self.parts:
            shape = part.shape_for(shape)
        return shape

    def forward(self, images: ImageTokens) -> ImageTokens:
        for part in self.parts:
            images = part(images)
        return images


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttentionConfig:
    """`queries` learned latents read each view through one attention of `heads` heads."""

    in_width: int
    out_width: int
    queries: int
    heads: int

    def __post_init__(self) -> None:
        if self.out_width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.out_width}")


class LatentAttention(nn.Module):
    """Any number of image tokens becomes a fixed number by one attention, without norms or a
    feed-forward layer. Tokens are brought to unit length and through a linear map; latents see
    them, and each other beside them.

    Source: transformers, `Kosmos2ImageToTextProjection`, and `normalize` before it.
    """

    Config = LatentAttentionConfig

    def __init__(self, config: LatentAttentionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.out_width
        self.project = nn.Linear(config.in_width, width)
        self.latents = nn.Parameter(torch.randn(config.queries, width))
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def shape_for(self, shape: TokenShape) -> TokenShape:
        return TokenShape(self.config.queries, None)

    def forward(self, images: ImageTokens) -> ImageTokens:
        context = self.project(F.normalize(images.tokens, dim=-1))
        V, _, D = context.shape
        latents = self.latents.to(context.dtype).expand(V, -1, -1)
        seen = torch.cat([context, latents], dim=1)
        heads = self.config.heads
        q, k, v = (
            layer(tokens).view(V, -1, heads, D // heads).transpose(1, 2)
            for layer, tokens in ((self.query, latents), (self.key, seen), (self.value, seen))
        )
        mask = None
        if images.valid is not None:
            mask = F.pad(images.valid, (0, self.config.queries), value=True)[:, None, None, :]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        tokens = self.out(read.transpose(1, 2).reshape(V, -1, D))
        return replace(images, valid=None).with_tokens(tokens, self.shape_for(images.shape))


KINDS = {
    "identity": Identity,
    "mlp": MLP,
    "newline_mlp": NewlineMLP,
    "split_mlp": SplitMLP,
    "pixel_shuffle": PixelShuffle,
    "normed_shuffle": NormedShuffle,
    "resampler": Resampler,
    "grid_resampler": GridResampler,
    "gated_mlp": GatedMLP,
    "perceiver": Perceiver,
    "chain": Chain,
    "latent_attention": LatentAttention,
}


def build(values: dict[str, Any]) -> nn.Module:
    """An adaptor with fresh weights from its configuration, `kind` included."""
    cls, config = _read(values)
    return cls(config)


def _read(values: dict[str, Any]) -> tuple[type, Any]:
    """The class and the configuration that values with their `kind` say."""
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"adaptor kind {kind!r} is not one of {', '.join(KINDS)}")
    return KINDS[kind], from_dict(KINDS[kind].Config, values, where=f"adaptor {kind}")


def config_of(adaptor: nn.Module) -> dict[str, Any]:
    """The configuration of an adaptor, `kind` included: the inverse of `build`."""
    kind = next(kind for kind, cls in KINDS.items() if type(adaptor) is cls)
    return {"kind": kind, **to_dict(adaptor.config)}


FLAMINGO = {
    "heads": 8,
    "kv_heads": 8,
    "head_width": 64,
    "mlp": "squared_relu",
    "norm": "layer",
    "eps": 1e-5,
}
"""Of a perceiver, whatever its width. Source: Flamingo (arXiv 2204.14198), appendix A.1.1."""


def adaptor_config(
    kind: str, *, in_width: int, out_width: int, depth: int, ratio: int, queries: int
) -> dict[str, Any]:
    """The configuration of an adaptor by name, its hidden layers as wide as the language model."""
    widths = {"in_width": in_width, "out_width": out_width}
    deep = {"depth": depth, "hidden_width": out_width}
    known = {
        "linear": {"kind": "mlp", **widths, "depth": 1, "hidden_width": out_width},
        "mlp": {"kind": "mlp", **widths, **deep},
        "pixel_shuffle": {
            "kind": "pixel_shuffle",
            **widths,
            **deep,
            "ratio": ratio,
            "norm": True,
            "positions": 6,
        },
        "resampler": {
            "kind": "resampler",
            **widths,
            "depth": depth,
            "queries": queries,
            "heads": max(1, out_width // 64),
        },
        "perceiver": {
            "kind": "chain",
            "parts": [
                {
                    "kind": "perceiver",
                    "width": in_width,
                    "latents": queries,
                    "depth": depth,
                    **FLAMINGO,
                    "mlp_width": 4 * in_width,
                },
                {"kind": "mlp", **widths, "depth": 1, "hidden_width": out_width},
            ],
        },
    }
    if kind not in known:
        raise ValueError(f"adaptor {kind!r} is not one of {', '.join(known)}")
    return known[kind]
