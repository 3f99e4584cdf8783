"""Where the lines of text are on a page, a scan or a photograph.

The foreground is split into components (`binarize`), those that may be characters (`components`)
make lines (`grouping`), and of dark and light lines the true ones are kept (`filtering`). No
learned model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlm.compat.extras import needs
from vlm.ocr.line_detection.binarize import Working, turned, working_copy
from vlm.ocr.line_detection.components import character_components, skew, without_bars
from vlm.ocr.line_detection.filtering import filter_lines, score_lines
from vlm.ocr.line_detection.grouping import TextLine, lines_of

with needs("ocr"):
    import cv2

Corners = tuple[tuple[float, float], ...]

MARGIN = 0.12
"""What `cut` leaves around a line, in its heights."""


@dataclass(frozen=True, slots=True)
class Found:
    """A line that was found.

    corners_px: its four corners (x, y), clockwise from the text's own top left, in pixels of the
        image, on pixel edges.
    """

    corners_px: Corners

    @property
    def xyxy_px(self) -> tuple[float, float, float, float]:
        """The smallest upright box around it."""
        xs, ys = zip(*self.corners_px)
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def size_px(self) -> tuple[float, float]:
        """How long and how high it is."""
        a, b, _, d = self.corners_px
        return math.dist(a, b), math.dist(a, d)


def find_lines(image: Image.Image) -> list[Found]:
    """The lines of text on an image, from top to bottom; none on a blank image.

    image: mode RGB. A page may be turned by up to MOST_SKEW degrees. Two columns give two lines
    where one stands beside the other. A text that runs up or down a page is not found as a line;
    `runs_sideways` says whether it is one.
    """
    rgb = np.asarray(image.convert("RGB"))
    if min(rgb.shape[:2]) < 3:
        return []
    working = working_copy(rgb)
    degrees = skew(working)
    if degrees:
        working = turned(working, degrees)
    dark, bright = (character_components(working, light) for light in (False, True))
    scored = []
    for light, components in (
        (False, without_bars(dark, bright)),
        (True, without_bars(bright, dark)),
    ):
        scored += score_lines(lines_of(components), components, working, light)
    found = [Found(_corners(line, working, rgb.shape[:2])) for line in filter_lines(scored)]
    return sorted(found, key=lambda one: (one.xyxy_px[1], one.xyxy_px[0]))


def runs_sideways(image: Image.Image) -> bool:
    """Whether most characters of an image have their nearest neighbour above or below them, as in
    text turned by 90 degrees, or in characters stacked on each other."""
    rgb = np.asarray(image.convert("RGB"))
    if min(rgb.shape[:2]) < 3:
        return False
    working = working_copy(rgb)
    best: tuple[int, bool] = (0, False)
    for light in (False, True):
        components = character_components(working, light)
        if not len(components.boxes):
            continue
        sizes = np.maximum(components.heights, components.widths)
        usual = np.median(sizes)
        boxes = components.boxes[(sizes > 0.5 * usual) & (sizes < 2.5 * usual)]
        boxes = boxes[:1500]
        if len(boxes) < 4:
            continue
        across = np.maximum(boxes[:, None, 0], boxes[None, :, 0]) - np.minimum(
            boxes[:, None, 2], boxes[None, :, 2]
        )
        down = np.maximum(boxes[:, None, 1], boxes[None, :, 1]) - np.minimum(
            boxes[:, None, 3], boxes[None, :, 3]
        )
        apart = np.hypot(np.maximum(across, 0), np.maximum(down, 0))
        np.fill_diagonal(apart, np.inf)
        nearest = apart.argmin(1)
        rows = np.arange(len(boxes))
        vertical = (down > across)[rows, nearest] & (apart[rows, nearest] < 2 * usual)
        if len(boxes) > best[0]:
            best = len(boxes), bool(vertical.mean() > 0.65)
    return best[1]


def cut(image: Image.Image, found: Found, margin: float = MARGIN) -> Image.Image:
    """One line as an upright image, with a margin of so many of its heights around it.

    What lies outside the image repeats its edge.
    """
    corners = np.array(widened(found, margin), np.float32)
    width = max(1, round(math.dist(corners[0], corners[1])))
    height = max(1, round(math.dist(corners[0], corners[3])))
    x0, y0 = corners.min(0)
    x1, y1 = corners.max(0)
    if np.array_equal(corners, np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])):
        box = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
        if box[0] >= 0 and box[1] >= 0 and box[2] <= image.width and box[3] <= image.height:
            return image.convert("RGB").crop(box)
    target = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32)
    matrix = cv2.getPerspectiveTransform(corners - 0.5, target - 0.5)
    x0, y0 = max(0, math.floor(x0) - 2), max(0, math.floor(y0) - 2)
    around = image.crop((x0, y0, min(image.width, int(x1) + 3), min(image.height, int(y1) + 3)))
    shift = np.array([[1, 0, x0], [0, 1, y0], [0, 0, 1]], np.float64)
    pixels = cv2.warpPerspective(
        np.asarray(around.convert("RGB")),
        matrix @ shift,
        (width, height),
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return Image.fromarray(pixels)


def widened(found: Found, margin: float = MARGIN) -> Corners:
    """The corners of a line with a margin of so many of its heights around it."""
    corners = np.array(found.corners_px, np.float64)
    length, height = found.size_px
    along = (corners[1] - corners[0]) / max(length, 1e-6)
    down = (corners[3] - corners[0]) / max(height, 1e-6)
    out = margin * height
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    moved = [corner + out * (a * along + b * down) for corner, (a, b) in zip(corners, signs)]
    return tuple((float(x), float(y)) for x, y in moved)


def _corners(line: TextLine, working: Working, size_hw: tuple[int, int]) -> Corners:
    """A line's corners in the caller's image."""
    u0, v0, u1, v1 = line.box
    cos = 1 / math.hypot(1, line.slope)
    sin = line.slope * cos
    turned_back = [(u * cos - v * sin, u * sin + v * cos)
                   for u, v in ((u0, v0), (u1, v0), (u1, v1), (u0, v1))]  # fmt: skip
    points = np.array(turned_back) @ working.to_image[:, :2].T + working.to_image[:, 2]
    points = points.clip(0, (size_hw[1], size_hw[0]))
    return tuple((float(x), float(y)) for x, y in points)
