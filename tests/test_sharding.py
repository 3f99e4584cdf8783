"""Sharded training: the same run as on one process, in parts."""

import dataclasses
import shutil

import pytest
import torch

import vlm
from tests import encoder_decoders, tiny, training
from tests.contrastive_runs import assert_close
from tests.runs import launch, lines
from vlm.families.decoder_only.batch import collate
from vlm.training.sharding import _dummy_batch, _dummy_views, units_of

pytestmark = pytest.mark.slow

EVERY = {"rates": [["*", 1e-2]]}
WHOLE = dataclasses.replace(training.STAGE, rates=(("*", 1e-2),))
PARTLY = (("tokenizer.*", None), ("adaptor.*", 1e-2), ("text.*", 1e-3))
TWO, FOUR = EVERY | {"micro_batch": 2}, EVERY | {"micro_batch": 1}
SHARDED = {"shard": "all", "split_by_kind": True}
BOTH = {"step": 4, "ranks": [0, 1]}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process on rows of which, on two ranks, one has no image: folder, weights, figures."""
    out = tmp_path_factory.mktemp("one")
    data = training.in_order(training.split_by_kind())
    chosen, _, history = training.train(out, WHOLE, data=data, save_every=4, keep=9)
    return out, training.weights(chosen), history


@pytest.fixture(scope="module")
def two(tmp_path_factory, one):
    """The folder of runs on two processes, one after another in one launch."""
    out = tmp_path_factory.mktemp("two")
    due = out / "due"
    for folder in (out / "resumed", due):
        shutil.copytree(one[0] / "checkpoints/step_00000004", folder / "checkpoints/step_00000004")
    runs = {
        "whole": {"stage": TWO, **SHARDED},
        "split": {"stage": FOUR, **SHARDED},
        "stopped": {"stage": TWO, **SHARDED, "stop": BOTH},
        "resumed": {"stage": TWO, **SHARDED, "resume": True},
        "evaluated": {"stage": TWO, **SHARDED, "evaluate_on_first": True, "eval_every": 2},
        "due": {
            "stage": TWO,
            **SHARDED,
            "resume": True,
            "evaluate_on_first": True,
            "eval_every": 4,
        },
        "partly": {
            "stage": {"rates": PARTLY, "micro_batch": 2},
            "shard": "all",
            "precision": "bf16",
        },
        "lines": {"stage": TWO, "shard": "all", "family": "line_reader"},
        "sigmoid": {"stage": {"micro_batch": 2}, "shard": "all", "loss": "sigmoid"},
        "softmax": {"stage": {"micro_batch": 2}, "shard": "all", "loss": "softmax"},
    }
    done = launch(out, 2, runs=runs)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def require_same(out, weights, history, norms=1e-4):
    """norms: how far gradient norms may part as rounding adds up over steps."""
    require_same_losses(out, history, norms)
    saved = torch.load(out / "weights.pt")
    assert {name: w.dtype for name, w in saved.items()} == {n: w.dtype for n, w in weights.items()}
    assert_close(saved, weights)


def require_same_losses(out, history, norms=1e-4):
    found = [line for line in lines(out) if "loss" in line]
    for a, b in zip(history[-len(found) :], found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=norms if a["step"] > 1 else 1e-5)
        assert (b["batch"], b["scored"], b["samples"]) == (a["batch"], a["scored"], a["samples"])


@pytest.mark.parametrize("run", ["whole", "split"])
def test_two_sharded_processes_follow_one_though_one_of_them_sees_no_image(two, one, run):
    """Every weight learns; a rank of text alone takes part in every call."""
    require_same(two / run, *one[1:])


def test_a_checkpoint_of_one_process_goes_on_sharded(two, one):
    """Optimizer state of whole weights reloads in parts."""
    assert [line["step"] for line in lines(two / "resumed")] == [5, 6]
    require_same(two / "resumed", *one[1:])


def test_a_sharded_checkpoint_goes_on_on_one_process(two, one):
    """Optimizer state saved in parts, at a request to stop, reloads whole."""
    assert [line["step"] for line in lines(two / "stopped")] == [1, 2, 3, 4, 5]
    data = training.in_order(training.split_by_kind())
    chosen, _, history = training.train(two / "stopped", WHOLE, data=data, resume=True)
    for a, b in zip(one[2], history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert_close(training.weights(chosen), one[1])


def test_evaluations_between_steps_need_no_company(two, one):
    """On a sharded module each rank evaluates rows of its own, or none at all."""
    found = [line["eval"] for line in lines(two / "evaluated") if "eval" in line]
    assert found == [{"rows": 2.0, "finite": 1.0}] * 2
    require_same(two / "evaluated", *one[1:])


def test_an_evaluation_may_come_before_the_first_step(two, one):
    """A kill between a step and its evaluation leaves it to the run that goes on."""
    found = [(line["step"], line["eval"]) for line in lines(two / "due") if "eval" in line]
    assert found == [(4, {"rows": 2.0, "finite": 1.0})]
    require_same(two / "due", *one[1:])


def test_frozen_parts_are_sharded_beside_trained_ones(tmp_path, two):
    """What learns has fp32 masters, what does not computes in bf16; frozen weights stay."""
    stage = dataclasses.replace(training.STAGE, rates=PARTLY)
    whole, _, history = training.train(tmp_path, stage, precision="bf16")
    before = training.weights(training.model())
    found = torch.load(two / "partly/weights.pt")
    for name, weight in training.weights(whole).items():
        frozen = name.startswith("tokenizer.")
        assert found[name].dtype == weight.dtype == (torch.bfloat16 if frozen else torch.float32)
        if frozen:
            assert torch.equal(found[name], before[name].bfloat16())
        else:
            assert not torch.equal(found[name], before[name])
    for a, b in zip(history, lines(two / "partly"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)  # bf16 rounds, here and there


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_contrastive_runs_shard_too(tmp_path, two, loss):
    """The contrast is that of the whole batch."""
    chosen, _, history = training.train(tmp_path, training.CONTRAST, loss=loss)
    require_same(two / loss, training.weights(chosen), history, norms=1e-3)
    assert (two / loss / "held_out0.json").read_text() == (
        two / loss / "held_out1.json"
    ).read_text()


def test_line_readers_shard_though_ranks_differ_in_widths_and_are_saved_whole(tmp_path, two):
    """The folder that the first rank writes holds what one process learned, in fp32."""
    stage = dataclasses.replace(WHOLE, rates=EVERY["rates"])
    data = training.dataset(training.text_lines())
    chosen, _, history = training.train(tmp_path, stage, chosen=training.line_model(), data=data)
    require_same_losses(two / "lines", history)
    saved = training.weights(vlm.load(two / "lines/model", device="cpu", dtype="stored"))
    learned = torch.load(two / "lines/weights.pt")
    for name, weight in training.weights(chosen).items():
        assert torch.equal(saved[name], learned[name])
        # Adam makes whole steps of gradients that are nearly rounding, as some are at first.
        torch.testing.assert_close(saved[name], weight, atol=1e-3, rtol=1e-3, msg=name)


def test_four_processes_on_two_machines_follow_one(tmp_path, one):
    """Sharded within a machine, copied across: ranks 2 and 3 hold what 0 and 1 do."""
    done = launch(tmp_path, 4, stage=FOUR, **SHARDED | {"shard": "node"}, machine_of=2)
    assert done.returncode == 0, done.stderr[-2000:]
    require_same(tmp_path, *one[1:])


def test_every_block_is_gathered_by_itself():
    module = tiny.decoder_only()
    units = units_of(module)
    for part in (*module.text.model.layers, module.adaptor, module.tokenizer):
        assert any(part is unit for unit in units)


def test_dummy_inputs_change_nothing():
    """Blank views pass through tokenizer and adaptor; states and gradients stay as they are."""
    module = tiny.decoder_only()
    rows = [tiny.processor(module).encode(example) for example in training.examples()[:3]]
    batch = collate(rows, 0)
    dummy = dataclasses.replace(batch, dummy_groups=(_dummy_views(module.tokenizer.pixel_spec),))
    grads = []
    for given in (batch, dummy):
        module.zero_grad()
        states = module.states(given)
        states.square().sum().backward()
        grads.append((states, [p.grad for p in module.parameters() if p.grad is not None]))
    assert torch.equal(grads[0][0], grads[1][0])
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [tiny.decoder_only, encoder_decoders.model])
def test_dummy_batch_passes_through_every_family_that_writes(make):
    """A rank with fewer batches than another makes the same calls, and adds nothing."""
    module = make()
    batch = dataclasses.replace(
        _dummy_batch(module), dummy_groups=(_dummy_views(module.tokenizer.pixel_spec),)
    )
    states = module.states(batch)
    assert len(states) == 0
    states.sum().backward()
    assert all(not p.grad.any() for p in module.parameters() if p.grad is not None)
