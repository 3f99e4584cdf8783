import pytest
import torch
from torch import nn

from tests.transformers_tokenizers import tiny
from vlm.kernels import mlp_parts
from vlm.kernels.mlp_parts import mlps_in_parts
from vlm.tokenizers.transformers import build


class MLP(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(6, 24), activation, nn.Linear(24, 5)

    def forward(self, hidden_states):
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class Residual(MLP):
    """Another computation of parts of the same names."""

    def __init__(self):
        super().__init__(nn.GELU())
        self.fc2 = nn.Linear(24, 6)

    def forward(self, hidden_states):
        return hidden_states + super().forward(hidden_states)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(1, 6), (3, 7, 6), (2, 8, 6)])
@torch.no_grad()
def test_parts_give_the_values_of_the_whole(shape, approximate, monkeypatch):
    """Whether or not positions fill the parts, and without a change of what goes in."""
    monkeypatch.setattr(mlp_parts, "POSITIONS", 4)
    torch.manual_seed(0)
    mlp, x = MLP(nn.GELU(approximate=approximate)), torch.randn(shape)
    expected, before = mlp(x), x.clone()
    with mlps_in_parts(mlp):
        assert mlp.forward.args == (mlp, approximate)
        torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(x, before)
    assert "forward" not in vars(mlp)


@torch.no_grad()
def test_what_is_not_known_is_left_as_it_is():
    hooked, low = MLP(nn.GELU()), MLP(nn.GELU()).bfloat16()
    hooked.fc1.register_forward_hook(lambda *_: None)
    for mlp in (Residual(), MLP(nn.SiLU()), hooked, low, nn.Linear(6, 6)):
        with mlps_in_parts(mlp):
            assert "forward" not in vars(mlp)


def test_passes_with_gradients_are_left_as_they_are():
    mlp = MLP(nn.GELU())
    with mlps_in_parts(mlp):
        mlp(torch.randn(3, 6)).sum().backward()
    assert mlp.fc1.weight.grad is not None


@pytest.mark.parametrize("model_type", ["deit", "vit", "siglip_vision_model"])
@torch.no_grad()
def test_encoders_give_the_tokens_of_the_slow_twin(model_type, monkeypatch):
    monkeypatch.setattr(mlp_parts, "POSITIONS", 16)
    tokenizer = build(tiny(model_type, (64, 96), prefix="keep")).eval()
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = tokenizer(pixels).tokens
    with mlps_in_parts(tokenizer):
        assert any("forward" in vars(part) for part in tokenizer.modules())
        torch.testing.assert_close(tokenizer(pixels).tokens, expected, atol=1e-4, rtol=1e-4)
