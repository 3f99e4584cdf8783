"""Which pieces of ink may be letters: no specks, rules, frames, edges, stains or bars; and how a
page is turned, which the feet of its letters tell."""

from __future__ import annotations

import math

import numpy as np

from vlm.ocr.line_detection.binarize import (
    Pieces,
    Working,
    ink_of,
    pieces_of,
    surroundings,
    weighted_median,
)

LEAST_PIECE_PX, LEAST_NOISY_PX = 3, 4
"""The longer side of the smallest dot, and of the smallest on an image of more than NOISY."""
NOISY = 1.0
STEP = 0.8
"""The spread of shades around a piece that is no letter, as a share of its contrast."""
FAINT = 0.25
"""The contrast of a piece as a share of the usual one, below which it is no ink of this page."""
MOST_SKEW = 10.0
"""Degrees that a page may be turned by."""


def letters_of(working: Working, light: bool) -> Pieces:
    """The pieces of ink without specks, rules, frames, edges, and what is as large as an image."""
    pieces = pieces_of(ink_of(working, light))
    if not len(pieces.boxes):
        return pieces
    contrast, spread = surroundings(pieces, working.grey)
    kept = spread < STEP
    pieces, contrast = pieces[kept], contrast[kept]
    if not len(pieces.boxes):
        return pieces
    # Print of the other side and stains are fainter than the text by far.
    usual = weighted_median(contrast, np.sqrt(pieces.area) * (pieces.heights >= 6))
    pieces = pieces[contrast > FAINT * usual]
    height, width = pieces.labels.shape
    h, w = pieces.heights, pieces.widths
    filled = pieces.area / (h * w)
    least = LEAST_NOISY_PX if working.noise > NOISY else LEAST_PIECE_PX
    speck = (np.maximum(h, w) < least) | (pieces.area < 1.5 * least)
    large = (h > 0.25 * height) & (w > 0.25 * width) & (filled < 0.1)
    keep = ~speck & ~large
    usual = float(np.median(h[keep & (h >= 8)])) if (keep & (h >= 8)).any() else 8.0
    across = (w > 10 * h) & (w > 4 * usual) & (h < usual)
    down = (h > 10 * w) & (h > 4 * usual)
    pieces = pieces[keep & ~across & ~down]
    return pieces[~_rule_pieces(pieces)]


def without_bars(pieces: Pieces, other: Pieces) -> Pieces:
    """The pieces without bars that hold letters of the other shade."""
    area = pieces.heights * pieces.widths
    bars = (pieces.area > 0.5 * area) & (pieces.widths > 1.5 * pieces.heights)
    for k in np.nonzero(bars)[0]:
        x0, y0, x1, y1 = pieces.boxes[k]
        held = (other.boxes[:, 0] >= x0) & (other.boxes[:, 2] <= x1)
        held &= (other.boxes[:, 1] >= y0) & (other.boxes[:, 3] <= y1)
        bars[k] = (held & (other.heights > 0.25 * (y1 - y0))).sum() >= 3
    return pieces[~bars]


def _rule_pieces(pieces: Pieces) -> np.ndarray:
    """bool[N]: thin upright pieces that continue each other, as those of a broken rule do and of a
    sheet's edge; letters of one line and the next stand further apart."""
    thin = np.nonzero(pieces.heights > 4 * pieces.widths)[0]
    boxes, found = pieces.boxes[thin], np.zeros(len(pieces.boxes), bool)
    gap = boxes[None, :, 1] - boxes[:, None, 3]
    reach = 0.35 * np.minimum(pieces.heights[thin][:, None], pieces.heights[thin][None])
    apart = np.maximum(boxes[:, None, 0], boxes[None, :, 0]) - np.minimum(
        boxes[:, None, 2], boxes[None, :, 2]
    )
    follows = (gap > -reach) & (gap < reach) & (apart < 3)
    np.fill_diagonal(follows, False)
    found[thin[follows.any(0) | follows.any(1)]] = True
    return found


def skew(working: Working) -> float:
    """Degrees, clockwise, to turn the page by so that its lines lie level; 0 where that is not
    clear. The best angle is the one at which the feet of the letters fall on fewest rows."""
    feet, sizes = [], []
    for light in (False, True):
        pieces = letters_of(working, light)
        boxes = pieces.boxes[pieces.widths < 4 * pieces.heights]
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
