"""A vision transformer at each image's own size: rotary positions of rows and columns, windows.

The image encoder of Qwen2-VL and Qwen2.5-VL. Sides of a view are whole blocks of patches
(`vlm.pixels.area`), and views of one pixel size come together, so that attention is dense: nothing
is padded, nothing is masked. Blocks attend over the whole view, or over windows of it; for these
the patches are put window by window, windows of like size together, and put back at the end.
Windows begin at the top left; those at the right and bottom hold what is left.

A patch joins several frames of a video; a still image stands for each of them.

Source: arXiv 2409.12191 (Qwen2-VL), section 2.1; 2502.13923 (Qwen2.5-VL), section 2.1;
transformers, `modeling_qwen2_vl.py` and `modeling_qwen2_5_vl.py`.

Shapes: V view, L image tokens per view, D width, A head, F features per head, H W pixel rows and
columns, h w patch rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.compat.transformers import GradientCheckpointingLayer
from vlm.image_tokens import ImageTokenizer, ImageTokens, TokenShape
from vlm.pixels.area import AreaSpec
from vlm.tokenizers.parts import named_parts

EPS = 1e-6
"""Of every norm. Source: transformers, `Qwen2VLVisionBlock` and `Qwen2_5_VLVisionBlock`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeViTConfig:
    """What rebuilds a `NativeViT`.

    mlp_width: between the linear maps of a block. patch_px: side of a patch; patch_frames: how many
    frames of a video it joins.
    norm: "layer" or "rms". mlp: "quick_gelu" (Qwen2-VL) or "gated_silu" (Qwen2.5-VL).
    rotary_base: the wave length of the slowest rotation, in patches over two pi.
    window_px: side of the windows that blocks attend over, whole blocks of pixels of `pixel_spec`;
        None where all attend over the whole view. whole_blocks: those that do so beside windows.
    Raises ValueError that shows the field and its value.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch_px: int
    patch_frames: int
    norm: str
    mlp: str
    rotary_base: float
    pixel_spec: AreaSpec
    window_px: int | None = None
    whole_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field, allowed in (("norm", NORMS), ("mlp", MLPS)):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {', '.join(allowed)}, found {getattr(self, field)!r}"
                )
        if self.width % (4 * self.heads):
            raise ValueError(
                "expected a width of whole fours of features for each head, half of them for rows "
                f"and half for columns, found width {self.width} and {self.heads} heads"
            )
        block_px = self.pixel_spec.block_px
        if block_px % self.patch_px:
            raise ValueError(
                f"pixel_spec: expected blocks of whole patches of {self.patch_px} pixels, found "
                f"{block_px}"
            )
        if self.window_px is not None and (self.window_px < 1 or self.window_px % block_px):
            raise ValueError(
                f"window_px must be whole blocks of {block_px} pixels, found {self.window_px}"
            )
        beyond = [number for number in self.whole_blocks if not 0 <= number < self.depth]
        if beyond or (self.whole_blocks and self.window_px is None):
            raise ValueError(
                f"whole_blocks must be of the {self.depth} blocks, beside windows, found "
                f"{self.whole_blocks} and window_px {self.window_px}"
            )


Config = NativeViTConfig


class NativeViT(ImageTokenizer):
    """Every patch of a view as a token, row by row, without a closing norm."""

    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.width
        self.pixel_spec = config.pixel_spec
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, pixels: Tensor) -> ImageTokens:
        """pixels: float[V, 3, H, W], sides of whole patches. Tokens float[V, h * w, D].

        Raises ValueError for sides that are not whole patches.
        """
        config = self.config
        grid_hw = _grid(tuple(pixels.shape[-2:]), config.patch_px)
        x = self.patch_embed(pixels)
        turns = rotary_turns(grid_hw, config.width // config.heads, config.rotary_base, x.device)
        whole = runs = [(1, x.shape[1])]
        if config.window_px is not None:
            order, runs = by_length(windows(grid_hw, config.window_px // config.patch_px))
            order = order.to(x.device)
            x, turns = x[:, order], (turns[0][order], turns[1][order])
        for number, block in enumerate(self.blocks):
            x = block(x, turns, whole if number in config.whole_blocks else runs)
        if config.window_px is not None:
            x = x[:, order.argsort()]
        return ImageTokens(tokens=x, grid_hw=grid_hw)

    def _meta_shape(self, view_hw: tuple[int, int]) -> TokenShape:
        """By arithmetic, since nearly every image has a size of its own."""
        h, w = _grid(view_hw, self.config.patch_px)
        return TokenShape(h * w, (h, w))

    def parts(self) -> dict[str, nn.Module]:
        return named_parts(self, {"embed": ("patch_embed",), "blocks": ("blocks",)})


class PatchEmbed(nn.Module):
    """Each patch of all frames through one linear map."""

    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        size = (config.patch_frames, config.patch_px, config.patch_px)
        self.proj = nn.Conv3d(3, config.width, size, stride=size, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """float[V, 3, H, W], a still image for every frame, to float[V, h * w, D]."""
        kernel = self.proj.weight.transpose(1, 2)  # frames before channels
        frames, patch_px = kernel.shape[1], kernel.shape[-1]
        pixels = pixels.repeat(1, frames, 1, 1)
        return F.conv2d(pixels, kernel.flatten(1, 2), stride=patch_px).flatten(2).transpose(1, 2)


class Block(GradientCheckpointingLayer):
    """Pre-norm attention, then a pre-norm MLP."""

    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        self.norm1 = NORMS[config.norm](config.width, eps=EPS)
        self.norm2 = NORMS[config.norm](config.width, eps=EPS)
        self.attn = Attention(config.width, config.heads)
        self.mlp = MLPS[config.mlp](config.width, config.mlp_width)

    def forward(
        self, x: Tensor, turns: tuple[Tensor, Tensor], runs: Sequence[tuple[int, int]]
    ) -> Tensor:
        """x: float[V, L, D]; the rest as in `Attention`."""
        x = x + self.attn(self.norm1(x), turns, runs)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Attention of tokens that lie in runs and see those of their own run alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, turns: tuple[Tensor, Tensor], runs: Sequence[tuple[int, int]]
    ) -> Tensor:
        """x: float[V, L, D]. turns: what `rotary_turns` gives, in the order of x. runs: (how many,
        tokens of each), of runs of equal length that follow each other."""
        V, L, D = x.shape
        query, key, value = self.qkv(x).view(V, L, 3, self.heads, -1).unbind(2)
        query, key = rotate(query, turns), rotate(key, turns)
        sizes = [count * length for count, length in runs]
        read = []
        for (count, length), *qkv in zip(runs, *(t.split(sizes, 1) for t in (query, key, value))):
            qkv = [t.reshape(V * count, length, self.heads, -1).transpose(1, 2) for t in qkv]
            out = F.scaled_dot_product_attention(*qkv)
            read.append(out.transpose(1, 2).reshape(V, count * length, D))
        return self.proj(torch.cat(read, dim=1))


class QuickGELUMLP(nn.Module):
    """Two linear maps with x * sigmoid(1.702 x) between them."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class GatedSiLUMLP(nn.Module):
    """A linear map, gated by the SiLU of another, and one back."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_width)
        self.up_proj = nn.Linear(width, mlp_width)
        self.down_proj = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
MLPS = {"quick_gelu": QuickGELUMLP, "gated_silu": GatedSiLUMLP}


def rotary_turns(
    grid_hw: tuple[int, int], head_width: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32[h * w, F] each, of the angles by which the features of the patch in
    each row and column turn: a quarter of the frequencies twice over for its row, a quarter for its
    column.

    Source: transformers, `Qwen2VLVisionRotaryEmbedding`.
    """
    h, w = grid_hw
    half = head_width // 2
    exponents = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
    frequencies = 1.0 / base**exponents
    rows = torch.arange(h, device=device).repeat_interleave(w)
    columns = torch.arange(w, device=device).repeat(h)
    angles = torch.cat([side[:, None] * frequencies for side in (rows, columns)], dim=1).repeat(
        1, 2
    )
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """float[V, L, A, F] turned in fp32, feature n together with feature n + F / 2."""
    cos, sin = (turn[:, None] for turn in turns)
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def windows(grid_hw: tuple[int, int], side: int) -> list[Tensor]:
    """The cells of a grid in windows of `side` x `side`, which follow row by row, as their cells
    do: int64[cells] of each.

    >>> [cells.tolist() for cells in windows((3, 3), 2)]
    [[0, 1, 3, 4], [2, 5], [6, 7], [8]]
    """
    h, w = grid_hw
    cells = torch.arange(h * w, device="cpu").view(h, w)
    return [part.flatten() for rows in cells.split(side) for part in rows.split(side, dim=1)]


def by_length(cells: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """All cells of windows int64[L], those of windows of like length together, and (how many,
    cells of each) of these.

    >>> order, runs = by_length(windows((3, 3), 2))
    >>> order.tolist(), runs
    ([8, 2, 5, 6, 7, 0, 1, 3, 4], [(1, 1), (2, 2), (1, 4)])
    """
    ordered = sorted(cells, key=len)
    runs = [(len(list(alike)), length) for length, alike in groupby(ordered, len)]
    return torch.cat(ordered), runs


def build(config: NativeViTConfig) -> NativeViT:
    """The tokenizer of `config` with random weights; downloads nothing."""
    return NativeViT(config)


def _grid(size_hw: tuple[int, int], patch_px: int) -> tuple[int, int]:
    """Patch rows and columns of a view of `size_hw` pixels."""
    (h, odd_h), (w, odd_w) = (divmod(side, patch_px) for side in size_hw)
    if odd_h or odd_w or not (h and w):
        raise ValueError(f"expected pixels in whole patches of {patch_px}, found {size_hw}")
    return h, w
