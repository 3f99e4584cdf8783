import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time

import pytest
import torch
from PIL import Image
from torch import nn

from tests import tiny, training
from tests.runs import launch, learned, lines
from vlm.data.example import BadRow, Example, Turn
from vlm.pixels import BadImage
from vlm.pixels.image_ref import ImageRef
from vlm.training import stages
from vlm.training.checkpoints import format as checkpoint_format
from vlm.training.checkpoints.checkpoint import CheckpointError, list_checkpoints
from vlm.training.fit import Interrupted
from vlm.training.loading.loader import _leave_stopping_to_the_loop
from vlm.training.objectives import next_token
from vlm.training.run_folder import Run, RunError
from vlm.training.stages import FROZEN, StageError
from vlm.weights import same_bits


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [2, 1])
def test_step_is_the_same_for_every_split_into_micro_batches(tmp_path, micro_batch):
    """Loss, gradient norm and weights, with answers of unequal lengths and text-only rows."""
    whole, _, expected = training.train(tmp_path / "whole")
    split = dataclasses.replace(training.STAGE, micro_batch=micro_batch)
    parts, _, found = training.train(tmp_path / "parts", split)
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b["batch"] == a["batch"]
    for name, weight in training.weights(whole).items():
        torch.testing.assert_close(training.weights(parts)[name], weight, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("by_kind", [False, True], ids=["shuffled", "one rank without images"])
def test_two_processes_follow_one(tmp_path, by_kind):
    """Loss, gradient norm and weights, also where one rank holds text alone throughout."""
    data = training.in_order(training.split_by_kind()) if by_kind else None
    one, _, expected = training.train(tmp_path / "one", data=data)
    done = launch(tmp_path / "two", 2, stage={"micro_batch": 2}, split_by_kind=by_kind)
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(expected, lines(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert (b["batch"], b["scored"], b["samples"]) == (a["batch"], a["scored"], a["samples"])
    two = torch.load(tmp_path / "two/weights.pt")
    for name, weight in training.weights(one).items():
        torch.testing.assert_close(two[name], weight, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_killed_processes_resume_on_two_and_on_one(tmp_path):
    """Optimizer state saved by two ranks reloads on two ranks, and on one."""
    _, _, expected = training.train(tmp_path / "whole")
    split = {"micro_batch": 2}
    assert launch(tmp_path / "2", 2, stage=split, kill_at=5, save_every=2).returncode
    shutil.copytree(tmp_path / "2", tmp_path / "1")
    done = launch(tmp_path / "2", 2, stage=split, save_every=2, resume=True)
    assert done.returncode == 0, done.stderr[-2000:]
    training.train(tmp_path / "1", save_every=2, resume=True)
    for resumed in ("2", "1"):
        for a, b in zip(expected, lines(tmp_path / resumed), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
            assert b["batch"] == a["batch"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_run_resumes_to_the_same_metrics(tmp_path, workers):
    """SIGKILL between checkpoints; batches and losses after resuming are the uninterrupted
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


@pytest.mark.slow
def test_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    _, _, expected = training.train(tmp_path / "whole")
    assert launch(tmp_path / "cut", kill_at=2).returncode
    with pytest.raises(RunError, match="already holds a run"):
        training.train(tmp_path / "cut")
    _, _, found = training.train(tmp_path / "cut", resume=True)
    assert learned(expected) == learned(found)


@pytest.mark.slow
def test_resume_is_exact_with_dropout(tmp_path):
    """Random numbers of a step depend on the seed, the step and the rank alone."""
    _, _, expected = training.train(tmp_path / "whole", dropout=0.3)
    assert launch(tmp_path / "cut", kill_at=5, save_every=2, dropout=0.3).returncode
    _, _, found = training.train(tmp_path / "cut", resume=True, dropout=0.3)
    assert learned(expected) == learned(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("workers", [0, 1])
def test_stop_request_saves_and_says_how_to_go_on(tmp_path, monkeypatch, kind, workers):
    """The request reaches the loop and, as from a terminal or scheduler, the loader's workers."""
    log = Run.log

    def log_and_ask_to_stop(self, step, figures):
        log(self, step, figures)
        if step == 3:
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, kind)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_ask_to_stop)
        with pytest.raises(Interrupted, match=r"after step 4, saved in .*go on with --resume"):
            training.train(tmp_path / "run", workers=workers)
    _, progress, history = training.train(tmp_path / "run", resume=True)
    assert [line["step"] for line in history] == [1, 2, 3, 4, 5, 6]
    assert progress.samples == 24


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[1], [0, 1]], ids=["one rank", "all ranks"])
def test_stop_request_to_any_rank_saves_once_and_ends_all(tmp_path, ranks):
    stop = {"step": 3, "ranks": ranks}
    done = launch(tmp_path, 2, stage={"micro_batch": 2}, save_every=4, stop=stop)
    assert done.returncode
    assert done.stderr.count("Interrupted: stopped after step 4, saved in") == 2
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step_00000004"]
    _, progress, history = training.train(tmp_path, resume=True)
    assert progress.step == len(history) == 6


def test_loss_that_is_no_number_stops_the_run_and_changes_nothing(tmp_path):
    chosen = training.model()
    with torch.no_grad():
        chosen.module.text.lm_head.weight[5] = float("nan")
    before = training.weights(chosen)
    with pytest.raises(StageError, match=r"the loss of step 1 is nan; .* Its rows here: \['"):
        training.train(tmp_path, chosen=chosen)
    after = training.weights(chosen)
    assert all(torch.equal(after[n], before[n]) for n in before if n.startswith("adaptor."))


def test_only_the_adaptor_changes(tmp_path):
    """Frozen weights are bit-identical after training, trained ones are not."""
    chosen = training.model()
    before = training.weights(chosen)
    training.train(tmp_path, chosen=chosen)
    for name, weight in training.weights(chosen).items():
        assert torch.equal(weight, before[name]) != name.startswith("adaptor."), name


def test_masters_are_fp32_and_frozen_parts_bf16(tmp_path):
    """Read from the live module after preparing; a rate of 1e-6 still changes weights."""
    stage = dataclasses.replace(
        training.STAGE, rates=(("adaptor.*", 1e-6), ("*", FROZEN)), steps=1, warmup_steps=0
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
    """Peak and current rate of every parameter, decay on matrices only."""
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


def test_run_that_fails_leaves_no_worker_behind(tmp_path):
    """Its error, and so every frame of the loop, is alive: workers must not wait for its end."""
    with pytest.raises((BadRow, BadImage)) as error:
        training.train(tmp_path / "run", rows=bad_rows(tmp_path), workers=2)
    assert not multiprocessing.active_children()
    assert error.tb


def test_worker_ends_at_the_second_request():
    """What multiprocessing sends a worker that is left over must end it, or exit waits for ever."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def wait():
        _leave_stopping_to_the_loop(0)
        ready.set()
        while True:
            time.sleep(0.01)

    worker = context.Process(target=wait, daemon=True)
    worker.start()
    assert ready.wait(20)
    os.kill(worker.pid, signal.SIGINT)
    worker.terminate()
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == -signal.SIGTERM


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


def test_counting_operations_changes_no_gradient(tmp_path, monkeypatch):
    """Torch's counter computes by other kernels; what it counts is thrown away."""
    from vlm.training.meter import Meter

    counted, _, with_counter = training.train(tmp_path / "a", precision="bf16", dropout=0.3)
    monkeypatch.setattr(
        Meter, "count_flops", lambda self, run, cost: setattr(self, "flops_per_cost", 1.0)
    )
    plain, _, without = training.train(tmp_path / "b", precision="bf16", dropout=0.3)
    for a, b in zip(with_counter, without, strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    assert same_bits(training.weights(counted), training.weights(plain))


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for out in ("notes", "notes/run"):
        with pytest.raises(
            RunError, match=r"expected a folder to write to, found the file .*notes"
        ):
            training.train(tmp_path / out)


def test_gradient_that_is_not_finite_changes_nothing(tmp_path):
    """A finite loss may have one; clipping would spread it to every weight."""
    chosen = training.model()
    weight = next(p for p in chosen.module.adaptor.parameters() if p.dim() > 1)
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = training.weights(chosen)
    with pytest.raises(StageError, match=r"the gradient norm of step 1 is (inf|nan); the optim"):
        training.train(tmp_path / "run", chosen=chosen)
    assert same_bits(before, training.weights(chosen))


def test_evaluation_that_fails_loses_no_step(tmp_path):
    def gone():
        raise BadRow("held-out row 3 is gone")

    with pytest.raises(BadRow):
        training.train(tmp_path / "run", evaluate=gone, eval_every=2, save_every=2)
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == [
        "step_00000002"
    ]


def test_step_whose_rows_are_all_skipped_stops_the_run(tmp_path):
    rows = [Example(f"r{i}", (Turn("user", ("and?",)),)) for i in range(4)]
    with pytest.raises(StageError, match=r"every row of step 1 was skipped.*an assistant"):
        training.train(tmp_path, rows=rows, on_bad_row="skip")


def test_run_folder_is_never_overwritten_and_resumes_only_itself(tmp_path):
    """Settings, stage, rows and frozen weights: whatever differs is named, and nothing written."""
    run = tmp_path / "run"
    training.train(run)
    settings = (run / "settings.json").read_text()
    with pytest.raises(RunError, match="already holds a run"):
        training.train(run)
    with pytest.raises(CheckpointError, match="steps: 6 then, 8 now"):
        training.train(run, dataclasses.replace(training.STAGE, steps=8), resume=True)
    with pytest.raises(CheckpointError, match=r"stage\.clip: 1\.0 then, 5\.0 now.*--change stage"):
        training.train(run, dataclasses.replace(training.STAGE, clip=5.0), resume=True)
    with pytest.raises(CheckpointError, match=r"data\.0 tiny: '13 rows, .* then, '7 rows, .* now"):
        training.train(run, rows=training.examples()[:7], resume=True)
    with pytest.raises(CheckpointError, match="frozen weights are not those of this model"):
        training.train(run, resume=True, chosen=training.model(seed=5))
    with pytest.raises(RunError, match="nothing to resume"):
        training.train(tmp_path / "none", resume=True)
    assert (run / "settings.json").read_text() == settings


def test_run_goes_on_with_the_changes_that_are_named(tmp_path, capsys):
    run, longer = tmp_path / "run", dataclasses.replace(training.STAGE, steps=8)
    training.train(run)
    with pytest.raises(CheckpointError, match=r"\['speed'\] name no setting .* any of \['"):
        training.train(run, longer, resume=True, change=("speed",))
    with pytest.raises(ValueError, match=r"change \['steps'\] goes with resume"):
        training.train(tmp_path / "new", change=("steps",))
    _, progress, history = training.train(run, longer, resume=True, change=("steps",))
    assert (progress.step, progress.samples, len(history)) == (8, 32, 8)
    said = capsys.readouterr().err
    assert "changed since step_00000006: steps: 6 then, 8 now" in said
    assert said.count("8 now") == 1


def test_run_goes_on_from_the_checkpoint_before_a_broken_one(tmp_path, capsys):
    whole, _, expected = training.train(tmp_path / "run", save_every=2)
    _, newest = list_checkpoints(tmp_path / "run/checkpoints")
    (file,) = newest.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-100])
    chosen, _, found = training.train(tmp_path / "run", resume=True, save_every=2)
    assert re.search(
        r"broken checkpoint: .*distcp: expected \d+ bytes, found \d+; set aside as "
        r"broken_step_00000006, going on from step_00000004",
        capsys.readouterr().err,
    )
    assert learned(expected) == learned(found)
    assert same_bits(training.weights(chosen), training.weights(whole))


def test_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    write = checkpoint_format.write

    def fill_the_disk(final, *rest):
        if final.name == "step_00000004":
            raise OSError(28, "No space left on device")
        write(final, *rest)

    monkeypatch.setattr(checkpoint_format, "write", fill_the_disk)
    message = r"step_00000004 could not be written: .*No space left.*whole one is step_00000002"
    with pytest.raises(CheckpointError, match=message):
        training.train(tmp_path, save_every=2)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000002"]


def test_evaluation_that_a_kill_prevented_is_made_up_for(tmp_path, monkeypatch):
    counts = iter(range(100))
    options = dict(evaluate=lambda: {"wrong": next(counts)}, eval_every=2, save_every=2)
    training.train(tmp_path / "run", **options)
    metrics = tmp_path / "run/metrics.jsonl"
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    kept = [line for line in lines(tmp_path / "run") if line["step"] < 4 or "eval" not in line]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in kept))
    _, _, history = training.train(tmp_path / "run", resume=True, **options)
    assert [line["step"] for line in history if "eval" in line] == [2, 4]


def test_small_disk_stops_a_run_before_its_first_step(tmp_path, monkeypatch):
    """Room for one checkpoint is too little for a run that keeps two and its model."""
    usage = shutil.disk_usage(tmp_path)
    one = 12 * sum(p.numel() for p in training.model().module.adaptor.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=one + 2**20))
    with pytest.raises(OSError, match=r"needs \d+ MB, its disk has \d+ MB free"):
        training.train(tmp_path / "run", save_every=1)
    assert not (tmp_path / "run").exists()


def test_disk_that_fills_during_a_run_stops_it_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    free = iter([usage.free, 1000])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=next(free)))
    with pytest.raises(CheckpointError, match=r"needs \d+ MB, its disk has 0 MB free.* no other"):
        training.train(tmp_path / "run")
    assert list_checkpoints(tmp_path / "run/checkpoints") == []


def test_rows_of_like_length_are_padded_together_and_none_is_lost(tmp_path, monkeypatch):
    """Long documents beside short captions, padded apart or together, give the same losses."""
    rows = [tiny.example(f"r{i}", answer="w" * (1 + 40 * (i % 3)), images=(tiny.image(i),))
            for i in range(9)]  # fmt: skip
    _, _, apart = training.train(tmp_path / "apart", rows=rows)
    processor = training.model().processor
    encoded = [processor.encode(row) for row in rows]
    parts = next_token.rows_of_like_length(encoded)
    assert sorted(row.name for part in parts for row in part) == [f"r{i}" for i in range(9)]
    assert [[row.name for row in part] for part in parts] == [
        ["r0", "r3", "r6"], ["r1", "r4", "r7"], ["r2", "r5", "r8"],
    ]  # fmt: skip
    monkeypatch.setattr(next_token, "rows_of_like_length", lambda rows: [rows] if rows else [])
    _, _, together = training.train(tmp_path / "together", rows=rows)
    for a, b in zip(apart, together, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert (a["scored"], a["samples"]) == (b["scored"], b["samples"])
