"""A run that is asked to stop after its last step."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm.training.runs.run import TrainingRun


def test_stop_during_the_closing_evaluation_says_how_to_go_on(capsys):
    run = SimpleNamespace(main=True, settings=SimpleNamespace(out=Path("run")))
    with pytest.raises(SystemExit) as stopped:
        TrainingRun._stop_evaluation(run)
    assert stopped.value.code == 130
    said = "stopped during the closing evaluation; the model is saved in run/model, and --resume"
    assert capsys.readouterr().err.startswith(said)
