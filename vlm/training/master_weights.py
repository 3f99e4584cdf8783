"""bf16 compute copies of fp32 master weights: a step computes with the copies, the masters learn.

Autocast alone casts each trainable weight again in every forward pass, and leaves what weights are
added to or multiplied with (embeddings, norms, the residual stream) in fp32. Compute copies are
cast once a step; gradients of every micro-batch are added up in fp32. FSDP's mixed precision has
the same meaning: 16-bit compute, fp32 masters and sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlm.compat.torch import copy_all_
from vlm.weights import castable


class ComputeCopies:
    """Copies of a module's trainable weights in `dtype`; in fp32 there is nothing to copy.

    Weights that `cast_parameters` leaves in fp32 (batch norms, scalars) compute as they are.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.weights = [
            parameter
            for parameter in castable(module)
            if parameter.requires_grad and parameter.dtype != dtype
        ]
        self.copies = [torch.empty_like(weight, dtype=dtype) for weight in self.weights]
        self.sums: dict[int, Tensor] = {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the module computes with the copies; after it, each weight is itself again and
        its `grad` the fp32 sum of the gradients of all passes within."""
        masters = [weight.data for weight in self.weights]
        if masters:
            copy_all_(self.copies, masters)
        hooks = [weight.register_post_accumulate_grad_hook(self._add) for weight in self.weights]
        try:
            for weight, copy in zip(self.weights, self.copies):
                weight.data = copy
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for weight, master in zip(self.weights, masters):
                weight.grad = None
                weight.data = master
                total = self.sums.pop(id(weight), None)
                weight.grad = None if total is None else total.float()

    def _add(self, weight: nn.Parameter) -> None:
        grad = weight.grad.detach()
        weight.grad = None
        total = self.sums.get(id(weight))
        if total is None:  # of the only pass, perhaps: in fp32 it would take twice the memory
            self.sums[id(weight)] = grad
        else:
            self.sums[id(weight)] = total.float().add_(grad)
