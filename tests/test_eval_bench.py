"""Benchmarks: what they share, and that each runs."""

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import mmap
import sys
from pathlib import Path
from unittest import mock

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
        with mmap.mmap(-1, 2**26) as pages:  # 64 MiB that no freed memory can serve for
            pages.write(b"1" * 2**26)
            return pages[-1]

    found = bench.measure(hold)
    assert found.value == ord("1")
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


def test_a_child_is_a_process_whose_last_line_is_read(monkeypatch, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        "import json, os, sys\nprint('noise')\nprint(json.dumps([sys.argv[1:], os.environ['X']]))"
    )
    monkeypatch.setattr(bench.sys, "argv", [str(path)])
    settings = argparse.Namespace(rounds=9, only=None)
    assert bench.child(settings, "ours", env={"X": "1"}) == [
        ["--rounds", "9", "--only", "ours"],
        "1",
    ]
    path.write_text("import sys\nsys.exit(3)")
    with pytest.raises(SystemExit, match="ended with 3"):
        bench.child(settings, "ours")


# Each benchmark from its command line to its table, at sizes that say nothing about speed.


@pytest.fixture
def script(monkeypatch, capsys):
    """Opens a benchmark as a module; `run` gives what its command line prints. Its children run in
    this process."""
    monkeypatch.syspath_prepend(str(EVAL))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**18))  # some set it for their children

    def run(module, *arguments):
        words = [module.__name__, "--precision", "fp32", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    def child(module, settings, *only, env=None, **changed):
        words = bench.command(settings, *only, **changed)
        out = io.StringIO()
        with mock.patch.object(sys, "argv", words[1:]), contextlib.redirect_stdout(out):
            module.main()
        return json.loads(out.getvalue().splitlines()[-1])

    def opened(name):
        module = importlib.import_module(name)
        if hasattr(module, "child"):
            monkeypatch.setattr(module, "child", functools.partial(child, module))
        return module, functools.partial(run, module)

    return opened


def cells(printed, first):
    """The words of the lines that begin with a word."""
    return [line.split() for line in printed.splitlines() if line.split()[:1] == [first]]


@pytest.mark.slow
def test_speed_loss_compares_its_ways(script):
    _, run = script("speed_loss")
    printed = run("--width", 64, "--vocab", 4096, "--positions", 512, "--rounds", 1)
    assert "512 positions, 25% scored" in printed
    for head in ("frozen", "trainable"):
        rows = {words[1]: words for words in cells(printed, head)}
        assert set(rows) == {"ours", "ours-plain", "transformers"}
        losses = [float(words[5]) for words in rows.values()]
        assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)


@pytest.mark.slow
def test_loss_memory_measures_batches_and_ranks(script, monkeypatch, tmp_path):
    loss_memory, run = script("loss_memory")
    printed = run("--width", 8, "--batches", 64, 128, "--out", tmp_path)
    assert len(cells(printed, "ours")) == len(cells(printed, "open_clip")) == 6
    points = json.loads((tmp_path / "batch.json").read_text())["points"]
    values = {(p["side"], p["loss"], p["batch"]): p["value"] for p in points}
    for loss in ("softmax", "sigmoid"):
        expected = values["open_clip", loss, 128]
        assert values["ours", loss, 128] == pytest.approx(expected, rel=1e-4)
    here = lambda measure, args, nprocs: measure(0, *args)  # noqa: E731
    monkeypatch.setattr(loss_memory.torch.multiprocessing, "spawn", here)
    run("--width", 8, "--ranks", 1, "--local-batch", 64, "--out", tmp_path)
    points = json.loads((tmp_path / "ranks.json").read_text())["points"]
    assert [(p["side"], p["loss"]) for p in points] == [
        ("ours", "sigmoid"), ("ours", "softmax"), ("open_clip", "sigmoid"),
    ]  # fmt: skip
    assert points[0]["value"] == pytest.approx(points[2]["value"], rel=1e-4)
    assert {path.name for path in tmp_path.glob("*.png")} == {"batch.png", "ranks.png"}
    printed = run("--width", 8, "--batches", 64, "--memory-fraction", 0, "--out", tmp_path)
    assert ["skipped:" in words for words in cells(printed, "open_clip")[:2]] == [True, True]


@pytest.mark.slow
def test_speed_retrieval_finds_the_same_recalls(script, monkeypatch):
    speed_retrieval, run = script("speed_retrieval")
    monkeypatch.setattr(speed_retrieval, "product_peak", lambda width, device: 1.0)
    printed = run("--images", 12, "--captions", 2, "--width", 8, "--rounds", 1)
    assert "the same to the last digit" in printed
    assert len(cells(printed, "clip_benchmark")) == 1
    assert "16 x 16, width 8, on cpu: ours alone" in run("--large", 16, "--width", 8)


@pytest.mark.slow
def test_plan_memory_estimates_and_measures_every_case(script, monkeypatch):
    plan_memory, run = script("plan_memory")
    for name, case in plan_memory.CASES.items():
        small = dataclasses.replace(
            case, make=lambda _, case=case: case.make(True), micro_batches=1
        )
        monkeypatch.setitem(plan_memory.CASES, name, small)
    lines = run().splitlines()[-len(plan_memory.CASES) :]
    for name, line in zip(plan_memory.CASES, lines, strict=True):
        planned, _, difference = line.removeprefix(name).split()
        assert float(planned) > 0
        assert difference.endswith("%")


@pytest.mark.slow
def test_speed_training_trains_every_variant(script, monkeypatch):
    speed_training, run = script("speed_training")
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=2, image_size=32, patch_size=8)  # fmt: skip
    text = dict(vocab_size=120, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                num_attention_heads=3, num_key_value_heads=1, pad_token_id=2)  # fmt: skip
    tiny = functools.partial(speed_training.llava, vision, text, image_id=119)
    monkeypatch.setattr(speed_training, "llava", tiny)
    printed = run("--stages", 1, 3, "--rounds", 1, "--steps", 2)
    assert "stage 1; ours at" in printed
    assert [len(cells(printed, name)) for name in ("ours", "llava-fp32")] == [2, 2]
    (cached,) = cells(printed, "ours,")
    losses = [float(words[3]) for words in [*cells(printed, "ours"), *cells(printed, "llava-fp32")]]
    assert losses == pytest.approx([losses[0]] * 4, abs=2e-4)
    assert float(cached[5]) == pytest.approx(losses[0], abs=2e-4)


@pytest.mark.slow
def test_speed_finetune_trains_every_variant(script, monkeypatch):
    _, run = script("speed_finetune")
    cases = importlib.import_module("finetune_cases")
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=2, image_size=64, patch_size=8)  # fmt: skip
    text = cases.SMOLVLM_TEXT | dict(vocab_size=120, hidden_size=24, intermediate_size=40,
                                              num_hidden_layers=2, num_attention_heads=3,
                                              num_key_value_heads=1)  # fmt: skip
    monkeypatch.setattr(cases, "SMOLVLM_VISION", vision)
    monkeypatch.setattr(cases, "SMOLVLM_TEXT", text)
    qwen = cases.QWEN_TEXT | dict(vocab_size=120, hidden_size=24, intermediate_size=40,
                                  num_attention_heads=3, num_key_value_heads=1)  # fmt: skip
    qwen["rope_parameters"] = qwen["rope_parameters"] | {"mrope_section": [2, 1, 1]}
    monkeypatch.setattr(cases, "QWEN_TEXT", qwen)
    monkeypatch.setattr(cases, "QWEN_VISION", cases.QWEN_VISION | dict(embed_dim=32, num_heads=2))
    printed = run("--tower", "frozen", "full", "--rounds", 1, "--steps", 2, "--layers", 1)
    assert "1 layers of each alone" in printed
    ours, theirs, cached = (cells(printed, name) for name in ("ours", "transformers", "ours,"))
    assert (len(ours), len(theirs), len(cached)) == (4, 4, 2)
    for case in range(2):  # of each, the tower frozen, then in full
        rows = [*ours[2 * case :][:2], *theirs[2 * case :][:2]]
        losses = [float(words[3]) for words in rows] + [float(cached[case][5])]
        assert losses == pytest.approx([losses[0]] * 5, abs=2e-4)


@pytest.mark.slow
def test_speed_contrastive_trains_every_variant(script, monkeypatch, tmp_path):
    speed_contrastive, run = script("speed_contrastive")
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1,
                     "layers": 1},
    }  # fmt: skip
    (tmp_path / "tiny-bench.json").write_text(json.dumps(config))
    speed_contrastive.open_clip.add_model_config(tmp_path)
    monkeypatch.setattr(speed_contrastive, "ARCHITECTURE", "tiny-bench")
    printed = run("--rounds", 1, "--steps", 2)
    (ours,), (peer,) = cells(printed, "ours"), cells(printed, "open_clip-fp32")
    assert float(ours[3]) == pytest.approx(float(peer[3]), abs=2e-3)


@pytest.mark.slow
def test_speed_ocr_writes_the_same_ids(script, monkeypatch):
    speed_ocr, run = script("speed_ocr")
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
    monkeypatch.setattr(speed_ocr, "TOKENS", 4)
    printed = run("--rounds", 1, "--repeats", 1)
    assert "fp32 ids: identical" in printed
    assert len(cells(printed, "ours")) == len(cells(printed, "transformers")) == 1


@pytest.mark.slow
def test_contrastive_training_beside_open_clip_prints_both(script, monkeypatch, tmp_path):
    beside, run = script("contrastive_beside_open_clip")
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
    printed = run("--steps", 2, "--batch", 4, "--out", tmp_path / "out")
    assert "2 steps of 4 pairs each, 1 epochs of open_clip's" in printed
    (ours,), (peer,) = cells(printed, "ours"), cells(printed, "open_clip")
    assert ours[-1] == peer[-1]  # as many parameters
    assert "zero-shot group of ours" in printed
