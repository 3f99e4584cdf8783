"""Which precision is chosen, and what is said of it."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

import vlm
from tests.contrastive_runs import TINY, run, write_decoder
from vlm import precision
from vlm.commands import plan
from vlm.precision import (
    Choice,
    PrecisionError,
    choose,
    gflops,
    machine,
    machine_line,
    speed_ratio,
)
from vlm.training.checkpoints.format import CheckpointError
from vlm.training.memory.plan import machine_of
from vlm.training.runs import launch


@pytest.fixture
def measured(monkeypatch):
    """Sets how fast 16 bits are beside fp32."""

    def set_to(ratio):
        monkeypatch.setattr(precision, "speed_ratio", lambda device, dtype: (ratio, "measured"))

    return set_to


@pytest.mark.parametrize(("ratio", "name"), [(0.01, "fp32"), (1.0, "fp32"), (1.5, "bf16")])
def test_auto_takes_bf16_where_it_is_the_faster_one(measured, ratio, name):
    measured(ratio)
    assert choose("auto", "cpu").name == name
    assert choose("auto", "cpu").warning() is None


def test_what_is_asked_for_is_taken_and_warned_of_where_it_is_slow(measured):
    measured(0.05)
    assert choose("bf16", "cpu").dtype == torch.bfloat16
    assert "20 times as fast in fp32" in choose("bf16", "cpu").warning()
    assert choose("fp32", "cpu").warning() is None
    measured(3.0)
    assert choose("fp32", "cpu").name == "fp32"
    assert choose("fp32", "cpu").warning() is None
    assert choose("bf16", "cpu").warning() is None


def test_what_a_device_cannot_do_is_refused(measured):
    measured(0.0)
    with pytest.raises(PrecisionError, match="bf16"):
        choose("bf16", "cpu")
    assert choose("auto", "cpu").name == "fp32"
    with pytest.raises(ValueError, match="found 'fp8'"):
        choose("fp8", "cpu")


def test_probe_is_short_and_agrees_with_larger_products():
    """Rates of the probe's own products, on one thread; the order of the two dtypes is what counts,
    where they are not nearly alike."""
    precision._speed_ratio.cache_clear()
    start = time.perf_counter()
    ratio, reason = speed_ratio("cpu", torch.bfloat16)
    assert time.perf_counter() - start < 1  # 0.05 s on a machine without other work
    assert "bf16 products at" in reason
    larger = gflops("cpu", torch.bfloat16) / gflops("cpu", torch.float32)
    if not 0.5 < larger < 2:
        assert (ratio > 1) == (larger > 1)


def test_threads_stay_as_they_were():
    before = torch.get_num_threads()
    precision._speed_ratio.cache_clear()
    speed_ratio("cpu", torch.bfloat16)
    assert torch.get_num_threads() == before


def test_machine_states_name_instructions_and_rates():
    values = machine()
    assert values["device"]
    assert values["instructions"]
    assert set(values["gflops"]) == {"float32", "bfloat16"}
    assert values["gflops"]["float32"] > 0
    assert values["instructions"] in machine_line()


@pytest.mark.slow
def test_settings_that_bound_a_cpu_to_avx2_are_honoured():
    """Of a CPU with more, the measured choice and what is detected are then those of AVX2."""
    code = (
        "from vlm.precision import choose, instructions, supports\n"
        "print(choose('auto', 'cpu').name, instructions(), supports('avx512_f'))"
    )
    if not torch.cpu.get_capabilities().get("avx2"):
        pytest.skip("no CPU with AVX2")
    bound = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | bound, capture_output=True, text=True
    )
    assert run.stdout.split() == ["fp32", "AVX2", "False"], run.stderr


AMX = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")
"""Of `torch.cpu.get_capabilities`, those of a CPU with matrix tiles."""


@pytest.mark.parametrize(
    ("variable", "value", "left"),
    [
        ("ONEDNN_MAX_CPU_ISA", "ALL", AMX),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", AMX),
        ("ONEDNN_MAX_CPU_ISA", "AVX10_1_512_AMX", AMX),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16", AMX[1:]),
        ("ONEDNN_MAX_CPU_ISA", "avx10_1_512", AMX[1:]),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", AMX[1:]),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", AMX[2:]),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", AMX[2:]),
        ("ONEDNN_MAX_CPU_ISA", "AVX2_VNNI_2", AMX[3:]),
        ("ONEDNN_MAX_CPU_ISA", "AVX2_VNNI", AMX[3:]),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", AMX[3:]),
        ("ONEDNN_MAX_CPU_ISA", "AVX", ()),
        ("ONEDNN_MAX_CPU_ISA", "SSE41", ()),
        ("ATEN_CPU_CAPABILITY", "avx512", AMX),
        ("ATEN_CPU_CAPABILITY", "avx2", AMX[3:]),
        ("ATEN_CPU_CAPABILITY", "default", ()),
    ],
)
def test_bound_takes_away_what_is_beyond_it(monkeypatch, variable, value, left):
    """Of a CPU that has all of it."""
    for name in precision.BOUNDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(AMX, True))
    assert tuple(filter(precision.supports, AMX)) == AMX
    monkeypatch.setenv(variable, value)
    assert tuple(filter(precision.supports, AMX)) == left
    names = dict(precision.INSTRUCTIONS)
    assert precision.instructions() == (names[left[0]] if left else platform.machine())


@pytest.mark.parametrize(("value", "left"), [("default", ["bf16"]), ("", ["sve_bf16", "bf16"])])
def test_bound_of_torch_takes_away_vectors_of_any_length(monkeypatch, value, left):
    """Of a CPU of ARM's; NEON is what torch's kernels then take."""
    has = {"sve_bf16": True, "bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", value)
    assert list(filter(precision.supports, has)) == left


def dtype_of(model):
    return next(model.module.text.parameters()).dtype


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folders of one tiny model, stored in fp32 and in bf16."""
    folder = tmp_path_factory.mktemp("models")
    write_decoder(folder / "fp32")
    vlm.load(folder / "fp32", dtype="bfloat16").save(folder / "bf16")
    return folder


def test_bf16_model_opens_in_what_the_device_is_fast_in(stored, measured):
    measured(0.1)
    assert dtype_of(vlm.load(stored / "bf16")) == torch.float32
    assert dtype_of(vlm.load(stored / "bf16", dtype="stored")) == torch.bfloat16
    with pytest.warns(UserWarning, match="10 times as fast in float32"):
        model = vlm.load(stored / "bf16", dtype="bfloat16")
    assert dtype_of(model) == torch.bfloat16
    measured(4.0)
    assert dtype_of(vlm.load(stored / "bf16")) == torch.bfloat16
    assert dtype_of(vlm.load(stored / "fp32")) == torch.float32  # never rounded unasked


def test_dtype_that_the_device_cannot_compute_in_is_refused(stored, measured):
    measured(0.0)
    with pytest.raises(ValueError, match="bfloat16"):
        vlm.load(stored / "fp32", dtype="bfloat16")
    assert dtype_of(vlm.load(stored / "bf16")) == torch.float32


def settings_in(folder):
    return json.loads((folder / "settings.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(0.1, 4.0), (4.0, 0.1)])
def test_resumed_run_keeps_its_precision_and_says_so(tmp_path, measured, capsys, first, then):
    """On a device that is fast in another too, which is said."""
    name, other = ("fp32", "bf16") if first < 1 else ("bf16", "fp32")
    measured(first)
    run(tmp_path, **TINY, precision="auto", save_every=1)
    assert settings_in(tmp_path)["precision"] == name
    assert settings_in(tmp_path)["precision_reason"] == "measured"
    said = " ".join(capsys.readouterr().err.split())
    assert f"computes in {name}: measured" in said
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000002")
    measured(then)
    run(tmp_path, **TINY, precision="auto", resume=True)
    assert settings_in(tmp_path)["precision"] == name
    said = " ".join(capsys.readouterr().err.split())
    assert f"computes in {name}: as when the run began" in said
    assert ("times as fast in fp32" in said) == (name == "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)  # as another process would begin
    with pytest.raises(CheckpointError, match=f"precision: '{name}' then, '{other}' now"):
        run(tmp_path, **TINY, precision=other, resume=True)


def test_processes_compute_in_what_all_are_fast_in(monkeypatch, measured):
    measured(2.0)
    slow = Choice(name="fp32", reason="slow")
    monkeypatch.setattr(launch, "gather_object", lambda mine: [*mine, ("auto", slow)])
    settings = SimpleNamespace(precision="auto")
    state = SimpleNamespace(device=torch.device("cpu"), num_processes=2)
    assert launch._agreed(settings, state) == slow
    monkeypatch.setattr(launch, "gather_object", lambda mine: [*mine, ("fp32", slow)])
    assert launch._agreed(settings, state).name == "bf16"  # and `_require_alike` refuses


def test_plan_takes_the_precision_of_the_machine_that_is_planned_for(measured):
    measured(0.1)
    assert plan._precision(machine_of("8xH100-80G"), "auto") == "bf16"
    assert plan._precision(machine_of("cpu-16G"), "auto") == "fp32"
    assert plan._precision(machine_of("cpu-16G"), "bf16") == "bf16"
