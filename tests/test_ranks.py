"""Processes of one run: what they must have in common, and what happens when one is gone."""

import time

import pytest

from tests.runs import run_two

pytestmark = pytest.mark.slow


def test_processes_with_different_settings_are_refused_on_each():
    for status, _, said in run_two("unlike"):
        assert status == 1
        assert "same settings on every process, found" in said
        assert "clip: 1.0 and 2.0; seed: 0 and 1" in said
        assert "Traceback" not in said


def test_the_others_end_with_a_message_when_one_dies():
    started = time.monotonic()
    (status, _, said), (killed, _, _) = run_two("dies")
    assert killed == -9
    assert status == 1
    assert "a process of this run ended" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert time.monotonic() - started < 80


def test_an_accelerate_configuration_that_asks_for_fsdp_turns_sharding_on():
    """On CPUs accelerate itself would make replicas of it, without a word."""
    for status, printed, said in run_two("alike", ACCELERATE_USE_FSDP="true"):
        assert status == 0, said
        assert "share 2, shard all" in printed
    for _, printed, _ in run_two("alike"):
        assert "share 2, shard no" in printed
