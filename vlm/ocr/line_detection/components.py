"""Which components of foreground may be characters: no specks, rules, frames, edges, stains or
bars; and how a page is turned, which the feet of its characters tell."""

from __future__ import annotations

import math

import numpy as np

from vlm.ocr.line_detection.binarize import (
    Components,
    Working,
    binarize,
    connected_components,
    surroundings,
    weighted_median,
)

LEAST_COMPONENT_PX, LEAST_NOISY_PX = 3, 4
"""The longer side of the smallest dot, and of the smallest on an image of more than NOISY."""
NOISY = 1.0
STEP = 0.8
"""The spread of shades around a component that is no character, as a share of its contrast."""
FAINT = 0.25
"""The contrast of a component as a share of the usual one, below which it is no text of this
page."""
MOST_SKEW = 10.0
"""Degrees that a page may be turned by."""


def character_components(working: Working, light: bool) -> Components:
    """The components of foreground without specks, rules, frames, edges, and what is as large as an
    image."""
    components = connected_components(binarize(working, light))
    if not len(components.boxes):
        return components
    contrast, spread = surroundings(components, working.grey)
    kept = spread < STEP
    components, contrast = components[kept], contrast[kept]
    if not len(components.boxes):
        return components
    # Print of the other side and stains are fainter than the text by far.
    usual = weighted_median(contrast, np.sqrt(components.area) * (components.heights >= 6))
    components = components[contrast > FAINT * usual]
    height, width = components.labels.shape
    h, w = components.heights, components.widths
    filled = components.area / (h * w)
    least = LEAST_NOISY_PX if working.noise > NOISY else LEAST_COMPONENT_PX
    speck = (np.maximum(h, w) < least) | (components.area < 1.5 * least)
    large = (h > 0.25 * height) & (w > 0.25 * width) & (filled < 0.1)
    keep = ~speck & ~large
    usual = float(np.median(h[keep & (h >= 8)])) if (keep & (h >= 8)).any() else 8.0
    across = (w > 10 * h) & (w > 4 * usual) & (h < usual)
    down = (h > 10 * w) & (h > 4 * usual)
    components = components[keep & ~across & ~down]
    return components[~_rule_components(components)]


def without_bars(components: Components, other: Components) -> Components:
    """The components without bars that hold characters of the other shade."""
    area = components.heights * components.widths
    bars = (components.area > 0.5 * area) & (components.widths > 1.5 * components.heights)
    for k in np.nonzero(bars)[0]:
        x0, y0, x1, y1 = components.boxes[k]
        held = (other.boxes[:, 0] >= x0) & (other.boxes[:, 2] <= x1)
        held &= (other.boxes[:, 1] >= y0) & (other.boxes[:, 3] <= y1)
        bars[k] = (held & (other.heights > 0.25 * (y1 - y0))).sum() >= 3
    return components[~bars]


def _rule_components(components: Components) -> np.ndarray:
    """bool[N]: thin upright components that continue each other, as those of a broken rule do and
    of a sheet's edge; characters of one line and the next stand further apart."""
    thin = np.nonzero(components.heights > 4 * components.widths)[0]
    boxes, found = components.boxes[thin], np.zeros(len(components.boxes), bool)
    gap = boxes[None, :, 1] - boxes[:, None, 3]
    reach = 0.35 * np.minimum(components.heights[thin][:, None], components.heights[thin][None])
    apart = np.maximum(boxes[:, None, 0], boxes[None, :, 0]) - np.minimum(
        boxes[:, None, 2], boxes[None, :, 2]
    )
    follows = (gap > -reach) & (gap < reach) & (apart < 3)
    np.fill_diagonal(follows, False)
    found[thin[follows.any(0) | follows.any(1)]] = True
    return found


def skew(working: Working) -> float:
    """Degrees, clockwise, to turn the page by so that its lines lie level; 0 where that is not
    clear. The best angle is the one at which the feet of the characters fall on fewest rows."""
    feet, sizes = [], []
    for light in (False, True):
        components = character_components(working, light)
        boxes = components.boxes[components.widths < 4 * components.heights]
        feet.append(np.stack([(boxes[:, 0] + boxes[:, 2]) / 2, boxes[:, 3]], 1))
        sizes.append(boxes[:, 3] - boxes[:, 1])
    feet, sizes = np.concatenate(feet), np.concatenate(sizes)
    if len(feet) < 12:
        return 0.0
    step = max(2.0, float(np.median(sizes)) / 5)

    def sharpness(degrees: float) -> float:
        angle = math.radians(degrees)
        rows = feet[:, 1] * math.cos(angle) + feet[:, 0] * math.sin(angle)
        counts = np.bincount(((rows - rows.min()) / step).astype(int))
        return float((counts.astype(np.float64) ** 2).sum())

    coarse = np.arange(-MOST_SKEW, MOST_SKEW + 0.01, 0.25)
    best = max(coarse, key=sharpness)
    best = max(np.arange(best - 0.2, best + 0.21, 0.05), key=sharpness)
    clear = sharpness(best) > 1.1 * sharpness(0.0)
    return float(best) if clear and abs(best) >= 0.2 else 0.0
