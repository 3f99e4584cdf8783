"""`vlm launch`, accelerate's launcher with nothing of its own below a recipe's error line."""

import subprocess
import sys

import pytest

from vlm.training.runs import launch
from vlm.training.runs.contrastive import Settings

pytestmark = pytest.mark.slow

FAILS = """
import os, sys, time
time.sleep(20 * int(os.environ.get("RANK", 0)))
print("error: steps must be at least 1, found 0", file=sys.stderr)
sys.exit(1)
"""


def launched(tmp_path, text, *options):
    (tmp_path / "recipe.py").write_text(text)
    command = [sys.executable, "-m", "vlm.cli", "launch", *options, str(tmp_path / "recipe.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "options",
    [
        ("--num_processes", "1"),
        ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
    ],
)
def test_error_of_a_recipe_is_the_last_line(tmp_path, options):
    more = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    done = launched(tmp_path, FAILS, *options, *more)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: steps must be at least 1, found 0"
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


def test_end_by_a_signal_is_said_and_success_is_quiet(tmp_path):
    done = launched(tmp_path, "import os; os.kill(os.getpid(), 9)", "--num_processes", "1")
    assert done.returncode == 137
    assert done.stderr.splitlines()[-1] == "error: a process of the run was ended by signal 9"
    assert launched(tmp_path, "print('done')", "--num_processes", "1").returncode == 0


@pytest.mark.parametrize(("rank", "pauses"), [("0", []), ("1", [launch.PAUSE_S])])
def test_other_processes_leave_the_first_to_say_an_error(monkeypatch, capsys, rank, pauses):
    slept = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(launch.time, "sleep", slept.append)
    monkeypatch.setattr(sys, "argv", ["x.py", "--steps", "0"])
    with pytest.raises(SystemExit) as ended:
        launch.start(Settings, lambda settings: pytest.fail("ran"))
    assert ended.value.code == 1
    assert slept == pauses
    assert capsys.readouterr().err == "error: steps must be at least 1, found 0\n"
