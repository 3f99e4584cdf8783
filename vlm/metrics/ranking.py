"""Which candidates score higher than a right one, and which score highest: streamed, and exact.

The score matrix is never held whole: two sets of rows meet in blocks, and of each block only counts
or the best are kept. Memory is that of the embeddings, once more than given, and of one block.

A score is a cosine, and its value does not depend on block, device or number of processes: rows are
brought to unit length and rounded to multiples of 2^-26, which fp32 holds. Products of such numbers
and their sums are multiples of 2^-52 below 2, which fp64 holds: in fp64 a score has no rounding
error, in whatever order it is summed. The grid moves it by 1e-8 or so, less than fp32's own
rounding does. Blocks are computed in fp32, which decides about all scores but the few that lie
nearer to the bar than fp32 can be wrong; those are computed again in fp64.

Shapes: N image, M text, U shared embedding width, Q query, C candidate, K kept, G unsettled score.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

_GRID = 2.0**26
_BLOCK = {"cpu": (512, 4096), "cuda": (8192, 16384)}
"""Images and texts of a block: the scores stay in a processor's cache, or fill a GPU."""
_SPARE = 16
"""How many candidates more than asked for `top_k` keeps by fp32 score, to decide among exactly."""
_SLICE = {"cpu": 1 << 16, "cuda": 1 << 24}
"""How many numbers are held in fp64 at once, outside whole blocks."""
_RUN = 64
"""Unsettled scores are looked for in runs of so many."""


def unit_rows(
    x: Tensor | ArrayLike, name: str, y: Tensor | ArrayLike, other: str
) -> tuple[Tensor, Tensor]:
    """Two sets of rows as they are compared: of length 1, on the grid, where the first one is.

    x: float[rows, U], y: float[rows, U]; name, other: what messages call them.
    Returns float32 of the same shapes; the same bits on every device.
    Raises ValueError for sets without rows or of unequal widths, and for rows that hold NaN or
    infinity or have length 0, which it names; TypeError for numbers that are not floating point.
    """
    x, y = (
        values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
        for values in (x, y)
    )
    for values, what in ((x, name), (y, other)):
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"{what}: expected [rows, width], found {list(values.shape)}")
        if not values.is_floating_point():
            raise TypeError(f"{what}: expected floating point numbers, found {values.dtype}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{name} are {x.shape[1]} wide, {other} {y.shape[1]}: expected one width")
    return _on_grid(x, name, x.device), _on_grid(y, other, x.device)


@torch.no_grad()
def top_k(
    queries: Tensor | ArrayLike,
    candidates: Tensor | ArrayLike,
    k: int,
    *,
    block: tuple[int, int] | None = None,
    show: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each query's k best candidates by cosine, best first; of equal ones the lower row first.

    queries: float[Q, U], candidates: float[C, U], k: 1 to C; computed where `queries` are.
    Returns scores float32[Q, k] in -1 to 1, rounded from exact ones, and rows int64[Q, k].
    block: queries and candidates that are compared at once; None takes what suits the device.
    Raises ValueError and TypeError as `unit_rows`, and ValueError for a k or block out of range.
    """
    queries, candidates = unit_rows(queries, "queries", candidates, "candidates")
    if not 1 <= k <= len(candidates):
        raise ValueError(f"k: expected 1 to {len(candidates)} candidates, found {k}")
    height, width = _block(block, queries.device)
    keep = min(k + _SPARE, len(candidates))
    best = torch.empty(len(queries), k, device=queries.device)
    rows = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    starts = tqdm(range(0, len(queries), height), desc="top", leave=False, disable=not show)
    with _full_precision(queries.device):
        for top in starts:
            x = queries[top : top + height]
            kept, index = _merge_blocks(x, candidates, keep, width)
            index = index.sort(1).values  # a stable sort then leaves equal ones by row
            scores = _exact_scores(
                x, candidates, torch.arange(len(x), device=x.device).repeat_interleave(keep), index
            ).view(index.shape)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            index = index.gather(1, order)
            unsure = scores[:, k - 1] <= kept.amin(1).double() + _margin(x.shape[1])
            if keep < len(candidates) and unsure.any():
                redone = _merge_blocks_exactly(x[unsure], candidates, k, width)
                scores[unsure, :k], index[unsure, :k] = redone
            best[top : top + height], rows[top : top + height] = scores[:, :k].float(), index[:, :k]
    return best, rows


@torch.no_grad()
def count_above(
    images: Tensor,
    texts: Tensor,
    owner: Tensor,
    rows: Tensor,
    *,
    block: tuple[int, int] | None = None,
    show: bool = False,
) -> Tensor:
    """How many wrong candidates score at least as high as each right pair of image and text.

    images: float32[N, U] and texts: float32[M, U] of `unit_rows`. owner: int64[M], the image that
    is right for a text. rows: the images to compare, int64[R] without repeats.
    Returns int64[2, M], a right pair being named by its text: texts of other images that score as
    high for its image, 0 where its image is not in `rows`; and other images, of `rows` alone, that
    score as high for its text. Counts of several parts of the images add up to those of all.
    block: images and texts that are compared at once; None takes what suits the device.
    Raises ValueError for a block below 1; RuntimeError where products are less exact than fp32.
    """
    device, M = images.device, len(texts)
    height, width = _block(block, device)
    exact = _exact_scores(images, texts, owner, torch.arange(M, device=device))
    margin = _margin(images.shape[1])
    low, high = _outward((exact - margin).float(), -1), _outward((exact + margin).float(), 1)

    # Rows with more texts come first, so that those with an nth text are the first of a block.
    right = owner.bincount(minlength=len(images))
    rows = rows[right[rows].argsort(descending=True, stable=True)]
    by_image, start = owner.argsort(stable=True), right.cumsum(0) - right
    row_of = torch.full((len(images),), -1, device=device)
    row_of[rows] = torch.arange(len(rows), device=device)
    row_of = row_of[owner]  # of a text's image among the rows

    counts = torch.zeros(2, M, dtype=torch.int64, device=device)
    buffers = torch.empty(2, height * width, device=device)
    bar = tqdm(total=len(rows), desc="ranks", leave=False, disable=not show)
    with _full_precision(device), bar:
        for top in range(0, len(rows), height):
            chosen = rows[top : top + height]
            x, texts_of = images[chosen], right[chosen]
            across = []
            for nth in range(int(texts_of[0])):
                pairs = by_image[start[chosen[texts_of > nth]] + nth]
                across.append(_Lines(1, pairs, low[pairs][:, None], high[pairs][:, None]))
            for left in range(0, M, width):
                pairs = torch.arange(left, min(left + width, M), device=device)
                down = _Lines(0, pairs, low[pairs], high[pairs])
                at = row_of[pairs] - top
                inside = ((at >= 0) & (at < len(x))).nonzero()[:, 0]
                tests, y = [*across, down], texts[left : left + width]
                found = _count_block(x, y, at[inside], inside, tests, exact, buffers)
                for lines, above in zip(tests, found, strict=True):
                    counts[1 - lines.dim].index_add_(0, lines.pairs, above)
            bar.update(len(x))
    return counts


class _Lines(NamedTuple):
    """Right pairs, one for each of the first rows (dim 1) or for every column (dim 0) of a block of
    scores, and between which two fp32 scores it is unsettled what is above them, [G, 1] or [G]."""

    dim: int
    pairs: Tensor
    low: Tensor
    high: Tensor


def _count_block(
    x: Tensor,
    y: Tensor,
    right_rows: Tensor,
    right_columns: Tensor,
    tests: list[_Lines],
    exact: Tensor,
    buffers: Tensor,
) -> list[Tensor]:
    """For each of the tests, how many wrong scores of the block are as high as each right pair's
    or higher, int64[G]. Right pairs in the block are at right_rows, right_columns; the last test is
    that of the columns. buffers: float32[2, at least the block's scores], to be written over."""
    scores, flags = (part[: len(x) * len(y)].view(len(x), len(y)) for part in buffers)
    torch.mm(x, y.T, out=scores)
    own = tests[-1]
    found = scores[right_rows, right_columns]
    if not ((found >= own.low[right_columns]) & (found <= own.high[right_columns])).all():
        raise RuntimeError(
            "scores in fp32 are further from exact ones than fp32 allows: is a lower precision of "
            "matrix products forced, as by NVIDIA_TF32_OVERRIDE?"
        )
    scores[right_rows, right_columns] = -math.inf

    above, unsettled = [], []
    for lines in tests:
        part = scores[: len(lines.pairs)] if lines.dim else scores
        marks = flags[: len(part)]  # fp32, which is compared and summed far faster than bool
        certain = _runs(torch.gt(part, lines.high, out=marks), lines.dim).sum(lines.dim + 1)
        unsettled.append(_runs(torch.ge(part, lines.low, out=marks), lines.dim).sum(lines.dim + 1))
        unsettled[-1] -= certain
        above.append(certain.sum(lines.dim))
    left = float(torch.stack([part.sum() for part in unsettled]).sum())
    if left > scores.numel() / 64:  # many scores are nearly equal: cheaper in one product
        scores = x.double() @ y.double().T
        scores[right_rows, right_columns] = -math.inf
        return [_count_exactly(scores, lines, exact) for lines in tests]
    above = [part.long() for part in above]
    if left:
        for lines, settled, open_ in zip(tests, above, unsettled, strict=True):
            _settle(scores, x, y, lines, settled, open_.nonzero().T, exact)
    return above


def _runs(scores: Tensor, dim: int) -> Tensor:
    """Rows (dim 1) or columns (dim 0) cut into runs, [rows, runs, run] or [runs, run, columns]."""
    run = _RUN if scores.shape[dim] % _RUN == 0 else scores.shape[dim]
    return scores.unflatten(dim, (-1, run))


def _count_exactly(scores: Tensor, lines: _Lines, exact: Tensor) -> Tensor:
    bar = exact[lines.pairs]
    if lines.dim:
        return (scores[: len(bar)] >= bar[:, None]).sum(1)
    return (scores >= bar).sum(0)


def _settle(
    scores: Tensor, x: Tensor, y: Tensor, lines: _Lines, above: Tensor, where: Tensor, exact: Tensor
) -> None:
    """Adds to `above` the unsettled scores that are exactly as high, or higher; they lie in the
    runs `where`, int64[2, G], positions in an array of lines and runs."""
    line, run = where if lines.dim else where.flip(0)
    runs = _runs(scores, lines.dim)
    held = runs[line, run] if lines.dim else runs[run, :, line]
    low, high = (bound.flatten()[line, None] for bound in (lines.low, lines.high))
    found, offset = ((held >= low) & (held <= high)).nonzero(as_tuple=True)
    line, candidate = line[found], run[found] * held.shape[1] + offset
    own, other = (x, y) if lines.dim else (y, x)
    hit = _exact_scores(own, other, line, candidate) >= exact[lines.pairs[line]]
    above.index_add_(0, line, hit.long())


def _merge_blocks(x: Tensor, y: Tensor, keep: int, width: int) -> tuple[Tensor, Tensor]:
    """The `keep` best candidates by fp32 score, in no order: float32[Q, K], int64[Q, K]."""
    best, index = x.new_empty(len(x), 0), x.new_empty(len(x), 0, dtype=torch.int64)
    for left in range(0, len(y), width):
        scores = x @ y[left : left + width].T
        scores, found = scores.topk(min(keep, scores.shape[1]), dim=1, sorted=False)
        best, index = torch.cat([best, scores], 1), torch.cat([index, found + left], 1)
        best, order = best.topk(min(keep, best.shape[1]), dim=1, sorted=False)
        index = index.gather(1, order)
    return best, index


def _merge_blocks_exactly(x: Tensor, y: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """The k best candidates by exact score, of equal ones the lower row first."""
    best = x.new_empty(len(x), 0, dtype=torch.float64)
    index = x.new_empty(len(x), 0, dtype=torch.int64)
    for left in range(0, len(y), width):
        scores = x.double() @ y[left : left + width].double().T
        found = torch.arange(left, left + scores.shape[1], device=x.device).expand(scores.shape)
        best, index = torch.cat([best, scores], 1), torch.cat([index, found], 1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, index = best[:, :k], index.gather(1, order[:, :k])
    return best, index


def _exact_scores(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Exact scores of rows of x with rows of y, given in pairs: float64[G]."""
    columns = columns.flatten()
    step = _step(x.device, x.shape[1])
    parts = [
        x[rows[i : i + step]].double().mul_(y[columns[i : i + step]]).sum(1)
        for i in range(0, len(rows), step)
    ]
    return torch.cat(parts) if parts else x.new_empty(0, dtype=torch.float64)


def _margin(width: int) -> float:
    """How far a score in fp32 can be from the exact one, for rows of length 1 and any order of
    summation. Source: Higham 2002, "Accuracy and Stability of Numerical Algorithms", equation 3.5;
    by Cauchy and Schwarz the sum of absolute products is at most 1."""
    return 1.01 * width * 2.0**-24


def _outward(scores: Tensor, sign: int) -> Tensor:
    return torch.nextafter(scores, torch.full_like(scores, sign * math.inf))


@torch.no_grad()
def _on_grid(values: Tensor, what: str, device: torch.device) -> Tensor:
    made = torch.empty(values.shape, dtype=torch.float32, device=device)
    lengths = torch.empty(len(values), 1, dtype=torch.float64, device=device)
    step = _step(device, values.shape[1])
    for i in range(0, len(values), step):
        rows = values[i : i + step].to(device, torch.float64)
        squares = rows.square()
        while squares.shape[1] > 1:  # by halves: an order of summation that no device changes
            half = (squares.shape[1] + 1) // 2
            squares[:, : squares.shape[1] - half] += squares[:, half:]
            squares = squares[:, :half]
        lengths[i : i + step] = length = squares.sqrt()
        made[i : i + step] = (rows * (_GRID / length)).float().round_().mul_(1 / _GRID)
    if not lengths.isfinite().all():
        raise ValueError(f"{what}: NaN or infinity in {_named(~lengths.isfinite())}")
    if not lengths.all():
        raise ValueError(f"{what}: length 0 of {_named(lengths == 0)}")
    return made


def _step(device: torch.device, width: int) -> int:
    return max(1, _SLICE.get(device.type, _SLICE["cpu"]) // width)


def _named(bad: Tensor) -> str:
    """The first rows that are bad: "row 3" or "rows 3, 7 and 12 more"."""
    rows = bad[:, 0].nonzero()[:, 0].tolist()
    shown = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    return f"row{'s' if len(rows) > 1 else ''} {shown}"


def _block(block: tuple[int, int] | None, device: torch.device) -> tuple[int, int]:
    height, width = block or _BLOCK.get(device.type, _BLOCK["cpu"])
    if min(height, width) < 1:
        raise ValueError(f"block: expected 1 or more of both, found {height} and {width}")
    return height, width


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products of fp32 in fp32, whatever the caller has allowed."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
