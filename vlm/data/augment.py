"""Random changes of a training image that leave its text true, and its boxes with it.

An image is seen through a random window, larger or smaller than itself, and in other colours.
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
    """How far an image may be changed.

    window: smallest and largest side of the window, as a share of the image's own; what lies
        beyond the image is filled with the colour of its corner. aspect: largest stretch of the
        window's sides against each other, at least 1.
    turn_degrees: largest turn either way, for images without boxes.
    colour: largest change of brightness, contrast and saturation, as a share of 1. hue: largest
        turn of the hue, as a share of the circle, at most 0.5.
    degrade: how often an image is blurred, flattened to few levels, or greyed, in 0 to 1.
    """

    window: tuple[float, float]
    aspect: float
    turn_degrees: float
    colour: float
    hue: float
    degrade: float

    def __call__(self, example: Example, seed: int) -> Example:
        """The example with its images changed, the same for the same seed.

        Raises BadImage where an image cannot be read; BadRow where a box cannot be one of its
        image: the window, which holds all boxes, would grow to hold it.
        """
        if not example.images:
            return example
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image_list = [open_image(reference) for reference in example.images]
            sizes_hw = [(image.height, image.width) for image in image_list]
            images, boxes = [], list(check_boxes(example.boxes, sizes_hw, example.name))
            for number, image in enumerate(image_list):
                own = [i for i, box in enumerate(boxes) if box.image == number]
                image, shrunk = _shrink(image)
                inside = shrunk.boxes([boxes[i].xyxy_px for i in own])
                image, window = self._reframe(self._recolour(image), inside.tolist())
                for i, xyxy_px in zip(own, window.boxes(inside).tolist()):
                    boxes[i] = replace(boxes[i], xyxy_px=tuple(xyxy_px))
                images.append(image)
        return Example(example.name, example.turns, tuple(images), tuple(boxes))

    def _recolour(self, image: Image.Image) -> Image.Image:
        if self.colour or self.hue:
            image = v2.ColorJitter(self.colour, self.colour, self.colour, self.hue)(image)
        if _uniform(0, 1) < self.degrade:
            choice = int(_uniform(0, 3))
            if choice == 0 and min(image.size) > 1:  # a blur reaches one pixel beyond
                side = max(3, min(image.size) // 16 | 1)
                image = functional.gaussian_blur(image, [side, side])
            elif choice == 1:
                image = functional.posterize(image, 2 + int(_uniform(0, 3)))
            else:
                image = functional.rgb_to_grayscale(image, 3)
        return image

    def _reframe(
        self, image: Image.Image, boxes_xyxy_px: list[tuple[float, ...]]
    ) -> tuple[Image.Image, Resize]:
        """The image seen through a window, and where its pixels went."""
        width, height = image.size
        fill = image.getpixel((0, 0))
        if self.turn_degrees and not boxes_xyxy_px:
            angle = _uniform(-self.turn_degrees, self.turn_degrees)
            image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=fill)
        side = math.exp(_uniform(*map(math.log, self.window)))
        stretch = math.exp(_uniform(-0.5, 0.5) * math.log(self.aspect))
        left, right = _span(width, side * stretch, [(b[0], b[2]) for b in boxes_xyxy_px])
        top, bottom = _span(height, side / stretch, [(b[1], b[3]) for b in boxes_xyxy_px])
        seen = Image.new("RGB", (right - left, bottom - top), fill)
        seen.paste(image, (-left, -top))
        size_hw = (bottom - top, right - left)
        return seen, Resize((height, width), size_hw, (1.0, 1.0), (float(-left), float(-top)))


LARGEST_PX = 2048
"""Longer sides are brought to this first: image tokenizers see less, and a camera's image would
take seconds."""
LIGHT = Augment(window=(0.8, 1.2), aspect=1.1, turn_degrees=5, colour=0.2, hue=0.02, degrade=0.1)
STRONG = Augment(window=(0.7, 1.4), aspect=1.3, turn_degrees=15, colour=0.5, hue=0.08, degrade=0.4)
LEVELS = {"none": None, "light": LIGHT, "strong": STRONG}
"""What a recipe's `augment` may say."""


def _shrink(image: Image.Image) -> tuple[Image.Image, Resize]:
    """The image with no side above LARGEST_PX, and where its pixels went."""
    W, H = image.size
    scale = min(1.0, LARGEST_PX / max(W, H))
    width, height = max(1, round(W * scale)), max(1, round(H * scale))
    if scale < 1.0:
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return image, Resize((H, W), (height, width), (width / W, height / H), (0.0, 0.0))


def _span(length: int, share: float, spans: list[tuple[float, float]]) -> tuple[int, int]:
    """First and last pixel (exclusive) of a random window on one axis: `share` of `length` long, or
    longer where `spans` need it; inside the image where smaller, around it where larger."""
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
