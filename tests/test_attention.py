"""Attention by whole products beside torch's fused one, its slow twin: values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from vlm.kernels import attention
from vlm.kernels.packed_attention import Segments, segment_attention

LONG = attention.QUERIES + 37


def heads(V, H, h, L, width=16, dtype=torch.float32, seed=0, value_width=None):
    """Query, key and value as models hand them on, not contiguous, and a gradient of what is
    read."""
    generator = torch.Generator().manual_seed(seed)
    last = value_width or width
    shapes = ((H, width), (h, width), (h, last))
    made = [torch.randn(V, L, *shape, generator=generator).to(dtype) for shape in shapes]
    given = [x.transpose(1, 2).requires_grad_() for x in made]
    return given, torch.randn(V, L, H, last, generator=generator).to(dtype)


def fused(query, key, value, scale, causal, lengths):
    """The same by torch, run by run, with key heads repeated."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    runs = zip(*(x.split(lengths, dim=2) for x in (query, key, value)))
    read = [F.scaled_dot_product_attention(*r, is_causal=causal, scale=scale) for r in runs]
    return torch.cat(read, dim=2).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize(
    ("V", "H", "h", "lengths", "causal"),
    [
        (3, 2, 2, (21,), False),
        (2, 4, 2, (LONG,), False),
        (2, 6, 2, (33,), True),
        (1, 6, 3, (LONG, 1, 2 * attention.QUERIES, 5), True),
        (2, 4, 1, (7, 9), True),
    ],
)
def test_whole_products_equal_the_fused_attention(V, H, h, lengths, causal, dtype, close):
    """Runs that lie end to end do not see each other; key heads are shared."""
    given, grad = heads(V, H, h, sum(lengths), dtype=dtype, value_width=8 if h == 3 else None)
    found = attention.whole_products(*given, 0.2, causal=causal, lengths=lengths)
    expected = fused(*given, 0.2, causal, lengths)
    assert found.shape == grad.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, atol=close, rtol=close)
    for a, b in zip(
        torch.autograd.grad(found, given, grad), torch.autograd.grad(expected, given, grad)
    ):
        torch.testing.assert_close(a, b, atol=close * 3, rtol=close)


def test_gradients_are_those_of_the_derivative():
    given, _ = heads(1, 4, 2, 9, width=3, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda *x: attention.whole_products(*x, 0.7, causal=True, lengths=(4, 5)), given
    )


def test_they_are_taken_where_they_gain(monkeypatch):
    query = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(attention, "_has_instructions", lambda: True)
    assert attention.gains(query, attention.MOST_POSITIONS)
    assert not attention.gains(query, attention.MOST_POSITIONS + 1)
    assert attention.gains(query, attention.MOST_CAUSAL, causal=True)
    assert not attention.gains(query, attention.MOST_POSITIONS, causal=True)
    assert not attention.gains(query.float(), 4)
    assert not attention.gains(query.to("meta"), 4)
    with attention.as_on_gpus():
        assert not attention.gains(query, 4)
    assert attention.gains(query, 4)
    monkeypatch.setattr(attention, "_has_instructions", lambda: False)
    assert not attention.gains(query, 4)


@pytest.mark.parametrize(
    ("found", "gain"),
    [
        ({"avx2"}, False),
        ({"avx2", "avx512_f"}, False),
        ({"avx2", "avx512_f", "avx512_bf16"}, True),
        ({"avx2", "avx512_f", "avx512_bf16", "amx_bf16"}, False),
        ({"neon", "bf16"}, True),
    ],
)
def test_cpus_without_instructions_for_bf16_take_the_fused_attention(found, gain, monkeypatch):
    monkeypatch.setattr(attention, "supports", lambda capability: capability in found)
    assert attention._has_instructions.__wrapped__() == gain


def test_packed_rows_are_read_by_them(monkeypatch):
    """On such a CPU in bf16; by torch's own elsewhere, to the same values."""
    given, _ = heads(1, 4, 2, 21, dtype=torch.bfloat16)
    row = Segments(
        bounds=torch.tensor([0, 5, 21]), lengths=(5, 16), prefix=(0, 0), masks=(None,) * 2
    )
    calls, whole_products = [], attention.whole_products

    def counted(*args, **options):
        calls.append(options)
        return whole_products(*args, **options)

    monkeypatch.setattr("vlm.kernels.packed_attention.whole_products", counted)
    read = []
    for gains in (False, True):
        monkeypatch.setattr(attention, "_has_instructions", lambda gains=gains: gains)
        read.append(segment_attention(None, *given, row, scaling=0.3)[0])
    assert calls == [{"causal": True, "lengths": (5, 16)}]
    torch.testing.assert_close(*read, atol=4e-2, rtol=4e-2)
