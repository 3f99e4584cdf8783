"""Attention of transformers' vision encoders, as fast as the CPU at hand allows.

torch's fused attention on CPUs without matrix tiles (AMX) computes 16-bit scores in parts that are
too small for its products: for the few hundred tokens of a picture two whole products with a
softmax between them take two thirds of its time. Everywhere else, and where gradients, masks or
dropout are asked for, it is transformers' own `sdpa`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm.tokenizers.encoders import WHOLE_PRODUCTS

MOST_TOKENS = 1024
"""Longest views for which the scores of all heads still lie in the caches of a core."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more,
) -> tuple[Tensor, None]:
    """float[V, L, A, F] of query, key and value float[V, A, L, F], as transformers asks for it."""
    plain = attention_mask is None and not dropout and not module.is_causal
    if not (plain and key.shape[1] == query.shape[1] and _gains(query)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    V, A, L, F = query.shape
    scale = F**-0.5 if scaling is None else scaling
    read = query.new_empty(V, L, A, F)
    scores, shares = (query.new_empty(A, L, key.shape[2]) for _ in range(2))
    for view in range(V):  # one at a time, so that the scores stay in the cache
        torch.bmm(query[view] * scale, key[view].transpose(1, 2), out=scores)
        torch.softmax(scores, -1, out=shares)
        read[view] = torch.bmm(shares, value[view]).transpose(0, 1)
    return read, None


def _gains(query: Tensor) -> bool:
    return (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[2] <= MOST_TOKENS
        and not torch.is_grad_enabled()
        and not _has_tiles()
    )


@cache
def _has_tiles() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def register() -> None:
    """Makes the name known to transformers; done before, it does nothing."""
    AttentionInterface.register(WHOLE_PRODUCTS, attend)
    AttentionMaskInterface.register(WHOLE_PRODUCTS, sdpa_mask)
