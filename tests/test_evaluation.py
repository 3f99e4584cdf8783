"""What evaluations share: the table of tasks, the command, the scripts, rows over ranks."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

import vlm
from tests import tiny, training
from tests.results import KEYS, read_result
from vlm import cli
from vlm.evaluation import TASKS, evaluation_class
from vlm.evaluation.base import Evaluation, Settings
from vlm.ranks import share

SCRIPTS = Path(__file__).parents[1] / "eval"


@pytest.mark.parametrize("task", TASKS)
def test_every_task_states_what_a_run_needs(task):
    evaluation = evaluation_class(task)
    assert issubclass(evaluation, Evaluation)
    assert evaluation.task == task
    assert issubclass(evaluation.settings_type, Settings)
    names = {field.name for field in dataclasses.fields(evaluation.settings_type)}
    assert {"data", "out", *evaluation.least} <= names


@pytest.mark.parametrize("task", TASKS)
def test_scripts_are_thin_and_name_their_task(task):
    text = (SCRIPTS / f"{task.replace('-', '_')}.py").read_text()
    assert len(text.splitlines()) <= 60
    called = [
        node.args[0].value for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "main"
    ]  # fmt: skip
    assert called == [task]


@pytest.mark.parametrize("task", TASKS)
def test_command_explains_a_tasks_options(task, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", task, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for option in ("MODEL", "--data", "--rows", "--out", "--precision", "--ignore-keys"):
        assert option in shown
    assert "--model" not in shown


def test_command_lists_the_tasks_and_refuses_others(capsys):
    cli.main(["eval"])
    shown = capsys.readouterr().out
    assert all(task in shown for task in TASKS)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "classify", "model"])
    assert stopped.value.code == 1
    error = f"error: vlm eval: expected a task of {', '.join(TASKS)}, found 'classify'"
    assert error in capsys.readouterr().err


def test_page_states_the_keys_of_every_result():
    page = (SCRIPTS / "README.md").read_text()
    section = page.partition("### result.json")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", section)) >= {*KEYS, "n"}
    assert all(f"| {task} |" in section for task in TASKS)


def test_command_evaluates_a_model(tmp_path, monkeypatch):
    opened = []

    def load(name, **options):
        opened.append((name, options["dtype"]))
        return training.model()

    monkeypatch.setattr(vlm, "load", load)
    tiny.image(0, (20, 30)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "who", "answers": ["a cat"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    cli.main(
        ["eval", "vqa", "runs/tiny", "--data", str(tmp_path / "rows.jsonl"), "--threads", "1",
         "--out", str(tmp_path / "out"), "--precision", "fp32", "--max-new-tokens", "2"]
    )  # fmt: skip
    result = read_result(tmp_path / "out")
    assert opened == [("runs/tiny", "float32")]
    assert (result["task"], result["model"], result["data"]) == ("vqa", "runs/tiny", ["rows.jsonl"])
    assert result["options"]["max_new_tokens"] == 2
    assert result["options"]["out"] == str(tmp_path / "out")


def test_shares_are_the_same_batches_on_any_number_of_ranks():
    for count in (0, 1, 7, 12):
        alone = [list(batch) for batch in share(count, 3, 0, 1)]
        assert [i for batch in alone for i in batch] == list(range(count))
        for ranks in (2, 3, 5):
            dealt = [list(batch) for r in range(ranks) for batch in share(count, 3, r, ranks)]
            assert sorted(dealt) == alone
