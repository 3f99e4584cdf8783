"""The model of a run's checkpoint: the same bits as the run's own, found by its settings."""

import json
import shutil

import pytest

import vlm
from recipes.line_reader import stage
from tests.line_readers import settings
from vlm import cli
from vlm.training.checkpoints.checkpoint import CheckpointError
from vlm.training.objectives.ctc import Transcribe
from vlm.training.run_folder import RunError
from vlm.training.runs.export import export, settings_of
from vlm.training.runs.line_reader import LineReaderSettings
from vlm.training.runs.reading import run
from vlm.weights import read_weights, same_bits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    chosen = settings(folder, steps=2, save_every=1, held_out_rows=0, precision="bf16")
    run(chosen, stage, lambda settings, model, stage: Transcribe())
    return folder


def test_newest_checkpoint_is_the_model_that_the_run_left(trained, tmp_path, capsys):
    cli.main(["export", str(trained), "--out", str(tmp_path / "model")])
    assert "step_00000002" in capsys.readouterr().out
    expected = read_weights(trained / "model")
    assert same_bits(read_weights(tmp_path / "model"), expected)
    export(trained, tmp_path / "first", step=1)
    assert not same_bits(read_weights(tmp_path / "first"), expected)
    assert vlm.load(tmp_path / "first", device="cpu").module.family == "line_reader"


def test_what_does_not_fit_is_named(trained, tmp_path, capsys):
    with pytest.raises(
        CheckpointError, match=r"checkpoint of step 7, found \['step_00000001', 'st"
    ):
        export(trained, tmp_path / "model", step=7)
    with pytest.raises(RunError, match="expected a new or an empty folder"):
        export(trained, trained)
    with pytest.raises(RunError, match=r"expected a run's folder, with settings\.json in it"):
        export(tmp_path / "none", tmp_path / "model")
    with pytest.raises(ValueError, match="came from no published system"):
        export(trained, tmp_path / "model", layout="reference")
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    values = json.loads((copy / "settings.json").read_text())
    (copy / "settings.json").write_text(json.dumps(values | {"width": 128}))
    with pytest.raises(CheckpointError, match=r"is of another model|are not those"):
        export(copy, tmp_path / "model")
    (copy / "settings.json").write_text(json.dumps(values | {"breadth": 128}))
    cli_fault = pytest.raises(SystemExit)
    with cli_fault:
        cli.main(["export", str(copy), "--out", str(tmp_path / "model")])
    assert "unknown keys ['breadth']" in capsys.readouterr().err


def test_no_file_is_run_because_a_run_names_it(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    recipe = copy / "mine.py"
    recipe.write_text(
        "from vlm.training.runs.line_reader import LineReaderSettings as Settings\n"
        "stage = objective = None\n"
    )
    values = json.loads((copy / "settings.json").read_text())
    assert values["recipe"] == "vlm.training.runs.line_reader:LineReaderSettings"
    for place in (f"{recipe}:Settings", "recipes/../mine.py:Settings", "os:path"):
        (copy / "settings.json").write_text(json.dumps(values | {"recipe": place}))
        with pytest.raises(RunError, match="name it with --recipe"):
            settings_of(copy)
    found = settings_of(copy, recipe)
    assert found == settings_of(trained)
    assert isinstance(found, LineReaderSettings)
    assert found.train == settings(tmp_path).train


def test_a_broken_newest_checkpoint_is_named_and_not_passed_over(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (file,) = (copy / "checkpoints/step_00000002").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-10])
    said = r"step_00000002.*distcp: expected \d+ bytes, found \d+; the newest whole .* --step 1$"
    with pytest.raises(CheckpointError, match=said):
        export(copy, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 2 is broken: .*distcp"):
        export(copy, tmp_path / "model", step=2)
    assert export(copy, tmp_path / "model", step=1).name == "step_00000001"


def test_an_ended_run_without_its_checkpoints_is_not_begun_again(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    before = (copy / "metrics.jsonl").read_text()
    again = settings(copy, steps=2, save_every=1, held_out_rows=0, precision="bf16", resume=True)
    with pytest.raises(RunError, match="the run has ended and its checkpoints are gone"):
        run(again, stage, lambda settings, model, stage: Transcribe())
    assert (copy / "metrics.jsonl").read_text() == before
