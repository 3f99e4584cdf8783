"""Totals of a step: named, summed over micro-batches and ranks before the first forward pass."""

import dataclasses

import pytest
import torch

from tests import training
from tests.runs import launch, lines
from vlm.training.objectives.base import Count, sum_totals

STEPS = {"steps": 2, "warmup_steps": 1}


def count(**totals):
    return Count(totals, samples=1, tokens=1, positions=1, cost=1, images=0, unscored=0)


def test_totals_are_summed_by_name_and_zero_without_batches():
    counts = [count(tokens=3, boxes=0), count(boxes=2, tokens=4)]
    assert sum_totals(("tokens", "boxes"), counts) == {"tokens": 7, "boxes": 2}
    assert sum_totals(("tokens", "boxes"), []) == {"tokens": 0, "boxes": 0}


@pytest.mark.parametrize("found", [{"tokens": 3}, {"tokens": 3, "boxes": 1, "masks": 2}])
def test_counts_of_other_totals_are_refused_with_both_named(found):
    with pytest.raises(ValueError, match=rf"\['boxes', 'tokens'\], found .*{max(found)}"):
        sum_totals(("tokens", "boxes"), [count(**found)])


@pytest.mark.slow
def test_gradients_of_two_totals_are_those_of_one_process(tmp_path):
    """Over two processes, of which one has no image in a step, and over micro-batches."""
    stage = dataclasses.replace(training.STAGE, **STEPS)
    options = {"two_totals": True, "gradients": True, "split_by_kind": True}
    done = launch(tmp_path / "two", 2, stage={**STEPS, "micro_batch": 1}, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    for micro_batch in (4, 2):
        one = tmp_path / str(micro_batch)
        one.mkdir()
        with training.keep_gradients(one):
            training.train(
                one,
                dataclasses.replace(stage, micro_batch=micro_batch),
                data=training.in_order(training.split_by_kind()),
                objective=training.TwoTotals(training.model().processor.pad_id),
            )
        for expected, found in zip(lines(one), lines(tmp_path / "two"), strict=True):
            totals = [(line["scored tokens"], line["scored images"]) for line in (expected, found)]
            assert totals[0] == totals[1]
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for number in range(STEPS["steps"]):
            expected, found = (
                torch.load(folder / f"gradients_{number}.pt") for folder in (one, tmp_path / "two")
            )
            assert expected.keys() == found.keys()
            assert any(name.startswith("adaptor.") for name in found)
            for name, grad in expected.items():
                torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-4)
