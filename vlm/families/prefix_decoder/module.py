"""Prefix decoders: image tokens and prompt read as a whole, the answer written after them.

PaliGemma is of this family. Placement is that of decoder-only models; what differs is the mask.
Image and prompt see each other whatever their order, the answer sees them and what was written of
it, and nothing sees padding.

Shapes: B example, T text position, D decoder width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vlm.compat.transformers import attention_of
from vlm.families.decoder_only.batch import Batch
from vlm.families.decoder_only.image_layout import Sees
from vlm.families.decoder_only.module import DecoderOnly
from vlm.image_tokens import ImageTokenizer
from vlm.kernels.packed_attention import read_segments


class PrefixDecoder(DecoderOnly):
    """An image tokenizer, an adaptor and a language model that reads the prompt at once.

    text: a transformers causal language model that takes a mask for each pair of positions, as
        those of Gemma, Llama and Qwen do. It is this family's from now on: vectors that are given
        to its decoder with a mask of positions alone, or none, are a prompt, as in `generate`,
        whose ids that follow are the answer.
    """

    family = "prefix_decoder"
    sees: Sees = "prefix"

    def __init__(self, tokenizer: ImageTokenizer, adaptor: nn.Module, text: nn.Module) -> None:
        super().__init__(tokenizer, adaptor, text)
        text.get_decoder().register_forward_pre_hook(_read_prompt, with_kwargs=True)

    def read(self, vectors: Tensor, batch: Batch) -> Tensor:
        """The language model's final states float[B, T, D]; `batch.prefix` is read at once. Raises
        ValueError as `DecoderOnly.read` does for packed rows, and for causal rows."""
        self.require_layout(batch)
        if batch.bounds is not None:
            prefix = batch.example[batch.prefix].bincount(minlength=len(batch.names))
            return read_segments(self.text, vectors, batch.positions, batch.bounds, prefix)
        decoder = self.text.get_decoder()
        out = decoder(
            inputs_embeds=vectors,
            attention_mask=prefix_masks(decoder.config, vectors, batch.valid, batch.prefix),
            position_ids=batch.positions,
            use_cache=False,
        )
        return out.last_hidden_state


def prefix_masks(
    config: PreTrainedConfig, vectors: Tensor, valid: Tensor, prefix: Tensor
) -> Tensor | dict[str, Tensor]:
    """The attention masks of a language model, in the form that it takes: one mask [B, 1, T, T], or
    one for each kind of its layers.

    config: the language model's. vectors: float[B, T, D], of which shape, dtype and device count.
    valid: bool[B, T], False at padding. prefix: bool[B, T], True at positions that see each other,
        on sliding layers at any distance, as in PaliGemma 2.
    Raises ValueError for layers that are no attention, and for an attention that takes no mask for
    each pair of positions.
    """
    attention = attention_of(config)
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"{attention} cannot read a prefix at once; load the language model with "
            'attn_implementation="sdpa"'
        )
    together = prefix[:, :, None] & prefix[:, None, :]

    def mask_of(kind: str) -> Tensor:
        seen = (seen_before(kind, config, valid) | together) & valid[:, None, :]
        if attention == "sdpa":
            return seen[:, None]
        hidden = torch.finfo(vectors.dtype).min
        return torch.where(seen, 0.0, hidden).to(vectors.dtype)[:, None]

    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return {kind: mask_of(kind) for kind in dict.fromkeys(kinds)}
    if getattr(config, "sliding_window", None) is not None:
        return mask_of("sliding_attention")
    if getattr(config, "attention_chunk_size", None) is not None:
        return mask_of("chunked_attention")
    return mask_of("full_attention")


def seen_before(kind: str, config: PreTrainedConfig, valid: Tensor) -> Tensor:
    """Which positions a layer without a prefix sees: bool[1 or B, T, T], rows see columns.

    kind: "full_attention": itself and all before it; "sliding_attention": of these the last
        `config.sliding_window`; "chunked_attention": those of its chunk of
        `config.attention_chunk_size`, counted from the first real position.
    valid: bool[B, T], False at padding.
    Raises ValueError naming any other kind.
    """
    position = torch.arange(valid.shape[1], device=valid.device)
    distance = (position[:, None] - position)[None]
    if kind == "full_attention":
        return distance >= 0
    if kind == "sliding_attention":
        return (distance >= 0) & (distance < config.sliding_window)
    if kind == "chunked_attention":
        after = position - valid.long().argmax(1)[:, None]
        chunk = after.div(config.attention_chunk_size, rounding_mode="floor")
        return (distance >= 0) & (chunk[:, :, None] == chunk[:, None, :])
    raise ValueError(
        f"{config.model_type} has layers of kind {kind}, which cannot read a prefix at once; "
        "expected attention that is full, sliding or chunked"
    )


def _read_prompt(
    decoder: nn.Module, arguments: tuple, options: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Gives a decoder the masks of a prompt where it is called with one."""
    if "cu_seq_lens_q" in options:  # a packed row has masks of its own
        return None
    vectors, mask = options.get("inputs_embeds"), options.get("attention_mask")
    if vectors is None or isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
        return None
    if mask is None:
        mask = torch.ones(vectors.shape[:2], device=vectors.device)
    valid = mask.bool()
    masks = prefix_masks(decoder.config, vectors, valid, valid)
    return arguments, options | {"attention_mask": masks}
