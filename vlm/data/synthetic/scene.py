"""Scenes of coloured shapes: what they hold, how they are composed from a seed, how they are drawn.

A scene is a value; its image follows from it alone, and its boxes are those of the very masks
that drew it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from vlm.data.dice import Dice

COLOURS = {
    "red": (214, 39, 40),
    "green": (34, 139, 34),
    "blue": (31, 80, 200),
    "yellow": (240, 210, 20),
    "orange": (250, 130, 10),
    "purple": (128, 30, 160),
    "pink": (245, 130, 190),
    "brown": (120, 72, 30),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
BACKGROUNDS = ("plain", "gradient", "noise")
"""Kinds that scenes draw from by themselves."""
HELD_BACK = ("checks", "stripes")
"""Kinds that scenes have only where they are asked for, to test on what was never trained."""
SUPERSAMPLING = 4  # samples to a pixel's side
CONTRAST = 150  # least sum of channel differences between a shape and its background
TRIES = 60  # places tried for a shape before the scene does without it


class Shape(NamedTuple):
    """A shape of a scene: box_xyxy_px is the square that holds it, in whole pixels."""

    kind: str
    colour: str
    box_xyxy_px: tuple[int, int, int, int]

    @property
    def label(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def centre(self) -> tuple[float, float]:
        """Column and row of the middle, in pixels."""
        x0, y0, x1, y1 = self.box_xyxy_px
        return (x0 + x1) / 2, (y0 + y1) / 2


class Background(NamedTuple):
    """What lies behind: `kind` of BACKGROUNDS or HELD_BACK, the colours of its corners or extremes,
    a seed."""

    kind: str
    first_rgb: tuple[int, int, int]
    last_rgb: tuple[int, int, int]
    seed: int


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes that do not touch, from left to right, on a background of size_hw pixels."""

    size_hw: tuple[int, int]
    background: Background
    shapes: tuple[Shape, ...]


# Corners of each straight-edged shape in the unit square, x to the right, y down.
def _star() -> tuple[tuple[float, float], ...]:
    angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
    radii = [0.5 if k % 2 == 0 else 0.21 for k in range(10)]
    return tuple((0.5 + r * math.cos(a), 0.5 + r * math.sin(a)) for r, a in zip(radii, angles))


POLYGONS = {
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "hexagon": ((0.25, 0), (0.75, 0), (1, 0.5), (0.75, 1), (0.25, 1), (0, 0.5)),
    "star": _star(),
    "cross": tuple(
        (x / 3, y / 3)
        for x, y in (
            (1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2),
            (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1),
        )
    ),
}  # fmt: skip
KINDS = ("circle", "ring", *POLYGONS)


def compose(
    seed: int,
    row: int,
    size_hw: tuple[int, int] | None,
    shapes: tuple[int, int] = (1, 4),
    background_kind: str | None = None,
) -> Scene:
    """The scene of (seed, row): size, background, and shapes at least 2 pixels apart."""
    dice = Dice(seed, row, "scene")
    if size_hw is None:
        size_hw = dice.between(128, 320), dice.between(128, 320)
    height, width = size_hw
    background = _background(dice, background_kind)
    colours = [name for name in COLOURS if _stands_out(COLOURS[name], background)]
    side = min(size_hw)
    placed: list[Shape] = []
    for _ in range(dice.between(*shapes)):
        for _ in range(TRIES):
            extent = dice.between(max(10, side // 9), side // 3)
            x0, y0 = dice.between(0, width - extent), dice.between(0, height - extent)
            box = (x0, y0, x0 + extent, y0 + extent)
            if not any(_near(box, shape.box_xyxy_px) for shape in placed):
                placed.append(Shape(dice.pick(KINDS), dice.pick(colours), box))
                break
    placed.sort(key=lambda shape: shape.centre)
    return Scene(size_hw, background, tuple(placed))


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image, edges smoothed."""
    image = _draw_background(scene.size_hw, scene.background)
    for shape in scene.shapes:
        x0, y0, x1, _ = shape.box_xyxy_px
        mask = shape_mask(shape.kind, x1 - x0)
        image.paste(COLOURS[shape.colour], (x0, y0), mask)
    return image


@cache
def shape_mask(kind: str, extent: int) -> Image.Image:
    """How much of each pixel a shape covers: mode L, extent x extent, 0 none, 255 all."""
    large = extent * SUPERSAMPLING
    mask = Image.new("L", (large, large))
    pen = ImageDraw.Draw(mask)
    last = large - 1
    if kind in POLYGONS:
        pen.polygon([(x * last, y * last) for x, y in POLYGONS[kind]], fill=255)
    else:
        pen.ellipse((0, 0, last, last), fill=255)
        if kind == "ring":
            edge = large * 0.22
            pen.ellipse((edge, edge, last - edge, last - edge), fill=0)
    return mask.reduce(SUPERSAMPLING)


def exact_box(shape: Shape) -> tuple[float, float, float, float]:
    """The smallest box around the pixels that a shape covers: xyxy, pixels, end exclusive."""
    x0, y0, x1, _ = shape.box_xyxy_px
    left, top, right, bottom = shape_mask(shape.kind, x1 - x0).getbbox()
    return float(x0 + left), float(y0 + top), float(x0 + right), float(y0 + bottom)


def _background(dice: Dice, asked: str | None) -> Background:
    """Light or dark, so that enough colours stand out; of the kind `asked` for, None: any."""
    low, high = (190, 255) if dice.roll() < 0.7 else (0, 60)
    first, last = (tuple(dice.between(low, high) for _ in range(3)) for _ in range(2))
    kind = dice.pick(BACKGROUNDS)
    kind = kind if asked is None else asked
    return Background(kind, first, first if kind == "plain" else last, dice.between(0, 2**32 - 1))


def _draw_background(size_hw: tuple[int, int], background: Background) -> Image.Image:
    height, width = size_hw
    if background.kind == "plain":
        return Image.new("RGB", (width, height), background.first_rgb)
    first, last = (np.array(rgb, np.float32) for rgb in background[1:3])
    if background.kind == "gradient":
        down = np.linspace(0, 0.5, height, dtype=np.float32)[:, None, None]
        across = np.linspace(0, 0.5, width, dtype=np.float32)[None, :, None]
        part = down + across
    elif background.kind in HELD_BACK:
        cell = 6 + background.seed % 20
        rows, columns = np.indices((height, width)) // cell
        odd = rows + columns if background.kind == "checks" else rows + np.zeros_like(columns)
        part = (odd % 2)[..., None].astype(np.float32)
    else:  # RandomState's streams are frozen, so an image stays the same under any numpy
        draws = np.random.RandomState(background.seed).bytes(height * width)
        part = np.frombuffer(draws, np.uint8).reshape(height, width, 1) / np.float32(255)
    return Image.fromarray((first + (last - first) * part + 0.5).astype(np.uint8))


def _stands_out(rgb: tuple[int, int, int], background: Background) -> bool:
    """Whether a colour differs enough from every colour between the background's extremes."""
    nearest = 0
    for value, a, b in zip(rgb, background.first_rgb, background.last_rgb):
        nearest += max(min(a, b) - value, value - max(a, b), 0)
    return nearest >= CONTRAST


def _near(a: tuple[int, int, int, int], b: tuple[int, int, int, int], gap: int = 2) -> bool:
    """Whether two boxes are less than `gap` pixels apart."""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap
