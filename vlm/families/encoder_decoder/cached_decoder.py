"""Decoders that read one id of each row at a time, and remember what they have read.

The decoders of TrOCR and mBART are stepped through layer by layer: image keys and values are
projected once, the keys and values of earlier tokens lie in buffers that grow by blocks, and no
more is computed than the next id needs. Other decoders take their own step, with transformers'
cache.

Shapes: B example, T text position, L image tokens of an example, A head, F features per head,
D decoder width, Z vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, MBartForCausalLM, TrOCRForCausalLM

from vlm.compat.transformers import CACHE
from vlm.families.encoder_decoder.module import EncoderDecoder, Memory
from vlm.kernels.packed_linear import packed
from vlm.text.decoders import embed_positions, head_of

IMAGE_ROWS = 2048
"""Image tokens for which weights that read them are laid out: those of a few views."""


class Stepper(Protocol):
    """A decoder that reads one id of each row at a time."""

    def step(self, ids: Tensor, position: int) -> Tensor:
        """The final states float[B, D] of ids int64[B] that stand at `position`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """The scores float[B, Z] of final states."""

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows alone, int64[N]."""


def stepper_of(module: EncoderDecoder, memory: Memory) -> Stepper:
    """What steps through the decoder of a model, from the memory of its images."""
    if isinstance(module.text, (TrOCRForCausalLM, MBartForCausalLM)):
        return LayerStepper(module.text, memory)
    return CachedStepper(module, memory)


class CachedStepper:
    """Any decoder of transformers, by its own step and transformers' cache."""

    def __init__(self, module: EncoderDecoder, memory: Memory) -> None:
        self.text, self.logits = module.text, module.logits
        self.memory = memory
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def step(self, ids: Tensor, position: int) -> Tensor:
        valid = self.memory.valid
        out = self.text.base_model(
            input_ids=ids[:, None],
            encoder_hidden_states=self.memory.tokens,
            encoder_attention_mask=None if valid is None else valid.long(),
            use_cache=True,
            **{CACHE: self.cache},
        )
        return out.last_hidden_state[:, -1]

    def keep(self, rows: Tensor) -> None:
        self.memory = self.memory.rows(rows)
        self.cache.batch_select_indices(rows)


BLOCK = 64
"""Positions by which the buffers for generated tokens grow."""


class LayerStepper:
    """The decoders of TrOCR (post-norm) and mBART (pre-norm), layer by layer.

    Each layer's keys and values of the memory are made once, in the layout that one query reads
    fastest; its query, key and value of the text are one product.
    """

    def __init__(self, text: nn.Module, memory: Memory) -> None:
        self.decoder = decoder = text.base_model.decoder
        rows = len(memory.tokens)
        self.layers = [
            _Layer(layer, isinstance(text, MBartForCausalLM), rows, memory.tokens)
            for layer in decoder.layers
        ]
        self.closing_norm = getattr(decoder, "layer_norm", None)
        self.head = packed([head_of(text)], rows)
        self.mask = None
        if memory.valid is not None:
            mask = memory.tokens.new_zeros(memory.valid.shape)
            self.mask = mask.masked_fill(~memory.valid, float("-inf"))[:, None, None, :]

    def step(self, ids: Tensor, position: int) -> Tensor:
        decoder, ids = self.decoder, ids[:, None]
        positions = embed_positions(decoder, ids, position)
        x_BD = (decoder.embed_tokens(ids) + positions)[:, 0]
        if decoder.layernorm_embedding is not None:
            x_BD = decoder.layernorm_embedding(x_BD)
        for layer in self.layers:
            x_BD = layer.step(x_BD, position, self.mask)
        return x_BD if self.closing_norm is None else self.closing_norm(x_BD)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def keep(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.keep(rows)
        if self.mask is not None:
            self.mask = self.mask[rows]


class _Layer:
    """One layer of a decoder with what it has seen: float[B, A, positions, F] each."""

    def __init__(self, layer: nn.Module, pre_norm: bool, rows: int, memory: Tensor) -> None:
        text, image = layer.self_attn, layer.encoder_attn
        self.pre_norm, self.heads, self.scale = pre_norm, text.num_heads, text.scaling
        self.activation = layer.activation_fn
        self.norms = layer.self_attn_layer_norm, layer.encoder_attn_layer_norm
        self.mlp_norm = layer.final_layer_norm
        self.query_key_value = packed([text.q_proj, text.k_proj, text.v_proj], rows)
        self.text_out = packed([text.out_proj], rows)
        self.image_query = packed([image.q_proj], rows)
        self.image_out = packed([image.out_proj], rows)
        self.widen, self.narrow = packed([layer.fc1], rows), packed([layer.fc2], rows)
        self.memory = [
            self._heads(packed([layer], IMAGE_ROWS)(memory)).contiguous()
            for layer in (image.k_proj, image.v_proj)
        ]
        self.cache = [self._empty(memory, rows) for _ in range(2)]

    def step(self, x_BD: Tensor, position: int, mask: Tensor | None) -> Tensor:
        """What the layer makes of the states at `position`. mask: float[B, 1, 1, L] on the
        memory."""
        x_BD = self._block(x_BD, self.norms[0], lambda x: self._read_text(x, position))
        x_BD = self._block(x_BD, self.norms[1], lambda x: self._read_memory(x, mask))
        return self._block(
            x_BD, self.mlp_norm, lambda x: self.narrow(self.activation(self.widen(x)))
        )

    def keep(self, rows: Tensor) -> None:
        self.memory = [held.index_select(0, rows) for held in self.memory]
        self.cache = [held.index_select(0, rows) for held in self.cache]

    def _block(self, x_BD: Tensor, norm: nn.Module, change: Callable[[Tensor], Tensor]) -> Tensor:
        """One residual block, its norm before (mBART) or after (TrOCR)."""
        if self.pre_norm:
            return x_BD + change(norm(x_BD))
        return norm(x_BD + change(x_BD))

    def _read_text(self, x_BD: Tensor, position: int) -> Tensor:
        if position >= self.cache[0].shape[2]:
            more = self._empty(x_BD, len(x_BD))
            self.cache = [torch.cat([held, more], 2) for held in self.cache]
        query, *new = self.query_key_value(x_BD)[:, None].chunk(3, dim=-1)
        for held, fresh in zip(self.cache, new):
            held[:, :, position] = self._heads(fresh)[:, :, 0]
        keys, values = (held[:, :, : position + 1] for held in self.cache)
        return self.text_out(self._attend(query, keys, values, None))

    def _read_memory(self, x_BD: Tensor, mask: Tensor | None) -> Tensor:
        return self.image_out(self._attend(self.image_query(x_BD)[:, None], *self.memory, mask))

    def _attend(
        self, query_BTD: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """What one query of each row reads, float[B, D]. On a CPU two products are several times as
        fast as the fused attention, which is made for many queries."""
        query = self._heads(query_BTD)
        if query.device.type == "cpu":
            scores = (query * self.scale) @ keys.transpose(2, 3)
            read = (scores if mask is None else scores + mask).softmax(-1) @ values
        else:
            read = F.scaled_dot_product_attention(query, keys, values, mask, scale=self.scale)
        return read.flatten(1)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        """float[B, T, D] as float[B, A, T, F]."""
        B, T, D = x_BTD.shape
        return x_BTD.view(B, T, self.heads, D // self.heads).transpose(1, 2)

    def _empty(self, like: Tensor, rows: int) -> Tensor:
        """An empty buffer for `BLOCK` positions more."""
        return like.new_zeros(rows, self.heads, BLOCK, self.memory[0].shape[-1])
