"""Token losses over scored positions only, summed in nats, in fp32.

Sums, not means: the trainer divides by the number of scored tokens of the whole step, over all
micro-batches and ranks, so that no split of a batch changes the loss.

`token_losses` takes logits. With a large vocabulary these outweigh all else in a step, so training
goes by `backward_state_losses`, which takes the states before the head: the logits of a chunk of
positions become their own gradient where they lie, go back through the head, and are gone. Nothing
is computed twice. `token_losses` is its slow twin.

Shapes: N scored position, D decoder width, Z vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

Head = Callable[[Tensor], Tensor]

CHUNK = 2**25
"""Logits that are made at once, 64 MiB in bf16. At 257k ids these are 130 positions, enough for the
head's products to run at full speed; small vocabularies have all their positions in one chunk."""
CPU_BLOCK = 2**20
"""Numbers in fp32 that a CPU works on at once: several passes go over them, in its cache."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-probability of each target in nats, fp32[N]; fp64 where logits are.

    logits: float[N, Z] at scored positions; targets: int64[N].
    """
    return F.cross_entropy(logits.to(_wide(logits.dtype)), targets, reduction="none")


@torch.no_grad()
def state_losses(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    """`token_losses(head(states), targets)` without a gradient, a chunk of positions at a time.

    head: see `backward_state_losses`. states: float[N, D]; targets: int64[N].
    """
    width, _ = _shown(head, states)
    positions = _positions(width, [])
    chunks = zip(states.split(positions), targets.split(positions))
    return torch.cat([_spend(head(part), wanted, None) for part, wanted in chunks])


def backward_state_losses(
    head: Head,
    states: Tensor,
    targets: Tensor,
    scale: float,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Tensor:
    """`token_losses(head(states), targets)`, after a backward pass of their sum times `scale`: what
    the head learns with, and what the states were made from, has its gradients.

    head: gives logits float[n, Z] of states float[n, D], each row of its own state alone. They are
        overwritten, so they must be a new tensor, and one that no backward pass needs, as linear
        layers, products with numbers and caps make it. Weights of the head may be frozen, or tied
        to some after the states.
    states: float[N, D] at scored positions; targets: int64[N].
    scale: given here, not to the losses later, so that gradients are rounded once.
    autocast: what the head is called within.

    A chunk has `CHUNK` logits, or as many as the head learns numbers: their gradient takes that
    memory anyway, and beside the products of so many positions its sum, in fp32, costs little.
    Returns the losses without a gradient.
    """
    with autocast():
        width, learned = _shown(head, states)
    positions = _positions(width, learned)
    if len(states) <= positions:
        with autocast():
            logits = head(states)
        losses = _spend(logits.detach(), targets, scale)
        if logits.requires_grad:
            logits.backward(logits.detach())
        return losses
    count = -(-len(states) // positions)
    sums = [weight.new_zeros(weight.shape, dtype=_wide(weight.dtype)) for weight in learned]
    chunks = zip(states.tensor_split(count), targets.tensor_split(count))
    passes = [_pass(head, part, wanted, scale, autocast, learned, sums) for part, wanted in chunks]
    losses, gradients = map(list, zip(*passes))
    reached = [*([states] if states.requires_grad else []), *learned]
    if reached:
        gradients = [torch.cat(gradients)] if states.requires_grad else []
        gradients += [sums.pop(0).to(weight.dtype) for weight in learned]
        torch.autograd.backward(reached, gradients)
    return torch.cat(losses)


def sum_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sums of `values` float[N] for each of `count` rows; rows int64[N] says where each belongs.

    >>> sum_by_row(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 2]), 3).tolist()
    [3.0, 0.0, 4.0]
    """
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, rows, values)


def _shown(head: Head, states: Tensor) -> tuple[int, list[Tensor]]:
    """How wide a head's logits are, and what it learns with; logits of no position show both."""
    none = head(states[:0].detach())
    return none.shape[-1], _leaves(none)


def _positions(width: int, learned: Sequence[Tensor]) -> int:
    """The most positions of a chunk."""
    return max(1, max(CHUNK, sum(weight.numel() for weight in learned)) // width)


def _pass(
    head: Head,
    states: Tensor,
    targets: Tensor,
    scale: float,
    autocast: Callable[[], AbstractContextManager],
    learned: Sequence[Tensor],
    sums: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """A chunk's losses and the gradient of its states, None where they need none; those of
    `learned` are added to `sums`. Nothing else of the chunk is alive afterwards."""
    states = states.detach().requires_grad_(states.requires_grad)
    with autocast():
        # A view, for hooks on what modules are given, such as a FLOP counter's, bear no leaf here.
        logits = head(states.view_as(states))
    losses = _spend(logits.detach(), targets, scale)
    own = [states] if states.requires_grad else []
    if not own and not learned:
        return losses, None
    found = torch.autograd.grad(logits, [*own, *learned], logits.detach())
    size = _block(states.device)
    for total, grad in zip(sums, found[len(own) :]):
        # Where dtypes differ, a CPU makes a copy in the wider one: of a part that is a small one.
        for to, part in zip(total.view(-1).split(size), grad.reshape(-1).split(size)):
            to.add_(part)
    return losses, found[0] if own else None


def _spend(logits: Tensor, targets: Tensor, scale: float | None) -> Tensor:
    """The losses fp32[N] of logits float[N, Z], which are overwritten: by the gradient of the
    losses' sum times `scale`, or, where it is None, by anything."""
    N, Z = logits.shape
    wide = _wide(logits.dtype)
    losses = torch.empty(N, dtype=wide, device=logits.device)
    rows = max(1, _block(logits.device) // Z)
    space = None
    if logits.dtype != wide:
        space = torch.empty(min(rows, N), Z, dtype=wide, device=logits.device)
    for start in range(0, N, rows):
        part = logits[start : start + rows]
        block = part if space is None else space[: len(part)].copy_(part)
        target = targets[start : start + rows, None]
        top = block.amax(-1, keepdim=True)
        below = top - block.gather(-1, target)
        total = block.sub_(top).exp_().sum(-1, keepdim=True)
        loss = total.log() + below
        losses[start : start + rows] = loss[:, 0]
        if scale is not None:
            block.mul_(scale / total)
            # p - 1, of which a likely target would lose all digits to rounding.
            block.scatter_(-1, target, scale * torch.expm1(-loss))
            if space is not None:
                part.copy_(block)
    return losses


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The tensors that get a gradient when a backward pass starts at this one, each once."""
    found, seen, nodes = [], set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes += [before for before, _ in node.next_functions]
    return found


def _block(device: torch.device) -> int:
    """Numbers that are worked on at once: on a GPU many, for each call costs there."""
    return CPU_BLOCK if device.type == "cpu" else CHUNK


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
