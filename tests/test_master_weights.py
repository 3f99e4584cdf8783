import dataclasses

import pytest
import torch
from torch import nn

from tests import training
from vlm.training.master_weights import ComputeCopies


class Net(nn.Module):
    """A linear map, a batch norm and a temperature: one to copy, two to leave."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.map, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3).eval()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return (self.norm(self.map(x).float()) * self.scale).sum()


def test_weights_work_in_bf16_and_stay_themselves_in_fp32():
    net = Net()
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in net.named_parameters()}
    with ComputeCopies(net, torch.bfloat16).in_use():
        dtypes = {name: p.dtype for name, p in net.named_parameters()}
        net(torch.ones(2, 4, dtype=torch.bfloat16)).backward()
    low = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert low == {"map.weight", "map.bias"}
    for name, p in net.named_parameters():
        same, address, values = before[name]
        assert p is same
        assert p.data_ptr() == address
        assert torch.equal(p, values)
        assert p.grad.dtype == torch.float32


def test_gradients_of_several_passes_are_added_up_in_fp32():
    """In bf16, 256 + 1 is 256: sixteen small gradients after a large one would be lost."""
    net = nn.Linear(1, 1, bias=False)
    working = ComputeCopies(net, torch.bfloat16)
    with working.in_use():
        for value in [256.0] + [1.0] * 16:
            net(torch.full((1, 1), value, dtype=torch.bfloat16)).backward()
    assert net.weight.grad.item() == 272.0
    net.weight.grad = None
    with working.in_use():
        net(torch.ones(1, 1, dtype=torch.bfloat16)).backward()
    assert net.weight.grad.item() == 1.0


def test_copies_follow_the_weights():
    net = nn.Linear(1, 1, bias=False)
    working = ComputeCopies(net, torch.bfloat16)
    for value in (1.0, 2.0):
        with torch.no_grad():
            net.weight.fill_(value)
        with working.in_use():
            assert net(torch.ones(1, 1, dtype=torch.bfloat16)).item() == value


def test_weights_are_themselves_after_an_error_and_leave_no_hook():
    net = nn.Linear(1, 1, bias=False)
    one = torch.ones(1, 1, dtype=torch.bfloat16)

    def fail():
        with ComputeCopies(net, torch.bfloat16).in_use():
            net(one).backward()
            net(one.expand(1, 2))  # too wide

    with pytest.raises(RuntimeError):
        fail()
    assert net.weight.dtype == torch.float32
    net.weight.grad = None
    net(torch.ones(1, 1)).backward()
    assert net.weight.grad.item() == 1.0


def test_fp32_and_frozen_weights_are_not_copied():
    net = Net()
    assert ComputeCopies(net, torch.float32).weights == []
    net.map.requires_grad_(False)
    assert ComputeCopies(net, torch.bfloat16).weights == []


def test_bf16_step_is_the_same_for_every_split_into_micro_batches(tmp_path):
    """Under compute copies, to bf16's rounding of a pass."""
    _, _, expected = training.train(tmp_path / "whole", precision="bf16")
    split = dataclasses.replace(training.STAGE, micro_batch=1)
    _, _, found = training.train(tmp_path / "parts", split, precision="bf16")
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=5e-2)


def test_bf16_run_learns_as_an_fp32_run_does(tmp_path):
    _, _, expected = training.train(tmp_path / "fp32")
    model, _, found = training.train(tmp_path / "bf16", precision="bf16")
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)
    assert all(p.dtype == torch.float32 for p in model.module.parameters() if p.requires_grad)
