"""The contrastive objective: every image and caption of a step against all others, over ranks and
micro-batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from vlm.families.contrastive.batch import Pair, PairBatch, collate_pairs
from vlm.families.contrastive.module import Contrastive, Embedded
from vlm.losses.contrastive import RefusedRows, sigmoid_loss, softmax_loss
from vlm.training.objectives.base import Autocast, Count, device_of
from vlm.training.sharding import passes_of_ranks
from vlm.training.stages import StageError

LARGEST_SCALE = 100.0
"""Source: CLIP, arXiv 2103.00020, section 2.5: logits are scaled by no more than 100."""


class Contrast:
    """Images and their captions told apart within the batch of all ranks and micro-batches.

    kind: "softmax" (CLIP) or "sigmoid" (SigLIP). group: the ranks among whose pairs they are told
    apart, as the losses take it; all at first.
    One micro-batch is an ordinary pass. Of several, embeddings alone are kept from a first pass
    without gradients; the loss over all of them gives each embedding's gradient, and a second pass
    through each micro-batch, with the random numbers of its first, takes it on to the weights. The
    gradients are those of one pass, at the memory of a micro-batch. Source: arXiv 2101.06983.
    """

    totals = ("pairs",)
    every_rank = True
    pack = None

    def __init__(self, kind: Literal["softmax", "sigmoid"]) -> None:
        if kind not in ("softmax", "sigmoid"):
            raise ValueError(f"loss is 'softmax' or 'sigmoid', found {kind!r}")
        self.kind = kind
        self.group: torch.distributed.ProcessGroup | None = None
        self.limit: torch.Tensor | None = None

    def collate(self, rows: Sequence[Pair]) -> tuple[PairBatch, ...]:
        return (collate_pairs(rows),)

    def count(self, batch: PairBatch) -> Count:
        pairs = len(batch.names)
        return Count(
            totals={"pairs": pairs},
            samples=pairs,
            tokens=int(batch.valid.sum()),
            positions=batch.valid.numel(),
            cost=pairs,  # images are most of it, and all of one size
            images=pairs,
            unscored=0,
        )

    def level(self, module: Contrastive, batches: Sequence[PairBatch]) -> Sequence[PairBatch]:
        """Raises StageError where ranks differ in their batches: each enters the loss."""
        passes = passes_of_ranks(len(batches))
        if len(set(passes)) > 1:
            raise StageError(
                f"ranks have {passes} micro-batches, since rows were skipped; a sharded "
                "contrastive run needs as many on each: mend the rows, or take a larger "
                "--micro-batch"
            )
        return batches

    def backward(
        self,
        module: Contrastive,
        batches: Sequence[PairBatch],
        totals: Mapping[str, int],
        autocast: Autocast,
    ) -> float:
        """The loss is a mean over the pairs that the ranks exchange, which are all of the step's.

        Raises StageError naming this rank's rows where the loss refuses their embeddings."""
        before = module.log_scale.detach()
        self.limit = before.clamp(min=math.log(LARGEST_SCALE))
        device = device_of(module)
        if len(batches) == 1:
            with autocast():
                embedded = module(batches[0].to(device))
            return self._backward(module, embedded, batches)
        states, kept = [], []
        for batch in batches:
            states.append(_random_state(device))
            with torch.no_grad(), autocast():
                kept.append(module(batch.to(device)))
        after = _random_state(device)
        joined = Embedded(*(torch.cat(parts).requires_grad_() for parts in zip(*kept)))
        share = self._backward(module, joined, batches)
        sizes = [len(batch.names) for batch in batches]
        grads = zip(*(embeddings.grad.split(sizes) for embeddings in joined))
        for batch, state, grad in zip(batches, states, grads):
            _set_random_state(state)
            with autocast():
                embedded = module(batch.to(device))
            _backward_through(embedded, grad)
        _set_random_state(after)
        return share

    def trial(self, module: Contrastive, batch: PairBatch, autocast: Autocast) -> None:
        with autocast():
            embedded = module(batch.to(device_of(module)))
        _backward_through(embedded, [torch.ones_like(vectors) for vectors in embedded])

    def after_step(self, module: Contrastive) -> None:
        """Keeps the scale at `LARGEST_SCALE` or below. One that was above before the step, as that
        of published SigLIP models is, may fall but not rise."""
        if module.log_scale.requires_grad:
            with torch.no_grad():
                module.log_scale.clamp_(max=self.limit)

    def alone(self) -> Contrast:
        other = copy.copy(self)
        other.group = torch.distributed.GroupMember.NON_GROUP_MEMBER
        return other

    def classes(self, module: Contrastive) -> None:
        return None

    def kept_between(self, module: Contrastive, examples: int) -> int:
        """Of each image and text its own embedding, a joined one, and that one's gradient."""
        return examples * 2 * 3 * 4 * module.dim

    def _backward(
        self, module: Contrastive, embedded: Embedded, batches: Sequence[PairBatch]
    ) -> float:
        """Gradients of the loss of all ranks' embeddings; gives this rank's share of its value,
        which is the same on every rank."""
        try:
            if self.kind == "softmax":
                loss = softmax_loss(*embedded, module.log_scale, group=self.group)
            else:
                scalars = module.log_scale, module.bias
                loss = sigmoid_loss(*embedded, *scalars, group=self.group)
        except RefusedRows as error:
            names = [name for batch in batches for name in batch.names]
            refused = [names[row] for row in error.rows[:32]]
            raise StageError(
                f"{error}. These rows are: {refused}; where they are sound, the run has diverged: "
                "lower its rates"
            ) from error
        except ValueError as error:
            raise StageError(str(error)) from error
        loss.backward()
        here = torch.distributed.is_available() and torch.distributed.is_initialized()
        return float(loss.detach()) / (torch.distributed.get_world_size() if here else 1)


def _backward_through(embedded: Embedded, grads: Sequence[torch.Tensor]) -> None:
    """Takes gradients of embeddings on to the weights. A locked tower's embeddings need none."""
    learned = [(vectors, grad) for vectors, grad in zip(embedded, grads) if vectors.requires_grad]
    if learned:
        torch.autograd.backward(*zip(*learned))


def _random_state(device: torch.device) -> tuple[torch.device, list[torch.Tensor]]:
    """What dropout will draw next, on the CPU and on a GPU."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return device, states


def _set_random_state(state: tuple[torch.device, list[torch.Tensor]]) -> None:
    device, (here, *there) = state
    torch.set_rng_state(here)
    for values in there:
        torch.cuda.set_rng_state(values, device)
