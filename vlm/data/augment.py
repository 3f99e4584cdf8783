"""Random changes of a training picture that leave its text true, and its boxes with it.

A picture is seen through a random window, larger or smaller than itself, and in other colours.
Windows are `Resize` records, so boxes move with the pixels; where a row has boxes the window holds
all of them. Nothing is mirrored: text and left from right would become false.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from vlm.data.boxes import check_boxes
from vlm.data.example import Example
from vlm.geometry import Resize
from vlm.pixels import open_image


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """How far a picture may be changed.

    window: smallest and largest side of the window, as a share of the picture's own; what lies
        beyond the picture is filled with the colour of its corner. aspect: largest stretch of the
        window's sides against each other, at least 1.
    turn_degrees: largest turn either way, for pictures without boxes.
    colour: largest change of brightness, contrast and saturation, as a share of 1. hue: largest
        turn of the hue, as a share of the circle, at most 0.5.
    degrade: how often a picture is blurred, flattened to few levels, or greyed, in 0 to 1.
    """

    window: tuple[float, float]
    aspect: float
    turn_degrees: float
    colour: float
    hue: float
    degrade: float

    def __call__(self, example: Example, seed: int) -> Example:
        """The example with its pictures changed, the same for the same seed.

        Raises BadImage where a picture cannot be read; BadRow where a box cannot be one of its
        picture: the window, which holds all boxes, would make room for it.
        """
        if not example.images:
            return example
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pictures = [open_image(reference) for reference in example.images]
            sizes_hw = [(picture.height, picture.width) for picture in pictures]
            images, boxes = [], list(check_boxes(example.boxes, sizes_hw, example.name))
            for number, picture in enumerate(pictures):
                own = [i for i, box in enumerate(boxes) if box.image == number]
                picture, shrunk = _shrink(picture)
                inside = shrunk.boxes([boxes[i].xyxy_px for i in own])
                picture, window = self._reframe(self._recolour(picture), inside.tolist())
                for i, xyxy_px in zip(own, window.boxes(inside).tolist()):
                    boxes[i] = replace(boxes[i], xyxy_px=tuple(xyxy_px))
                images.append(picture)
        return Example(example.name, example.turns, tuple(images), tuple(boxes))

    def _recolour(self, picture: Image.Image) -> Image.Image:
        if self.colour or self.hue:
            picture = v2.ColorJitter(self.colour, self.colour, self.colour, self.hue)(picture)
        if _uniform(0, 1) < self.degrade:
            choice = int(_uniform(0, 3))
            if choice == 0 and min(picture.size) > 1:  # a blur reaches one pixel beyond
                side = max(3, min(picture.size) // 16 | 1)
                picture = functional.gaussian_blur(picture, [side, side])
            elif choice == 1:
                picture = functional.posterize(picture, 2 + int(_uniform(0, 3)))
            else:
                picture = functional.rgb_to_grayscale(picture, 3)
        return picture

    def _reframe(
        self, picture: Image.Image, boxes_xyxy_px: list[tuple[float, ...]]
    ) -> tuple[Image.Image, Resize]:
        """The picture seen through a window, and where its pixels went."""
        width, height = picture.size
        fill = picture.getpixel((0, 0))
        if self.turn_degrees and not boxes_xyxy_px:
            angle = _uniform(-self.turn_degrees, self.turn_degrees)
            picture = picture.rotate(angle, Image.Resampling.BILINEAR, fillcolor=fill)
        side = math.exp(_uniform(*map(math.log, self.window)))
        stretch = math.exp(_uniform(-0.5, 0.5) * math.log(self.aspect))
        left, right = _span(width, side * stretch, [(b[0], b[2]) for b in boxes_xyxy_px])
        top, bottom = _span(height, side / stretch, [(b[1], b[3]) for b in boxes_xyxy_px])
        seen = Image.new("RGB", (right - left, bottom - top), fill)
        seen.paste(picture, (-left, -top))
        size_hw = (bottom - top, right - left)
        return seen, Resize((height, width), size_hw, (1.0, 1.0), (float(-left), float(-top)))


LARGEST_PX = 2048
"""Longer sides are brought to this first: image tokenizers see less, and a camera's picture would
take seconds."""
LIGHT = Augment(window=(0.8, 1.2), aspect=1.1, turn_degrees=5, colour=0.2, hue=0.02, degrade=0.1)
STRONG = Augment(window=(0.7, 1.4), aspect=1.3, turn_degrees=15, colour=0.5, hue=0.08, degrade=0.4)
LEVELS = {"none": None, "light": LIGHT, "strong": STRONG}
"""What a recipe's `augment` may say."""


def _shrink(picture: Image.Image) -> tuple[Image.Image, Resize]:
    """The picture with no side above LARGEST_PX, and where its pixels went."""
    W, H = picture.size
    scale = min(1.0, LARGEST_PX / max(W, H))
    width, height = max(1, round(W * scale)), max(1, round(H * scale))
    if scale < 1.0:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return picture, Resize((H, W), (height, width), (width / W, height / H), (0.0, 0.0))


def _span(length: int, share: float, spans: list[tuple[float, float]]) -> tuple[int, int]:
    """First and last pixel (exclusive) of a random window on one axis: `share` of `length` long, or
    longer where `spans` need it; inside the picture where smaller, around it where larger."""
    low = min((math.floor(a) for a, _ in spans), default=length)
    high = max((math.ceil(b) for _, b in spans), default=0)
    window = max(1, round(share * length), high - low)
    first, last = sorted((0, length - window))
    if spans:
        first, last = max(first, high - window), min(last, low)
        first, last = min(first, last), max(first, last)
    start = round(_uniform(first, last))
    return start, start + window


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
