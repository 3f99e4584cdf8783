"""What a step minimises: how rows become batches, and batches gradients.

The trainer knows no family: it hands an objective the rows of a micro-batch, then the batches of a
step, and sums the gradients that it leaves over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

Autocast = Callable[[], AbstractContextManager]


class Count(NamedTuple):
    """What a batch holds: terms of the loss, examples, real text places, computed ones, what the
    cost of a pass goes by, examples that have a picture, and examples without a term."""

    scored: int
    samples: int
    tokens: int
    positions: int
    work: int
    pictured: int
    unscored: int


class Objective(Protocol):
    """What `fit` asks of an objective.

    every_rank: whether a step needs an example on each rank.
    """

    every_rank: bool

    def collate(self, rows: Sequence[Any]) -> tuple[Any, ...]:
        """The rows of one micro-batch, at least one, as batches."""

    def count(self, batch: Any) -> Count:
        """What a batch holds."""

    def level(self, module: nn.Module, batches: Sequence[Any]) -> Sequence[Any]:
        """The batches with blank ones beside them, so that every rank makes the same calls on a
        sharded module; called on all ranks together."""

    def backward(
        self, module: nn.Module, batches: Sequence[Any], scored: int, autocast: Autocast
    ) -> float:
        """Adds the gradients of this rank's batches; gives its share of the loss.

        batches: in the host's memory; each is moved to the module's device for its own passes.
        scored: terms of the loss of the step, over all ranks. Shares and gradients add up over
        ranks to those of the whole step.
        """

    def trial(self, module: nn.Module, batch: Any, autocast: Autocast) -> None:
        """One pass forward and backward over a batch, to count its operations; its gradients are
        thrown away."""

    def after_step(self, module: nn.Module) -> None:
        """Called when the optimizer has changed the module."""

    def alone(self) -> Objective:
        """One like it that this process uses without the others, to simulate a step."""

    def kept_between(self, module: nn.Module, examples: int) -> int:
        """Bytes that further micro-batches of so many examples keep until the step's last one."""


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
