"""Memory-efficient norms and MLPs beside transformers' own, their slow twins."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests import tiny, training
from vlm.kernels import norm_mlp
from vlm.kernels.attention import as_on_gpus
from vlm.kernels.norm_mlp import POSITIONS, _in_parts, memory_efficient_kernels, use_kernels
from vlm.training.activation_checkpointing import saved_bytes

KERNELS = {  # kind -> how many norms and MLPs are known
    "llama": (5, 2),
    "qwen2": (5, 2),
    "qwen3": (9, 2),
    "granite": (5, 2),
    "gemma": (0, 0),  # weighs by 1 + weight, and gates by GELU
    "cohere": (0, 2),  # norms of another kind
}


def chosen(text):
    found = [m for m in text.modules() if "forward" in vars(m)]
    mlps = [m for m in found if hasattr(m, "gate_proj")]
    return len(found) - len(mlps), len(mlps)


def passed(text, vectors):
    """States of a language model, the gradients of everything, and the bytes that were kept."""
    vectors = vectors.clone().requires_grad_()
    text.zero_grad()
    with saved_bytes() as kept:
        states = text.model(inputs_embeds=vectors, use_cache=False).last_hidden_state
    generator = torch.Generator().manual_seed(1)
    states.backward(torch.randn(states.shape, generator=generator).to(states))
    grads = [p.grad.clone() for p in text.model.parameters() if p.grad is not None]
    return states.detach(), [vectors.grad, *grads], sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KERNELS)
def test_memory_efficient_blocks_compute_the_same_and_keep_less(kind, dtype):
    text = tiny.text_model(kind).to(dtype)
    with torch.no_grad():
        for name, weight in text.named_parameters():
            if "norm" in name:
                weight += torch.linspace(-0.3, 0.3, len(weight)).to(dtype)
    vectors = torch.randn(2, POSITIONS // 2 + 9, 32, generator=torch.Generator().manual_seed(0))
    states, grads, kept = passed(text, vectors.to(dtype))
    with use_kernels(text, memory_efficient_kernels(text)):
        assert chosen(text) == KERNELS[kind]
        found, own_grads, own_kept = passed(text, vectors.to(dtype))
    assert chosen(text) == (0, 0)
    assert torch.equal(found, states)
    for a, b in zip(own_grads, grads, strict=True):
        scale = float(b.abs().max())
        close = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(a, b, atol=close * scale, rtol=close)
    assert own_kept < kept if any(KERNELS[kind]) else own_kept == kept


def test_gradients_are_as_near_to_those_of_32_bits():
    """They differ from transformers' by rounding, and are off by no more than those."""
    exact = tiny.text_model("llama")
    vectors = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact.to(torch.bfloat16)
    rounded = [g.float() for g in passed(exact, vectors)[1]]
    with use_kernels(exact, memory_efficient_kernels(exact)):
        assert min(chosen(exact)) > 0
        found = [g.float() for g in passed(exact, vectors)[1]]
    expected = passed(exact.float(), vectors.float())[1]

    def off(grads):
        return sum(float((a - b).norm() / b.norm()) for a, b in zip(grads, expected))

    assert off(found) < 1.05 * off(rounded)


def test_models_are_whole_again_where_training_fails():
    text = tiny.text_model("llama")
    with pytest.raises(KeyError), use_kernels(text, memory_efficient_kernels(text)):
        raise KeyError
    assert chosen(text) == (0, 0)


def test_runs_use_memory_efficient_kernels(tmp_path, monkeypatch):
    """A run learns the same, and its model leaves it as it came."""
    found = []

    def seen(module, kernels):
        found.extend(kernels)
        return use_kernels(module, kernels)

    monkeypatch.setattr("vlm.training.state.use_kernels", seen)
    chosen_model, _, history = training.train(tmp_path / "efficient")
    assert len(set(found)) == sum(KERNELS["llama"])
    assert chosen(chosen_model.module.text) == (0, 0)
    monkeypatch.setattr("vlm.kernels.norm_mlp._kind", lambda part: None)
    _, _, plain = training.train(tmp_path / "plain")
    for a, b in zip(history, plain, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_what_a_trial_in_evaluation_or_32_bits_would_not_show_stays():
    """Norms that round elsewhere in 16 bits, dropout of an MLP's own, norms without an epsilon."""
    norms = tiny.text_model("olmo2")
    kinds = [type(norms.get_submodule(name)).__name__ for name in memory_efficient_kernels(norms)]
    assert kinds == ["Olmo2MLP"] * 2
    seed = tiny.text_model("seed_oss", residual_dropout=0.1)
    assert not any("mlp" in name for name in memory_efficient_kernels(seed))
    assert any("norm" in name for name in memory_efficient_kernels(seed))
    assert not any(part.training for part in seed.modules())
    assert memory_efficient_kernels(torch.nn.Sequential(torch.nn.RMSNorm(4))) == {}


def test_lora_in_an_mlp_is_called():
    """Its layers, dropout included, are the projections' own."""
    text = tiny.text_model("llama")
    wrapped = get_peft_model(
        text, LoraConfig(target_modules=["gate_proj", "down_proj"], lora_dropout=0.5)
    )
    tried = memory_efficient_kernels(wrapped)
    kernels = {name: kernel for name, kernel in tried.items() if name.endswith("mlp")}
    assert len(kernels) == 2
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first, when LoRA changes nothing
            nn.init.normal_(weight, std=0.1)
    mlp = wrapped.get_submodule(next(iter(kernels)))
    positions = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    expected = mlp.train()(positions)
    expected.sum().backward()
    gradients = {name: p.grad for name, p in mlp.named_parameters() if p.grad is not None}
    mlp.zero_grad()
    torch.manual_seed(1)
    with use_kernels(wrapped, kernels):
        found = mlp(positions)
        found.sum().backward()
    torch.testing.assert_close(found, expected)
    assert any("lora_B" in name for name in gradients)
    for name, p in mlp.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name])


def kept_in(kept):
    """What packs a saved tensor, and notes it down."""
    return lambda tensor: kept.append(tensor) or tensor


@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "trained"])
def test_a_plain_projection_behind_the_gate_keeps_nothing_of_its_own(learns, monkeypatch):
    """In parts and whole, in each dtype: the same values, and gradients to rounding."""
    monkeypatch.setattr(norm_mlp, "POSITIONS", 3)
    for dtype, near in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        mlp = tiny.text_model("llama").model.layers[0].mlp.to(dtype)
        mlp.down_proj.bias = nn.Parameter(torch.linspace(-1, 1, 32).to(dtype))
        mlp.down_proj.requires_grad_(learns)
        positions = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        runs = []
        for kernels in ({}, memory_efficient_kernels(mlp)):
            given = positions.clone().requires_grad_(True)
            mlp.zero_grad()
            kept = []
            with (
                use_kernels(mlp, kernels),
                torch.autograd.graph.saved_tensors_hooks(kept_in(kept), lambda t: t),
            ):
                out = mlp(given)
            out.pow(2).sum().backward()
            grads = [given.grad, *(p.grad for p in mlp.parameters() if p.grad is not None)]
            wide = {t.data_ptr() for t in kept if t.shape[-1] == mlp.gate_proj.out_features and
                    t.dim() == 3}  # fmt: skip
            runs.append((out, grads, len(wide)))
        (plain, expected, more), (found, grads, fewer) = runs
        torch.testing.assert_close(found, plain, atol=near, rtol=near)
        assert len(grads) == len(expected) == (5 if learns else 3)
        for a, b in zip(grads, expected):
            torch.testing.assert_close(a, b, atol=near, rtol=10 * near)
        assert fewer == 2 < more


def test_a_forward_of_an_instance_stays():
    text = tiny.text_model("llama")
    own = text.model.norm.forward = lambda hidden_states: hidden_states
    assert "model.norm" not in memory_efficient_kernels(text)
    with use_kernels(text, memory_efficient_kernels(text)):
        pass
    assert text.model.norm.forward is own


def test_parts_are_for_caches_of_cpus_alone():
    """A step of a GPU is simulated whole, as it is made there."""
    positions = torch.zeros(3 * POSITIONS, 2)
    assert len(list(_in_parts(positions))) == 3
    with as_on_gpus():
        assert len(list(_in_parts(positions))) == 1
