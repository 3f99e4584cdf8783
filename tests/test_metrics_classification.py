import json

import numpy as np
import pytest
import torch

from vlm.metrics.classification import classification
from vlm.metrics.share import wilson


def test_accuracies_equal_those_counted_by_hand():
    """Classes 0 and 1 have two and one examples, class 2 none; the last right class is second."""
    scores = [[3, 1, 2], [0, 1, 5], [4, 3, 2.0]]
    found = classification(scores, [0, 0, 1], scale=1)
    assert found.top_1 == wilson(1, 3)
    assert found.top_5.share == 1
    np.testing.assert_equal(found.by_class, [0.5, 0, np.nan])
    assert (found.mean_per_class, found.classes_without_examples) == (0.25, 1)
    assert found.examples == 3


def test_top_5_counts_the_sixth_best_as_missed():
    scores = np.arange(8.0)[::-1][None].repeat(8, 0)
    assert classification(scores, np.arange(8), scale=1).top_5 == wilson(5, 8)


def test_equal_scores_are_no_hit_whatever_the_order_of_classes():
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        place = torch.tensor(order).argsort()
        found = classification(scores[:, order], place[[0, 1]], scale=1)
        assert found.top_1.share == 0


def test_calibration_error_equals_the_hand_computed_one():
    """Confidences 0.6, 0.7 and 0.9 of two bins: 0.5 to 1 holds all; with five bins of a fifth,
    0.6 lies in the third, of (0.4, 0.6], and 0.7 and 0.9 alone in the fourth and fifth."""
    probabilities = [[0.6, 0.4], [0.3, 0.7], [0.9, 0.1]]
    labels = [0, 0, 0]  # right, wrong, right
    two = classification(probabilities, labels, scale=None, bins=2).calibration
    assert two.count.tolist() == [0, 3]
    assert two.error == pytest.approx(abs(2 / 3 - 2.2 / 3))
    assert two.accuracy[1] == pytest.approx(2 / 3)
    assert two.confidence[1] == pytest.approx(2.2 / 3)
    assert np.isnan(two.confidence[0])
    five = classification(probabilities, labels, scale=None, bins=5).calibration
    assert five.count.tolist() == [0, 0, 1, 1, 1]
    assert five.error == pytest.approx((0.4 + 0.7 + 0.1) / 3)
    np.testing.assert_allclose(five.edges, [0, 0.2, 0.4, 0.6, 0.8, 1])


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_figures_equal_a_second_definition_on_random_scores(bins, monkeypatch):
    draw = np.random.default_rng(bins)
    scores, labels = draw.normal(size=(400, 30)), draw.integers(0, 25, 400)
    scores[np.arange(400), labels] += 1
    probabilities = torch.from_numpy(2.5 * scores).softmax(1)
    best, guess = (values.numpy() for values in probabilities.max(1))
    order = np.argsort(-scores, 1)
    error = 0.0
    for b in range(bins):
        inside = (best > b / bins) & (best <= (b + 1) / bins)
        if inside.any():
            error += inside.mean() * abs((guess == labels)[inside].mean() - best[inside].mean())
    monkeypatch.setattr("vlm.metrics.classification._SLICE", 1000)
    for given in (scores, torch.from_numpy(scores)):
        found = classification(given, labels, scale=2.5, bins=bins)
        assert found.top_1.share == (guess == labels).mean()
        assert found.top_5.share == (order[:, :5] == labels[:, None]).any(1).mean()
        by_class = [(guess == labels)[labels == c].mean() for c in np.unique(labels)]
        assert found.mean_per_class == pytest.approx(np.mean(by_class))
        assert found.calibration.error == pytest.approx(error)
    given = classification(probabilities, labels, scale=None, bins=bins)
    assert given.calibration.error == pytest.approx(error)
    assert 0.05 < found.top_1.share < 0.95


def test_a_large_scale_gives_finite_confidence():
    found = classification([[1.0, -1.0], [0.2, 0.1]], [0, 1], scale=1e4)
    assert found.calibration.confidence[-1] == 1
    assert found.calibration.error == 0.5


def test_figures_are_json():
    figures = json.loads(json.dumps(classification([[0.2, 0.8]], [1], scale=None).metrics()))
    assert figures["accuracy"] == 1
    assert figures["ece"] == pytest.approx(0.2)
    assert (figures["classes"], figures["classes_without_examples"]) == (2, 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(scores=np.zeros((0, 3)), labels=np.zeros(0, int)), ValueError, r"found \[0, 3\]"),
        (dict(scores=np.zeros((2, 0))), ValueError, r"found \[2, 0\]"),
        (dict(labels=[0]), ValueError, r"labels: expected shape \[2\], found \[1\]"),
        (dict(labels=[0, 3]), ValueError, "expected 0 to 2, found 3 for example 1"),
        (dict(labels=[-1, 3]), ValueError, "found -1 for example 0 and 1 more"),
        (dict(labels=[0.0, 1.0]), TypeError, "labels: expected whole numbers, found float64"),
        (dict(scores=[[0, 0, 0], [0, np.nan, 0]]), ValueError, "NaN or infinity in row 1"),
        (dict(scale=0), ValueError, "scale: expected a number above 0, found 0"),
        (dict(scale=None), ValueError, "sum 2 in row 1"),
        (dict(bins=0), ValueError, "bins: expected 1 or more, found 0"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    given = dict(scores=[[0.2, 0.3, 0.5], [0.5, 1.0, 0.5]], labels=[0, 1], scale=1.0) | changes
    with pytest.raises(error, match=message):
        classification(given.pop("scores"), given.pop("labels"), **given)
