"""Characters become lines: neighbours of like height make runs, runs on one height make lines, and
the small marks around them (dots, commas, hyphens, accents) come last."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vlm.ocr.line_detection.binarize import Components

LINK_GAP, LINK_RATIO, LINK_OVERLAP = 0.9, 2.5, 0.5
"""Neighbouring characters: the gap in heights, the ratio of heights, the shared share of the
lower."""
MERGE_GAP = 3.0
"""Words of one line: the most gap in heights."""


class TextLine(NamedTuple):
    """Components that make a line. members: their rows. slope: of the line, rows for each column.
    box: x0, y0, x1, y1 in coordinates turned by the slope around the origin."""

    members: np.ndarray
    slope: float
    box: np.ndarray


def lines_of(components: Components) -> list[TextLine]:
    """The components as lines."""
    if not len(components.boxes):
        return []
    runs = _groups(len(components.boxes), _neighbours(components))
    lines = _with_marks([_fit(run, components) for run in runs], components)
    lines = [part for line in _merge_words(lines, components) for part in _split(line, components)]
    return _with_marks(lines, components)


def _neighbours(components: Components) -> list[tuple[int, int]]:
    """Each component with the nearest one to its right that may be the next character."""
    boxes, heights, widths = components.boxes, components.heights, components.widths
    order = np.argsort(boxes[:, 0], kind="stable")
    left = boxes[order, 0]
    pairs = []
    for i in range(len(boxes)):
        reach = boxes[i, 2] + LINK_GAP * LINK_RATIO * heights[i]
        start = np.searchsorted(left, boxes[i, 0], "left")
        near = order[start : np.searchsorted(left, reach, "right")]
        near = near[near != i]
        if not len(near):
            continue
        gap = boxes[near, 0] - boxes[i, 2]
        top = np.maximum(boxes[near, 1], boxes[i, 1])
        shared = np.minimum(boxes[near, 3], boxes[i, 3]) - top
        lower, higher = np.minimum(heights[near], heights[i]), np.maximum(heights[near], heights[i])
        middle = (boxes[near, 0] + boxes[near, 2] - boxes[i, 0] - boxes[i, 2]) / 2
        fits = (gap <= LINK_GAP * higher) & (shared >= LINK_OVERLAP * lower)
        fits &= (higher <= LINK_RATIO * lower) & (middle > 0)
        fits &= gap > -0.7 * np.minimum(widths[near], widths[i])
        if fits.any():
            tilt = np.abs(boxes[near, 1] + boxes[near, 3] - boxes[i, 1] - boxes[i, 3]) / 2
            cost = np.where(fits, np.maximum(gap, 0) + tilt, np.inf)
            pairs.append((i, int(near[cost.argmin()])))
    return pairs


def _groups(count: int, pairs: list[tuple[int, int]]) -> list[np.ndarray]:
    """The connected parts of a graph of `count` nodes."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in pairs:
        parent[root(a)] = root(b)
    roots = np.array([root(node) for node in range(count)])
    return [np.nonzero(roots == one)[0] for one in np.unique(roots)]


def _fit(members: np.ndarray, components: Components) -> TextLine:
    """The line that some components make: its slope where they show one, and its box."""
    boxes = components.boxes[members]
    slope = 0.0
    heights = boxes[:, 3] - boxes[:, 1]
    usual = _tall(heights)
    length = boxes[:, 2].max() - boxes[:, 0].min()
    body = (heights > 0.6 * usual) & (heights < 1.7 * usual)
    if body.sum() >= 8 and length > 6 * usual:
        slope = _slope((boxes[body, 0] + boxes[body, 2]) / 2, boxes[body, 3])
        if abs(slope) * length < 0.15 * usual or abs(slope) > 0.1:
            slope = 0.0
    return TextLine(members, float(slope), _box(boxes, float(slope)))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """The usual slope between two points that are well apart, which the few feet below the base
    line do not change (Theil-Sen)."""
    if len(x) > 80:
        some = np.linspace(0, len(x) - 1, 80).astype(int)
        x, y = x[np.argsort(x)][some], y[np.argsort(x)][some]
    across = x[None] - x[:, None]
    apart = across > 0.25 * (x.max() - x.min())
    return float(np.median((y[None] - y[:, None])[apart] / across[apart]))


def _tall(heights: np.ndarray) -> float:
    """The height of a line's characters, dots and commas not counted."""
    return float(np.percentile(heights, 75))


def _box(boxes: np.ndarray, slope: float) -> np.ndarray:
    """The box around boxes in coordinates that are turned by the slope."""
    cos = 1 / math.hypot(1, slope)
    sin = slope * cos
    # Of each box the middle is turned; its own extent stays, as characters stand upright on it.
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    u, v = x * cos + y * sin, y * cos - x * sin
    half_w, half_h = (boxes[:, 2] - boxes[:, 0]) / 2, (boxes[:, 3] - boxes[:, 1]) / 2
    return np.array(
        [(u - half_w).min(), (v - half_h).min(), (u + half_w).max(), (v + half_h).max()]
    )


def _merge_words(lines: list[TextLine], components: Components) -> list[TextLine]:
    """Runs that stand on one height become one line, but for those of two columns."""
    lines = sorted(lines, key=lambda line: line.box[0])
    heights = [_tall(components.heights[line.members]) for line in lines]
    left = [_end(line, components, right=False) for line in lines]
    right = [_end(line, components, right=True) for line in lines]
    starts = np.array(left)
    boxes = np.array([_upright(line, components) for line in lines])
    size = np.array(heights)
    pairs = []
    for i in range(len(lines)):
        edge, top, bottom = right[i]
        h = bottom - top
        gap = starts[:, 0] - edge
        shared = np.minimum(starts[:, 2], bottom) - np.maximum(starts[:, 1], top)
        lower = np.minimum(starts[:, 2] - starts[:, 1], h)
        ratio = np.maximum(size / size[i], size[i] / size)
        fits = (gap > -0.5 * h) & (gap < MERGE_GAP * h) & (shared >= 0.5 * lower) & (ratio < 2.2)
        fits &= np.arange(len(lines)) != i
        fits &= boxes[:, 2] > boxes[i, 2]
        if not fits.any():
            continue
        j = int(np.where(fits, gap, np.inf).argmin())
        if gap[j] < 0.5 * h or not _between_columns(boxes, i, j, h):
            pairs.append((i, j))
    groups = _groups(len(lines), pairs)
    return [
        _fit(np.concatenate([lines[k].members for k in group]), components)
        if len(group) > 1
        else lines[group[0]]
        for group in groups
    ]


def _end(line: TextLine, components: Components, right: bool) -> tuple[float, float, float]:
    """Edge, top and bottom of a line at one of its ends, from the last components there."""
    boxes = components.boxes[line.members]
    heights = boxes[:, 3] - boxes[:, 1]
    edge = boxes[:, 2].max() if right else boxes[:, 0].min()
    boxes = boxes[heights > 0.6 * _tall(heights)]
    boxes = boxes[np.argsort(-boxes[:, 2] if right else boxes[:, 0])[:5]]
    return edge, boxes[:, 1].min(), boxes[:, 3].max()


def _upright(line: TextLine, components: Components) -> np.ndarray:
    boxes = components.boxes[line.members]
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])


def _between_columns(boxes: np.ndarray, i: int, j: int, height: float) -> bool:
    """Whether the gap between two runs is one of columns: runs above and below begin where the
    right one begins, and few reach across."""
    start, end = boxes[i, 2], boxes[j, 0]
    centre, size = (boxes[:, 1] + boxes[:, 3]) / 2, boxes[:, 3] - boxes[:, 1]
    y = (boxes[i, 1] + boxes[i, 3]) / 2
    near = (size > 0.5 * height) & (size < 2.5 * height)
    near &= (np.abs(centre - y) < 12 * height) & (np.abs(centre - y) > 0.6 * height)
    reach = min(end - start, height)
    crossing = near & (boxes[:, 0] < end - 0.6 * reach) & (boxes[:, 2] > end - 0.3 * reach)
    level = near & (np.abs(boxes[:, 0] - end) < 0.4 * height)
    if not crossing.any():
        return level.sum() >= 2 or end - start > 2.5 * height
    return level.sum() >= max(3, 1.5 * crossing.sum())


def _split(line: TextLine, components: Components) -> list[TextLine]:
    """A line, or the several that strokes from one to the next have made one; such strokes are left
    out, as they belong to none."""
    boxes = components.boxes[line.members]
    heights = boxes[:, 3] - boxes[:, 1]
    tall = _tall(heights[heights > 0.3 * heights.max()]) if len(heights) < 4 else _tall(heights)
    if line.box[3] - line.box[1] < 1.9 * tall:
        return [line]
    characters = (heights > 0.45 * tall) & (heights < 1.6 * tall)
    if characters.sum() < 4:
        return [line]
    cos = 1 / math.hypot(1, line.slope)
    rows = (boxes[:, 1] + boxes[:, 3]) / 2 - (boxes[:, 0] + boxes[:, 2]) / 2 * line.slope * cos
    rank = np.sort(rows[characters])
    gaps = np.nonzero(np.diff(rank) > 0.5 * tall)[0]
    if not len(gaps):
        return [line]
    edges = (rank[gaps] + rank[gaps + 1]) / 2
    level = np.searchsorted(edges, rows)
    fit = heights < 1.6 * tall
    return [
        _fit(line.members[(level == k) & fit], components)
        for k in range(len(edges) + 1)
        if ((level == k) & fit).any()
    ]


def _with_marks(lines: list[TextLine], components: Components) -> list[TextLine]:
    """Lines with the dots, commas and accents around them; those by themselves are skipped."""
    if not lines:
        return []
    body = np.array([line.box[3] - line.box[1] for line in lines])
    usual = np.array([_tall(components.heights[line.members]) for line in lines])
    upright = np.array([_upright(line, components) for line in lines])
    count = np.array([len(line.members) for line in lines])
    slopes = np.array([line.slope for line in lines])
    cos = 1 / np.hypot(1, slopes)
    top, bottom = (np.array([line.box[k] for line in lines]) for k in (1, 3))
    adopted: dict[int, list[int]] = {}
    gone = set()
    for k in np.argsort(body):
        x0, y0, x1, y1 = upright[k]
        cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
        v = cy * cos - cx * slopes * cos
        fits = (body > 1.4 * body[k]) & (usual > 1.6 * usual[k])
        fits |= (count[k] == 1) & (body > 1.8 * body[k])
        fits &= (cx > upright[:, 0] - 1.5 * body) & (cx < upright[:, 2] + 1.5 * body)
        away = np.maximum(np.maximum(top - v, v - bottom), 0)
        fits &= away < np.where(v > bottom, 0.2, 0.35) * body
        fits &= count >= count[k]
        fits[k] = False
        if fits.any():
            beside = np.maximum(np.maximum(upright[:, 0] - cx, cx - upright[:, 2]), 0)
            host = int(np.where(fits, (away + beside) / body, np.inf).argmin())
            adopted.setdefault(host, []).append(int(k))
            gone.add(int(k))
    final = []
    for k, line in enumerate(lines):
        if k in gone:
            continue
        waiting, members = list(adopted.get(k, ())), [line.members]
        while waiting:
            one = waiting.pop()
            members.append(lines[one].members)
            waiting += adopted.get(one, ())
        rows = np.concatenate(members)
        final.append(TextLine(rows, line.slope, _box(components.boxes[rows], line.slope)))
    return final
