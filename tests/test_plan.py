import json

import pytest
import torch

from tests import tiny, training
from vlm import cli
from vlm.placement import IMAGE
from vlm.training.objectives import Contrast, NextToken
from vlm.training.plan import (
    GIB,
    MOST,
    Estimate,
    kept_parts,
    largest_within,
    machine_of,
    make_plan,
    split_of,
    with_text_places,
)
from vlm.training.rehearsal import Held, Rehearsal, Step
from vlm.training.stages import FROZEN, Stage

STAGE = Stage(name="t", rates=(("*", 1e-3),), steps=2, batch=4, micro_batch=4, warmup=0)


class Even:
    """Steps that hold 10 GiB, and 2 for each example; as Estimate gives them."""

    group, gathered, tokens_per_example = 1, 0, 100.0

    def held(self, micro_batch, accumulation):
        return Held(4 * GIB, 2 * GIB, 4 * GIB, 2 * GIB * micro_batch, 0)

    def flops_per_example(self, micro_batch, accumulation):
        return 1e12


def planned(machine="8xH100-80G", estimate=None, **more):
    options = {"batch": 256, "steps": 900, "micro_batch": None, "peak_flops": 1e15, "mfu": 0.4}
    return make_plan(estimate or Even(), machine_of(machine), **{**options, **more})


@pytest.mark.parametrize(
    ("text", "nodes", "devices", "gib"),
    [
        ("8xH100-80G", 1, 8, 80),
        ("4x8xH200", 4, 8, 141),
        ("A100", 1, 1, 80),
        ("A100-40G", 1, 1, 40),
        ("2x4090", 1, 2, 24),
        ("4090", 1, 1, 24),
        ("8xl40s", 1, 8, 48),
        ("b200", 1, 1, 180),
        ("cpu-16G", 1, 1, 16),
    ],
)
def test_machines_are_read_from_their_names(text, nodes, devices, gib):
    machine = machine_of(text)
    assert (machine.nodes, machine.devices, machine.gib) == (nodes, devices, gib)
    assert (machine.tflops is None) == (machine.name == "cpu")


@pytest.mark.parametrize("text", ["8xH300", "cpu", "", "8x", "H100-G", "2x2x2xH100", "H100x8"])
def test_an_unknown_machine_is_refused_with_those_that_are_known(text):
    with pytest.raises(ValueError, match="known are A100, H100, H200, B200, L40S, 4090, and cpu"):
        machine_of(text)


def test_a_machine_without_devices_is_refused():
    with pytest.raises(ValueError, match="must be above 0"):
        machine_of("0xH100")


@pytest.mark.parametrize("room", [0, 99, 106, 107, 113, 114, 5000, 10**9])
def test_the_largest_count_is_found_in_few_trials(room):
    tried = set()

    def total(count):
        tried.add(count)
        return 100 + 7 * count

    expected = min(max((room - 100) // 7, 0), MOST)
    assert largest_within(total, room) == expected
    assert len(tried) <= 5


def test_the_largest_count_is_found_where_cost_bends():
    """As a loss in chunks makes it: steep at first, then even."""

    def total(count):
        return 50 * min(count, 10) + 3 * count

    assert largest_within(total, 700) == 66


def test_plan_divides_a_batch_and_finds_the_largest_micro_batch():
    plan = planned()
    assert (plan.micro_batch, plan.accumulation) == (32, 1)
    assert plan.largest == 31  # 0.92 * 80 GiB hold 10 and 2 for each of 31
    assert plan.largest_even == 16
    assert not plan.fits
    assert plan.refusal() == (
        "a micro-batch of 32 needs 74 GiB on each device, which has 73.6; the largest that fits "
        "is 31: take --micro-batch 16, 2 of which make a device's share of a step"
    )
    assert planned(micro_batch=16).fits


def test_plan_says_what_to_do_where_no_example_fits():
    plan = planned("8xH100-11G")
    assert plan.largest == plan.largest_even == 0
    assert "not even one example fits: most are activations" in plan.refusal()
    assert "--shard" in plan.refusal()


def test_time_and_cost_are_operations_by_the_stated_share_of_the_peak():
    plan = planned(price=2.5, mfu=0.5)
    assert plan.step_s == pytest.approx(256 * 1e12 / (8 * 1e15 * 0.5))
    assert plan.hours == pytest.approx(plan.step_s * 900 / 3600)
    assert plan.cost == pytest.approx(plan.hours * 8 * 2.5)
    assert plan.tokens_per_s == pytest.approx(256 * 100 / plan.step_s)
    unknown = planned(peak_flops=None, price=2.5)
    assert unknown.step_s is unknown.hours is unknown.cost is None


@pytest.mark.parametrize(
    ("batch", "micro_batch", "ranks", "message"),
    [
        (16, None, 32, r"batch 16 does not divide over 32 devices; .* --batch 32"),
        (100, None, 8, r"batch 100 does not divide over 8 devices; .* --batch 104"),
        (64, 3, 8, "share of 8 examples is no whole number of micro-batches of 3; .* 2"),
        (64, 16, 8, "no whole number of micro-batches of 16; .* --micro-batch 8"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(
    batch, micro_batch, ranks, message
):
    with pytest.raises(ValueError, match=message):
        split_of(batch, micro_batch, ranks)


@pytest.mark.parametrize("share", [{"mfu": 0.0}, {"mfu": 1.1}, {"reserve": 1.0}])
def test_shares_outside_their_range_are_refused(share):
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        planned(**share)


def estimate(group=1, ranks=1, rates=STAGE.rates):
    model = training.model()
    rows = [model.processor.encode(example) for example in training.examples()]
    stage = Stage(name="t", rates=rates, steps=2, batch=4, micro_batch=4, warmup=0)
    rehearsal = Rehearsal(
        model.module, stage, NextToken(model.processor.pad_id), torch.bfloat16, gpu=True
    )
    return Estimate(rehearsal, rows, ranks, group)


def test_sharding_divides_state_by_its_group_and_holds_blocks_whole():
    whole, sharded = estimate(ranks=64), estimate(group=64, ranks=64)
    trained = sum(p.numel() for p in sharded.rehearsal.trained)
    held = sharded.held(2, 1)
    assert held.optimizer == 8 * trained // 64
    block = sum(p.numel() for p in sharded.rehearsal.module.text.model.layers[0].parameters())
    outside = trained - 2 * block
    assert sharded.gathered == 2 * (outside + 2 * block)
    assert held.weights == 4 * trained // 64 + sharded.gathered
    assert held.weights + held.optimizer < sum(whole.held(2, 1)[:3])


def test_ranks_that_exchange_gradients_hold_all_in_fp32_and_a_bucket():
    one, many = estimate(), estimate(ranks=2)
    step = Step(Held(1, 2, 3, 4, 5), Held(0, 0, 0, 0, 0), None)
    trained = sum(p.numel() for p in many.rehearsal.trained)
    assert one._whole(step) == step.peak
    assert many._whole(step) == Held(1, 4 * trained, 3, 4 * trained, 0)


def test_memory_goes_by_the_longest_rows_and_tokens_by_all():
    found = estimate()
    longest = max(len(row.ids) for row in found.rows)
    assert [len(row.ids) for row in found._heavy(1)] == [longest]
    assert len(found._heavy(40)) == 40
    mean = sum(len(row.ids) for row in found.rows) / len(found.rows)
    assert found.tokens_per_example == pytest.approx(mean)


def test_a_contrast_keeps_the_embeddings_of_waiting_micro_batches():
    model = training.contrastive_model("sigmoid")
    rows = [model.processor.encode(example) for example in training.pairs(4)]
    rehearsal = Rehearsal(model.module, STAGE, Contrast("sigmoid"), torch.bfloat16, gpu=False)
    found = Estimate(rehearsal, rows)
    more = found.held(2, 102).activations - found.held(2, 2).activations
    assert more == 200 * 2 * 3 * 4 * model.module.dim


def test_rows_are_brought_to_a_number_of_text_places():
    model = training.model()
    row = model.processor.encode(training.examples()[0])
    images = int((row.ids == IMAGE).sum())
    for count in (len(row.ids) - images - 3, 80):
        found = with_text_places(row, count)
        assert len(found.ids) == len(found.scored) == images + count
        assert int((found.ids == IMAGE).sum()) == images
    with pytest.raises(ValueError, match="would cut its images"):
        with_text_places(row, 1)
    with pytest.raises(ValueError, match="at least 1, found 0"):
        with_text_places(row, 0)


def test_kept_parts_are_those_that_gradients_pass():
    module = tiny.decoder_only()
    stage = Stage(
        name="t", rates=(("adaptor.*", 1e-3), ("*", FROZEN)), steps=1, batch=1, micro_batch=1,
        warmup=0,
    )  # fmt: skip
    assert kept_parts(module, stage) == ["text"]
    assert kept_parts(module, STAGE) == ["tokenizer", "text"]
    pairs = training.contrastive_model("sigmoid").module
    locked = Stage(
        name="t", rates=(("tokenizer.*", FROZEN), ("*", 1e-3)), steps=1, batch=1, micro_batch=1,
        warmup=0,
    )  # fmt: skip
    assert kept_parts(pairs, locked) == ["text"]


SMALL = ["recipes/contrastive.py", "--width", "64", "--depth", "1", "--text-width", "64",
         "--text-depth", "1", "--rows", "2"]  # fmt: skip


def test_plan_command_tells_a_recipes_memory_and_time(capsys):
    cli.main(["plan", *SMALL, "--machine", "2xH100", "--price", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == sum(found["held"].values())
    assert (found["micro_batch"], found["ranks"], found["fits"]) == (64, 2, True)
    assert found["cost"] == pytest.approx(found["hours"] * 4)


def test_plan_command_refuses_what_cannot_be(capsys):
    for arguments, message in (
        ([*SMALL, "--machine", "H300"], "machine 'H300': expected"),
        ([*SMALL, "--machine", "3xH100"], "batch 128 does not divide over 3 devices"),
        ([*SMALL, "--machine", "H100", "--hybrid"], "--hybrid says how --shard divides"),
        ([*SMALL[:-2], "--machine", "H100", "--rows", "0"], "--rows must be at least 1"),
        ([*SMALL, "--machine", "H100-0.08G"], "the largest that fits is"),
        (["none.py", "--machine", "H100"], "none.py: expected a recipe"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["plan", *arguments])
        assert stopped.value.code == 1
        found = capsys.readouterr().err
        assert found.startswith("error: ")
        assert message in found
