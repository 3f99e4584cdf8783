"""Numbers that a stage may not have."""

import dataclasses
import math

import pytest

from tests import training
from vlm.training.stages import FROZEN, StageError


@pytest.mark.parametrize("rate", [0.0, -1e-3, math.nan, math.inf])
def test_rate_that_is_none_is_refused(rate):
    with pytest.raises(
        StageError, match=r"rate of 'adaptor\.\*' must be positive or FROZEN, found"
    ):
        dataclasses.replace(training.STAGE, rates=(("adaptor.*", rate), ("*", FROZEN)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"clip": -1.0}, "clip must be above 0"),
        ({"clip": math.nan}, "clip must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
    ],
)
def test_numbers_that_would_train_uphill_are_refused(value, message):
    with pytest.raises(StageError, match=message):
        dataclasses.replace(training.STAGE, **value)
