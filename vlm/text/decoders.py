"""Text decoders with cross-attention: transformers' causal language models that read image tokens
as a memory.

Taken are all whose `forward` has `encoder_hidden_states` and whose layers attend to it: TrOCR,
mBART, and BERT-like models that were given cross-attention. Language models without it (LLaMA and
the like) are refused by name.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

FROM_PAD = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "roberta-prelayernorm")
"""`model_type` of classes that count positions from after their pad id, in one table with it."""


class SinusoidalPositions(nn.Module):
    """TrOCR's sinusoidal positions, counted from `pad_id` + 1; a pad has zeros.

    transformers' module keeps its table as a plain tensor, which stays on the meta device after
    `from_pretrained` and in the dtype and on the device where it was made; this one's follows the
    decoder. Rows whose pads lie after their text get transformers' own positions.

    count: positions that the table is made for; it grows where a row is longer.
    norm: a layer norm of the decoder, in whose dtype positions are given.
    """

    def __init__(self, count: int, width: int, pad_id: int, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.width = width
        self.pad_id = pad_id
        self._norm = (norm,)  # in a tuple, so that it is no sub-module here
        self.register_buffer("table", self._made(count), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        first: int = 0,
        *,
        cache_length: int = 0,
        past_key_values_length: int = 0,
    ) -> Tensor:
        """input_ids: int64[B, T], of which the first stands at position `first`. cache_length,
        past_key_values_length: that number by the names that transformers has had for it. Gives
        float[B, T, D]."""
        first = first + cache_length + past_key_values_length
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) + first
        end = first + input_ids.shape[1]
        if end > len(self.table) - self.pad_id - 1:
            self.table = self._made(end).to(self.table)
        rows = (positions + self.pad_id + 1).expand_as(input_ids)
        vectors = self.table[rows.masked_fill(input_ids == self.pad_id, self.pad_id)]
        return vectors.to(self._norm[0].weight.dtype)

    def _made(self, count: int) -> Tensor:
        table = sinusoids(torch.arange(count + self.pad_id + 1), self.width)
        table[self.pad_id] = 0
        return table


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """fp32[..., width] of positions int64[...]: the sines of each at falling frequencies, then the
    cosines.

    Source: transformers, `TrOCRSinusoidalPositionalEmbedding.get_embedding`, as tensor2tensor has
    them; "Attention Is All You Need", section 3.5, has other frequencies.
    """
    half = width // 2
    steps = torch.arange(half, device=positions.device).float()
    angles = positions.float()[..., None] * torch.exp(steps * -(math.log(10000) / (half - 1)))
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, width % 2))


def embed_positions(decoder: nn.Module, ids: Tensor, first: int) -> Tensor:
    """The position vectors float[B, T, D] of ids int64[B, T], of which the first stands at position
    `first`, in the decoder of TrOCR or mBART."""
    table = decoder.embed_positions
    if isinstance(table, SinusoidalPositions):
        return table(ids, first)
    start = first + table.offset  # the first rows are never read
    return table.weight[start : start + ids.shape[1]].expand(*ids.shape, -1)


def build(config: PreTrainedConfig) -> nn.Module:
    """A decoder with random weights from a transformers configuration, which is not changed.

    Raises ValueError where the model has no cross-attention.
    """
    config = AutoConfig.for_model(**config.to_dict())  # classes write into theirs
    text = AutoModelForCausalLM.from_config(config)
    return prepared(text)


def prepared(text: nn.Module) -> nn.Module:
    """The decoder itself, without habits of writing of its own, its positions made to follow it
    where they do not (see `SinusoidalPositions`). Raises ValueError where it has no
    cross-attention."""
    require_cross_attention(text)
    text.generation_config = GenerationConfig()
    if text.config.model_type == "trocr" and not text.config.use_learned_position_embeddings:
        decoder = text.base_model.decoder
        decoder.embed_positions = SinusoidalPositions(
            text.config.max_position_embeddings,
            text.config.hidden_size,
            text.config.pad_token_id,
            decoder.layers[0].self_attn_layer_norm,
        )
    return text


def require_cross_attention(text: nn.Module) -> None:
    """Raises ValueError naming the class where a language model cannot read image tokens."""
    name = type(text).__name__
    if "encoder_hidden_states" not in inspect.signature(text.forward).parameters:
        raise ValueError(
            f"text: {name} has no cross-attention, so it cannot read image tokens as a memory; "
            "expected a decoder such as TrOCR's, mBART's or a BERT-like one"
        )
    own = any("encoder_attn" in path for path, _ in text.named_modules())
    if not (own or getattr(text.config, "add_cross_attention", False)):
        raise ValueError(
            f"text: expected {name} with cross-attention, found add_cross_attention=False in its "
            "configuration"
        )


def head_of(text: nn.Module) -> nn.Module:
    """The module that turns final states into logits, whatever its class calls it. Raises
    ValueError where there are several."""
    heads = [child for child in text.children() if child is not text.base_model]
    if len(heads) != 1:
        raise ValueError(
            f"text: expected one module after the decoder of {type(text).__name__}, found "
            f"{[type(head).__name__ for head in heads]}"
        )
    return heads[0]


def memory_width(config: PreTrainedConfig) -> int:
    """The width of the image tokens that a decoder's cross-attention takes."""
    return getattr(config, "cross_attention_hidden_size", None) or config.hidden_size


def first_position(text: nn.Module) -> int:
    """The position id of a row's first token where a class is told positions: 0, or after the pad
    id."""
    return text.config.pad_token_id + 1 if text.config.model_type in FROM_PAD else 0


def positions_of(config: PreTrainedConfig) -> int | None:
    """The most positions of a row; None where the configuration does not say."""
    count = getattr(config, "max_position_embeddings", None)
    if count is not None and config.model_type in FROM_PAD:
        return count - config.pad_token_id - 1
    return count


def plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A decoder's configuration as JSON values; `AutoConfig.for_model(**values)` reads them."""
    return config.to_dict()
