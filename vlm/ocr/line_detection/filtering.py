"""Which lines are text, and which of two that lie on each other.

Dark and light text are looked for alike, so the gaps between dark characters come as light lines
too; what lies around a line tells which of the two it is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vlm.ocr.line_detection.binarize import Components, Working, weighted_median
from vlm.ocr.line_detection.grouping import TextLine

LEAST_LINE_PX = 6
LEAST_ALONE = 12.0
"""Grey levels of contrast of an image's only characters."""


class ScoredLine(NamedTuple):
    """A line with what speaks for it. characters: components that are not much lower than it. flat:
    whether most components lie flat, as dashes do. filled: share of foreground in the boxes of its
    components."""

    line: TextLine
    light: bool
    contrast: float
    area: float
    characters: int
    flat: bool
    filled: float

    @property
    def weight(self) -> float:
        """Many characters speak for more than one large component, which may be the bar they are
        on."""
        return self.contrast * math.sqrt(self.area * min(10, self.characters))

    @property
    def height(self) -> float:
        return float(self.line.box[3] - self.line.box[1])


def score_lines(
    lines: list[TextLine], components: Components, working: Working, light: bool
) -> list[ScoredLine]:
    """The lines whose foreground differs from what lies around it, with what speaks for each."""
    contrasts = [_contrast(line, components, working, light) for line in lines]
    return [_scored(line, components, c, light) for line, c in zip(lines, contrasts) if c > 0]


def filter_lines(lines: list[ScoredLine]) -> list[TextLine]:
    """The lines of text among those of both shades, no two of them on each other."""
    return [one.line for one in _without_doubles(_plausible(lines))]


def _contrast(line: TextLine, components: Components, working: Working, light: bool) -> float:
    """Grey levels between a line's foreground and what lies around it; 0 where the line is no text.

    The gaps between characters make components of the other shade, but what lies around those is of
    their own shade.
    """
    boxes = components.boxes[line.members]
    x0, y0 = np.floor(boxes[:, :2].min(0)).astype(int)
    x1, y1 = np.ceil(boxes[:, 2:].max(0)).astype(int)
    height = line.box[3] - line.box[1]
    pad = max(2, round(0.15 * height))
    rows = slice(max(0, y0 - pad), min(working.grey.shape[0], y1 + pad))
    columns = slice(max(0, x0 - pad), min(working.grey.shape[1], x1 + pad))
    grey = working.grey[rows, columns].astype(np.int16)
    labels = components.labels[rows, columns]
    foreground = np.isin(labels, components.numbers[line.members])
    free = working.inside[rows, columns] & (labels == 0)
    around = free.copy()
    around[y0 - rows.start : y1 - rows.start, x0 - columns.start : x1 - columns.start] = False
    around = around if around.sum() >= 8 else free
    if not around.any() or foreground.mean() > 0.75:
        return 0.0
    contrast = float(np.median(grey[foreground])) - float(np.median(grey[around]))
    contrast = contrast if light else -contrast
    spread = float(np.percentile(grey, 95) - np.percentile(grey, 5))
    return contrast if contrast >= max(5.0, 0.3 * spread) else 0.0


def _scored(line: TextLine, components: Components, contrast: float, light: bool) -> ScoredLine:
    heights, widths = components.heights[line.members], components.widths[line.members]
    area = float(components.area[line.members].sum())
    return ScoredLine(
        line, light, contrast, area, int((heights > 0.4 * (line.box[3] - line.box[1])).sum()),
        bool(np.median(widths / heights) > 2.5), area / float((heights * widths).sum()),
    )  # fmt: skip


def _plausible(lines: list[ScoredLine]) -> list[ScoredLine]:
    """The lines without what is too faint, too small or of the wrong shape beside the lines of
    which there can be no doubt, those of many components."""
    certain = [one for one in lines if len(one.line.members) >= 4]
    least_height = LEAST_LINE_PX
    least_contrast, most_height = 0.0, math.inf
    if certain:
        weights = np.array([one.area for one in certain])
        height = weighted_median([one.height for one in certain], weights)
        least_height, most_height = max(least_height, 0.45 * height), 2.5 * height
        least_contrast = 0.2 * weighted_median([s.contrast for s in certain], weights)
    elif lines:
        # One short word, or none: what is far less than the best is not it.
        least_height = max(least_height, 0.35 * max(one.height for one in lines))
        least_contrast = max(LEAST_ALONE, 0.3 * max(one.contrast for one in lines))
    kept = []
    for one in lines:
        few = len(one.line.members) < 4
        faint = one.contrast < least_contrast
        small = one.height < (least_height if few or one.flat else LEAST_LINE_PX)
        dash = one.flat and few and one.filled > 0.8
        frame = few and one.filled < 0.1
        block = few and one.filled > 0.55 and one.height > most_height
        if faint or small or dash or frame or block:
            continue
        kept.append(one)
    return kept


def _without_doubles(lines: list[ScoredLine]) -> list[ScoredLine]:
    """Of lines that lie on each other, dark ones and light ones, the one for which more speaks; and
    none in the rarer shade that touches one in the other, as the gaps between tight lines do."""
    kept: list[ScoredLine] = []
    for one in sorted(lines, key=lambda one: -one.weight):
        if all(_shared(one.line.box, other.line.box) <= _allowed(one, other) for other in kept):
            kept.append(one)
    if not kept:
        return kept
    by_shade = {light: [one for one in kept if one.light == light] for light in (False, True)}
    sums = {light: sum(one.weight for one in some) for light, some in by_shade.items()}
    common = by_shade[sums[True] > sums[False]]
    rarer = []
    usual = weighted_median([one.contrast for one in common], np.ones(len(common)))
    for one in by_shade[sums[True] <= sums[False]]:
        out = 0.25 * one.height
        wide = one.line.box + np.array([-out, -out, out, out])
        touches = any(_shared(wide, other.line.box) > 0.02 for other in common)
        if one.contrast >= 0.5 * usual and not touches:
            rarer.append(one)
    return common + rarer


def _allowed(one: ScoredLine, other: ScoredLine) -> float:
    return 0.8 if one.light == other.light else 0.4


def _shared(first: np.ndarray, second: np.ndarray) -> float:
    """How much of the smaller of two boxes they share."""
    (x0, y0, x1, y1), (a0, b0, a1, b1) = first, second
    shared = max(0, min(x1, a1) - max(x0, a0)) * max(0, min(y1, b1) - max(y0, b0))
    return shared / min((x1 - x0) * (y1 - y0), (a1 - a0) * (b1 - b0))
