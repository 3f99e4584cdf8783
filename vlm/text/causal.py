"""Causal language models of a configuration of transformers, for decoders without such a class too.

transformers knows the decoders of Qwen2-VL and Qwen2.5-VL, whose position ids have three numbers,
but has a head for them in its vision-language classes alone. Here they are causal language models
as all others are: a decoder, and a linear head.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlm.compat.transformers import CACHE, random_weights

DECODERS = ("qwen2_vl_text", "qwen2_5_vl_text")
"""`model_type` of the decoders that transformers has no causal class for."""

SPARE_ROWS = "spare_input_rows"
"""Field of a configuration: how many rows its input table has beside those of the vocabulary."""

OURS = {"kosmos_2_text_model": ("vlm.text.magneto", "Magneto")}
"""`model_type` of decoders that are ours -> the module and name of the class."""


class DecoderWithHead(PreTrainedModel, GenerationMixin):
    """A decoder of transformers and a linear head without bias, which may be tied to its table."""

    config_class = PreTrainedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = _decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits float[B, T, Z] of int64[B, T] ids or their vectors; the arguments are those of
        transformers' causal language models, `logits_to_keep` the last positions (0: all)."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **options,
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, **{CACHE: getattr(out, CACHE)})


def causal_language_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of a configuration, its weights random; where the configuration has
    SPARE_ROWS, with an input table of so many more rows than its head, for tokens that are read and
    never written, such as Mllama's image mark.

    Raises ValueError where there are such rows and both are to be one tensor.
    """
    if config.model_type in (*DECODERS, *OURS):
        text = random_weights(DecoderWithHead, config, "sdpa")
    else:
        text = AutoModelForCausalLM.from_config(config)
    spare = getattr(config, SPARE_ROWS, 0)
    if not spare:
        return text
    if config.tie_word_embeddings:
        raise ValueError(
            f"{SPARE_ROWS}: expected 0 where input table and head are one tensor, found {spare}"
        )
    table = text.get_input_embeddings()
    rows, width = table.weight.shape
    text.set_input_embeddings(nn.Embedding(rows + spare, width, table.padding_idx))
    return text


def _decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """The decoder of a configuration, its weights random."""
    if config.model_type not in OURS:
        return AutoModel.from_config(config)
    module, name = OURS[config.model_type]
    return random_weights(getattr(import_module(module), name), config, "sdpa")
