"""Which precision is chosen, and what is said of it."""

import os
import subprocess
import sys
import time

import pytest
import torch

from vlm import precision
from vlm.precision import PrecisionError, choose, gflops, machine, machine_line, speed_ratio


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
    assert values["device"] and values["instructions"]
    assert set(values["gflops"]) == {"float32", "bfloat16"}
    assert values["gflops"]["float32"] > 0
    assert values["instructions"] in machine_line()


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
