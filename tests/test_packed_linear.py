import time

import pytest
import torch
from torch import nn

from vlm.kernels import packed_linear as packing
from vlm.kernels.packed_linear import _weights, packed, packed_layers


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


@torch.no_grad()
def test_layers_are_packed_while_asked_for_and_see_new_weights(monkeypatch):
    monkeypatch.setattr(packing, "_gains", lambda layers, rows: True)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 16))
    x = torch.randn(5, 48)
    for _ in range(2):
        expected = net(x)
        with packed_layers(net, rows=5):
            assert "forward" in vars(net[0])
            torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
        assert "forward" not in vars(net[0])
        net[0].weight.mul_(-2.0)


@torch.no_grad()
def test_weights_are_laid_out_once_until_they_change():
    layers = [nn.Linear(32, 32) for _ in range(2)]
    assert _weights(layers, 4) is _weights(layers, 4)
    before = _weights(layers, 4)
    layers[1].weight.add_(1.0)
    assert _weights(layers, 4) is not before


def test_layers_that_are_trained_are_left_as_they_are():
    net = nn.Linear(8, 4).bfloat16()
    with packed_layers(net, rows=2):
        assert "forward" not in vars(net)
        net(torch.randn(2, 8).bfloat16()).sum().backward()
    assert net.weight.grad is not None


@pytest.fixture
def large(monkeypatch):
    """A layer that counts as large, and no size measured yet."""
    monkeypatch.setattr(packing, "LARGE", 48 * 32)
    monkeypatch.setattr(packing, "_faster", {})
    torch.manual_seed(0)
    return nn.Linear(48, 32)


@pytest.mark.parametrize("faster", [True, False])
@torch.no_grad()
def test_layouts_are_taken_in_fp32_where_they_are_measured_faster(large, faster, monkeypatch):
    monkeypatch.setattr(packing, "_is_faster", lambda layers, rows: faster)
    calls, product = [], packing.linear_prepacked
    monkeypatch.setattr(
        packing, "linear_prepacked", lambda *args: calls.append(args) or product(*args)
    )
    x = torch.randn(5, 48)
    torch.testing.assert_close(packed([large], 5)(x), large(x), atol=1e-5, rtol=1e-5)
    assert bool(calls) == faster


@torch.no_grad()
def test_each_size_is_measured_once_in_fp32(large, monkeypatch):
    """Rows count by powers of two; many rows and small weights are not measured."""
    sizes = []
    monkeypatch.setattr(packing, "_is_faster", lambda layers, rows: sizes.append(rows) or False)
    for rows in (5, 8, 7, 16, packing.FEW + 1):
        packed([large], rows)
    packed([nn.Linear(8, 8)], 4)
    assert sizes == [8, 16]


@pytest.mark.parametrize(("plain", "faster"), [(0.0, False), (0.05, True)])
@torch.no_grad()
def test_the_faster_product_is_found_by_measurement(large, plain, faster, monkeypatch):
    linear, product = nn.functional.linear, packing.linear_prepacked

    def slow(run, seconds):
        return lambda *args: (time.sleep(seconds), run(*args))[1]

    monkeypatch.setattr(nn.functional, "linear", slow(linear, plain))
    monkeypatch.setattr(packing, "linear_prepacked", slow(product, 0.05 - plain))
    assert packing._is_faster([large], 4) == faster
    assert (large in packing._laid_out) == faster  # what gains nothing takes no memory
