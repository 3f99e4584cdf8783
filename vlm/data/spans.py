"""Spans of text, drawn at random, that a docked text encoder reads in both directions (MetaLM)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vlm.data.example import Example, NonCausal, Turn


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawSpans:
    """Makes spans of whole words of the text that is learned non-causal: of each answer that is
    scored, or of a document.

    share: of the words, above 0 and below 1; one at least stays. longest: the most words of a span;
        lengths are drawn evenly from 1 on. Between two spans lies a word at least, so that of large
        shares in short spans not all find a place.
    Raises ValueError for another share or length.
    Source: arXiv 2206.06336 (MetaLM), section 2.3, semi-causal language modeling.

    >>> turns = (Turn("user", ("say it",)), Turn("assistant", ("one two three four five six",)))
    >>> drawn = DrawSpans(share=0.5)(Example("row", turns), seed=1)
    >>> drawn.turns[1].text, sum(isinstance(part, NonCausal) for part in drawn.turns[1].content) > 0
    ('one two three four five six', True)
    """

    share: float
    longest: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"span share must be above 0 and below 1, found {self.share}")
        if self.longest < 1:
            raise ValueError(f"longest must be at least 1 word, found {self.longest}")

    def __call__(self, example: Example, seed: int) -> Example:
        """The example with spans, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        turns = tuple(
            self._drawn(turn, generator) if turn.is_learned or turn.role == "text" else turn
            for turn in example.turns
        )
        return replace(example, turns=turns)

    def _drawn(self, turn: Turn, generator: torch.Generator) -> Turn:
        content: list = []
        for part in turn.content:
            plain = isinstance(part, str) and not isinstance(part, NonCausal)
            content += self._split(part, generator) if plain else [part]
        return replace(turn, content=tuple(content))

    def _split(self, text: str, generator: torch.Generator) -> list[str]:
        """A text in parts, some of them non-causal; joined they are the text."""
        words = re.findall(r"\s*\S+(?:\s+\Z)?", text)
        if len(words) < 2:
            return [text]
        expected = self.share * len(words)
        budget = int(expected + float(torch.rand((), generator=generator)))  # right on average
        budget = min(budget, len(words) - 1)
        lengths = []
        while budget > 0:
            most = min(budget, self.longest)
            lengths.append(int(torch.randint(1, most + 1, (), generator=generator)))
            budget -= lengths[-1]
        between = len(words) - sum(lengths)
        lengths = lengths[: between + 1]
        # After how many of the other words each span stands, no two after the same.
        after = torch.randperm(between + 1, generator=generator)[: len(lengths)].sort().values
        parts, left, passed = [], words, 0
        for length, place in zip(lengths, after.tolist()):
            parts.append("".join(left[: place - passed]))
            parts.append(NonCausal("".join(left[place - passed : place - passed + length])))
            left, passed = left[place - passed + length :], place
        return [part for part in (*parts, "".join(left)) if part]


@dataclass(frozen=True, slots=True)
class InOrder:
    """Random changes of an example, one after the other. changes: at least one, such as
    `vlm.data.augment.Augment`."""

    changes: tuple[Callable[[Example, int], Example], ...]

    def __call__(self, example: Example, seed: int) -> Example:
        """The example changed, the same for the same seed."""
        for change in self.changes:
            example = change(example, seed)
        return example
