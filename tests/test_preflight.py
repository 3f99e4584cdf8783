"""A run that does not fit in memory says so before its first step, with the largest that does."""

import contextlib
import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import training
from tests.contrastive_runs import TINY, run
from tests.runs import run_two
from vlm.data.example import BadRow
from vlm.training.activation_checkpointing import checkpoint_activations
from vlm.training.memory import preflight
from vlm.training.memory.estimate import Estimate, rows_of_run
from vlm.training.memory.preflight import (
    MOST,
    MemoryFit,
    free_memory,
    largest_within,
    require_memory,
    size,
)
from vlm.training.memory.simulate import Held, SimulatedStep
from vlm.training.objectives.contrastive import Contrast
from vlm.training.objectives.ctc import Transcribe
from vlm.training.objectives.next_token import NextToken
from vlm.training.runs import contrastive
from vlm.training.stages import Stage

pytestmark = pytest.mark.slow

STAGE = Stage(name="t", rates=(("*", 1e-3),), steps=2, batch=4, micro_batch=4, warmup_steps=0)
PLENTY = 2**40


@pytest.mark.parametrize("budget", [0, 99, 106, 107, 113, 114, 5000, 10**9])
def test_the_largest_count_is_found_in_few_trials(budget):
    tried = set()

    def total(count):
        tried.add(count)
        return 100 + 7 * count

    expected = min(max((budget - 100) // 7, 0), MOST)
    assert largest_within(total, budget) == expected
    assert len(tried) <= 5


def test_the_largest_count_is_found_where_cost_bends():
    """As a loss in chunks makes it: steep at first, then even."""

    def total(count):
        return 50 * min(count, 10) + 3 * count

    assert largest_within(total, 700) == 66


@pytest.mark.parametrize(
    ("share", "largest", "even"), [(32, 31, 16), (32, 32, 32), (32, 99, 32), (7, 6, 1), (4, 0, 0)]
)
def test_the_largest_even_micro_batch_divides_the_share(share, largest, even):
    held = Held(1, 1, 1, 1, 1)
    found = MemoryFit(share=share, micro_batch=share, held=held, budget=1, largest=largest)
    assert found.largest_even == even


class Given:
    """What a device has, in place of this machine's memory."""

    def __init__(self, monkeypatch, there):
        self.there = there
        monkeypatch.setattr(preflight, "memory_for", lambda device, module: self.there)


def settings_of(**changes):
    """What `require_memory` reads of a recipe's settings."""
    values = dict(batch=4, micro_batch=None, pack=None, checkpoint_activations=False,
                  memory_check=None, memory_remedies=lambda: ())  # fmt: skip
    return SimpleNamespace(**values | changes)


SIZES = dict(TINY, image_px=64, batch=64)
"""Settings of a recipe whose images take more memory than its weights."""


@pytest.fixture(scope="module")
def needs():
    """Bytes that its step needs, by its micro-batch."""
    settings = contrastive.Settings(**SIZES, out="none", steps=2)
    pairing = settings.build()
    rows = rows_of_run(settings.data(), pairing.processor, 2 * 64, preflight.ROWS_AT_MOST)
    simulated = SimulatedStep(pairing.module, STAGE, Contrast("sigmoid"), torch.float32, gpu=False)
    estimate = Estimate(simulated, rows)
    return {count: estimate.held(count, 64 // count).total for count in (1, 8, 64)}


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, needs
):
    Given(monkeypatch, needs[8])
    for asked, setting in (({}, "--batch 64"), ({"micro_batch": 64}, "--micro-batch 64")):
        with pytest.raises(ValueError, match="the largest that fits is") as refused:
            run(tmp_path / "run", **SIZES, **asked)
        said = str(refused.value)
        assert said.startswith(
            f"{setting}: a micro-batch of 64 needs {size(needs[64])} on each process, which has "
            f"{size(needs[8])}; "
        )
        assert said.endswith(
            "take --micro-batch 8, 8 of which make a process's share of a step. To run all the "
            "same: --memory-check warn"
        )
    assert not (tmp_path / "run").exists()
    assert run(tmp_path / "run", **SIZES, micro_batch=8)["step"] == 2


def test_a_run_that_does_not_fit_goes_on_where_the_check_only_warns(
    tmp_path, monkeypatch, capsys, needs
):
    Given(monkeypatch, needs[8])
    assert run(tmp_path / "run", **SIZES, memory_check="warn")["step"] == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"--batch 64: a micro-batch of 64 needs {size(needs[64])} on each process" in said
    assert "The run goes on all the same; --memory-check stop would end it here" in said


def test_check_that_is_off_estimates_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "memory_for", lambda *_: pytest.fail("memory was looked at"))
    assert run(tmp_path / "run", **TINY, memory_check="off")["step"] == 2


@pytest.mark.parametrize(
    ("device", "check", "stops"),
    [("cpu", None, True), ("cuda", None, False), ("cuda", "stop", True), ("cpu", "warn", False)],
)
def test_check_stops_on_cpus_and_warns_on_gpus_unless_told(monkeypatch, device, check, stops):
    Given(monkeypatch, 2**10)
    model, rows, objective = decoder_only()
    said = []
    settings = settings_of(precision="bf16", memory_check=check)
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=1)
    with pytest.raises(ValueError, match="not even one") if stops else contextlib.nullcontext():
        require_memory(
            model, STAGE, training.dataset(rows), objective, settings, accelerator=accelerator,
            shard="no", say=lambda text, **_: said.append(text),
        )  # fmt: skip
    assert ["not even one example fits" in text for text in said] == [True] * (not stops)


def test_a_run_of_which_no_example_fits_is_told_what_may_help(tmp_path, monkeypatch, needs):
    Given(monkeypatch, needs[1] // 2)
    with pytest.raises(ValueError, match="not even one example fits: most are") as refused:
        run(tmp_path / "run", **SIZES)
    for way in ("--checkpoint-activations", "--shard all", "--precision bf16", "--length"):
        assert way in str(refused.value)
    for way in ("--pack", "--max-tokens", "lora"):  # this recipe has none of them
        assert way not in str(refused.value)


def test_a_run_that_nearly_fills_its_memory_says_so(tmp_path, monkeypatch, capsys, needs):
    Given(monkeypatch, int(needs[64] * 1.05))
    assert run(tmp_path / "run", **SIZES)["step"] == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"a step's estimated peak memory is {size(needs[64])}, and may be more" in said


def test_a_step_that_cannot_be_simulated_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("Cannot access data pointer of Tensor")

    Given(monkeypatch, 1)
    monkeypatch.setattr(preflight, "SimulatedStep", refuse)
    assert run(tmp_path / "run", **TINY)["step"] == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "whether a step fits in memory is not known: Cannot access data pointer" in said


@pytest.mark.parametrize("there", [2**50, None])
def test_a_run_of_which_no_row_can_be_used_stops_with_the_first_reason(monkeypatch, there):
    Given(monkeypatch, there)
    model, rows, objective = decoder_only()
    rows = [dataclasses.replace(row, turns=row.turns[:1]) for row in rows]
    settings = settings_of(precision="fp32", memory_check="warn")
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    said = r"^none of 8 rows of the run can be used: \w+: expected an assistant turn to learn from"
    with pytest.raises(BadRow, match=said):
        require_memory(
            model, STAGE, training.dataset(rows), objective, settings, accelerator=accelerator,
            shard="no", say=pytest.fail,
        )  # fmt: skip


def lines():
    return training.line_model(), training.text_lines(), Transcribe()


def encoder_decoder():
    model = training.encoder_decoder_model()
    return model, training.images_alone(), NextToken(model.processor.pad_id)


def decoder_only(pack=None):
    model = training.model()
    return model, training.examples(), NextToken(model.processor.pad_id, pack)


def checkpointed():
    model, rows, objective = decoder_only()
    checkpoint_activations(model.module, ("text",))
    return model, rows, objective


def packed():
    return decoder_only(pack=96)


def pairs():
    model = training.contrastive_model("softmax")
    return model, training.pairs(), Contrast("softmax")


@pytest.mark.parametrize(
    "make", [decoder_only, checkpointed, packed, encoder_decoder, lines, pairs]
)
@pytest.mark.parametrize("shard", ["no", "all"])
def test_steps_of_every_family_are_estimated_and_models_stay_as_they_were(monkeypatch, make, shard):
    """Its weights to the bit, and what of it learns and drops out."""
    if shard == "all" and make is checkpointed:
        pytest.skip("blocks are computed again in the same way, sharded or not")
    model, rows, objective = make()
    before = copy.deepcopy(model.module.state_dict())
    modes = [(p.requires_grad, p.dtype) for p in model.module.parameters()]
    training_modes = [m.training for m in model.module.modules()]
    ranks = 2 if shard == "all" else 1
    monkeypatch.setattr(preflight, "gather_object", lambda found: found * ranks)
    said = []

    def require(there):
        Given(monkeypatch, there)
        require_memory(
            model,
            STAGE,
            training.dataset(rows),
            objective,
            settings_of(precision="bf16", pack=96),
            accelerator=SimpleNamespace(device=torch.device("cpu"), num_processes=ranks),
            shard=shard,
            say=lambda text, **_: said.append(text),
        )  # fmt: skip

    require(PLENTY)
    assert said == []
    with pytest.raises(ValueError, match=r"--batch 4 --pack 96: .* not even one example fits"):
        require(2**10)
    assert [(p.requires_grad, p.dtype) for p in model.module.parameters()] == modes
    assert [m.training for m in model.module.modules()] == training_modes
    after = model.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert getattr(objective, "limit", None) is None


def test_all_processes_refuse_where_one_has_too_little(tmp_path):
    for status, _, said in run_two("crowded", OUT=str(tmp_path / "run")):
        assert status == 1
        assert "error: --batch 4: a micro-batch of 2 needs" in said
        assert "which has 1 MiB" in said
        assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


MEMINFO = "MemTotal: 999 kB\nMemFree: 100 kB\nMemAvailable:    800 kB\n"


def system(folder, cgroup, files):
    """A folder with the system's files about memory."""
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup, **files}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


STAT = "anon 100\ninactive_file 3000\nactive_file 1000\n"
STAT_V1 = "cache 1\ntotal_inactive_file 3000\ntotal_active_file 1000\ninactive_file 0\n"


def test_free_memory_is_the_systems_where_no_group_bounds_it(tmp_path):
    top = system(tmp_path, "0::/a\n", {"sys/fs/cgroup/a/memory.max": "max\n"})
    assert free_memory(top) == 800 * 1024


@pytest.mark.parametrize("group", ["", "job/", "job/step/"])
def test_free_memory_is_that_of_the_group_or_of_one_above_it(tmp_path, group):
    """Files that lie in memory are given up where it is needed."""
    here = f"sys/fs/cgroup/{group}memory"
    files = {f"{here}.max": "100000\n", f"{here}.current": "64000\n", f"{here}.stat": STAT}
    assert free_memory(system(tmp_path, "1:cpu:/\n0::/job/step\n", files)) == 40000


def test_free_memory_is_known_where_groups_are_not(tmp_path):
    """A kernel without groups, and a group whose use may not be read."""
    top = system(tmp_path, "0::/a\n", {"sys/fs/cgroup/a/memory.max": "40000\n"})
    assert free_memory(top) == 800 * 1024
    (top / "proc/self/cgroup").unlink()
    assert free_memory(top) == 800 * 1024


def test_free_memory_knows_the_first_version_of_groups(tmp_path):
    """In a container a group's own folder is the top, whatever its path is called outside."""
    here = "sys/fs/cgroup/memory/memory"
    files = {
        f"{here}.limit_in_bytes": "100000\n",
        f"{here}.usage_in_bytes": "64000\n",
        f"{here}.stat": STAT_V1,
    }
    top = system(tmp_path, "4:memory:/docker/0ca79\n5:cpu,cpuacct:/\n", files)
    assert free_memory(top) == 40000


def test_free_memory_is_not_known_beside_linux(tmp_path):
    assert free_memory(tmp_path) is None


def test_processes_of_a_machine_share_what_is_free_beside_their_own_weights(monkeypatch):
    module = torch.nn.Linear(1000, 1000)
    own = sum(4 * p.numel() for p in module.parameters())
    monkeypatch.setattr(preflight, "free_memory", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert preflight.memory_for(torch.device("cpu"), module) == 250 + own
    monkeypatch.setattr(preflight, "free_memory", lambda: None)
    assert preflight.memory_for(torch.device("cpu"), module) is None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_weights_in_a_mapped_file_are_free_already(monkeypatch, tmp_path):
    save_file({"weight": torch.ones(64, 64), "bias": torch.ones(64)}, tmp_path / "linear")
    module = torch.nn.Linear(64, 64)
    module.load_state_dict(load_file(tmp_path / "linear"), assign=True)
    module.bias = torch.nn.Parameter(torch.zeros(64))
    monkeypatch.setattr(preflight, "free_memory", lambda: 1000)
    assert preflight.memory_for(torch.device("cpu"), module) == 1000 + 4 * 64
