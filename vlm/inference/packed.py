"""Linear layers whose weights are laid out once for many products.

On CPUs oneDNN reads 16-bit weights in a layout of its own, into which it else brings them anew for
every product: with few rows that is most of the work, with hundreds still a fifth of it. torch's
compiler packs weights once, by the operators that are used here. Results are the same bits. What
was laid out is kept as long as its layer lives and its weights stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.compat.torch import can_prepack_bf16, linear_prepacked, prepack_linear, version_of

Product = Callable[[Tensor], Tensor]

_laid_out: WeakKeyDictionary[nn.Module, dict[tuple, Tensor]] = WeakKeyDictionary()
"""First layer -> which weights (their places and versions) -> these weights, laid out."""


def packed(layers: Sequence[nn.Module], rows: int) -> Product:
    """The outputs of layers that read the same float[rows, ...], side by side, as one product.

    Packed are plain linear layers in bfloat16 on a CPU whose torch can; all others are used as they
    are (LoRA layers, other dtypes and devices). rows: how many rows most products will have.
    Later changes of the weights are not seen by a product, but by the next call for one.
    """
    if not all(type(layer) is nn.Linear for layer in layers):
        return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)
    weight = layers[0].weight
    bias = layers[0].bias
    if len(layers) > 1 and bias is not None:
        bias = torch.cat([layer.bias for layer in layers])
    if not all(_can_pack(layer.weight) for layer in layers):
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
        if type(layer) is nn.Linear and "forward" not in vars(layer) and _can_pack(layer.weight)
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
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not weight.is_inference()  # which has no version to tell its changes by
        and can_prepack_bf16()
    )
