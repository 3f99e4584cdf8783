import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tests import tiny, training
from vlm.data.example import BadRow, Example, ImageRef, Turn
from vlm.pixels import BadImage
from vlm.training import stages
from vlm.training.checkpoint import CheckpointError, list_checkpoints
from vlm.training.run import RunError
from vlm.training.stages import FROZEN, StageError

ROOT = Path(__file__).parent.parent


def launch(out, processes=1, **options):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes"]
    command += [str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--module", "tests.training", str(out), json.dumps(options)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def learned(history):
    return [
        (line["step"], line["batch"], pytest.approx(line["loss"], abs=1e-6)) for line in history
    ]


@pytest.mark.parametrize("micro_batch", [2, 1])
def test_step_is_the_same_for_every_split_into_micro_batches(tmp_path, micro_batch):
    """T9: loss, gradient norm and weights, with answers of unequal lengths and text-only rows."""
    whole, _, expected = training.train(tmp_path / "whole")
    split = dataclasses.replace(training.STAGE, micro_batch=micro_batch)
    parts, _, found = training.train(tmp_path / "parts", split)
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b["batch"] == a["batch"]
    for name, weight in training.weights(whole).items():
        torch.testing.assert_close(training.weights(parts)[name], weight, atol=2e-5, rtol=1e-4)


def test_two_processes_follow_one(tmp_path):
    """T9, T10: also where one rank's micro-batch holds text alone."""
    _, _, expected = training.train(tmp_path / "one")
    out = launch(tmp_path / "two", processes=2, stage={"micro_batch": 1})
    assert out.returncode == 0, out.stderr[-2000:]
    found = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert (b["batch"], b["scored"], b["samples"]) == (a["batch"], a["scored"], a["samples"])


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_run_resumes_to_the_same_metrics(tmp_path, workers):
    """T13: SIGKILL between checkpoints; batches and losses after resuming are the uninterrupted
    run's, with shuffling and loader workers."""
    _, _, expected = training.train(tmp_path / "whole", save_every=2)
    killed = launch(tmp_path / "cut", kill_at=5, save_every=2, workers=workers)
    assert killed.returncode != 0
    _, progress, found = training.train(
        tmp_path / "cut", resume=True, save_every=2, workers=workers
    )
    assert learned(expected) == learned(found)
    assert progress.step == training.STAGE.steps
    assert len(list_checkpoints(tmp_path / "cut/checkpoints")) == 2


def test_interrupt_saves_and_says_how_to_go_on(tmp_path):
    import signal

    from vlm.training.fit import Interrupted
    from vlm.training.run import Run

    log = Run.log

    def log_and_interrupt(self, step, figures):
        log(self, step, figures)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    Run.log = log_and_interrupt
    try:
        with pytest.raises(Interrupted, match=r"after step 4, saved in .*go on with --resume"):
            training.train(tmp_path / "run")
    finally:
        Run.log = log
    _, progress, history = training.train(tmp_path / "run", resume=True)
    assert [line["step"] for line in history] == [1, 2, 3, 4, 5, 6]
    assert progress.samples == 24


def test_only_the_adaptor_changes(tmp_path):
    """Frozen weights are bit-identical after training, trained ones are not."""
    chosen = training.model()
    before = training.weights(chosen)
    training.train(tmp_path, chosen=chosen)
    for name, weight in training.weights(chosen).items():
        assert torch.equal(weight, before[name]) != name.startswith("adaptor."), name


def test_masters_are_fp32_and_frozen_parts_bf16(tmp_path):
    """T14: read from the live module after preparing; a rate of 1e-6 still changes weights."""
    stage = dataclasses.replace(
        training.STAGE, rates=(("adaptor.*", 1e-6), ("*", FROZEN)), steps=1, warmup=0
    )
    chosen = training.model()
    before = training.weights(chosen)
    training.train(tmp_path, stage, chosen=chosen, precision="bf16")
    for name, parameter in chosen.module.named_parameters():
        trained = name.startswith("adaptor.")
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16)
        if trained and parameter.dim() > 1:
            assert not torch.equal(parameter, before[name])


def test_rates_of_each_pattern_are_read_back_from_the_live_optimizer():
    """T22: peak and current rate of every parameter, decay on matrices only."""
    module = training.model().module
    stage = dataclasses.replace(
        training.STAGE,
        rates=(("adaptor.layers.0.*", 1e-3), ("adaptor.*", 1e-4), ("text.*", 1e-5), ("*", FROZEN)),
        weight_decay=0.1,
    )
    stages.prepare(module, stage, torch.float32)
    optimizer = stages.optimizer_for(module, stage)
    stages.set_rates(optimizer, 0.5)
    live = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in module.named_parameters():
        expected = (
            1e-3 if name.startswith("adaptor.layers.0.")
            else 1e-4 if name.startswith("adaptor.")
            else 1e-5
        )  # fmt: skip
        if name.startswith("tokenizer."):
            assert id(parameter) not in live
            continue
        assert live[id(parameter)]["lr"] == expected / 2
        assert live[id(parameter)]["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
    table = {row[0]: row for row in stages.describe(module, optimizer)}
    assert table["adaptor"][3] == "0.0001, 0.001"
    assert table["tokenizer"][3] == "frozen"


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((("adaptor.*", 1e-3),), r"matched by no pattern \(\d+\): \['tokenizer.patch.weight'"),
        ((("adapter.*", 1e-3), ("*", FROZEN)), r"patterns matching no parameter: \['adapter.\*'\]"),
        ((("*", FROZEN),), "trains no parameter"),
    ],
)
def test_stage_that_does_not_fit_names_what_does_not(rates, message):
    stage = dataclasses.replace(training.STAGE, rates=rates)
    with pytest.raises(StageError, match=message):
        stages.prepare(training.model().module, stage, torch.float32)


def test_trainable_parameter_without_gradient_is_an_error(tmp_path):
    chosen = training.model()
    chosen.module.adaptor.extra = nn.Linear(2, 2)
    with pytest.raises(StageError, match=r"2 trainable parameters got no gradient.*extra.weight"):
        training.train(tmp_path, chosen=chosen)


def test_batch_norm_and_frozen_parts_stay_in_evaluation_mode():
    module = training.model().module
    module.adaptor.norm = nn.BatchNorm1d(4)
    module.adaptor.norm.half()
    stages.prepare(module, training.STAGE, torch.bfloat16)
    assert module.adaptor.training
    assert not module.adaptor.norm.training
    assert not any(part.training for part in (module.tokenizer, module.text))
    assert module.adaptor.norm.weight.dtype == torch.float32


def bad_rows(tmp_path):
    cut = tmp_path / "cut.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(cut)
    cut.write_bytes(cut.read_bytes()[:70])
    unanswered = Example("rows:11", (Turn("user", ("and?",)),))
    return [
        *training.examples(),
        tiny.example("rows:10", images=(ImageRef(cut, "cut.png"),)),
        unanswered,
    ]


def test_bad_row_stops_the_run_and_is_named(tmp_path):
    for workers in (0, 1):
        with pytest.raises((BadRow, BadImage), match=r"rows:1[01]: "):
            training.train(tmp_path / str(workers), rows=bad_rows(tmp_path), workers=workers)


def test_bad_rows_are_skipped_only_when_told_and_counted(tmp_path):
    """15 rows in 24 draws: each bad row is met at least once; every other row is trained on."""
    _, progress, history = training.train(
        tmp_path / "run", rows=bad_rows(tmp_path), on_bad_row="skip"
    )
    assert progress.skipped == 24 - sum(line["samples"] for line in history)
    assert 2 <= progress.skipped <= 4
    named = "\n".join(progress.examples_skipped)
    assert "cut.png" in named
    assert "expected an assistant turn" in named


def test_run_folder_is_never_overwritten_and_resumes_only_itself(tmp_path):
    training.train(tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run"):
        training.train(tmp_path / "run")
    with pytest.raises(CheckpointError, match="steps: 6 then, 8 now"):
        training.train(tmp_path / "run", dataclasses.replace(training.STAGE, steps=8), resume=True)
    with pytest.raises(CheckpointError, match="frozen weights are not those of this model"):
        training.train(tmp_path / "run", resume=True, chosen=training.model(seed=5))
    with pytest.raises(RunError, match="nothing to resume"):
        training.train(tmp_path / "none", resume=True)


def test_checkpoint_that_is_broken_is_named(tmp_path):
    training.train(tmp_path / "run")
    (path,) = list_checkpoints(tmp_path / "run/checkpoints")
    state = path / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"state\.pt: broken checkpoint"):
        training.train(tmp_path / "run", resume=True)


def test_full_disk_stops_before_writing(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs \d+ MB, its disk has 0 MB free"):
        training.train(tmp_path / "run")
    assert list_checkpoints(tmp_path / "run/checkpoints") == []
