"""Memory-efficient kernels: RMS norms and gated MLPs (SwiGLU) of language models that keep less for
the backward pass, and compute the same.

transformers' RMS norms keep their input in fp32, and its gated MLPs what their activation gives;
both follow from what is kept anyway in a few cheap operations. What is computed stays equal to the
bit; gradients differ by the rounding of 16-bit steps that are not made here.

Shapes: N position, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vlm.compat.torch import has_hooks, silu_backward
from vlm.compat.transformers import SiLUActivation
from vlm.kernels.attention import on_cpu

POSITIONS = 512
"""Positions at a time on CPUs, so that what lies between two operations stays in the caches."""


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Forward = Callable[[nn.Module, Tensor], Tensor]


def memory_efficient_kernels(module: nn.Module) -> dict[str, Forward]:
    """The memory-efficient forward of each RMS norm and gated MLP of a model, by the part's name.
    Parts that compute something else, as a trial of one of each kind shows, are skipped; so the
    weights must have values, and must not be sharded."""
    tried: dict[tuple, Forward | None] = {}
    kernels = {}
    for name, part in module.named_modules():
        kind = _kind(part)
        if kind is None or "forward" in vars(part):
            continue
        if kind not in tried:
            kernel, alike, *_ = kind
            tried[kind] = kernel if alike(part) else None
        if tried[kind] is not None:
            kernels[name] = tried[kind]
    return kernels


@contextmanager
def use_kernels(module: nn.Module, kernels: dict[str, Forward]) -> Iterator[None]:
    """Within, a model's parts compute by these kernels.

    kernels: what `memory_efficient_kernels` gives of the model, or of one of the same structure.
    """
    parts = [module.get_submodule(name) for name in kernels]
    for part, kernel in zip(parts, kernels.values()):
        part.forward = partial(kernel, part)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def _kind(part: nn.Module) -> tuple | None:
    """The kernel for a part, its trial, and what else decides how the trial ends; None for what is
    neither an RMS norm nor a gated MLP."""
    own = dict(part.named_parameters())
    if type(part).__name__.endswith("RMSNorm") and own.keys() == {"weight"}:
        weight, eps = own["weight"], _eps(part)
        if weight.dim() == 1 and weight.is_floating_point() and isinstance(eps, float):
            return _norm_forward, _norm_alike, type(part), len(weight), weight.dtype, eps
    projections = [getattr(part, name, None) for name in PROJECTIONS]
    gated = isinstance(getattr(part, "act_fn", None), (nn.SiLU, SiLUActivation))
    weights = [getattr(projection, "weight", None) for projection in projections]
    if gated and all(isinstance(w, Tensor) and w.is_floating_point() for w in weights):
        inner = tuple((type(m), getattr(m, "p", None)) for m in part.modules())
        return _mlp_forward, _mlp_alike, inner, *((tuple(w.shape), w.dtype) for w in weights)
    return None


def _eps(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _norm_alike(norm: nn.Module) -> bool:
    """Tried with weights of its own, since among ones all norms are alike, and in each dtype that
    it may be trained in, since some round at other positions."""
    trials = [deepcopy(norm).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    for trial in trials:
        trial.weight.data = torch.linspace(-1, 2, len(trial.weight)).to(trial.weight)
    return all(_alike(trial, _norm_forward, trial.weight) for trial in trials)


def _mlp_alike(mlp: nn.Module) -> bool:
    """Tried as it trains, so that dropout of its own shows; that of layers such as LoRA's does not
    count, since they are called."""
    modes = [(part, part.training) for part in mlp.modules()]
    mlp.train()
    for name in PROJECTIONS:
        getattr(mlp, name).eval()
    try:
        return _alike(mlp, _mlp_forward, mlp.gate_proj.weight[0])
    finally:
        for part, training in modes:
            part.training = training


@torch.no_grad()
def _alike(part: nn.Module, kernel: Forward, like: Tensor) -> bool:
    """Whether both compute the same of two positions of a width and dtype."""
    positions = torch.linspace(-3, 5, 2 * len(like)).view(1, 2, len(like)).to(like)
    with torch.random.fork_rng(devices=[]):
        try:
            theirs, ours = part(positions), kernel(part, positions)
            return theirs.dtype == ours.dtype and torch.equal(theirs, ours)
        except Exception:  # whatever a part of this name may want or give, it is not known
            return False


def _norm_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    return _Norm.apply(hidden_states, module.weight, _eps(module))


def _mlp_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    gate, up = module.gate_proj(hidden_states), module.up_proj(hidden_states)
    down = module.down_proj
    if _is_plain(down) and gate.dtype == down.weight.dtype:
        return _GatedDown.apply(gate, up, down.weight, down.bias)
    return down(_Gated.apply(gate, up))


def _is_plain(part: nn.Module) -> bool:
    """Whether a linear layer is no more than its weights, which can be used without calling it."""
    return type(part) is nn.Linear and "forward" not in vars(part) and not has_hooks(part)


class _Norm(torch.autograd.Function):
    """weight * (x / sqrt(mean(x ** 2) + eps)), normed in fp32, weighed in x's dtype."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        flat = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(flat, dtype=torch.promote_types(x.dtype, weight.dtype))
        inverse = flat.new_empty(len(flat), 1, dtype=torch.float32)
        for a, b, inv in _in_parts(flat, out, inverse):
            full = a.float()
            inv.copy_((full.pow(2).mean(-1, keepdim=True) + eps).rsqrt_())
            torch.mul(weight, (full * inv).to(x.dtype), out=b)
        ctx.save_for_backward(x, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        flat, by_out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        by_x = torch.empty_like(flat)
        by_weight = torch.zeros_like(weight, dtype=torch.float32)
        for a, g, b, inv in _in_parts(flat, by_out, by_x, inverse):
            normed, back = a.float() * inv, g.float()
            if ctx.needs_input_grad[1]:
                by_weight += (back * normed.to(x.dtype)).sum(0)
            back = back * weight.float()
            shared = (back * normed).mean(-1, keepdim=True)
            b.copy_(back.addcmul_(normed, shared, value=-1).mul_(inv))
        return by_x.view_as(x), by_weight.to(weight.dtype), None


class _Gated(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        by_gate = silu_backward(grad * up, gate)
        return by_gate, F.silu(gate).mul_(grad)


class _GatedDown(torch.autograd.Function):
    """weight (silu(gate) * up) + bias. What the linear layer reads is made in parts, and again for
    the backward pass: to keep it would take as much as the gate."""

    @staticmethod
    def forward(ctx, gate, up, weight, bias):
        ctx.save_for_backward(gate, up, weight)
        out = gate.new_empty(*gate.shape[:-1], len(weight))
        for a, b, c in _in_parts(*map(_by_position, (gate, up, out))):
            c.copy_(F.linear(F.silu(a).mul_(b), weight, bias))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        _, _, learns, learns_bias = ctx.needs_input_grad
        by_gate, by_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
        positions = map(_by_position, (gate, up, grad, by_gate, by_up))
        for a, b, by_out, by_a, by_b in _in_parts(*positions):
            by_product = by_out @ weight
            by_a.copy_(silu_backward(by_product * b, a))
            torch.mul(F.silu(a), by_product, out=by_b)
        by_weight = by_bias = None
        if learns:
            by_weight = _by_position(grad).T @ _by_position(F.silu(gate).mul_(up))
        if learns_bias:
            by_bias = _by_position(grad).sum(0)
        return by_gate, by_up, by_weight, by_bias


def _by_position(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [N, ...] in parts that belong together; whole where there are no caches to mind."""
    size = POSITIONS if on_cpu(tensors[0]) else max(len(tensors[0]), 1)
    return zip(*(t.split(size) for t in tensors))
