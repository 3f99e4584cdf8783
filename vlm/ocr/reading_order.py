"""The order in which the lines of a page are read.

A line comes before another where the two share columns of pixels and it is the upper one, or where
it is left of the other and no line between them spans both: so a heading is read before the columns
under it, and one column before the next.
Source: Breuel 2003, "High Performance Document Layout Analysis", section 5.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from vlm.ocr.line_detection.detect import Found

SHARED = 0.4
"""How far two lines reach over each other, in their heights, to share columns of pixels."""


def order(found: Sequence[Found]) -> list[Found]:
    """The lines in reading order: lines from top to bottom, columns from left to right, those of
    scripts that run to the left too."""
    if len(found) < 2:
        return list(found)
    boxes = _level(found)
    heights = np.array([one.size_px[1] for one in found])
    _span_lonely(boxes, heights)
    before = _before(boxes, heights)
    return [found[i] for i in _sorted(before, boxes)]


def _level(found: Sequence[Found]) -> np.ndarray:
    """Boxes float64[N, 4] of the lines, turned so that they lie level by their usual slope."""
    corners = np.array([one.corners_px for one in found], np.float64)
    along = corners[:, 1] - corners[:, 0]
    long = np.hypot(along[:, 0], along[:, 1])
    angles = np.arctan2(along[:, 1], along[:, 0])
    rank = np.argsort(angles)
    share = np.cumsum(long[rank]) / long.sum()
    angle = float(angles[rank][np.searchsorted(share, 0.5)])
    cos, sin = math.cos(angle), math.sin(angle)
    x = corners[:, :, 0] * cos + corners[:, :, 1] * sin
    y = corners[:, :, 1] * cos - corners[:, :, 0] * sin
    return np.stack([x.min(1), y.min(1), x.max(1), y.max(1)], 1)


def _span_lonely(boxes: np.ndarray, heights: np.ndarray) -> None:
    """Lines above or below all others that share columns with none or stand in the middle, such as
    a page's number below two columns, are taken as wide as the page."""
    left, right = boxes[:, 0].min(), boxes[:, 2].max()
    for i, (x0, y0, x1, y1) in enumerate(boxes.copy()):
        others = np.delete(boxes, i, 0)
        shared = np.minimum(others[:, 2], x1) - np.maximum(others[:, 0], x0)
        outside = (y0 >= others[:, 3]).all() or (y1 <= others[:, 1]).all()
        centred = abs(x0 + x1 - left - right) < 0.2 * (right - left)
        if outside and (centred or (shared < SHARED * heights[i]).all()):
            boxes[i, [0, 2]] = left, right


def _before(boxes: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """bool[N, N]: whether line n must be read before line m."""
    x0, y0, x1, y1 = boxes.T
    middle = (y0 + y1) / 2
    lower = np.minimum(heights[:, None], heights[None])
    reach = np.minimum(x1[:, None], x1[None]) - np.maximum(x0[:, None], x0[None])
    shares = reach > SHARED * lower
    np.fill_diagonal(shares, False)
    before = shares & (middle[:, None] < middle[None])
    left = ~shares & (x0[:, None] + x1[:, None] < x0[None] + x1[None])
    for n in range(len(boxes)):
        for m in np.nonzero(left[n])[0]:
            low, high = sorted((middle[n], middle[m]))
            between = (middle > low) & (middle < high) & shares[n] & shares[m]
            before[n, m] = not between.any()
    return before


def _sorted(before: np.ndarray, boxes: np.ndarray) -> list[int]:
    """The lines so that each comes after those before it; where that goes in circles, the topmost
    next."""
    left_to_wait_for = before.sum(0)
    ready = [(boxes[i, 1], boxes[i, 0], i) for i in np.nonzero(left_to_wait_for == 0)[0]]
    heapq.heapify(ready)
    placed: list[int] = []
    done = np.zeros(len(boxes), bool)
    while len(placed) < len(boxes):
        if not ready:
            waiting = np.nonzero(~done)[0]
            i = int(waiting[np.lexsort((boxes[waiting, 1], left_to_wait_for[waiting]))[0]])
        else:
            i = int(heapq.heappop(ready)[2])
        if done[i]:
            continue
        done[i] = True
        placed.append(i)
        for m in np.nonzero(before[i] & ~done)[0]:
            left_to_wait_for[m] -= 1
            if left_to_wait_for[m] == 0:
                heapq.heappush(ready, (boxes[m, 1], boxes[m, 0], m))
    return placed
