"""Whether confidences are right, and what mends them: on examples whose truth is known."""

import numpy as np
import pytest
import torch

from vlm.metrics.calibration import Scaling, calibration, fit_scaling
from vlm.metrics.classification import classification


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(temperature, offset=0.0, count=40_000, seed=0):
    """Raw confidences, and whether each is right, with the honest probability
    sigmoid(logit / temperature + offset)."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(2, 3, count)
    right = draw.random(count) < sigmoid(logits / temperature + offset)
    return np.log(sigmoid(logits)), right


def test_error_equals_the_hand_computed_one():
    found = calibration([0.1, 0.3, 0.95, 0.9], [False, True, True, False], bins=4)
    assert found.count.tolist() == [1, 1, 0, 2]
    assert found.error == pytest.approx((0.1 + 0.7 + abs(1 - 1.85)) / 4)
    assert np.isnan(found.accuracy[2])
    assert found.accuracy[3] == 0.5


def test_error_is_that_of_classification():
    """One implementation, and the same figure."""
    probabilities = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    labels = np.random.default_rng(0).integers(0, 5, 200)
    whole = classification(probabilities, labels, scale=None).calibration
    best, guess = probabilities.double().max(1)
    own = calibration(best, guess.numpy() == labels)
    assert own.error == whole.error
    assert own.count.tolist() == whole.count.tolist()


def test_honest_confidences_have_almost_no_error_and_certain_ones_lie_in_the_end_bins():
    log_p, right = drawn(1)
    assert calibration(np.exp(log_p), right).error < 0.01
    ends = calibration([0, 1, 1], [False, True, True])
    assert (ends.error, ends.count[0], ends.count[-1]) == (0, 1, 2)


@pytest.mark.parametrize("temperature", [0.5, 1, 3])
def test_fitted_temperature_is_the_true_one(temperature):
    log_p, right = drawn(temperature)
    found = fit_scaling(log_p, right)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.offset == 0
    held_log_p, held_right = drawn(temperature, seed=1)
    assert calibration(found(held_log_p), held_right).error < 0.01


def test_fitted_offset_is_the_true_one():
    log_p, right = drawn(2, -0.7)
    found = fit_scaling(log_p, right, offset=True)
    assert found.temperature == pytest.approx(2, rel=0.05)
    assert found.offset == pytest.approx(-0.7, abs=0.05)
    assert calibration(found(log_p), right).error < 0.01
    assert calibration(fit_scaling(log_p, right)(log_p), right).error > 0.02


def test_nothing_nearby_is_more_likely():
    log_p, right = drawn(2, 0.5, count=300)

    def loss(scaling):
        p = scaling(log_p)
        return -np.log(np.where(right, p, 1 - p)).mean()

    one, two = fit_scaling(log_p, right), fit_scaling(log_p, right, offset=True)
    for step in (0.97, 1.03):
        assert loss(one) < loss(Scaling(temperature=one.temperature * step))
        moved = Scaling(temperature=two.temperature * step, offset=two.offset)
        assert loss(two) < loss(moved)
        moved = Scaling(temperature=two.temperature, offset=two.offset * step)
        assert loss(two) < loss(moved)
    assert loss(two) <= loss(one)


def test_scaled_confidences_keep_their_order_and_lie_in_0_to_1():
    log_p = np.array([-np.inf, -500.0, -3.0, -0.1, -1e-6, 0.0])
    for scaling in (Scaling(), Scaling(temperature=3, offset=1), Scaling(temperature=0.1)):
        found = scaling(log_p)
        assert (np.diff(found) >= 0).all()
        assert ((found >= 0) & (found <= 1)).all()
        assert np.isfinite(found).all()
    np.testing.assert_allclose(Scaling()(log_p[2:5]), np.exp(log_p[2:5]), rtol=1e-9)


def test_temperature_ends_at_its_bound_where_confidence_parts_right_from_wrong():
    found = fit_scaling(np.log([0.9, 0.8, 0.2, 0.1]), [True, True, False, False])
    assert found.temperature == pytest.approx(0.05)
    upside_down = fit_scaling(np.log([0.9, 0.8, 0.2, 0.1]), [False, False, True, True])
    assert upside_down.temperature == pytest.approx(20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration([0.5, 1.2], [True, True]), "expected 0 to 1, found 1.2 for example 1"),
        (lambda: calibration([np.nan], [True]), "expected 0 to 1, found nan for example 0"),
        (lambda: calibration([0.5], [True], bins=0), "bins: expected 1 or more, found 0"),
        (lambda: calibration([0.5], [True, False]), r"found shapes \[1\] and \[2\]"),
        (lambda: calibration([], []), r"not empty, found shapes \[0\] and \[0\]"),
        (lambda: fit_scaling([0.1], [True]), "expected 0 or less, found 0.1 for example 0"),
        (lambda: fit_scaling([np.nan], [True]), "expected 0 or less, found nan for example 0"),
        (lambda: fit_scaling([-1, -2], [True, True]), "both kinds, found all 2 right"),
        (lambda: fit_scaling([-1, -2], [False, False]), "both kinds, found all 2 wrong"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
