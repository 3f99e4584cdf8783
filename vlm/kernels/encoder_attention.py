"""Attention of transformers' vision encoders, as fast as the machine at hand allows: by whole
products where they gain (see `vlm.kernels.attention`), else, and where masks or dropout are asked
for, transformers' own `sdpa`.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from vlm.compat.transformers import sdpa_attention_forward, sdpa_mask
from vlm.kernels import WHOLE_PRODUCTS
from vlm.kernels.attention import gains, whole_products


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
    if not (plain and key.shape == query.shape and gains(query, query.shape[2])):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return whole_products(query, key, value, scale), None


def register() -> None:
    """Makes the name known to transformers; done before, it does nothing."""
    AttentionInterface.register(WHOLE_PRODUCTS, attend)
    AttentionMaskInterface.register(WHOLE_PRODUCTS, sdpa_mask)
