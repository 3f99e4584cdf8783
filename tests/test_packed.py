import pytest
import torch
from torch import nn

from vlm.inference.packed import packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_packed_products_are_those_of_the_layers(dtype, bias):
    """Any number of rows, whatever number the weights were laid out for."""
    torch.manual_seed(0)
    layers = [nn.Linear(48, width, bias=bias).to(dtype) for width in (32, 32, 80)]
    for chosen in (layers[:1], layers):
        product = packed(chosen, rows=4)
        for rows in (1, 4, 7):
            x = torch.randn(rows, 48).to(dtype)
            expected = torch.cat([layer(x) for layer in chosen], dim=-1)
            torch.testing.assert_close(product(x), expected, atol=1e-2, rtol=1e-2)
            assert product(x).dtype == dtype


@torch.no_grad()
def test_layers_that_are_more_than_a_product_are_used_as_they_are():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, plain = Doubled(8, 4).bfloat16(), nn.Linear(8, 4).bfloat16()
    x = torch.randn(3, 8).bfloat16()
    assert torch.equal(packed([layer, plain], 3)(x), torch.cat([layer(x), plain(x)], -1))


def test_products_give_gradients_where_they_are_asked_for():
    layer = nn.Linear(8, 4).bfloat16()
    packed([layer], 2)(torch.randn(2, 8).bfloat16()).sum().backward()
    assert layer.weight.grad is not None
