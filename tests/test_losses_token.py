import dataclasses
from functools import partial

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import encoder_decoders, tiny, training
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import collate
from vlm.losses import token
from vlm.losses.token import backward_state_losses, state_losses, sum_by_row, token_losses
from vlm.training.activation_checkpointing import checkpoint_activations
from vlm.training.master_weights import ComputeCopies
from vlm.training.objectives.next_token import NextToken
from vlm.vocabulary import train_rows

TEXTS = ("word " * 6, "a longer one", "ab")


def with_lora(module):
    """LoRA beside the head, which `add_lora` leaves out but other hands may add, and beside inner
    layers. Its B is stirred, so that A learns too."""
    module.requires_grad_(False)
    settings = LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head", "q_proj"])
    torch.manual_seed(1)
    inject_adapter_in_model(settings, module.text)
    for name, parameter in module.text.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    module.adaptor.requires_grad_(True)
    return module.eval()


def with_rows(module):
    train_rows(module.text, [5, 17, 299])
    return module


def frozen(module, *names):
    for name in names:
        module.get_submodule(name).requires_grad_(False)
    return module


MODULES = {
    "tied": lambda: tiny.decoder_only("llama"),
    "untied": lambda: tiny.decoder_only("qwen2"),
    "capped": lambda: tiny.decoder_only("gemma2"),
    "scaled": lambda: tiny.decoder_only("cohere"),
    "divided": lambda: tiny.decoder_only("granite"),
    "prefix, capped": lambda: tiny.prefix_decoder("gemma2"),
    "trocr": lambda: encoder_decoders.model("trocr", noise=0.1),
    "bert": lambda: encoder_decoders.model("bert", noise=0.1),
    "LoRA": lambda: with_lora(tiny.decoder_only("qwen2")),
    "rows": lambda: with_rows(tiny.decoder_only("qwen2")),
    "adaptor alone": lambda: frozen(tiny.decoder_only("gemma2"), "text", "tokenizer"),
    "head alone": lambda: frozen(
        tiny.decoder_only("qwen2"), "tokenizer", "adaptor", "text.model"
    ),
    "nothing": lambda: frozen(tiny.decoder_only("qwen2"), "tokenizer", "adaptor", "text"),
}  # fmt: skip


def batch_for(module):
    """Rows of unequal lengths; their scored positions are no multiple of the chunks used here."""
    if module.family == "encoder_decoder":
        return collate(encoder_decoders.rows(encoder_decoders.processor(module), *TEXTS), 0)
    made = tiny.processor(module, prefix=module.family == "prefix_decoder")
    rows = [tiny.example(f"r{i}", answer=text) for i, text in enumerate(TEXTS)]
    return collate([made.encode(row) for row in rows], made.pad_id)


def in_chunks(monkeypatch, positions):
    monkeypatch.setattr(token, "_positions", lambda width, learned: positions)


def gradients(module):
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def plain(module, batch, scale=1.0):
    losses = token_losses(module(batch), batch.targets)
    if losses.requires_grad:
        (losses.sum() * scale).backward()
    return losses.detach(), gradients(module)


def chunked(module, batch, scale=1.0):
    losses = backward_state_losses(module.logits, module.states(batch), batch.targets, scale)
    assert not losses.requires_grad
    return losses, gradients(module)


def assert_same(found, expected, bound):
    (losses, grads), (expected_losses, expected_grads) = found, expected
    assert losses.dtype == expected_losses.dtype
    assert (losses - expected_losses).norm() <= bound * expected_losses.norm()
    assert grads.keys() == expected_grads.keys()
    largest = max((grad.norm() for grad in expected_grads.values()), default=0)
    for name, grad in grads.items():
        size = max(expected_grads[name].norm(), 1e-3 * largest)  # biases of keys have none
        assert (grad - expected_grads[name]).norm() <= bound * size, name


@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    [
        *((kind, torch.float32, 1e-6) for kind in MODULES),
        *((kind, torch.float64, 1e-13) for kind in ("tied", "capped", "rows", "LoRA")),
    ],
)
def test_chunks_equal_the_plain_loss(kind, dtype, bound, monkeypatch):
    """Values and all gradients, chunks of unequal lengths, of one position, and all in one."""
    module = MODULES[kind]().to(dtype)
    batch = batch_for(module).to("cpu", dtype)
    expected = plain(module, batch, 1 / 7)
    count = len(batch.targets)
    assert count % 7 != 0
    for positions in (1, 7, count - 1, count):
        in_chunks(monkeypatch, positions)
        assert_same(chunked(module, batch, 1 / 7), expected, bound)
        found = state_losses(module.logits, module.states(batch), batch.targets)
        assert not found.requires_grad
        assert (found - expected[0]).norm() <= bound * expected[0].norm()


@pytest.mark.parametrize("kind", MODULES)
@torch.no_grad()
def test_logits_are_those_of_states(kind):
    module = MODULES[kind]()
    batch = batch_for(module)
    states = module.states(batch)
    assert states.shape == (len(batch.targets), module.text.config.hidden_size)
    assert torch.equal(module.logits(states), module(batch))


@pytest.mark.parametrize("block", [1, 5000, 2**25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_gives_the_same(block, dtype, monkeypatch):
    torch.manual_seed(0)
    logits = (8 * torch.randn(23, 700)).to(dtype).requires_grad_()
    targets = torch.randint(0, 700, (23,))
    expected = token_losses(logits, targets)
    (0.3 * expected.sum()).backward()
    monkeypatch.setattr(token, "CPU_BLOCK", block)
    spent = logits.detach().clone()
    torch.testing.assert_close(token._spend(spent, targets, 0.3), expected.detach())
    torch.testing.assert_close(spent, logits.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sure_and_hopeless_targets_keep_their_digits(dtype):
    """A target of probability 1 - 1e-4, whose gradient is lost where 1 is taken from what bf16
    makes of its probability; logits whose exponential overflows; impossible ids."""
    logits = torch.tensor(
        [[9.25, 0.0, -float("inf")], [300.0, 0.0, 0.0], [300.0, 0.0, 0.0]], dtype=dtype
    )
    targets = torch.tensor([0, 0, 1])
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none")
    expected.sum().backward()
    found = token._spend(logits, targets, 1.0)
    torch.testing.assert_close(found.double(), expected.detach(), atol=1e-6, rtol=1e-4)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        logits.double(), wide.grad, atol=1e-6 * rounding, rtol=max(rounding, 1e-3)
    )


@pytest.mark.parametrize("positions", [1, 4, 100])
@pytest.mark.parametrize("kind", ["tied", "untied", "LoRA", "adaptor alone"])
def test_no_scored_position_gives_the_gradients_of_the_plain_loss(kind, positions, monkeypatch):
    """Zeros, and not none: a rank without a target still takes part."""
    module = MODULES[kind]()
    batch = batch_for(module)
    batch.scored[:] = False
    in_chunks(monkeypatch, positions)
    assert_same(chunked(module, batch), plain(module, batch), 0)
    assert len(state_losses(module.logits, module.states(batch), batch.targets)) == 0


@pytest.mark.parametrize("positions", [7, 100])
@pytest.mark.parametrize("kind", ["tied", "capped", "LoRA", "adaptor alone"])
def test_checkpointed_blocks_give_the_same(kind, positions, monkeypatch):
    module = MODULES[kind]()
    batch = batch_for(module)
    expected = plain(module, batch)
    checkpoint_activations(module, ("text",))
    in_chunks(monkeypatch, positions)
    assert_same(chunked(module, batch), expected, 1e-6)


@pytest.mark.parametrize("positions", [7, 100])
@pytest.mark.parametrize("kind", ["tied", "untied", "capped", "LoRA", "trocr"])
def test_compute_copies_get_the_gradients_of_the_plain_loss(kind, positions, monkeypatch):
    """In bf16, under autocast as in `fit`; differences are those of bf16's roundings."""
    module = MODULES[kind]()
    batch = batch_for(module)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    found = []
    working = ComputeCopies(module, torch.bfloat16)
    in_chunks(monkeypatch, positions)
    for step in ("plain", "chunked"):
        with working.in_use():
            if step == "plain":
                with autocast():
                    logits = module(batch)
                losses = token_losses(logits, batch.targets)
                (losses.sum() / 9).backward()
            else:
                with autocast():
                    states = module.states(batch)
                losses = backward_state_losses(
                    module.logits, states, batch.targets, 1 / 9, autocast
                )
        found.append((losses.detach(), gradients(module)))
    expected, again = found
    assert_same(again, expected, 1e-2)
    assert all(grad.dtype == torch.float32 for grad in again[1].values())
    assert (again[0] - expected[0]).norm() <= 1e-2 * expected[0].norm()


def test_fp32_weights_under_autocast_get_the_gradients_of_the_plain_loss(monkeypatch):
    module = MODULES["untied"]()
    batch = batch_for(module)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    with autocast():
        logits = module(batch)
    token_losses(logits, batch.targets).sum().backward()
    expected = gradients(module)["text.lm_head.weight"]
    in_chunks(monkeypatch, 7)
    with autocast():
        states = module.states(batch)
    backward_state_losses(module.logits, states, batch.targets, 1.0, autocast)
    found = gradients(module)["text.lm_head.weight"]
    assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_gradients_of_chunks_are_added_up_in_fp32(monkeypatch):
    """In bf16, 256 + 1 is 256: sixteen small gradients after a large one would be lost."""
    head = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    states = torch.tensor([[512.0]] + [[2.0]] * 16, dtype=torch.bfloat16)
    in_chunks(monkeypatch, 1)
    backward_state_losses(head, states, torch.zeros(17, dtype=torch.int64), 1.0)
    assert head.weight.grad.tolist() == [[-272.0], [272.0]]


def test_gradients_are_added_to_those_that_are_there(monkeypatch):
    """As those of another micro-batch are."""
    module = MODULES["tied"]()
    batch = batch_for(module)
    expected = {name: 2 * grad for name, grad in plain(module, batch)[1].items()}
    in_chunks(monkeypatch, 7)
    for _ in range(2):
        losses = backward_state_losses(module.logits, module.states(batch), batch.targets, 1.0)
    assert_same((losses, gradients(module)), (losses, expected), 1e-6)


def test_weights_that_share_a_gradient_do_not_share_its_sum(monkeypatch):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = (nn.Parameter(torch.randn(11, 4)) for _ in range(2))

        def forward(self, states):
            return F.linear(states, self.one + self.two)

    head, twin = Sum(), Sum()
    states, targets = torch.randn(5, 4), torch.randint(0, 11, (5,))
    token_losses(twin(states), targets).sum().backward()
    in_chunks(monkeypatch, 2)
    backward_state_losses(head, states, targets, 1.0)
    for found, expected in zip(head.parameters(), twin.parameters()):
        torch.testing.assert_close(found.grad, expected.grad)


class Live(TorchDispatchMode):
    """Counts bytes of tensors that were made within and are still there: the most at any time."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                self.held[ref.cdata] = ref, storage.nbytes()
        self.held = {key: item for key, item in self.held.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return out


def bytes_needed(positions, count, learns, monkeypatch, dtype=torch.float32, D=4, Z=1000):
    """(most bytes at any time, bytes left over) of one call."""
    head = nn.Linear(D, Z, bias=False, dtype=dtype).requires_grad_(learns)
    states = torch.randn(count, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, Z, (count,))
    in_chunks(monkeypatch, positions)
    with Live() as live:
        losses = backward_state_losses(head, states, targets, 1.0)
    del losses
    left = sum(size for ref, size in live.held.values() if not ref.expired())
    return live.peak, left


@pytest.mark.parametrize("learns", [True, False])
def test_bytes_do_not_grow_with_the_number_of_chunks(learns, monkeypatch):
    """Neither those needed at once nor those left over; what many positions take besides a
    chunk's logits (5 x 1000) is their states, gradients and losses."""
    few, left = bytes_needed(5, 10, learns, monkeypatch)
    many, still = bytes_needed(5, 60, learns, monkeypatch)
    logits = 5 * 1000 * 4
    weights = 1000 * 4 * 4 if learns else 0
    assert few <= 2 * logits + 3 * weights
    assert many - few <= 50 * 4 * 20
    assert still - left <= 50 * 4 * 20
    smaller, _ = bytes_needed(1, 60, learns, monkeypatch)
    assert smaller < many - 2 * 1000 * 4


def test_logits_are_held_once(monkeypatch):
    """In one chunk and in bf16: the logits, a block in fp32 and the weights' gradient, where the
    plain loss holds fp32 logits, their log-softmax and its gradient too."""
    monkeypatch.setattr(token, "CPU_BLOCK", 10_000)
    count, size = 64, 64 * 1000 * 2
    whole, _ = bytes_needed(count, count, True, monkeypatch, torch.bfloat16)
    assert whole <= 1.5 * size


def test_chunks_hold_as_many_logits_as_the_head_learns_numbers(monkeypatch):
    monkeypatch.setattr(token, "CHUNK", 10_000)
    module = tiny.decoder_only("qwen2")  # 300 ids, 32 wide

    def positions():
        return token._positions(*token._shown(module.logits, torch.randn(2, 32)))

    head = module.text.lm_head.weight
    assert positions() == 10_000 // 300
    monkeypatch.setattr(token, "CHUNK", 3_000)
    assert positions() == 32
    head.requires_grad_(False)
    assert positions() == 10
    monkeypatch.setattr(token, "CHUNK", 100)
    assert positions() == 1


@pytest.mark.parametrize("kind", ["untied", "prefix, capped", "trocr"])
def test_training_and_evaluation_go_by_chunks(kind, monkeypatch):
    module = MODULES[kind]()
    batch = batch_for(module)
    losses, expected = plain(module, batch, 1 / 11)
    seen = []
    head = module.logits
    monkeypatch.setattr(module, "logits", lambda states: seen.append(len(states)) or head(states))
    in_chunks(monkeypatch, 7)
    share = NextToken(0).backward(module, [batch], {"tokens": 11}, torch.enable_grad)
    assert share == pytest.approx(float(losses.sum()) / 11, rel=1e-6)
    assert_same((losses, gradients(module)), (losses, expected), 1e-6)
    if kind != "trocr":
        by_row = sum_by_row(losses, batch.target_rows, len(batch.names))
        torch.testing.assert_close(engine.answer_losses(module, batch), by_row)
        torch.testing.assert_close(engine.image_gain(module, batch)[0], by_row)
    assert max(seen) <= 7


@pytest.mark.slow
def test_a_run_is_the_same_in_chunks(tmp_path, monkeypatch):
    """Through `fit`, in bf16 with all weights learning and with micro-batches of two."""
    losses = []
    stage = dataclasses.replace(training.STAGE, rates=(("*", 1e-3),), micro_batch=2, steps=2)
    for positions in (10_000, 5):
        in_chunks(monkeypatch, positions)
        _, _, history = training.train(tmp_path / str(positions), stage, precision="bf16")
        losses.append([line["loss"] for line in history])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
