"""Flamingo's composition: gated blocks before every k-th layer of any causal language model.

Source: Flamingo (arXiv 2204.14198), section 3.2. A text position sees the latest image; one before
all images gets nothing from the blocks, so that text alone is read as by the language model.
"""

from __future__ import annotations

import torch
from torch import nn

from vlm.families.cross_attended.blocks import GatedBlockConfig
from vlm.families.cross_attended.module import Cross, CrossAttended, CrossConfig
from vlm.image_tokens import ImageTokenizer

MLP_RATIO = 4
"""Width of a block's feed-forward layer over the language model's. Source: OpenFlamingo,
`helpers.py`, `GatedCrossAttentionBlock`."""
EPS = 1e-5
"""Of the blocks' norms: torch's own for LayerNorm, which OpenFlamingo keeps."""


def cross_attended(
    tokenizer: ImageTokenizer, adaptor: nn.Module, text: nn.Module, every: int
) -> CrossAttended:
    """A language model with fresh gated blocks before its layers 0, `every`, 2 * `every`, ...

    adaptor: gives tokens of any width. Blocks have the language model's number of heads. The vector
        of an image's mark begins as the mean of those of its tokens.
    Weights are drawn from torch's global generator.
    Raises ValueError for `every` below 1.
    """
    if every < 1:
        raise ValueError(f"cross_every must be at least 1, found {every}")
    config = text.config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    block = GatedBlockConfig(
        width=width,
        memory_width=adaptor.config.out_width,
        heads=heads,
        kv_heads=heads,
        head_width=getattr(config, "head_dim", None) or width // heads,
        mlp_width=MLP_RATIO * width,
        eps=EPS,
        norm="layer",
        qk_norm=False,
        mlp="gelu",
    )
    before = tuple(range(0, config.num_hidden_layers, every))
    cross = Cross(CrossConfig(block=block, before=before, sees="latest"))
    with torch.no_grad():
        cross.mark.copy_(text.get_input_embeddings().weight.mean(0))
    return CrossAttended(tokenizer, adaptor, cross, text)
