"""Token losses over scored places only, summed in nats, in fp32.

Sums, not means: the trainer divides by the number of scored tokens of the whole step, over all
micro-batches and ranks, so that no split of a batch changes the loss.

Shapes: N scored place, Z vocabulary, B example.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-probability of each target in nats, fp32[N].

    logits: float[N, Z] at scored places; targets: int64[N].
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")


def sum_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sums of `values` float[N] for each of `count` rows; rows int64[N] says where each belongs.

    >>> sum_by_row(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 2]), 3).tolist()
    [3.0, 0.0, 4.0]
    """
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, rows, values)
