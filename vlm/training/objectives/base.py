"""What a step minimises: how rows become batches, and batches gradients.

The trainer knows no family: it hands an objective the rows of a micro-batch, then the batches of a
step, and sums the gradients that it leaves over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

Autocast = Callable[[], AbstractContextManager]


class Count(NamedTuple):
    """What a batch holds.

    totals: by name, how many terms of each kind it adds to the loss: what the step's loss is
        divided by, see `Objective.totals`.
    samples: examples. tokens: real positions of the text stream; positions: computed ones, padding
    included; both 0 in families without such a stream, of which no tokens a second are shown.
    cost: what the time of a pass goes by, such as its FLOP cost. images: how many there are.
    unscored: examples without a term in the loss.
    """

    totals: Mapping[str, int]
    samples: int
    tokens: int
    positions: int
    cost: int
    images: int
    unscored: int


class Objective(Protocol):
    """What `fit` asks of an objective.

    totals: names of the totals that the loss is divided by, such as ("tokens",). The trainer sums
        each over the micro-batches and ranks of a step before the first forward pass, so that the
        gradient is the same however a step is split.
    every_rank: whether a step needs an example on each rank.
    pack: the most positions of a packed row; None where rows are not packed.
    """

    totals: tuple[str, ...]
    every_rank: bool
    pack: int | None

    def collate(self, rows: Sequence[Any]) -> tuple[Any, ...]:
        """The rows of one micro-batch, at least one, as batches."""

    def count(self, batch: Any) -> Count:
        """What a batch holds."""

    def level(self, module: nn.Module, batches: Sequence[Any]) -> Sequence[Any]:
        """The batches with dummy inputs beside them, so that every rank makes the same calls on a
        sharded module; called on all ranks together."""

    def backward(
        self,
        module: nn.Module,
        batches: Sequence[Any],
        totals: Mapping[str, int],
        autocast: Autocast,
    ) -> float:
        """Adds the gradients of this rank's batches; gives its share of the loss.

        batches: in the host's memory; each is moved to the module's device for its own passes.
        totals: those that the objective names, of the whole step over all ranks. Shares and
        gradients add up over ranks to those of the whole step.
        """

    def trial(self, module: nn.Module, batch: Any, autocast: Autocast) -> None:
        """One pass forward and backward over a batch, to count its operations; its gradients are
        thrown away."""

    def after_step(self, module: nn.Module) -> None:
        """Called when the optimizer has changed the module."""

    def alone(self) -> Objective:
        """One like it that this process uses without the others, to simulate a step."""

    def classes(self, module: nn.Module) -> int | None:
        """How many classes the logits of each target score, such as the ids of a vocabulary; None
        where the loss has no such logits."""

    def kept_between(self, module: nn.Module, examples: int) -> int:
        """Bytes that further micro-batches of so many examples keep until the step's last one."""


def sum_totals(names: Sequence[str], counts: Sequence[Count]) -> dict[str, int]:
    """The totals of some batches, by name; zeros of none.

    names: an objective's `totals`. Raises ValueError where a count has other ones.
    """
    for count in counts:
        if count.totals.keys() != set(names):
            raise ValueError(
                f"expected counts of the objective's totals {sorted(names)}, found "
                f"{sorted(count.totals)}"
            )
    return {name: sum(count.totals[name] for count in counts) for name in names}


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
