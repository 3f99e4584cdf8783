"""Runs in processes of their own, and what they leave after."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import vlm

ROOT = Path(__file__).parent.parent


def on_processes(count, *program):
    """A program, a script or `--module` and a module with its arguments, as so many processes of
    accelerate's launcher, which exchange tensors by gloo."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--multi_gpu"]  # accelerate's name for several on one machine, GPUs or not
    command += ["--num_processes", str(count), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", *map(str, program)]
    return _run(command)


def on_two_processes(script, *arguments):
    """A script that two processes end without an error."""
    done = on_processes(2, script, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]


def launch(out, processes=1, **options):
    """The tiny run as a process of its own, or as several."""
    program = ["tests.training", str(out), json.dumps(options)]
    if processes > 1:
        done = on_processes(processes, "--module", *program)
    else:
        done = _run([sys.executable, "-m", *program])
    if done.returncode == 0:
        assert (Path(out) / "world").read_text() == str(processes)
    return done


def _run(command):
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def learned(history):
    return [
        (line["step"], line["batch"], pytest.approx(line["loss"], abs=1e-6)) for line in history
    ]


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


RECIPES = str(Path(__file__).parent.parent / "recipes")


def stage_of(name):
    sys.path.insert(0, RECIPES)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(RECIPES)


def weights(folder):
    module = vlm.load(folder, dtype="stored").module
    return {name: p.detach().clone() for name, p in module.named_parameters()}
