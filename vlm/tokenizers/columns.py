"""Image tokens for lines of text: one for every four columns of pixels, however long the line.

A small convolutional net reads strokes at two resolutions and folds its rows into columns; layers
along the line then see each column's neighbours and, in some layers, the whole line. Nothing in it
knows a line's length, so that any width is read. Lines come at few widths (see PixelSpec's fit
"height"), so that a batch has no padding, and a line reads the same alone and beside others.

Shapes: V view, L image tokens (columns), D width, C channels, H W pixel rows and columns,
h w rows and columns of a feature map, A head, F features per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.image_tokens import ImageTokenizer, ImageTokens
from vlm.pixels import PixelSpec

STRIDE = 4
"""Columns of pixels of one token."""
FOLDED = 8
"""Rows of pixels of one row of the last map."""
HEAD_WIDTH = 64
BRANCH = 0.3
"""What the first weights of a residual branch's end are of the usual ones."""
LEAST_SPREAD = 0.02
"""The contrast, of 2, below which a view is taken for blank."""
LUMA = (0.299, 0.587, 0.114)
"""Source: ITU-R BT.601."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnsConfig:
    """What rebuilds a `ColumnsTokenizer`.

    channels: of the two maps, at a quarter of the height and at an eighth. blocks: residual blocks
        on each. width: of a token, whole heads of 64. layers: along the line; every third one
        sees the whole line, the others `reach` columns to each side.
    pixel_spec: its rows are a multiple of 8, its fit "height" with patches of 4.
    Raises ValueError naming what does not fit.
    """

    channels: tuple[int, int] = (32, 64)
    blocks: tuple[int, int] = (2, 2)
    width: int = 192
    layers: int = 6
    reach: int = 5
    pixel_spec: PixelSpec

    def __post_init__(self) -> None:
        if self.width % HEAD_WIDTH:
            raise ValueError(f"width must be whole heads of {HEAD_WIDTH}, found {self.width}")
        if self.pixel_spec.size_hw[0] % FOLDED:
            raise ValueError(
                f"rows must be a multiple of {FOLDED}, found {self.pixel_spec.size_hw[0]}"
            )
        if self.pixel_spec.size_hw[1] % STRIDE:
            raise ValueError(
                f"columns must be a multiple of {STRIDE}, found {self.pixel_spec.size_hw[1]}"
            )


Config = ColumnsConfig


class ColumnsTokenizer(ImageTokenizer):
    """Lines of text as a row of tokens, grid (1, W / 4), no prefix tokens."""

    def __init__(self, config: ColumnsConfig) -> None:
        super().__init__()
        self.config = config
        self.pixel_spec = config.pixel_spec
        self.dim = config.width
        low, high = config.channels
        rows = config.pixel_spec.size_hw[0] // FOLDED
        self.embed = nn.ModuleList([_conv(1, low // 2, (2, 2)), _conv(low // 2, low, (2, 2))])
        self.strokes = nn.ModuleList([Strokes(low) for _ in range(config.blocks[0])])
        self.shrink = _conv(low, high, (2, 1))
        self.letters = nn.ModuleList([Strokes(high) for _ in range(config.blocks[1])])
        self.fold = nn.Linear(high * rows, config.width)
        self.layers = nn.ModuleList([_layer(i, config) for i in range(config.layers)])
        self.norm = nn.LayerNorm(config.width)

    def forward(self, pixels: Tensor) -> ImageTokens:
        """pixels: float[V, 3, H, W], W whole patches of 4. Tokens float[V, W / 4, D]."""
        x = level(pixels).contiguous(memory_format=torch.channels_last)
        for conv in self.embed:
            x = F.relu(conv(x))
        for block in self.strokes:
            x = block(x)
        x = self.shrink(x)
        for block in self.letters:
            x = block(x)
        x = self.fold(x.permute(0, 3, 2, 1).flatten(2))
        for layer in self.layers:
            x = layer(x)
        return ImageTokens(tokens=self.norm(x), grid_hw=(1, x.shape[1]))

    def parts(self) -> dict[str, nn.Module]:
        return {
            "embed": self.embed,
            "strokes": self.strokes,
            "shrink": self.shrink,
            "letters": self.letters,
            "fold": self.fold,
            "layers": self.layers,
            "norm": self.norm,
        }


def level(pixels: Tensor) -> Tensor:
    """Grey levels float[V, 1, H, W] of each view with mean 0 and spread 1, so that pale and dark
    print look alike; a blank view is all 0."""
    luma = torch.tensor(LUMA, dtype=torch.float32, device=pixels.device)
    grey = (pixels.float() * luma[:, None, None]).sum(1, keepdim=True)
    grey = grey - grey.mean((2, 3), keepdim=True)
    spread = grey.square().mean((2, 3), keepdim=True).sqrt()
    return (grey / spread.clamp(min=LEAST_SPREAD)).to(pixels.dtype)


def _conv(inside: int, outside: int, stride: tuple[int, int]) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride, 1)


class Strokes(nn.Module):
    """A residual block on a feature map: norm over channels, two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.first = _conv(channels, channels, (1, 1))
        self.second = _conv(channels, channels, (1, 1))
        with torch.no_grad():
            self.second.weight.mul_(BRANCH)

    def forward(self, x: Tensor) -> Tensor:
        """x: float[V, C, h, w], lying in memory as channels last, which makes the norm one pass."""
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.second(F.relu(self.first(y)))


class Layer(nn.Module):
    """A layer along the line: columns look at others, then each is worked on by itself."""

    def __init__(self, width: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mixer = mixer
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        with torch.no_grad():
            self.down.weight.mul_(BRANCH)
            self.mixer.out.weight.mul_(BRANCH)

    def forward(self, x: Tensor) -> Tensor:
        """x: float[V, L, D]."""
        x = x + self.mixer(self.norm(x))
        return x + self.down(F.relu(self.up(self.mlp_norm(x))))


class Near(nn.Module):
    """Each column sees `reach` columns to each side, each channel with weights of its own."""

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width)
        self.window = nn.Conv1d(
            width, width, 2 * reach + 1, padding=reach, groups=width, bias=False
        )
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, values = self.gate(x).chunk(2, -1)
        # As an image of one row, which lies in memory as channels last: several times as fast.
        values = values.transpose(1, 2)[:, :, None]
        kernel = self.window.weight[:, :, None]
        reach = self.window.padding[0]
        seen = F.conv2d(values, kernel, padding=(0, reach), groups=values.shape[1])
        return self.out(F.silu(gate) * seen[:, :, 0].transpose(1, 2))


class Whole(nn.Module):
    """Attention over the whole line; rotary positions tell how far apart columns stand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        V, L, D = x.shape
        q, k, v = self.qkv(x).view(V, L, 3, self.heads, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        cos, sin = rotation(L, HEAD_WIDTH, x.device, x.dtype)
        q, k = rotate(q, cos, sin) * HEAD_WIDTH**-0.5, rotate(k, cos, sin)
        # Written out: on CPUs the backward pass of torch's fused attention is several times slower.
        y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(V, L, D))


def rotation(
    length: int, features: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, [length, features / 2] each."""
    rates = 1000.0 ** (-torch.arange(0, features, 2, device=device) / features)
    angles = torch.arange(length, device=device)[:, None] * rates
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: float[..., L, F], its two halves turned as the parts of complex numbers."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _layer(number: int, config: ColumnsConfig) -> Layer:
    whole = number % 3 == 2
    return Layer(config.width, Whole(config.width) if whole else Near(config.width, config.reach))


def build(config: ColumnsConfig) -> ColumnsTokenizer:
    """The tokenizer of `config` with random weights."""
    return ColumnsTokenizer(config)


def line_spec(height_px: int, longest_px: int = 16384) -> PixelSpec:
    """The preprocessing of lines: their height brought to `height_px`, their aspect kept up to
    `longest_px` columns."""
    return PixelSpec(
        size_hw=(height_px, longest_px),
        fit="height",
        patch_px=STRIDE,
        resample="bilinear",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
