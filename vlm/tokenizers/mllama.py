"""Image tokens of Mllama's vision encoder: the tiles of a canvas, encoded together.

The tiles are one sequence, each with a class token, through a plain and then a gated encoder. The
weights were trained on sequences filled up to `max_tiles` tiles, and each tile to a multiple of 8
places: real places see what fills them up, and what fills up sees the real places alone. So all are
always computed; of what fills up none is given, unless `absent` asks for it.

Shapes: V view, t tile, N real places of a tile (class token and patches), S places of a sequence,
E width, h w tile rows and columns.

Source: arXiv 2407.21783, section 7; transformers, `modeling_mllama.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.compat.transformers import GradientCheckpointingLayer
from vlm.image_tokens import ImageTokenizer, ImageTokens
from vlm.pixels import PixelSpec
from vlm.pixels.canvas import CanvasSpec, layouts
from vlm.tokenizers.parts import named_parts

MULTIPLE = 8
"""A tile is filled up to a multiple of so many places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MllamaConfig:
    """What rebuilds an `MllamaTokenizer`.

    width, heads, mlp_width: of both encoders. depth, global_depth: layers of the plain and of the
        gated encoder. taken: plain layers, counted from 0, whose outputs are given beside the
        final one. patch_px: side of a patch. max_tiles: most tiles of an image. eps: of the layers'
        norms. absent: whether the tokens of tiles that an image has not are given too, as not
        valid. pixel_spec: preprocessing of one tile.
    Raises ValueError showing the fields that do not fit.
    """

    width: int
    heads: int
    mlp_width: int
    depth: int
    global_depth: int
    taken: tuple[int, ...]
    patch_px: int
    max_tiles: int
    pixel_spec: PixelSpec
    eps: float = 1e-5
    absent: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.width}")
        if any(not 0 <= layer < self.depth for layer in self.taken):
            raise ValueError(f"taken: expected layers of {self.depth}, found {self.taken}")
        if self.patch_px > min(self.pixel_spec.size_hw):
            raise ValueError(
                f"patches of {self.patch_px} pixels do not fit tiles of {self.pixel_spec.size_hw}"
            )

    @property
    def places(self) -> int:
        """Real places of a tile: its patches and the class token."""
        return (self.pixel_spec.size_hw[0] // self.patch_px) ** 2 + 1


Config = MllamaConfig


class Attention(nn.Module):
    """Self-attention in which the places after the first `real` see those `real` alone.

    Without the mask that says so: two products of fewer keys are the same.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_VSE: Tensor, real: int) -> Tensor:
        q, k, v = (
            project(x_VSE).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        read = F.scaled_dot_product_attention(q[:, :, :real], k, v)
        if real < x_VSE.shape[1]:
            filling = F.scaled_dot_product_attention(q[:, :, real:], k[:, :, :real], v[:, :, :real])
            read = torch.cat([read, filling], dim=2)
        return self.o_proj(read.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(GradientCheckpointingLayer):
    """Attention, then an MLP, each after its norm; of the gated encoder each times tanh of a
    learned number."""

    def __init__(self, config: MllamaConfig, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.self_attn = Attention(config.width, config.heads)
        self.mlp = MLP(config.width, config.mlp_width)
        self.input_layernorm = nn.LayerNorm(config.width, eps=config.eps)
        self.post_attention_layernorm = nn.LayerNorm(config.width, eps=config.eps)
        if gated:
            self.gate_attn = nn.Parameter(torch.full((1,), math.pi / 4))
            self.gate_ffn = nn.Parameter(torch.full((1,), math.pi / 4))

    def forward(self, x_VSE: Tensor, real: int) -> Tensor:
        read = self.self_attn(self.input_layernorm(x_VSE), real)
        x_VSE = x_VSE + (_opened(self.gate_attn, read) * read if self.gated else read)
        more = self.mlp(self.post_attention_layernorm(x_VSE))
        return x_VSE + (_opened(self.gate_ffn, more) * more if self.gated else more)


class Encoder(nn.Module):
    """Blocks one after the other."""

    def __init__(self, config: MllamaConfig, depth: int, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, gated) for _ in range(depth))

    def forward(self, x_VSE: Tensor, real: int, taken: tuple[int, ...] = ()) -> list[Tensor]:
        """The outputs of the layers `taken`, in that order, then the last one's."""
        found = {}
        for number, layer in enumerate(self.layers):
            x_VSE = layer(x_VSE, real)
            if number in taken:
                found[number] = x_VSE
        return [*(found[number] for number in taken), x_VSE]


class TileEmbedding(nn.Module):
    """A vector for each tile of each layout, times tanh of a learned number that starts at 0. The
    table has a row 0 that no layout has (of images that are not there)."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.max_tiles = config.max_tiles
        rows = len(layouts(config.max_tiles)) + 1
        self.embedding = nn.Embedding(rows, config.max_tiles * config.width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, id: int) -> Tensor:
        """float[tiles, E] of the layout `id`."""
        vectors = self.embedding.weight[id].unflatten(0, (self.max_tiles, -1))
        return vectors * _opened(self.gate, vectors)


class PositionEmbedding(nn.Module):
    """A vector for each place of a tile, and one for each place of each tile of each layout; a
    learned number, at first 0, whose tanh shifts weight from the first to the second."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.max_tiles, self.places = config.max_tiles, config.places
        rows = len(layouts(config.max_tiles)) + 1
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.randn(self.places, config.width) * config.width**-0.5)
        self.tile_embedding = nn.Embedding(rows, config.max_tiles * self.places * config.width)

    def forward(self, id: int) -> Tensor:
        """float[tiles, N, E] of the layout `id`."""
        own = self.tile_embedding.weight[id].unflatten(0, (self.max_tiles, self.places, -1))
        gate = _opened(self.gate, own)
        return (1 - gate) * self.embedding + gate * own


class MllamaTokenizer(ImageTokenizer):
    """The tokens of the tiles of an image, tile after tile, each its class token and its patches
    row by row: the gated encoder's output, then, feature by feature, those of the plain layers
    `taken`."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.config = config
        self.pixel_spec = CanvasSpec(tile=config.pixel_spec, max_tiles=config.max_tiles)
        self.dim = config.width * (1 + len(config.taken))
        self.patch_embedding = nn.Conv2d(
            3, config.width, config.patch_px, config.patch_px, bias=False
        )
        self.class_embedding = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(config.width)
        self.layernorm_post = nn.LayerNorm(config.width)
        self.transformer = Encoder(config, config.depth, gated=False)
        self.global_transformer = Encoder(config, config.global_depth, gated=True)

    def forward(self, pixels: Tensor) -> ImageTokens:
        """The tokens of V canvases of one size, pixels float[V, 3, H, W].

        Raises ValueError for a canvas that is not whole tiles, or of more than `max_tiles`.
        """
        h, w = self._layout_of(pixels)
        id = layouts(self.config.max_tiles).index((h, w)) + 1
        order = _Order(h * w, self.config.max_tiles, self.config.places)
        x_VSE = order.flatten(F.pad(self._embed(pixels, h, w, id), (0, 0, 0, order.spare)))
        *taken, x_VSE = self.transformer(x_VSE, order.real, self.config.taken)
        tile_tE = self.post_tile_positional_embedding(id)
        tile_SE = order.flatten(tile_tE[None, :, None].expand(-1, -1, order.filled, -1))
        x_VSE = self.layernorm_post(x_VSE) + tile_SE
        (x_VSE,) = self.global_transformer(x_VSE, order.real)
        states = [x_VSE, torch.stack([*taken], dim=-1).flatten(-2)] if taken else [x_VSE]
        tokens = order.given(torch.cat(states, dim=-1), self.config.absent)
        valid = None
        if self.config.absent:
            valid = torch.arange(tokens.shape[1], device=tokens.device) < order.real
            valid = valid.expand(len(tokens), -1)
        return ImageTokens(tokens=tokens, grid_hw=None, valid=valid)

    def parts(self) -> dict[str, nn.Module]:
        return named_parts(
            self,
            {
                "embed": (
                    "patch_embedding",
                    "class_embedding",
                    "gated_positional_embedding",
                    "pre_tile_positional_embedding",
                    "layernorm_pre",
                ),
                "blocks": ("transformer.layers",),
                "between": ("layernorm_post", "post_tile_positional_embedding"),
                "global_blocks": ("global_transformer.layers",),
            },
        )

    def _layout_of(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of tiles of canvases."""
        (H, W), side = pixels.shape[-2:], self.pixel_spec.side_px
        h, w = H // side, W // side
        if (h * side, w * side) != (H, W) or (h, w) not in layouts(self.config.max_tiles):
            raise ValueError(
                f"expected canvases of 1 to {self.config.max_tiles} whole tiles of {side} pixels, "
                f"found {H} x {W} pixels"
            )
        return h, w

    def _embed(self, pixels: Tensor, h: int, w: int, id: int) -> Tensor:
        """float[V, tiles, N, E]: every tile's class token and patches with their positions; tiles
        that are absent are zeros before that."""
        V, side = len(pixels), self.pixel_spec.side_px
        cut = pixels.reshape(V, 3, h, side, w, side).permute(0, 2, 4, 1, 3, 5)
        patches = self.patch_embedding(cut.reshape(V * h * w, 3, side, side))
        patches = patches.flatten(2).transpose(1, 2).unflatten(0, (V, h * w))
        absent = self.config.max_tiles - h * w
        patches = F.pad(patches, (0, 0, 0, 0, 0, absent))  # without a bias, zeros give zeros
        patches = patches + self.pre_tile_positional_embedding(id)[:, None]
        first = self.class_embedding.to(patches.dtype).expand(*patches.shape[:2], 1, -1)
        tiles = torch.cat([first, patches], dim=2)
        return self.layernorm_pre(tiles + self.gated_positional_embedding(id))


@dataclass(frozen=True, slots=True)
class _Order:
    """The order of the places of a sequence: the real ones tile by tile, then what fills their
    tiles up, then the absent tiles.

    found: tiles that are there. tiles: tiles of a sequence. places: real places of a tile.
    """

    found: int
    tiles: int
    places: int

    @property
    def spare(self) -> int:
        """Places that fill up a tile."""
        return -self.places % MULTIPLE

    @property
    def filled(self) -> int:
        """Places of a tile that is filled up."""
        return self.places + self.spare

    @property
    def real(self) -> int:
        """Real places of the sequence."""
        return self.found * self.places

    def flatten(self, x_VtNE: Tensor) -> Tensor:
        """The sequence float[V, S, E] of filled tiles float[V, tiles, filled, E]."""
        there, absent = x_VtNE[:, : self.found], x_VtNE[:, self.found :]
        parts = there[:, :, : self.places], there[:, :, self.places :], absent
        return torch.cat([part.flatten(1, 2) for part in parts], dim=1)

    def given(self, x_VSE: Tensor, absent: bool) -> Tensor:
        """Of a sequence the tokens of tiles: of those that are there, or of `absent` ones too."""
        there = x_VSE[:, : self.real]
        if not absent:
            return there
        rest = x_VSE[:, self.real + self.found * self.spare :]
        rest = rest.unflatten(1, (self.tiles - self.found, self.filled))[:, :, : self.places]
        return torch.cat([there, rest.flatten(1, 2)], dim=1)


def _opened(gate: Tensor, like: Tensor) -> Tensor:
    """What a gate lets through, in the dtype of what it gates."""
    return gate.tanh().to(like.dtype)


def build(config: MllamaConfig) -> MllamaTokenizer:
    """The tokenizer of `config` with random weights; downloads nothing."""
    return MllamaTokenizer(config)
