"""Options of earlier versions, each refused with the name that it has now."""

import ast
import dataclasses
import runpy
import sys
from pathlib import Path

import pytest

from vlm import cli
from vlm.evaluation import TASKS, evaluation_class, main
from vlm.renamed import RENAMED
from vlm.training.runs.launch import recipe_in
from vlm.training.stages import Stage

ROOT = Path(__file__).parents[1]
GROUNDING = ["--data", "scenes:2:task=ground"]


def fields(cls):
    return {field.name for field in dataclasses.fields(cls)}


def options_of_benchmark(path):
    """The names that a benchmark gives to its parser."""
    called = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    added = [node for node in called if getattr(node.func, "attr", "") == "add_argument"]
    return {node.args[0].value.removeprefix("--").replace("-", "_") for node in added}


def all_options():
    """The options of everything that has some, by its name; and what a stage states."""
    recipes = [path for path in (ROOT / "recipes").glob("*.py") if path.name != "__init__.py"]
    return {
        "stage": fields(Stage),
        **{path.name: fields(recipe_in(path).Settings) for path in recipes},
        **{task: fields(evaluation_class(task).settings_type) for task in TASKS},
        **{path.name: options_of_benchmark(path) for path in (ROOT / "eval").glob("*.py")},
    }


def test_new_names_are_options_of_today():
    known = set().union(*all_options().values())
    for old, names in RENAMED.items():
        assert set(names) <= known, old


@pytest.mark.parametrize(
    ("words", "old", "new"),
    [
        (["--pictures", "4"], "pictures", "images"),
        (["--pictures=4"], "pictures", "images"),
        (["--batch-size", "4"], "batch-size", "batch"),
    ],
    ids=["apart", "joined", "batch"],
)
@pytest.mark.parametrize(
    "start",
    [
        lambda words: main("grounding", ["--model", "x", *GROUNDING, *words]),
        lambda words: cli.main(["eval", "grounding", "x", *GROUNDING, *words]),
    ],
    ids=["script", "command"],
)
def test_evaluation_names_what_an_option_is_called_now(start, words, old, new, capsys):
    with pytest.raises(SystemExit) as stopped:
        start(words)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"error: --{old}: this option is now --{new}\n"


@pytest.mark.parametrize(
    ("script", "old", "new"),
    [("speed_loss", "places", "positions"), ("loss_memory", "room", "memory-fraction")],
)
def test_benchmark_names_what_an_option_is_called_now(script, old, new, monkeypatch):
    path = ROOT / "eval" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), f"--{old}", "8"])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert stopped.value.code == f"error: --{old}: this option is now --{new}"


def test_recipe_names_what_an_option_is_called_now(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", str(ROOT / "recipes/stage1_adaptor.py"), "--machine", "cpu-16G",
                  "--warmup", "0.1"])  # fmt: skip
    assert capsys.readouterr().err == "error: --warmup: this option is now --warmup-ratio\n"


def test_option_that_never_was_is_told_as_such(capsys):
    with pytest.raises(SystemExit) as stopped:
        main("grounding", ["--model", "x", *GROUNDING, "--warmup", "4"])
    assert stopped.value.code == 2
    assert "--warmup" in capsys.readouterr().err
