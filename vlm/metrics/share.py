"""A share or another figure that was measured on a sample, with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A share with its interval of confidence, all in 0 to 1."""

    share: float
    low: float
    high: float


def with_ci(name: str, found: tuple[float, float, float]) -> dict[str, float | list[float]]:
    """A metric and its 95 % confidence interval by the names that they have in result.json.

    found: the metric, and the low and high end of its interval.

    >>> with_ci("accuracy", Interval(0.5, 0.25, 0.75))
    {'accuracy': 0.5, 'accuracy_ci': [0.25, 0.75]}
    """
    value, low, high = found
    return {name: value, f"{name}_ci": [low, high]}


def wilson(hits: float, count: int, z: float = 1.959964) -> Interval:
    """The share of hits with Wilson's score interval, by default at 95 %; valid at 0 and 1 too.

    Draws are taken as independent, which phrases of one image are not quite. hits need not be
    whole: a share of another count may be stated for as many draws as are independent.
    Source: Wilson 1927, "Probable inference"; count at least 1.

    >>> [round(value, 3) for value in wilson(8, 10)]
    [0.8, 0.49, 0.943]
    """
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"expected 0 <= hits <= count and count >= 1, found {hits} and {count}")
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    low = 0.0 if hits == 0 else middle - half
    return Interval(share, low, 1.0 if hits == count else middle + half)


def bootstrap(
    terms: np.ndarray,
    figure: Callable[[np.ndarray], np.ndarray],
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % interval of a figure of sums over a sample: between the 2.5th and 97.5th percentile
    over samples of equal size drawn with replacement. The order of the sample does not matter.

    terms: float[N, K], what each of the sample adds to the sums. figure: from sums, float[D, K], to
    the figure of each, float[D]. draws: samples. seed: of these.
    Source: Efron 1979. Of a sample whose terms are all the same the interval has no width.

    >>> bootstrap(np.array([[0.0], [1.0]]), lambda sums: sums[:, 0] / 2)
    (0.0, 1.0)
    """
    terms = terms[np.lexsort(terms.T)]
    generator, count = np.random.default_rng(seed), len(terms)
    found = []
    for start in range(0, draws, _DRAWS):
        size = min(_DRAWS, draws - start)
        found.append(figure(generator.multinomial(count, np.full(count, 1 / count), size) @ terms))
    low, high = np.percentile(np.concatenate(found), (2.5, 97.5))
    return float(low), float(high)


_DRAWS = 100
"""Samples that are drawn at once."""
