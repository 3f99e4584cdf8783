"""What a training step works on, assembled once: a module prepared for its stage, the optimizer,
the bf16 compute copies of its fp32 master weights, and its memory-efficient kernels.

A run (`vlm.training.fit`), a simulated step (`vlm.training.memory.simulate`) and the benchmarks
build it here, so that all of them make the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm.kernels.norm_mlp import Forward, memory_efficient_kernels, use_kernels
from vlm.training.master_weights import ComputeCopies
from vlm.training.objectives.base import Autocast, Objective
from vlm.training.sharding import (
    Shard,
    clip_gradients,
    is_sharded,
    mesh_for,
    shard_module,
)
from vlm.training.stages import Stage, choose_trained, optimizer_for, prepare


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainState:
    """A module that learns, and all that its step needs beside batches.

    dtype: what the step computes in. copies: of the trained weights, in `dtype`; none in fp32, and
    none where the module is sharded, as sharding makes its own. kernels: by the part's name, see
    `vlm.kernels.norm_mlp`. trained: parameters with a gradient, in the module's order.
    """

    module: nn.Module
    stage: Stage
    dtype: torch.dtype
    optimizer: torch.optim.Optimizer
    copies: ComputeCopies
    kernels: dict[str, Forward]
    trained: list[nn.Parameter]

    @property
    def sharded(self) -> bool:
        return is_sharded(self.module)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within, forward and backward passes compute with the copies and kernels; after it, every
        weight is its fp32 master again, with the sum of the gradients of all passes within."""
        with self.copies.in_use(), use_kernels(self.module, self.kernels):
            yield

    def fill_absent_gradients(self) -> None:
        """Gives zeros to trained weights without a gradient, so that the optimizer treats a weight
        that no example reached alike on every rank."""
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def clip_gradients(self) -> float:
        """Scales gradients down to the stage's largest norm; gives their norm before."""
        if self.sharded:
            return clip_gradients(self.trained, self.stage.clip)
        return float(nn.utils.clip_grad_norm_(self.trained, self.stage.clip))

    def update(self) -> None:
        """The optimizer's step; gradients are gone afterwards."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def learn(
        self,
        objective: Objective,
        batches: Sequence[Any],
        totals: Mapping[str, int],
        autocast: Autocast,
    ) -> float:
        """A whole step of one process without others, at the optimizer's present learning rates;
        gives the loss. The arguments are those of `Objective.backward`."""
        with self.computing():
            loss = objective.backward(self.module, batches, totals, autocast)
        self.fill_absent_gradients()
        if self.stage.clip < math.inf:
            self.clip_gradients()
        self.update()
        objective.after_step(self.module)
        return loss


def build_state(
    module: nn.Module,
    stage: Stage,
    dtype: torch.dtype,
    *,
    device: torch.device | None = None,
    shard: Shard = "no",
    kernels: dict[str, Forward] | None = None,
) -> TrainState:
    """Prepares a module in place for a stage, and builds what its step needs.

    dtype: what the step computes in: frozen weights are held in it, trained ones in fp32.
    device: where the module goes; None leaves it where it is, and goes with shard "no".
    shard: over which processes weights are sharded; the module stays so.
    kernels: those of a module of the same structure; None tries them on this one, whose weights
        must then have values.
    Raises StageError as `prepare` and `shard_module` do.
    """
    if kernels is None:
        kernels = memory_efficient_kernels(module)  # before it is sharded, when it can be tried
    if shard == "no":
        if device is not None:
            module.to(device)
        prepare(module, stage, dtype)
    else:
        choose_trained(module, stage)
        shard_module(module, mesh_for(shard, device), dtype, device)
    return TrainState(
        module=module,
        stage=stage,
        dtype=dtype,
        optimizer=optimizer_for(module, stage),
        copies=ComputeCopies(module, dtype if shard == "no" else torch.float32),
        kernels=kernels,
        trained=[p for p in module.parameters() if p.requires_grad],
    )
