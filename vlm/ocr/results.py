"""What reading an image of text gives: lines, words and tokens, each with its confidence.

A confidence is the model's estimate, in 0 to 1, that a piece is right as a whole: a token's that it
stands there, a word's the product of its tokens', a line's that nothing else stands there either.
Temperatures, fitted on held-out lines, calibrate them.

Texts are in logical order, in which they are said and typed: those of Arabic, Hebrew and other
scripts that run from right to left are not turned round, neither here nor in what is written to
files; whoever shows them does that. Tokens and words stand in the same order, and their boxes where
the ink is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

XyxyPx = tuple[float, float, float, float]
"""x0, y0, x1, y1 in the caller's own image, origin top left, end exclusive."""


@dataclass(frozen=True, slots=True)
class Token:
    """One id of a model as text, special tokens skipped.

    text: "" is possible, where several ids make one character.
    confidence: in 0 to 1.
    span: where it stands along the line, as shares of the line's width from its left, or None where
        the model does not say.
    """

    text: str
    confidence: float
    span: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Word:
    """What stands between two spaces.

    confidence: in 0 to 1. xyxy_px: where it stands; None where the model does not say.
    """

    text: str
    confidence: float
    xyxy_px: XyxyPx | None = None
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """One line of text.

    confidence: in 0 to 1; of a line on which nothing was read, that nothing stands there.
    xyxy_px: the smallest upright box around it. corners_px: its four corners (x, y), clockwise from
        the text's own top left, where the line is turned; else those of the box.
    """

    text: str
    confidence: float
    words: tuple[Word, ...]
    xyxy_px: XyxyPx
    corners_px: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read in one image.

    lines: in reading order, that of columns from left to right. size_hw: the image's rows and
    columns.
    values: what a model that answers with fields (Donut) says, as values of JSON, unsure ones
        included; None of others.
    """

    lines: tuple[Line, ...]
    size_hw: tuple[int, int]
    values: Any = None

    @property
    def text(self) -> str:
        """The lines' texts, a line break between them."""
        return "\n".join(line.text for line in self.lines)

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of all lines."""
        return tuple(word for line in self.lines for word in line.words)

    @property
    def confidence(self) -> float:
        """The mean of the lines' confidences, by characters; 1 where there is no line."""
        weights = [max(1, len(line.text)) for line in self.lines]
        if not weights:
            return 1.0
        total = sum(w * line.confidence for w, line in zip(weights, self.lines))
        return total / sum(weights)


@dataclass(frozen=True, slots=True)
class Transcript:
    """What a line model wrote on one line, before it is placed on the caller's image.

    tokens: in order, as text; joined they are the line's text.
    confidence: in 0 to 1, of the line as a whole, the end of writing included where the model
        writes one.
    """

    tokens: tuple[Token, ...]
    confidence: float

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


def words_of(
    tokens: Sequence[Token], xyxy_px: XyxyPx, corners_px: Sequence[tuple[float, float]]
) -> tuple[Word, ...]:
    """The words that tokens make, with boxes where tokens have spans.

    A token that holds spaces ends one word and begins the next, and counts for both.

    >>> tokens = [Token("a", 0.9, (0.0, 0.4)), Token(" b", 0.5, (0.5, 1.0))]
    >>> corners = ((0, 0), (10, 0), (10, 5), (0, 5))
    >>> [(w.text, w.confidence, w.xyxy_px) for w in words_of(tokens, (0, 0, 10, 5), corners)]
    [('a', 0.9, (0.0, 0.0, 4.0, 5.0)), ('b', 0.5, (5.0, 0.0, 10.0, 5.0))]
    """
    words: list[Word] = []
    text, kept = "", []

    def close() -> None:
        nonlocal text, kept
        if text:
            confidence = math.prod(token.confidence for token in kept)
            spans = [token.span for token in kept if token.span is not None]
            box = _part_of_box(spans, corners_px) if len(spans) == len(kept) else None
            words.append(Word(text, confidence, box, tuple(kept)))
        text, kept = "", []

    for token in tokens:
        pieces = token.text.split(" ") if token.text else [""]
        for number, piece in enumerate(pieces):
            if number:
                close()
            if piece or (kept and not token.text):
                text += piece
                kept.append(token)
    close()
    return tuple(words)


def _part_of_box(
    spans: Sequence[tuple[float, float]], corners_px: Sequence[tuple[float, float]]
) -> XyxyPx:
    """The upright box around the part of a line between the first and the last of `spans`."""
    start, end = min(span[0] for span in spans), max(span[1] for span in spans)
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = corners_px
    xs, ys = [], []
    for share in (start, end):
        xs += [ax + (bx - ax) * share, dx + (cx - dx) * share]
        ys += [ay + (by - ay) * share, dy + (cy - dy) * share]
    return (float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys)))
