"""Which pixels of an image may be foreground (text), and the connected components that they make.

Text is told from its surroundings locally, so that uneven light, shadows and large and small type
do no harm: a pixel is foreground where it differs from the mean around it by a share of the spread
around it. Characters much larger than that window become outlines, whose boxes are the characters'
own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vlm.compat.extras import needs

with needs("ocr"):
    import cv2

WORKING_PIXELS = 900_000, 4_500_000
"""Images are enlarged towards the first and reduced to the second number of pixels."""
MOST_ENLARGED = 3.0
WINDOW_PX = 51
SPREADS = 0.5
"""How many standard deviations of its window the foreground differs from the mean of it."""
NOISES = 5.0
"""How many standard deviations of the noise the foreground differs at least."""
LEAST_CONTRAST = 7.0
CONTRAST_SHARE = 0.12
"""The least contrast of foreground, in grey levels and as a share of the strongest on the image."""
TEXTURE_PX, TEXTURES, MOST_TEXTURE = 15, 3.5, 0.3
"""Foreground differs by so many standard deviations of the paper's texture, as the emptiest windows
show it, but not by more than a share of the strongest contrast."""
RING_PX = 4.5


class Working(NamedTuple):
    """An image as lines are looked for in it.

    grey: uint8[H, W]. inside: bool[H, W], where there is image. noise: standard deviation of its
    noise, in grey levels. to_image: float64[2, 3], from its pixel edges to the caller's.
    """

    grey: np.ndarray
    inside: np.ndarray
    noise: float
    to_image: np.ndarray


class Components(NamedTuple):
    """Connected components of foreground, one a row: boxes float64[N, 4] as x0, y0, x1, y1, end
    exclusive, area int[N] in pixels; and the image they are on, labels int32[H, W], 0 for no
    component."""

    boxes: np.ndarray
    area: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray

    @property
    def heights(self) -> np.ndarray:
        return self.boxes[:, 3] - self.boxes[:, 1]

    @property
    def widths(self) -> np.ndarray:
        return self.boxes[:, 2] - self.boxes[:, 0]

    def __getitem__(self, keep) -> Components:
        return Components(self.boxes[keep], self.area[keep], self.labels, self.numbers[keep])


def working_copy(rgb: np.ndarray) -> Working:
    """The grey image at a size at which small type has a few pixels to its strokes.

    rgb: uint8[H, W, 3].
    """
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    low, high = WORKING_PIXELS
    scale = 1.0
    if grey.size < low:
        scale = min(MOST_ENLARGED, (low / grey.size) ** 0.5)
    elif grey.size > high:
        scale = (high / grey.size) ** 0.5
    # Noise is measured and smoothed where its pixels are independent, before any resizing.
    noise = noise_of(grey)
    if noise > 2:
        blur = min(2.0, 0.4 + noise / 10)
        grey = cv2.GaussianBlur(grey, (0, 0), blur)
        noise /= max(1.0, 2 * math.sqrt(math.pi) * blur)  # of white noise, what is left
    height, width = (max(1, round(side * scale)) for side in grey.shape)
    to_image = np.array([[grey.shape[1] / width, 0, 0], [0, grey.shape[0] / height, 0]])
    if (height, width) != grey.shape:
        how = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
        grey = cv2.resize(grey, (width, height), interpolation=how)
    return Working(grey, np.ones(grey.shape, bool), noise, to_image)


def turned(working: Working, degrees: float) -> Working:
    """The image turned clockwise around its middle, on a canvas that holds all of it."""
    height, width = working.grey.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -degrees, 1.0)
    cos, sin = abs(matrix[0, 0]), abs(matrix[0, 1])
    size = int(np.ceil(width * cos + height * sin)), int(np.ceil(width * sin + height * cos))
    matrix[:, 2] += (size[0] - width) / 2, (size[1] - height) / 2
    grey = cv2.warpAffine(
        working.grey, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    inside = cv2.warpAffine(working.inside.astype(np.uint8), matrix, size, flags=cv2.INTER_NEAREST)
    # OpenCV's coordinates lie on pixel centres, ours on edges.
    back = cv2.invertAffineTransform(matrix)
    back[:, 2] += 0.5 - back[:, :2] @ (0.5, 0.5)
    to_image = working.to_image[:, :2] @ back
    to_image[:, 2] += working.to_image[:, 2]
    return Working(grey, inside > 0, working.noise, to_image)


def noise_of(grey: np.ndarray) -> float:
    """The standard deviation of the noise, in grey levels, text and edges not counted.

    Source: Immerkær 1996, "Fast noise variance estimation", with a median in place of the mean.
    """
    if min(grey.shape) < 3:
        return 0.0
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    answer = np.abs(cv2.filter2D(grey, cv2.CV_32F, kernel))
    return float(np.median(answer[1:-1, 1:-1])) / (0.6745 * 6)


def binarize(working: Working, light: bool) -> np.ndarray:
    """bool[H, W]: the foreground, darker than its surroundings, or with `light` lighter."""
    grey = working.grey.astype(np.float32)
    if light:
        grey = 255 - grey
    size = (WINDOW_PX, WINDOW_PX)
    mean = cv2.boxFilter(grey, -1, size, borderType=cv2.BORDER_REFLECT)
    square = cv2.sqrBoxFilter(grey, -1, size, borderType=cv2.BORDER_REFLECT)
    spread = np.sqrt(np.maximum(square - mean * mean, 0))
    strongest = 2 * float(np.percentile(spread, 99))
    small = (TEXTURE_PX, TEXTURE_PX)
    near, square = cv2.boxFilter(grey, -1, small), cv2.sqrBoxFilter(grey, -1, small)
    texture = math.sqrt(max(0.0, float(np.percentile(square - near * near, 15))))
    least = max(
        LEAST_CONTRAST,
        NOISES * working.noise,
        CONTRAST_SHARE * strongest,
        min(TEXTURES * texture, MOST_TEXTURE * strongest),  # a tight line has no empty place
    )
    return (mean - grey > np.maximum(SPREADS * spread, least)) & working.inside


def connected_components(foreground: np.ndarray) -> Components:
    """The connected components of foreground, each of 8-connected pixels."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(foreground.astype(np.uint8))
    x, y, w, h, area = stats[1:].T
    boxes = np.stack([x, y, x + w, y + h], 1).astype(np.float64)
    return Components(boxes, area.astype(np.int64), labels, np.arange(1, count))


def surroundings(components: Components, grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How components differ from the ring of pixels around them: the contrast float64[N], 0 or
    more, in grey levels, and the spread float64[N] of the ring's own shades as a share of it.

    Along the edge of a sheet, a shadow or a thing one side of the ring has the component's own
    shade, and the spread is about 1; what surrounds a character is of one shade.
    components: those of an image, all of them.
    """
    apart, nearest = cv2.distanceTransformWithLabels(
        (components.labels == 0).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_CCOMP
    )
    count = int(components.labels.max()) + 1
    on = components.labels > 0
    own = np.zeros(int(nearest.max()) + 1, np.int64)  # OpenCV numbers the components anew
    own[nearest[on]] = components.labels[on]
    ring = (apart > 1.5) & (apart < RING_PX)
    around, shades = own[nearest[ring]], grey[ring].astype(np.float64)
    pixels = np.maximum(np.bincount(around, minlength=count), 1)
    mean = np.bincount(around, shades, count) / pixels
    square = np.bincount(around, shades * shades, count) / pixels
    spread = np.sqrt(np.maximum(square - mean * mean, 0))
    level = np.bincount(components.labels[on], grey[on], count)
    level /= np.maximum(np.bincount(components.labels[on], minlength=count), 1)
    contrast = np.abs(mean - level)[components.numbers]
    return contrast, spread[components.numbers] / np.maximum(contrast, 1e-3)


def weighted_median(values, weights: np.ndarray) -> float:
    """The value up to which half of the weights lie."""
    values = np.asarray(values)
    rank = np.argsort(values)
    sums = np.cumsum(weights[rank])
    return float(values[rank][np.searchsorted(sums, 0.5 * sums[-1])])
