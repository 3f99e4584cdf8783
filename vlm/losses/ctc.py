"""The loss of line readers: a text's probability, summed over every way to spread it on a line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def ctc_losses(logits: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """Negative log-probability of each line's characters in nats, fp32[V].

    logits: float[V, L, Z], in any precision; the sum is made in fp32. ids: int64[sum of lengths].
    lengths: int64[V].
    A line with more characters (and blanks between equal ones) than tokens has no such way: its
    loss is 0, without a gradient, and the caller must know it (`least_columns`).
    Source: Graves et al. 2006, equation 8.
    """
    logprobs = logits.float().log_softmax(-1).transpose(0, 1)
    columns = torch.full_like(lengths, logits.shape[1])
    return F.ctc_loss(
        logprobs, ids, columns, lengths, blank=BLANK, reduction="none", zero_infinity=True
    )


def least_columns(ids: Sequence[int]) -> int:
    """The fewest tokens that can name these characters: equal neighbours need a blank between.

    >>> least_columns([3, 5, 5, 5])
    6
    """
    return len(ids) + sum(a == b for a, b in pairwise(ids))


BLANK = 0
"""The id that says nothing; characters are numbered from 1."""
