"""Runs that version 0.1.0 wrote with its names of settings: resumed, exported, and what is said of
options that have new names. `data/earlier_run.tar` holds such a run of recipes/line_reader.py,
after two of its four steps, its data, and the metrics of all four steps."""

import json
import tarfile
from pathlib import Path

import pytest

import vlm
from recipes.line_reader import objective, stage
from vlm.training.runs import launch
from vlm.training.runs.export import export, settings_of
from vlm.training.runs.line_reader import LineReaderSettings
from vlm.training.runs.reading import run

DATA = Path(__file__).parent / "data" / "earlier_run.tar"


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    with tarfile.open(DATA) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Path("earlier")


def steps_of(folder):
    """Step -> loss, of the lines of metrics.jsonl that are steps."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_run_of_an_earlier_version_goes_on_as_it_would_have(earlier):
    expected = steps_of(earlier)
    settings = LineReaderSettings(
        out=earlier, resume=True, train=("data/rows.tsv",), held_out_rows=0, steps=4,
        batch=4, warmup_ratio=0.5, min_lr_ratio=0.5, precision="fp32", threads=1, workers=0,
        save_every=2, keep=2, width=64, depth=1,
    )  # fmt: skip
    assert run(settings, stage, objective)["step"] == 4
    found = steps_of(earlier)
    assert list(found) == [1, 2, 3, 4]
    assert found == pytest.approx(expected, rel=1e-4)  # another CPU rounds in another way


def test_model_of_an_earlier_run_is_exported(earlier, tmp_path):
    settings = settings_of(earlier)
    assert (settings.warmup_ratio, settings.min_lr_ratio) == (0.5, 0.5)
    assert settings.lines_text == "english"
    export(earlier, tmp_path / "model")
    assert vlm.load(tmp_path / "model", device="cpu").module.family == "line_reader"


@pytest.mark.parametrize(
    ("option", "now"),
    [
        ("--floor", "--min-lr-ratio"),
        ("--warmup=1", "--warmup-ratio"),
        ("--language", "--lines-text"),
    ],
)
def test_option_of_an_earlier_version_is_refused_with_its_new_name(option, now, tmp_path):
    with pytest.raises(ValueError, match=f"{option.partition('=')[0]}: this option is now {now}$"):
        launch.read_settings(LineReaderSettings, [option, "0.1"], None)
    (tmp_path / "old.yaml").write_text("floor: 0.1\n")
    with pytest.raises(ValueError, match=r"old.yaml: settings have changed .*floor is now min_lr"):
        launch.read_settings(LineReaderSettings, ["--config", str(tmp_path / "old.yaml")], None)
