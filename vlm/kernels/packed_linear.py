"""Linear layers whose weights are laid out once for many products.

On CPUs oneDNN reads 16-bit weights in a layout of its own, into which it else brings them anew for
every product: with few rows that is most of the work, with hundreds still a fifth of it. torch's
compiler packs weights once, by the operators that are used here. Results are the same bits.

In fp32 torch's own products want no layout; with hundreds of rows they are as fast as any. With few
rows a product of a large weight is as slow as memory, and there oneDNN's layout can be read several
times as fast, which depends on the CPU: both are measured once for each size, and the faster one is
taken. Results differ in the order of sums.

What was laid out is kept as long as its layer lives and its weights stay the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.compat.torch import can_prepack, linear_prepacked, prepack_linear, version_of

Product = Callable[[Tensor], Tensor]

FEW = 64
"""Most rows of a product in fp32 for which a layout may gain."""
LARGE = 2**20
"""Weights of as many numbers or more are measured in fp32; smaller ones stay in the caches."""
MARGIN = 1.1
"""How many times as fast a layout must be in fp32, for it takes memory as well."""

_laid_out: WeakKeyDictionary[nn.Module, dict[tuple, Tensor]] = WeakKeyDictionary()
"""First layer -> which weights (their addresses and versions) -> these weights, laid out."""


def packed(layers: Sequence[nn.Module], rows: int) -> Product:
    """The outputs of layers that read the same float[rows, ...], side by side, as one product.

    Packed are plain linear layers on a CPU whose torch can: in bfloat16 all, in float32 those that
    are faster so. All others are used as they are (LoRA layers, other dtypes and devices). rows:
    how many rows most products will have.
    Later changes of the weights are not seen by a product, but by the next call for one.
    """
    if not all(type(layer) is nn.Linear for layer in layers):
        return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)
    weight = layers[0].weight
    bias = layers[0].bias
    if len(layers) > 1 and bias is not None:
        bias = torch.cat([layer.bias for layer in layers])
    if not (all(_can_pack(layer.weight) for layer in layers) and _gains(layers, rows)):
        if len(layers) > 1:
            weight = torch.cat([layer.weight for layer in layers])
        return lambda x: F.linear(x, weight, bias)
    laid_out = _weights(layers, rows)
    return lambda x: linear_prepacked(x, laid_out, bias)


@contextmanager
def packed_layers(module: nn.Module, rows: int) -> Iterator[None]:
    """While it lasts, every linear layer of `module` that can be packed is.

    Only for forward passes without gradients; elsewhere it changes nothing.
    """
    layers = [
        layer
        for layer in module.modules()
        if type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and _can_pack(layer.weight)
        and _gains([layer], rows)
    ]
    for layer in layers:
        layer.forward = packed([layer], rows)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _weights(layers: Sequence[nn.Module], rows: int) -> Tensor:
    """The layers' weights side by side, laid out; from the last call where they are the same."""
    held = _laid_out.setdefault(layers[0], {})
    key = tuple((layer.weight.data_ptr(), version_of(layer.weight)) for layer in layers)
    if key not in held:
        for old in [other for other in held if len(other) == len(key)]:
            del held[old]  # of weights that have changed since
        weight = torch.cat([layer.weight.detach() for layer in layers])
        held[key] = prepack_linear(weight, rows)
    return held[key]


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not weight.is_inference()  # which has no version to tell its changes by
        and can_prepack(weight.dtype)
    )


def _gains(layers: Sequence[nn.Linear], rows: int) -> bool:
    """Whether a product of layers that can be packed is worth a layout."""
    if layers[0].weight.dtype != torch.float32:
        return True
    outputs, inputs = sum(layer.out_features for layer in layers), layers[0].in_features
    if rows > FEW or outputs * inputs < LARGE:
        return False
    rows = 1 << (rows - 1).bit_length()  # so that few sizes are measured
    key = rows, inputs, outputs, torch.get_num_threads()
    if key not in _faster:
        _faster[key] = _is_faster(layers, rows)
    return _faster[key]


_faster: dict[tuple[int, int, int, int], bool] = {}
"""Rows, inputs, outputs and threads of products in fp32 -> whether a layout is faster."""


def _is_faster(layers: Sequence[nn.Linear], rows: int) -> bool:
    """Measured in turn, so that other work slows both."""
    weight = torch.cat([layer.weight for layer in layers])
    laid_out = _weights(layers, rows)
    x = weight.new_ones(rows, weight.shape[1])
    ways = (lambda: F.linear(x, weight)), (lambda: linear_prepacked(x, laid_out, None))
    seconds: list[list[float]] = [[], []]
    for _ in range(4):
        for way, found in zip(ways, seconds):
            start = time.perf_counter()
            way()
            found.append(time.perf_counter() - start)
    plain, packed = (min(found[1:]) for found in seconds)  # each once to warm up
    if plain > MARGIN * packed:
        return True
    _laid_out.pop(layers[0], None)
    return False
