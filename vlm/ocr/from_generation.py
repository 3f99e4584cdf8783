"""Text that a model generated, as lines and words with confidences.

Such a model says no positions: a line's box is its whole image, and words have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlm.ocr.results import Line, Reading, Token, words_of
from vlm.text.generation import Generation

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Ends a decoded text whose last character's bytes are not all there yet."""


def reading_of(generation: Generation, text_tokenizer, size_hw: tuple[int, int]) -> Reading:
    """The generated text as a reading of an image of size_hw pixels, a line for each that is not
    blank. A confidence is the product of the probabilities of the ids that it covers; a line's
    covers the break or end after it too.
    """
    tokens = tokens_of(generation, text_tokenizer)
    end = 1.0
    if generation.ids and generation.ids[-1] in text_tokenizer.all_special_ids:
        end = tokens.pop().confidence
    return Reading(lines_of(tokens, end, size_hw), size_hw)


def lines_of(tokens: Sequence[Token], end: float, size_hw: tuple[int, int]) -> tuple[Line, ...]:
    """The lines that tokens make on an image of size_hw pixels, line breaks in their texts. end:
    the confidence that the last line ends there."""
    height, width = size_hw
    box = (0.0, 0.0, float(width), float(height))
    corners = ((0.0, 0.0), (box[2], 0.0), (box[2], box[3]), (0.0, box[3]))
    lines = []
    for held, last in _by_line(tokens, end):
        text = "".join(token.text for token in held).strip()
        if text:
            confidence = math.prod((token.confidence for token in held), start=last)
            lines.append(Line(text, confidence, words_of(held, box, corners), box, corners))
    return tuple(lines)


def tokens_of(generation: Generation, text_tokenizer) -> list[Token]:
    """Each id as text: joined, what all of them decode to without special tokens. An id that ends
    within a character has none, and the one that completes it has the whole character."""
    tokens, said = [], ""
    for count, logprob in enumerate(generation.logprobs, start=1):
        text = text_tokenizer.decode(generation.ids[:count], skip_special_tokens=True)
        whole = text.startswith(said) and not text.endswith(UNFINISHED)
        piece = text[len(said) :] if whole else ""
        said += piece
        tokens.append(Token(piece, min(1.0, math.exp(logprob))))
    return tokens


def _by_line(tokens: Sequence[Token], end: float) -> list[tuple[list[Token], float]]:
    """The tokens of each line, and the confidence of its break or of the `end`. A token with a
    break in it counts for the lines of which it has text."""
    lines, held = [], []
    for token in tokens:
        *ended, rest = token.text.split("\n")
        for part in ended:
            if part:
                held.append(Token(part, token.confidence))
            lines.append((held, 1.0 if part else token.confidence))
            held = []
        if rest or not ended:
            held.append(Token(rest, token.confidence))
    return [*lines, (held, end)]
