"""Insides of peft that are no public API, tested with 0.21: how it names what it puts around a
layer, what such a layer gives (`vlm.lora`, `vlm.merge`), and what it asks of packed weights.

peft is slow to import, so it is where it is used.
"""

from __future__ import annotations

from torch import Tensor, nn

BASE, ADAPTER = ".base_layer.", ".lora_"
"""How peft names a layer's own tensors and LoRA's, between the layer's name and theirs."""


def is_lora(layer: nn.Module) -> bool:
    """Whether a layer is one of LoRA's, around another."""
    from peft.tuners.lora import LoraLayer

    return isinstance(layer, LoraLayer)


def adds_delta(layer: nn.Module) -> bool:
    """Whether a layer is one of LoRA's, told without importing peft."""
    return hasattr(layer, "get_delta_weight")


def delta_of(layer: nn.Module) -> Tensor:
    """What a LoRA layer adds to the weight that it stands beside."""
    (adapter,) = layer.active_adapters
    return layer.get_delta_weight(adapter)


def settings_of(component: nn.Module):
    """The LoraConfig of a component whose layers have LoRA; None for others."""
    if "peft_config" not in vars(component):
        return None
    (settings,) = component.peft_config.values()
    return settings


def mark_packed(text: nn.Module) -> None:
    """Says that layers are packed in 4 bits, which peft asks before it stands beside them."""
    text.is_loaded_in_4bit = True


def unpacked(layer: nn.Module) -> Tensor:
    """The weight of a layer that bitsandbytes packed."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer)
