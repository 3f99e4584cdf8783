"""MLPs of image encoders a few hundred tokens at a time, on CPUs in fp32.

What an MLP widens an image's tokens to is several times as large as its input: for a few images
at once it no longer stays in the caches, and the activation, which does next to nothing to each
number, waits for memory. In parts it is widened, activated in place and narrowed while it is there.
The values are the same, but for the order of sums where a product depends on its number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.compat.torch import gelu_, has_hooks

POSITIONS = 512
"""Tokens of a part: fewer make products slow."""


@contextmanager
def mlps_in_parts(module: nn.Module) -> Iterator[None]:
    """While it lasts, every MLP of `module` that is known goes in parts: two plain linear layers in
    fp32 on a CPU, `fc1` and `fc2`, with a GELU between them, as transformers' vision encoders have
    them. A trial shows whether it computes that.

    Only for forward passes without gradients; elsewhere it changes nothing.
    """
    tried: dict[tuple[type, ...], str | None] = {}
    changed = []
    for part in module.modules():
        if torch.is_grad_enabled() or not _is_mlp(part):
            continue
        kind = type(part), type(part.activation_fn)
        if kind not in tried:
            tried[kind] = _gelu_of(part)
        if tried[kind] is not None:
            part.forward = partial(_forward, part, tried[kind])
            changed.append(part)
    try:
        yield
    finally:
        for part in changed:
            del part.forward


def _is_mlp(part: nn.Module) -> bool:
    if {name for name, _ in part.named_children()} != {"fc1", "activation_fn", "fc2"}:
        return False
    layers = part.fc1, part.fc2
    return "forward" not in vars(part) and all(
        type(layer) is nn.Linear
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and not has_hooks(layer)
        for layer in layers
    )


def _gelu_of(mlp: nn.Module) -> str | None:
    """Which GELU stands in an MLP, as torch names its approximations; None where it computes
    something else."""
    x = torch.linspace(-6, 6, 2 * mlp.fc1.in_features).view(1, 2, -1)
    wide = torch.linspace(-6, 6, 64)
    for approximate in ("none", "tanh"):
        same = torch.equal(mlp.activation_fn(wide), F.gelu(wide, approximate=approximate))
        if same and torch.allclose(mlp(x), _forward(mlp, approximate, x), atol=1e-5, rtol=1e-4):
            return approximate
    return None


def _forward(mlp: nn.Module, approximate: str, hidden_states: Tensor) -> Tensor:
    vectors = hidden_states.reshape(-1, hidden_states.shape[-1])
    out = vectors.new_empty(len(vectors), mlp.fc2.out_features)
    for part, made in zip(vectors.split(POSITIONS), out.split(POSITIONS)):
        made.copy_(mlp.fc2(gelu_(mlp.fc1(part), approximate)))
    return out.view(*hidden_states.shape[:-1], -1)
