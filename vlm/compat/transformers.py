"""Insides of transformers that are no public API, tested with 5.23 and 5.24.

- `CACHE`: the name under which models take a cache of keys and values
  (`vlm.families.encoder_decoder.cached_decoder`, `vlm.families.encoder_decoder.generate`).
- `GradientCheckpointingLayer`: the class of every block; checkpointing, sharding, packed rows.
- `sdpa_attention_forward`, `sdpa_mask`: what our attention falls back to, and what makes masks by
  the rule of a model (`vlm.kernels.encoder_attention`, `vlm.kernels.packed_attention`).
- `attention_of`, `set_attention`, `takes_attention`, `has_recurrence`: the attention that a
  configuration names, and what a model's class says of its own; packed rows, prefix masks.
- `Conv1D`: the linear layer of GPT-2 and its like (`vlm.lora`).
- `SiLUActivation`: the activation of gated MLPs (`vlm.kernels.norm_mlp`).
- `BaseStreamer`: whom `generate` hands ids as they are written
(`vlm.families.decoder_only.generate`).
- `random_weights`: a model of a class that no Auto class makes (image tokenizers, text encoders).
- `sam_neck`: the neck of SAM, of which DeepSeek-VL has two (`vlm.tokenizers.sam_hybrid`).
- `resizing_backends`: how an image processor resizes (`vlm.pixels.sources`).

Beside these, the names of weights and layers that published folders have are relied on where a
model is taken apart: TrOCR's and mBART's decoders in
`vlm.families.encoder_decoder.cached_decoder`, encoders in `vlm.tokenizers.encoders`.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

__all__ = [
    "CACHE",
    "BaseStreamer",
    "Conv1D",
    "GradientCheckpointingLayer",
    "SiLUActivation",
    "attention_of",
    "has_recurrence",
    "random_weights",
    "resizing_backends",
    "sam_neck",
    "sdpa_attention_forward",
    "sdpa_mask",
    "set_attention",
    "takes_attention",
]

CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)
"""5.24 renamed it throughout, and warns of the old name."""

M = TypeVar("M", bound=PreTrainedModel)


def attention_of(config: PreTrainedConfig) -> str | None:
    """The name of the attention that a model of this configuration computes; None: its default."""
    return config._attn_implementation


def set_attention(config: PreTrainedConfig, name: str | None) -> None:
    """Makes the models of this configuration, this very object, compute attention `name`."""
    config._attn_implementation = name


def takes_attention(model: nn.Module) -> bool:
    """Whether a model's class takes its attention from transformers' registry."""
    return getattr(model, "_supports_attention_backend", False)


def has_recurrence(model: PreTrainedModel) -> bool:
    """Whether a language model has states that go from position to position beside attention."""
    return model._is_stateful


def random_weights(cls: type[M], config: PreTrainedConfig, attention: str, **arguments: Any) -> M:
    """A model of `cls` with random weights. attention: its name. arguments: of the class."""
    return cls._from_config(config, attn_implementation=attention, **arguments)


def sam_neck(config: PreTrainedConfig) -> nn.Module:
    """The convolutions after SAM's blocks, random. config: of SAM's vision encoder."""
    from transformers.models.sam.modeling_sam import SamVisionNeck

    return SamVisionNeck(config)


def resizing_backends() -> dict[str, type]:
    """What resizes ("torchvision", "pil") -> the base class of image processors that do so."""
    from transformers.image_processing_backends import PilBackend, TorchvisionBackend

    return {"torchvision": TorchvisionBackend, "pil": PilBackend}
