"""Kosmos-2's language model: a causal decoder whose attention and feed-forward layers have a
LayerNorm of their own inside ("Magneto"), built of transformers' blocks.

transformers' class around those blocks makes its masks by itself, so that it takes neither a mask
for each pair of positions nor a packed row, and counts position ids over padding, so that what it
writes after a prompt differs with the prompts beside it. This one takes masks and position ids as
other language models do. Its weights have the names of `Kosmos2TextTransformer`.

Shapes: B example, T text position, D decoder width.

Source: arXiv 2210.06423 (Magneto); transformers, `modeling_kosmos2.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, Kosmos2PreTrainedModel, Kosmos2TextConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from vlm.compat.transformers import CACHE, create_causal_mask, magneto_block
from vlm.text.decoders import sinusoids


class Magneto(Kosmos2PreTrainedModel):
    """The decoder. Vectors, those of images too, are multiplied by the square root of their width
    where the configuration says `scale_embedding`; positions are sinusoidal, of any number.

    Raises ValueError for a configuration with cross-attention or with layers that are skipped.
    """

    config_class = Kosmos2TextConfig

    def __init__(self, config: Kosmos2TextConfig) -> None:
        super().__init__(config)
        if config.add_cross_attention or config.layerdrop:
            raise ValueError(
                "expected a decoder without cross-attention whose layers all run, found "
                f"add_cross_attention={config.add_cross_attention} and layerdrop={config.layerdrop}"
            )
        width = config.embed_dim
        self.scale = math.sqrt(width) if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.layers = nn.ModuleList(magneto_block(config, layer) for layer in range(config.layers))
        self.layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others,
    ) -> BaseModelOutputWithPast:
        """The final states float[B, T, D]; arguments are those of transformers' decoders. Position
        ids count from 0."""
        vectors = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = others.pop(CACHE, None)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            first = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(vectors.shape[1], device=vectors.device)[None] + first
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=vectors,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        # The table begins with a pad's row and those before it.
        places = sinusoids(position_ids + self.config.pad_token_id + 1, vectors.shape[-1])
        states = vectors * self.scale + places.to(vectors.dtype)
        states = F.dropout(states, self.config.dropout, self.training)
        for layer in self.layers:
            states = layer(states, mask, use_cache=use_cache, **{CACHE: cache}, **others)
        return BaseModelOutputWithPast(last_hidden_state=self.layer_norm(states), **{CACHE: cache})
