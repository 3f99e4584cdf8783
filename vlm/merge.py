"""A module's plain weights: what training has put around its layers, taken off without touching it.

LoRA layers (peft's) and tables of which only some rows are trained (`vlm.vocabulary.SplitRows`)
have weights of their own beside the ones that they stand for; 4-bit weights are packed. A folder of
a model shows none of these: the weights that it needs are made one by one as they are written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vlm.compat.peft import ADAPTER, BASE, adds_delta, delta_of, unpacked
from vlm.compat.torch import own_parameters
from vlm.vocabulary import SplitRows


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that is made when it is asked for. like: a tensor of its shape and dtype."""

    like: Tensor
    make: Callable[[], Tensor]


def plain_state(module: nn.Module, *, lora: bool = True) -> dict[str, Tensor | Made]:
    """The state of `module` as if it had been built without what training puts around layers.

    lora: whether LoRA is merged too; where not, its layers keep their names and tensors.
    """
    state: dict[str, Tensor | Made] = dict(module.state_dict())
    for path, part in module.named_modules():
        if isinstance(part, SplitRows):
            old = state.pop(f"{path}.old")
            del state[f"{path}.new"], state[f"{path}.rows"]
            state[f"{path}.weight"] = Made(old, part.joined)
        elif hasattr(own_parameters(part).get("weight"), "quant_state"):
            for key in [key for key in state if key.startswith(f"{path}.weight.")]:
                del state[key]  # how bitsandbytes packed it
            state[f"{path}.weight"] = _unpacked(part)
    if not lora or not any(ADAPTER in key for key in state):
        return state
    plain = {key.replace(BASE, "."): t for key, t in state.items() if ADAPTER not in key}
    for path, part in module.named_modules():
        if adds_delta(part):
            weight = plain[f"{path}.weight"]
            like = weight.like if isinstance(weight, Made) else weight
            plain[f"{path}.weight"] = Made(like, partial(_merged, part, weight))
    return plain


@torch.no_grad()
def _merged(layer: nn.Module, weight: Tensor | Made) -> Tensor:
    """The weight of a peft LoRA layer with what LoRA adds, rounded once."""
    weight = weight.make() if isinstance(weight, Made) else weight
    return (weight.float() + delta_of(layer).float()).to(weight.dtype)


def _unpacked(layer: nn.Module) -> Made:
    """The weight of a 4-bit layer of bitsandbytes, in the dtype that it computes in."""
    shape = layer.out_features, layer.in_features
    return Made(
        torch.empty(shape, dtype=layer.compute_dtype, device="meta"),
        lambda: unpacked(layer).to(layer.compute_dtype),
    )
