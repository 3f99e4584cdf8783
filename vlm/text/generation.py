"""What a model that writes text gives: the text, its ids, and how likely each was."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote.

    text: special tokens skipped. ids: with the end token, where one was generated.
    logprobs: log-probability of each id in nats, under the model's own (unscaled) distribution.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


Written = tuple[list[int], list[float]]
"""The generated ids and the log-probability of each in nats."""
