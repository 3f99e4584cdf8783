"""Holds the pages to the code: what they link to, name and run is there."""

import contextlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import tyro

from vlm import assets, cli
from vlm.commands import readme_tables
from vlm.commands.evaluation import with_model_argument
from vlm.evaluation import TASKS, evaluation_class
from vlm.training.runs.launch import recipe_in

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    path.relative_to(ROOT)
    for folder in ("", "recipes", "eval", "tests", "vlm")
    for path in (ROOT / folder).glob("**/README.md" if folder else "README.md")
)
OPTION = re.compile(r"--[a-z][a-z0-9-]*(?![\w-])")
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OF_OTHERS = {"--psm"}
"""Options of other programs that the pages name: tesseract's."""


def test_readme_has_the_tables_of_the_registry():
    assert readme_tables.with_tables(README) == README, (
        "run `python -m vlm.commands.readme_tables README.md` to write the tables anew"
    )


def test_table_refuses_a_system_whose_load_does_not_say_its_model(monkeypatch):
    def load(folder, values) -> int: ...

    module = SimpleNamespace(__name__="toy", load=load)
    monkeypatch.setattr(readme_tables, "import_module", lambda name: module)
    with pytest.raises(ValueError, match=r"toy\.load: expected the model of a family"):
        readme_tables.family_of("clip")


def test_tables_replace_those_that_stand_there():
    old = "| system | what it is | old |\n| --- |\n| x |\n\nb\n\n| command | what it does |\n"
    systems, commands = readme_tables.systems_table(), readme_tables.commands_table()
    found = readme_tables.with_tables(f"a\n\n{old}\nc\n")
    assert found == f"a\n\n{systems}\n\nb\n\n{commands}\n\nc\n"
    with pytest.raises(ValueError, match=r"expected one table .* found 0"):
        readme_tables.with_tables("a\n")


def test_pages_name_every_asset_and_folder():
    text = (ROOT / "vlm/tokenizers/README.md").read_text()
    for name in assets.ASSETS:
        assert f"`{name}`" in text
    text = (ROOT / "vlm/README.md").read_text()
    for folder in {path.parent.name for path in (ROOT / "vlm").glob("*/__init__.py")}:
        assert f"`{folder}/`" in text


def test_top_level_holds_what_belongs_there():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    names = {line.split("/")[0] for line in listed.splitlines() if not line.startswith(".")}
    if not names:
        pytest.skip("this is no git checkout, so other folders may lie here")
    assert names == {"pyproject.toml", "vlm", "recipes", "tests", "eval", "README.md", "LICENSE"}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks((ROOT / page).read_text())):
        if link.startswith("https://"):
            continue
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if heading:
            found = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in {h.lower().replace(" ", "-") for h in found}, link


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_pages_name_exist(page):
    text = (ROOT / page).read_text()
    examples = set(re.findall(r"^```python (\S+\.py)$", text, re.MULTILINE))
    named = set(re.findall(r"(?:vlm|recipes|eval|tests)/[\w/.]*\.(?:py|yaml|md)\b", text))
    missing = {name for name in named - examples if not (ROOT / name).exists()}
    folder = (ROOT / page).parent
    assert {name for name in missing if not (folder / name).exists()} <= {
        "vlm/X.py",
        "recipes/X.py",
    }


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_of_pages_exist_with_their_options(page):
    for line in commands((ROOT / page).read_text()):
        words = shlex.split(line, comments=True)
        known = known_options(words)
        given = {word for word in words if OPTION.fullmatch(word)}
        assert known is None or given <= known, f"{line}: no options {sorted(given - known)}"


def test_options_that_pages_name_in_passing_exist():
    every = set().union(OF_OTHERS, *map(options_of_script, (ROOT / "eval").glob("*.py")))
    every = every.union(*map(options_of_recipe, (ROOT / "recipes").glob("*.py")))
    every = every.union(*map(options_of_command, cli.commands()))
    for page in PAGES:
        text = without_blocks((ROOT / page).read_text())
        named = {o for code in re.findall(r"`([^`]+)`", text) for o in OPTION.findall(code)}
        assert named <= every, f"{page}: no options {sorted(named - every)}"


def test_package_data_stays_small():
    size = sum(p.stat().st_size for p in (ROOT / "vlm/data/sample").iterdir())
    assert size < 8e6


def without_blocks(text):
    return BLOCK.sub("", text)


def commands(text):
    """The command lines of a page's shell blocks, continued lines joined, and those in cells of
    its tables."""
    for kind, block in BLOCK.findall(text):
        if kind in ("", "sh"):
            lines = block.replace("\\\n", " ").splitlines()
            yield from (line for line in lines if shlex.split(line, comments=True))
    yield from re.findall(r"\| `((?:vlm|python|accelerate) [^`]+)`(?= \|)", text)


def known_options(words):
    """The options of what a command line runs; None for what is not ours.

    Fails where it runs a file, module or command that is not there.
    """
    scripts = [word for word in words if re.fullmatch(r"(recipes|eval)/\w+\.py", word)]
    if words[:2] == ["vlm", "eval"] and words[2] in TASKS:
        settings = with_model_argument(evaluation_class(words[2]).settings_type)
        return options_of_class(settings)
    if words[0] == "vlm" and words[1] not in ("launch", "eval"):
        assert words[1] in cli.commands(), words
        more = set().union(*map(options_of_recipe, map(ROOT.joinpath, scripts)))
        return options_of_command(words[1]) | more
    if words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("vlm", "tests"):
        assert importlib.util.find_spec(words[2]), words
        return None
    if scripts:
        del words[: words.index(scripts[0])]  # the launcher's own
        path = ROOT / scripts[0]
        return options_of_recipe(path) if path.parent.name == "recipes" else options_of_script(path)
    assert words[0] in ("python3", "pytest", "vlm"), f"what is {words[0]!r}?"
    return None


@cache
def options_of_class(settings):
    """The options that tyro makes of a class, by its help."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(settings, args=["--help"])
    return set(OPTION.findall(out.getvalue()))


def options_of_command(name):
    return options_of_class(cli.commands()[name])


@cache
def options_of_recipe(path):
    return options_of_class(recipe_in(path).Settings) | {"--config"}


@cache
def options_of_script(path):
    """The options that a script's --help names."""
    if "__main__" not in path.read_text():
        return set()
    out = io.StringIO()
    with (
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        mock.patch.object(sys, "argv", [str(path), "--help"]),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        runpy.run_path(str(path), run_name="__main__")
    return set(OPTION.findall(out.getvalue()))
