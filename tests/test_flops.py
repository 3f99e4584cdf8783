"""Counted operations: those of attention fused for CPUs are counted as its products are."""

import pytest
import torch
from torch.nn import functional as F

from vlm.kernels.attention import whole_products
from vlm.training.flops import flop_counter


def counted(attend, H=6, h=2, L=24, width=8):
    given = [torch.randn(2, n, L, width, requires_grad=True) for n in (H, h, h)]
    with flop_counter() as forward:
        read = attend(*given)
    with flop_counter() as backward:
        read.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_counts_as_its_products(causal):
    def fused(query, key, value):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
        )

    def whole(query, key, value):
        return whole_products(query, key, value, 1.0)

    forward, backward = counted(whole)
    assert forward == 2 * 2 * 2 * 6 * 24 * 24 * 8
    assert backward == 5 * forward // 2
    assert counted(fused) == (forward, backward)


def test_other_products_count_as_torch_counts_them():
    with flop_counter() as counter:
        torch.zeros(3, 4) @ torch.zeros(4, 5)
    assert counter.get_total_flops() == 2 * 3 * 4 * 5
