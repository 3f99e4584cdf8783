"""Linear layers whose weights are laid out once for many products with few rows.

A product with few rows is bound by reading the weights. On CPUs oneDNN reads 16-bit weights in a
layout of its own, into which it else brings them anew for every product; torch's compiler packs
them once, by the operators that are used here. Results are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Product = Callable[[Tensor], Tensor]


def packed(layers: Sequence[nn.Module], rows: int) -> Product:
    """The outputs of layers that read the same float[rows, ...], side by side, as one product.

    Packed are plain linear layers in bfloat16 on a CPU whose torch can; all others are used as they
    are (LoRA layers, other dtypes and devices). rows: how many rows most products will have.
    Later changes of the weights are not seen.
    """
    if not all(type(layer) is nn.Linear for layer in layers):
        return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)
    weight = layers[0].weight
    bias = layers[0].bias
    if len(layers) > 1:
        weight = torch.cat([layer.weight for layer in layers])
        if bias is not None:
            bias = torch.cat([layer.bias for layer in layers])
    if not _can_pack(weight):
        return lambda x: F.linear(x, weight, bias)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, laid_out, bias, "none", [], "")


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
