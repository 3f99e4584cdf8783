import json

import pytest

from vlm import cli
from vlm.data.mixture import split_of
from vlm.training.memory.plan import machine_of, make_plan
from vlm.training.memory.preflight import GIB
from vlm.training.memory.simulate import Held

pytestmark = pytest.mark.slow


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


def test_plan_divides_a_batch_and_finds_the_largest_micro_batch():
    plan = planned()
    assert (plan.micro_batch, plan.accumulation) == (32, 1)
    assert plan.largest == 31  # 0.92 * 80 GiB hold 10 and 2 for each of 31
    assert plan.largest_even == 16
    assert not plan.fits
    assert plan.refusal("--batch 256", "") == (
        "--batch 256: a micro-batch of 32 needs 74 GiB on each device, which has 73.6 GiB; the "
        "largest that fits is 31: take --micro-batch 16, 2 of which make a device's share of a step"
    )
    assert planned(micro_batch=16).fits


def test_plan_says_what_to_do_where_no_example_fits():
    plan = planned("8xH100-11G")
    assert plan.largest == plan.largest_even == 0
    said = plan.refusal("--batch 256", "What may help: sharding")
    assert said.endswith("not even one example fits: most are activations. What may help: sharding")


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
        (16, None, 32, r"batch 16 does not divide over 32 processes; .* --batch 32"),
        (100, None, 8, r"batch 100 does not divide over 8 processes; .* --batch 104"),
        (64, 3, 8, "share of 8 examples is no whole number of micro-batches of 3; .* 2"),
        (64, 0, 8, "micro_batch must be at least 1, found 0"),
        (0, None, 8, "batch must be at least 1, found 0"),
        (64, 16, 8, "no whole number of micro-batches of 16; .* --micro-batch 8"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(
    batch, micro_batch, ranks, message
):
    with pytest.raises(ValueError, match=message):
        split_of(batch, micro_batch, ranks)


@pytest.mark.parametrize(
    "share", [{"mfu": 0.0}, {"mfu": 1.1}, {"reserve": 1.0}, {"reserve": -0.1}, {"price": -1.0}]
)
def test_shares_outside_their_range_are_refused(share):
    with pytest.raises(ValueError, match=rf"{next(iter(share))} must be (above|at least) 0"):
        planned(**share)


SMALL = ["recipes/contrastive.py", "--width", "64", "--depth", "1", "--text-width", "64",
         "--text-depth", "1", "--rows", "2"]  # fmt: skip


def test_plan_command_tells_a_recipes_memory_and_time(capsys):
    cli.main(["plan", *SMALL, "--machine", "2xH100", "--price", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == sum(found["held"].values())
    assert (found["micro_batch"], found["ranks"], found["fits"]) == (64, 2, True)
    assert found["cost"] == pytest.approx(found["hours"] * 4)


@pytest.mark.parametrize(("shard", "group"), [("all", 4), ("node", 2)])
def test_plan_command_takes_the_recipes_own_sharding(shard, group, capsys):
    cli.main(["plan", *SMALL, "--machine", "2x2xH100", "--shard", shard, "--json"])
    assert json.loads(capsys.readouterr().out)["shard_group"] == group


def test_plan_command_refuses_what_cannot_be(capsys):
    for arguments, message in (
        ([*SMALL, "--machine", "H300"], "machine 'H300': expected"),
        ([*SMALL, "--machine", "3xH100"], "batch 128 does not divide over 3 processes"),
        ([*SMALL, "--machine", "H100", "--hybrid"], "--hybrid: this option is now --shard node"),
        ([*SMALL, "--machine", "H100", "--shard"], "--shard: expected --shard no, all or node"),
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
