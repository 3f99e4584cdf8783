"""Choices that follow from a seed alone, on every machine and in every version of Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Seeded choices. Only Python's `random()` is used below: its stream is kept for good.

    key: what the choices follow from, such as a seed and a row's number.
    """

    def __init__(self, *key: int | str) -> None:
        self._random = random.Random(":".join(map(str, key)))

    def roll(self) -> float:
        """From 0 up to 1, evenly."""
        return self._random.random()

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self.roll() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[int(self.roll() * len(items))]
