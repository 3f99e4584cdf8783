"""Processes of one run: what they must have in common, and what happens when one is gone."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def run_two(case, **environment):
    """Two processes without a launcher that would end one for the other: (exit status, what it
    printed, what it said) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", case],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=shared | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=90) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said)]


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
