"""The training loop with a contrastive objective: splits, precisions, processes, resuming."""

import dataclasses
import json
import math

import pytest
import torch
from accelerate import Accelerator

from tests import tiny, training
from tests.contrastive_runs import assert_close, assert_follows
from tests.runs import launch, learned, lines
from vlm.data.sources import ListSource
from vlm.metrics.retrieval import retrieval
from vlm.training.objectives.contrastive import Contrast
from vlm.training.run_folder import Run
from vlm.training.runs.contrastive import retrieval_on
from vlm.weights import same_bits

LOSSES = ("softmax", "sigmoid")


def train(out, loss, **options):
    stage = dataclasses.replace(training.CONTRAST, **options.pop("stage", {}))
    return training.train(out, stage, loss=loss, **options)


@pytest.mark.parametrize("loss", LOSSES)
def test_run_is_the_same_for_every_split_into_micro_batches(tmp_path, loss):
    whole, _, expected = train(tmp_path / "8", loss)
    for micro_batch in (4, 2):
        split = {"micro_batch": micro_batch}
        parts, _, found = train(tmp_path / str(micro_batch), loss, stage=split)
        assert_follows(found, expected)
        assert_close(training.weights(parts), training.weights(whole))
    assert expected[-1]["loss"] < expected[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_run_begins_as_fp32_does_and_learns_in_one_pass_and_in_two(tmp_path, loss):
    """The recipe's own precision: weights cast once a step, gradients added up in fp32. Later steps
    drift apart, as Adam makes whole steps of small gradients."""
    _, _, expected = train(tmp_path / "fp32", loss)
    for micro_batch in (8, 2):
        split = {"micro_batch": micro_batch}
        chosen, _, found = train(tmp_path / str(micro_batch), loss, stage=split, precision="bf16")
        assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=2e-2)
        assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=5e-2)
        assert found[-1]["loss"] < 0.8 * found[0]["loss"]
        assert {p.dtype for p in chosen.module.parameters()} == {torch.float32}


def test_cost_of_a_step_goes_by_pairs_not_by_the_length_of_its_texts(tmp_path):
    """Of one batch of short texts and one of long ones."""
    chosen, rows = training.contrastive_model(), training.pairs(8)
    objective = Contrast("sigmoid")
    counts = []
    for words in (1, 3):
        long = [tiny.example(row.name, (None,), "ab " * words, images=row.images) for row in rows]
        (batch,) = objective.collate([chosen.processor.encode(row) for row in long])
        counts.append(objective.count(batch))
    assert counts[0].positions < counts[1].positions
    assert counts[0].cost == counts[1].cost == 8


@pytest.mark.slow
def test_two_processes_follow_one_where_a_row_is_skipped(tmp_path):
    """In micro-batches, 4 pairs on one rank and 3 on the other; 7 held-out rows."""
    data = training.in_order(training.pairs(8, unread=[5]))
    data.on_bad_row = "skip"
    one, progress, expected = train(tmp_path / "one", "sigmoid", data=data)
    assert progress.skipped == 6
    assert progress.examples_skipped[0].endswith("p5: expected a caption, found an empty text")
    done = launch(tmp_path / "two", 2, loss="sigmoid", unread=[5], stage={"micro_batch": 2})
    assert done.returncode == 0, done.stderr[-2000:]
    assert_follows(lines(tmp_path / "two"), expected)
    assert {line["samples"] for line in expected} == {7}
    two = torch.load(tmp_path / "two/weights.pt")
    assert_close(two, training.weights(one))
    held_out = [json.loads((tmp_path / f"two/held_out{rank}.json").read_text()) for rank in (0, 1)]
    assert held_out == [recalls(one, training.pairs(7))] * 2


@pytest.mark.slow
def test_rank_without_a_pair_stops_every_rank(tmp_path):
    """Within the time that `launch` grants."""
    done = launch(tmp_path, 2, loss="softmax", unread=[4, 5, 6, 7], stage={"micro_batch": 2})
    assert done.returncode != 0
    said = "StageError: every row of step 1 on 1 of 2 ranks was skipped; this loss needs"
    assert done.stderr.count(said) == 2


def test_killed_run_resumes_to_the_same_batches_and_losses(tmp_path, monkeypatch):
    """With dropout, in micro-batches."""

    def attempt(out, **options):
        chosen = training.contrastive_model("sigmoid", "bert, class")
        return train(tmp_path / out, "sigmoid", chosen=chosen, stage={"micro_batch": 4}, **options)

    whole, _, expected = attempt("whole", save_every=2)
    log = Run.log

    def log_and_die(self, step, figures):
        log(self, step, figures)
        if step == 5:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_die)
        with pytest.raises(RuntimeError, match="killed"):
            attempt("cut", save_every=2)
    resumed, progress, found = attempt("cut", resume=True)
    assert learned(expected) == learned(found)
    assert same_bits(training.weights(whole), training.weights(resumed))
    assert progress.samples == 48


def test_scale_of_a_run_never_passes_100(tmp_path):
    chosen, seen = training.contrastive_model("softmax"), []
    log_scale = chosen.module.log_scale
    log_scale.register_hook(lambda gradient: -gradient.abs())  # each step raises it
    chosen.module.register_forward_pre_hook(lambda *_: seen.append(log_scale.item()))
    rates = (("log_scale", 1.0), ("*", 1e-3))
    train(tmp_path, "softmax", chosen=chosen, stage={"rates": rates, "warmup_steps": 0})
    assert seen[0] == pytest.approx(math.log(10))
    assert seen[-1] == max(seen) == pytest.approx(math.log(100), abs=1e-6)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_retrieval_of_rows_is_the_metric_of_the_public_models_vectors(batch_size):
    chosen, rows = training.contrastive_model(), training.pairs(7)
    chosen.module.train()
    found = retrieval_on(chosen, ListSource(rows, "rows"), range(7), accelerator(), batch_size)
    assert chosen.module.training
    assert found == recalls(chosen, rows)


def accelerator():
    return Accelerator(cpu=True, mixed_precision="no")


def recalls(model, rows):
    """By the metric itself, on the vectors that the public model gives."""
    images = model.embed_images([row.images[0] for row in rows])
    texts = model.embed_texts([row.answer for row in rows])
    found = retrieval(images, texts, torch.arange(len(rows)))
    figures = {"pairs": len(rows)}
    for name in ("image_to_text", "text_to_image"):
        for k, recall in getattr(found, name).recall.items():
            figures |= {f"{name}_r{k}": recall.share, f"{name}_r{k}_ci": [recall.low, recall.high]}
    return figures
