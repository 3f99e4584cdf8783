"""Benchmarks: what they share, and that each runs."""

import argparse
import ast
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import image as tiny_image
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


def test_ratio_to_nothing_is_no_number(capsys):
    table = bench.Table(columns={}, ratios={"memory": ("mb", "6.2f")}, width=4)
    table.print_rows({"ours": {"mb": 2.0}, "peer": {"mb": 0.0}})
    assert capsys.readouterr().out.splitlines() == ["ours   1.00x", "peer    nanx"]


# Each benchmark from its command line to its table, at sizes that say nothing about speed.

FP32 = ("--precision", "fp32")


def run_script(name, *arguments):
    """What a benchmark prints, run as its users run it."""
    done = subprocess.run(
        [sys.executable, str(EVAL / f"{name}.py"), *map(str, arguments)],
        capture_output=True, text=True, timeout=250, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EVAL.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def cells(printed, first):
    """The words of the lines that begin with a word."""
    return [line.split() for line in printed.splitlines() if line.split()[:1] == [first]]


@pytest.fixture
def script(monkeypatch):
    """Opens a benchmark as a module, to make it smaller than its options can."""
    monkeypatch.syspath_prepend(str(EVAL))
    return importlib.import_module


@pytest.mark.slow
def test_speed_loss_compares_its_ways():
    printed = run_script(
        "speed_loss", *FP32, "--width", 64, "--vocab", 4096, "--positions", 512, "--rounds", 1,
        "--heads", "frozen",
    )  # fmt: skip
    assert "512 positions, 25% scored" in printed
    rows = {words[1]: words for words in cells(printed, "frozen")}
    assert set(rows) == {"ours", "ours-plain", "transformers"}
    losses = [float(words[5]) for words in rows.values()]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)
    assert all(float(words[2]) >= 0 for words in rows.values())


@pytest.mark.slow
def test_loss_memory_measures_batches_and_ranks(tmp_path):
    printed = run_script("loss_memory", *FP32, "--width", 8, "--batches", 64, "--out", tmp_path)
    assert len(cells(printed, "ours")) == len(cells(printed, "open_clip")) == 4
    points = json.loads((tmp_path / "batch.json").read_text())["points"]
    values = {(point["side"], point["loss"]): point["value"] for point in points}
    for loss in ("softmax", "sigmoid"):
        assert values["ours", loss] == pytest.approx(values["open_clip", loss], rel=1e-4)
    run_script(
        "loss_memory", *FP32, "--width", 8, "--ranks", 2, "--local-batch", 64, "--out", tmp_path
    )
    points = json.loads((tmp_path / "ranks.json").read_text())["points"]
    assert [(point["side"], point["ranks"]) for point in points] == [
        ("ours", 2), ("ours", 2), ("open_clip", 2),
    ]  # fmt: skip
    assert {path.name for path in tmp_path.glob("*.png")} == {"batch.png", "ranks.png"}


@pytest.mark.slow
def test_loss_memory_leaves_out_what_would_not_fit(tmp_path):
    printed = run_script(
        "loss_memory", *FP32, "--width", 8, "--batches", 64, "--memory-fraction", 0, "--out",
        tmp_path,
    )  # fmt: skip
    assert all("skipped:" in words for words in cells(printed, "open_clip")[:2])


@pytest.mark.slow
def test_speed_retrieval_finds_the_same_recalls():
    printed = run_script(
        "speed_retrieval", *FP32, "--images", 12, "--captions", 2, "--width", 8, "--rounds", 1,
        "--threads", 1,
    )  # fmt: skip
    assert "the same to the last digit" in printed
    assert cells(printed, "clip_benchmark")
    large = run_script("speed_retrieval", *FP32, "--large", 16, "--width", 8, "--threads", 1)
    assert "16 x 16, width 8, on cpu: ours alone" in large


@pytest.mark.slow
def test_plan_memory_estimates_and_measures(script):
    plan_memory = script("plan_memory")
    for case in plan_memory.CASES.values():
        module, rows, objective = case.make(True)
        step = plan_memory.SimulatedStep(module, case.stage, objective, torch.float32, gpu=False)
        assert step.run([rows]).peak.total > 0
    printed = run_script("plan_memory", *FP32, "--cases", "line reader, all")
    (words,) = cells(printed, "line")
    planned, measured = map(float, words[3:5])
    assert planned == pytest.approx(measured, rel=0.5)


@pytest.mark.slow
def test_speed_training_trains_every_variant(script, monkeypatch):
    speed_training = script("speed_training")
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=2, image_size=32, patch_size=8)  # fmt: skip
    text = dict(vocab_size=120, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                num_attention_heads=3, num_key_value_heads=1, pad_token_id=2)  # fmt: skip
    tiny = functools.partial(speed_training.llava, vision, text, image_id=119)
    monkeypatch.setattr(speed_training, "llava", tiny)
    speed_training.require_same(*speed_training.losses(tiny()), "Llava")
    settings = argparse.Namespace(precision="fp32", steps=2, profile=False, nanovlm=None)
    found = {
        variant: speed_training.train(variant, 1, settings)
        for variant in (*speed_training.VARIANTS["fp32"], speed_training.CACHED)
    }
    assert all(each["samples_per_s"] > 0 for each in found.values())
    assert found["ours"]["gflops"] > 0
    losses = [each["loss"] for each in found.values()]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)


@pytest.mark.slow
def test_speed_contrastive_trains_every_variant(script, monkeypatch, tmp_path):
    speed_contrastive = script("speed_contrastive")
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1,
                     "layers": 1},
    }  # fmt: skip
    (tmp_path / "tiny-bench.json").write_text(json.dumps(config))
    speed_contrastive.open_clip.add_model_config(tmp_path)
    monkeypatch.setattr(speed_contrastive, "ARCHITECTURE", "tiny-bench")
    ours, theirs = speed_contrastive.losses()
    assert ours == pytest.approx(theirs, abs=1e-4)
    found = [
        speed_contrastive.train(variant, 2, torch.float32)
        for variant in speed_contrastive.VARIANTS["fp32"]
    ]
    assert all(each["samples_per_s"] > 0 and each["peak_mb"] > 0 for each in found)
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], abs=1e-3)


@pytest.mark.slow
def test_speed_ocr_writes_the_same_ids(script, monkeypatch):
    speed_ocr = script("speed_ocr")
    small = speed_ocr.trocr.SIZES["small"]
    tiny = dataclasses.replace(
        small,
        vision=small.vision | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                               "num_attention_heads": 2},
        text=small.text | {"vocab_size": 500, "d_model": 32, "decoder_layers": 1,
                           "decoder_attention_heads": 2, "decoder_ffn_dim": 48,
                           "cross_attention_hidden_size": 32},
    )  # fmt: skip
    monkeypatch.setitem(speed_ocr.trocr.SIZES, "tiny", tiny)
    monkeypatch.setattr(speed_ocr, "SIZE", "tiny")
    equal, different = speed_ocr.same_ids(2)
    assert equal
    assert different > 1
    for variant in speed_ocr.VARIANTS:
        found = speed_ocr.measure(variant, 1, torch.float32)
        assert found["lines_per_s"] > 0
        assert 0 < found["encoder_s"] < speed_ocr.BATCH / found["lines_per_s"] * 2


@pytest.mark.slow
def test_contrastive_training_beside_open_clip_prints_both(script, monkeypatch, tmp_path, capsys):
    beside = script("contrastive_beside_open_clip")
    rows = []
    for number in range(8):
        tiny_image(number, (40, 40)).save(tmp_path / f"{number}.png")
        group = ("flag", "face")[number % 2]
        rows.append({"image": f"{number}.png", "caption": f"{group} {number}", "group": group})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(beside, "TRAIN", str(path))
    monkeypatch.setattr(beside, "HELD_OUT", str(path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(
        sys, "argv", ["beside", *FP32, "--steps", "2", "--batch", "4", "--out", str(tmp_path / "o")]
    )
    beside.main()
    printed = capsys.readouterr().out
    assert "2 steps of 4 pairs each, 1 epochs of open_clip's" in printed
    (ours,), (peer,) = cells(printed, "ours"), cells(printed, "open_clip")
    assert ours[-1] == peer[-1]  # as many parameters
    assert "zero-shot group of ours" in printed
