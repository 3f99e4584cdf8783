"""Language models whose input table has rows that their head has not (Mllama's): for tokens that
are read and never written, such as an image's mark.

Their number is a field of the configuration, so that folders of our own layout hold it.
"""

from __future__ import annotations

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

FIELD = "spare_input_rows"
"""The field: how many rows the input table has beside those of the vocabulary."""


def causal_lm(config: PreTrainedConfig) -> nn.Module:
    """A causal language model with random weights; where its configuration says so, with an input
    table of more rows than its head. Raises ValueError where both are to be one tensor."""
    text = AutoModelForCausalLM.from_config(config)
    spare = getattr(config, FIELD, 0)
    if not spare:
        return text
    if config.tie_word_embeddings:
        raise ValueError(
            f"{FIELD}: expected 0 where input table and head are one tensor, found {spare}"
        )
    table = text.get_input_embeddings()
    rows, width = table.weight.shape
    text.set_input_embeddings(nn.Embedding(rows + spare, width, table.padding_idx))
    return text
