"""A share that was measured on a sample, with how sure it is."""

from __future__ import annotations

import math
from typing import NamedTuple


class Interval(NamedTuple):
    """A share with its interval of confidence, all in 0 to 1."""

    share: float
    low: float
    high: float


def wilson(hits: float, count: int, z: float = 1.959964) -> Interval:
    """The share of hits with Wilson's score interval, by default at 95 %; honest at 0 and 1 too.

    Draws are taken as independent, which phrases of one picture are not quite. hits need not be
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
