"""What benchmarks share: the precision of both sides, and the machine's kind."""

import argparse
import ast
import importlib.util
from pathlib import Path

import pytest
import torch

from vlm import precision

EVAL = Path(__file__).parents[1] / "eval"
spec = importlib.util.spec_from_file_location("eval_bench", EVAL / "bench.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def settings_of(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_precision(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(("ratio", "name"), [(4.0, "bf16"), (0.02, "fp32")])
def test_a_benchmark_computes_in_what_its_device_is_fast_in(ratio, name, monkeypatch, capsys):
    """And hands the name on to its processes; what is printed names the machine."""
    monkeypatch.setattr(precision, "speed_ratio", lambda device, dtype: (ratio, "measured"))
    monkeypatch.setattr(bench, "machine_line", lambda device: "a CPU, AVX2, 2 cores")
    settings = settings_of()
    choice = bench.chosen(settings)
    assert settings.precision == choice.name == name
    printed = capsys.readouterr()
    assert printed.out == f"machine: a CPU, AVX2, 2 cores\nprecision: {name} (measured)\n"
    assert not printed.err


def test_a_precision_that_is_slow_here_is_taken_with_a_warning(monkeypatch, capsys):
    monkeypatch.setattr(precision, "speed_ratio", lambda device, dtype: (0.1, "measured"))
    monkeypatch.setattr(bench, "machine_line", lambda device: "a CPU")
    assert bench.chosen(settings_of("--precision", "bf16")).dtype == torch.bfloat16
    assert "10 times as fast in fp32" in capsys.readouterr().err


def test_autocast_is_on_in_bf16_alone():
    for dtype in (torch.bfloat16, torch.float32):
        with bench.autocast(dtype):
            found = torch.nn.functional.linear(torch.ones(2, 4), torch.ones(3, 4)).dtype
        assert found == dtype


def test_every_benchmark_takes_a_precision_and_names_its_machine():
    names = ["loss_memory", "plan_memory", "contrastive_beside_open_clip"]
    paths = [*EVAL.glob("speed_*.py"), *(EVAL / f"{name}.py" for name in names)]
    assert len(paths) > len(names)
    for path in paths:
        tree = ast.walk(ast.parse(path.read_text()))
        called = {node.func.id for node in tree
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
        assert {"add_precision", "chosen"} <= called, path.name


def test_a_child_gets_the_same_options_but_those_that_differ(monkeypatch):
    monkeypatch.setattr(bench.sys, "argv", ["script.py", "--rounds", "9"])
    settings = argparse.Namespace(
        rounds=9, stages=[1, 2], profile=False, out_dir=None, precision="fp32", only=None
    )
    words = bench.command(settings, "ours", "frozen", stages=[2], profile=True)
    assert words[1:] == ["script.py", "--rounds", "9", "--stages", "2", "--profile",
                         "--precision", "fp32", "--only", "ours", "frozen"]  # fmt: skip


def test_variants_take_turns_and_rows_show_medians_and_ratios(capsys):
    turns = []

    def measured(variant):
        turns.append(variant)
        return {"s": {"ours": 2.0, "peer": 6.0}[variant] * len(turns), "mb": 10, "note": "text"}

    found = bench.medians(bench.in_turn(("ours", "peer"), 3, measured))
    assert turns == ["ours", "peer"] * 3
    assert found == {"ours": {"s": 6.0, "mb": 10}, "peer": {"s": 24.0, "mb": 10}}
    table = bench.Table(
        columns={"s": ("s", "6.2f")},
        ratios={"time": ("s", "5.2f"), "faster": ("s", "6.1f")},
        width=7,
        inverted=("faster",),
        lead=("head", 5),
    )
    table.print_head()
    table.print_rows(found, "h")
    assert capsys.readouterr().out.splitlines() == [
        "head  variant      s   time  faster",
        "h     ours      6.00  1.00x    1.0x",
        "h     peer     24.00  0.25x    4.0x",
    ]


def test_a_call_is_measured_with_the_memory_that_it_takes():
    def hold():
        return torch.ones(2**24).sum().item()  # 64 MiB

    found = bench.measure(hold)
    assert found.value == 2**24
    assert found.seconds > 0
    if bench.STATUS.exists():
        assert 50 < found.taken_mb <= found.peak_mb
    calls = []
    repeated = bench.repeat(lambda: calls.append(len(calls)) or len(calls), 3)
    assert repeated.values == [1, 2, 3, 4]
