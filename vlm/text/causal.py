"""Causal language models by their configuration: transformers' own, and those that are ours."""

from __future__ import annotations

from importlib import import_module

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from vlm.compat.transformers import random_weights

OURS = {"kosmos_2_text_model": ("vlm.text.magneto", "MagnetoForCausalLM")}
"""`model_type` of a language model that no Auto class makes -> the module and name of its class."""


def build(config: PreTrainedConfig) -> nn.Module:
    """The causal language model of a configuration, with random weights."""
    if config.model_type not in OURS:
        return AutoModelForCausalLM.from_config(config)
    module, name = OURS[config.model_type]
    return random_weights(getattr(import_module(module), name), config, "sdpa")
