"""From the scores of a line's tokens to characters: the likeliest path, or a search over texts.

Shapes: L image tokens, Z characters and the blank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.losses.ctc import BLANK, ctc_losses, least_columns

KEPT = 12
"""Characters of a token that a search looks at."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a line says.

    ids: characters. logprobs: of each, in nats, by the token that shows it best. spans: first and
    one past the last token of each. logprob: of the whole text, summed over every way to spread it
    on the line.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]
    logprob: float


def greedy(logits: Tensor) -> list[Written]:
    """What the likeliest name of every token gives, for each line of scores float[V, L, Z]."""
    logprobs = logits.float().log_softmax(-1)
    best, ids = logprobs.max(-1)
    read = [_runs(path, scores) for path, scores in zip(ids.tolist(), best.tolist())]
    return _with_totals(logits, read)


def beam(logits: Tensor, beams: int) -> list[Written]:
    """The likeliest text among those that a search with `beams` texts keeps, for each line.

    Source: Graves and Jaitly 2014, algorithm 1 (prefix search), without a language model.
    """
    logprobs = logits.float().log_softmax(-1).cpu()
    read = [_aligned(_search(row, beams), row) for row in logprobs]
    return _with_totals(logits, read)


def total_logprobs(logits: Tensor, texts: Sequence[Sequence[int]]) -> list[float]:
    """The log-probability of a text for each line in nats, over every way to spread it; minus
    infinity where it does not fit."""
    ids = torch.tensor([id for text in texts for id in text], dtype=torch.long)
    lengths = torch.tensor([len(text) for text in texts])
    losses = ctc_losses(logits.cpu(), ids, lengths).tolist()
    fits = [least_columns(text) <= logits.shape[1] for text in texts]
    return [-loss if fit else -math.inf for loss, fit in zip(losses, fits)]


Read = tuple[list[int], list[float], list[tuple[int, int]]]


def _runs(path: list[int], scores: list[float]) -> Read:
    ids, logprobs, spans = [], [], []
    before = BLANK
    for column, (id, score) in enumerate(zip(path, scores)):
        if id == BLANK:
            pass
        elif id == before:
            logprobs[-1] = max(logprobs[-1], score)
            spans[-1] = (spans[-1][0], column + 1)
        else:
            ids.append(id)
            logprobs.append(score)
            spans.append((column, column + 1))
        before = id
    return ids, logprobs, spans


def _with_totals(logits: Tensor, read: list[Read]) -> list[Written]:
    totals = total_logprobs(logits, [ids for ids, _, _ in read])
    return [
        Written(tuple(ids), tuple(logprobs), tuple(spans), min(0.0, total))
        for (ids, logprobs, spans), total in zip(read, totals)
    ]


def _search(logprobs: Tensor, beams: int) -> list[int]:
    """The likeliest text of one line among the kept prefixes.

    Each prefix has two log-probabilities: of the ways that end in a blank, and in its last
    character.
    """
    kept = {(): (0.0, -math.inf)}
    values, names = logprobs.topk(min(KEPT, logprobs.shape[-1]), -1)
    blanks = logprobs[:, BLANK].tolist()
    for step, (scores, ids) in enumerate(zip(values.tolist(), names.tolist())):
        grown: dict[tuple[int, ...], list[float]] = {}

        def add(prefix: tuple[int, ...], ending: int, value: float) -> None:
            pair = grown.setdefault(prefix, [-math.inf, -math.inf])  # noqa: B023
            pair[ending] = _plus(pair[ending], value)

        for prefix, (blank, nonblank) in kept.items():
            both = _plus(blank, nonblank)
            add(prefix, 0, both + blanks[step])
            for id, score in zip(ids, scores):
                if id == BLANK:
                    continue
                if prefix and prefix[-1] == id:
                    add(prefix, 1, nonblank + score)
                    add((*prefix, id), 1, blank + score)
                else:
                    add((*prefix, id), 1, both + score)
        best = sorted(grown.items(), key=lambda item: -_plus(*item[1]))[:beams]
        kept = {prefix: (pair[0], pair[1]) for prefix, pair in best}
    return list(max(kept, key=lambda prefix: _plus(*kept[prefix])))


def _aligned(text: list[int], logprobs: Tensor) -> Read:
    """A text's likeliest way on a line (Viterbi): where characters stand, and scores."""
    if not text:
        return [], [], []
    states = [BLANK] + [s for id in text for s in (id, BLANK)]
    scores = [-math.inf] * len(states)
    table = logprobs[:, states].tolist()
    came: list[list[int]] = []
    for step, row in enumerate(table):
        new, back = [], []
        for s, emit in enumerate(row):
            options = [(scores[s], s)] if step else [(0.0 if s < 2 else -math.inf, s)]
            if step and s:
                options.append((scores[s - 1], s - 1))
            if step and s > 1 and states[s] != BLANK and states[s] != states[s - 2]:
                options.append((scores[s - 2], s - 2))
            value, source = max(options)
            new.append(value + emit)
            back.append(source)
        scores = new
        came.append(back)
    state = max((len(states) - 1, len(states) - 2), key=lambda s: scores[s])
    path = []
    for back in reversed(came):
        path.append(state)
        state = back[state]
    path.reverse()
    spans: list[tuple[int, int]] = []
    scores: list[float] = []
    for number in range(len(text)):
        columns = [column for column, s in enumerate(path) if s == 2 * number + 1]
        spans.append((columns[0], columns[-1] + 1))
        scores.append(max(table[column][2 * number + 1] for column in columns))
    return text, scores, spans


def _plus(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))
