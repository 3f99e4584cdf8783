import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.transformers_tokenizers import tiny
from vlm.kernels import attention as products
from vlm.kernels import encoder_attention as attention
from vlm.tokenizers.transformers import build


def heads(*shape, dtype=torch.bfloat16, seed=0):
    """Query, key and value as an encoder hands them on: not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(3))
    return [x.transpose(1, 2) for x in made]  # float[V, A, L, F]


@pytest.fixture
def module():
    layer = nn.Module()
    layer.is_causal = False
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gains", [True, False])
@torch.no_grad()
def test_whole_products_equal_the_fused_attention(module, dtype, gains, monkeypatch):
    monkeypatch.setattr(products, "_has_instructions", lambda: gains)
    query, key, value = heads(3, 21, 2, 16, dtype=dtype)
    found, _ = attention.attend(module, query, key, value, None, scaling=0.2)
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.2).transpose(1, 2)
    assert found.shape == (3, 21, 2, 16)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_masks_and_dropout_take_the_fused_attention(module, monkeypatch):
    monkeypatch.setattr(products, "_has_instructions", lambda: True)
    monkeypatch.setattr(attention, "whole_products", None)
    query, key, value = heads(1, 5, 2, 8)
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bfloat16)
    attention.attend(module, query, key, value, mask)
    attention.attend(module, query, key, value, None, dropout=0.1)


@pytest.mark.parametrize(
    "model_type", ["vit", "deit", "siglip_vision_model", "clip_vision_model", "dinov2"]
)
@torch.no_grad()
def test_encoders_give_the_tokens_of_sdpa_in_16_bits(model_type, monkeypatch):
    tokenizer = build(tiny(model_type, (64, 96), prefix="keep")).eval().bfloat16()
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(products, "_has_instructions", lambda: True)
    calls, run = [], products._WholeProducts.apply
    monkeypatch.setattr(products._WholeProducts, "apply", lambda *a: calls.append(a) or run(*a))
    own = tokenizer(pixels).tokens
    assert calls
    again = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(again(pixels).tokens, own)
    monkeypatch.setattr(products, "_has_instructions", lambda: False)
    torch.testing.assert_close(tokenizer(pixels).tokens, own, atol=3e-2, rtol=3e-2)
