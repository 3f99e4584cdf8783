"""Insides of transformers that are no public API, tested with 5.23 and 5.24.

- `CACHE`: the name under which models take a cache of keys and values
  (`vlm.families.encoder_decoder.cached_decoder`, `vlm.families.encoder_decoder.generate`).
- `GradientCheckpointingLayer`: the class of every block; checkpointing, sharding, packed rows.
- `sdpa_attention_forward`, `sdpa_mask`: what our attention falls back to, and what makes masks by
  the rule of a model (`vlm.kernels.encoder_attention`, `vlm.kernels.packed_attention`).
- `attention_of`, `set_attention`, `takes_attention`, `has_recurrence`: the attention that a
  configuration names, and what a model's class says of its own; packed rows, prefix masks.
- `has_multimodal_rotary`, `prompt_position_ids`: position ids of three numbers, and how `generate`
  counts position ids on (`vlm.families.decoder_only`).
- `Conv1D`: the linear layer of GPT-2 and its like (`vlm.lora`).
- `SiLUActivation`: the activation of gated MLPs (`vlm.kernels.norm_mlp`).
- `BaseStreamer`: whom `generate` hands ids as they are written
(`vlm.families.decoder_only.generate`).
- `random_weights`: a model of a class that no Auto class makes (image tokenizers, text encoders and
  decoders).
- `create_causal_mask`, `magneto_block`: the mask and the blocks of Kosmos-2's language model
  (`vlm.text.magneto`).
- `sam_neck`: the neck of SAM, of which DeepSeek-VL has two (`vlm.tokenizers.sam_hybrid`).
- `resizing_backends`: how an image processor resizes (`vlm.pixels.sources`).

Beside these, the names of weights and layers that published folders have are relied on where a
model is taken apart: TrOCR's and mBART's decoders in
`vlm.families.encoder_decoder.cached_decoder`, encoders in `vlm.tokenizers.encoders`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
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
    "create_causal_mask",
    "has_multimodal_rotary",
    "has_recurrence",
    "magneto_block",
    "prompt_position_ids",
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


def has_multimodal_rotary(model: PreTrainedModel) -> bool:
    """Whether the rotary position embedding of a language model takes three numbers for a position
    (temporal, row, column), as Qwen2-VL's does."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    return getattr(rotary, "mrope_section", None) is not None


@contextmanager
def prompt_position_ids(model: PreTrainedModel, positions: Tensor) -> Iterator[dict[str, Tensor]]:
    """Within, what `model.generate` is to be given besides a prompt's vectors, so that what it
    writes has position ids from the largest number of each row + 1 on.

    positions: int64[B, T] or int64[3, B, T] of a prompt, padded on the left.
    `generate` counts each number on from the prompt's last position by itself. Where that is in an
    image, its numbers differ: `generate` is given the largest, and the model's first call its own.
    Gives nothing for models that take no position ids (BLOOM, MPT).
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        yield {}
        return
    last = positions[..., -1:]
    if positions.dim() == 2 or bool((last == last[:1]).all()):
        yield {"position_ids": positions}
        return

    def restore(_: nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple:
        hook.remove()
        given = options["position_ids"]
        own = last.repeat_interleave(given.shape[1] // last.shape[1], dim=1)  # for each beam
        return arguments, options | {"position_ids": torch.cat([given[..., :-1], own], dim=-1)}

    hook = model.register_forward_pre_hook(restore, with_kwargs=True)
    largest = last.amax(0, keepdim=True).expand_as(last)
    try:
        yield {"position_ids": torch.cat([positions[..., :-1], largest], dim=-1)}
    finally:
        hook.remove()


def random_weights(cls: type[M], config: PreTrainedConfig, attention: str, **arguments: Any) -> M:
    """A model of `cls` with random weights. attention: its name. arguments: of the class."""
    return cls._from_config(config, attn_implementation=attention, **arguments)


def magneto_block(config: PreTrainedConfig, layer: int) -> nn.Module:
    """A block of Kosmos-2's language model, random. layer: its number, from 0."""
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextBlock

    return Kosmos2TextBlock(config, layer_idx=layer)


def sam_neck(config: PreTrainedConfig) -> nn.Module:
    """The convolutions after SAM's blocks, random. config: of SAM's vision encoder."""
    from transformers.models.sam.modeling_sam import SamVisionNeck

    return SamVisionNeck(config)


def resizing_backends() -> dict[str, type]:
    """What resizes ("torchvision", "pil") -> the base class of image processors that do so."""
    from transformers.image_processing_backends import PilBackend, TorchvisionBackend

    return {"torchvision": TorchvisionBackend, "pil": PilBackend}
