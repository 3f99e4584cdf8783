"""The worked examples of the READMEs, carried out as their reader would: files are written where
their blocks say, rows are added to the tables that they name, and the tests among them pass."""

import dataclasses
import importlib
import inspect
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from vlm import tokenizers
from vlm.commands import readme_tables
from vlm.families import registry

ROOT = Path(__file__).parent.parent
FOLDERS = ("tokenizers", "systems", "families", "commands", "training")
PAGES = {folder: (ROOT / "vlm" / folder / "README.md").read_text() for folder in FOLDERS}
BLOCK = re.compile(r"^```python ([^\n]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^## (Add [^\n]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
EXAMPLES = {
    name: BLOCK.findall(text) for page in PAGES.values() for name, text in SECTION.findall(page)
}
TESTS = {
    name: [path for path, _ in blocks if path.startswith("tests/")]
    for name, blocks in EXAMPLES.items()
}


REGISTRY = "vlm/families/registry.py"
FOLDER = [f"vlm/families/tagger/{name}.py"
          for name in ("batch", "module", "processor", "model", "layout", "inspect")]  # fmt: skip
TOUCHED = {
    "Add an image tokenizer": (["vlm/tokenizers/patches.py"], {}),
    "Add a published system": (["vlm/systems/toy_vl.py"], {REGISTRY: 1}),
    "Add a family": (
        [
            *FOLDER,
            "vlm/training/objectives/tags.py",
            "vlm/training/runs/tagger.py",
            "recipes/tagger.py",
        ],
        {REGISTRY: 1},
    ),
    "Add a task": (
        ["vlm/commands/verify.py"],
        {"vlm/families/decoder_only/model.py": 1, REGISTRY: 2},
    ),
    "Add an objective": (
        ["vlm/training/objectives/smoothed.py"],
        {"recipes/stage1_adaptor.py": 1},
    ),
}
"""Example -> the files that it adds beside its tests, and those that it changes, each with how many
rows, names or methods it gets there."""


def test_pages_have_the_examples_each_with_a_test():
    assert list(EXAMPLES) == list(TOUCHED)
    assert all(TESTS.values())


@pytest.mark.parametrize("name", TOUCHED)
def test_an_addition_touches_few_files(name):
    places = [place for place, _ in EXAMPLES[name] if place not in TESTS[name]]
    added = [place for place in places if " in " not in place]
    changed = Counter(place.split(" in ")[1] for place in places if " in " in place)
    assert (sorted(added), dict(changed)) == (sorted(TOUCHED[name][0]), TOUCHED[name][1])


def test_additions_come_into_the_tables_of_readme(added):
    """By the command alone: nothing in README.md is written by hand."""
    readme = (ROOT / "README.md").read_text()
    page = readme_tables.with_tables(readme)
    head = next(line for line in page.splitlines() if line.startswith("| system |"))
    cells = {line.split(" |")[0]: line for line in page.splitlines() if line.startswith("| `")}
    assert "| verify |" in head
    assert cells["| `toy_vl`"].startswith("| `toy_vl` | Toy-VL: SigLIP, linear, LLaMA | ✓ |")
    assert cells["| `tagger`"].endswith("| [tagger](recipes/tagger.py) | ✓ |")
    command = "`vlm verify IMAGE... --statement TEXT --model RUN`"
    assert f"| {command} | says how probable a statement about each image is |" in page


@pytest.fixture
def added(tmp_path, monkeypatch):
    """All examples, carried out in a folder whose packages lie after ours."""
    folder = tmp_path / "checkout"
    blocks = [block for example in EXAMPLES.values() for block in example]
    files = {path: code for path, code in blocks if " " not in path}
    for path, code in files.items():
        assert not (ROOT / path).exists(), f"{path} is no example: it is there"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(code)
    ours = [parent for path in files if path.startswith("vlm/") for parent in Path(path).parents]
    for package in {parent for parent in ours if parent.parts}:
        (folder / package / "__init__.py").touch()
        if not (ROOT / package).is_dir():  # a new one is found through the one above it
            continue
        module = importlib.import_module(".".join(package.parts))
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(folder / package)])
    monkeypatch.setattr(tokenizers, "KINDS", tokenizers._kinds())
    monkeypatch.chdir(folder)
    for place, code in blocks:
        if " in " in place:
            add(place, code, monkeypatch)
    yield folder
    forget(folder)


def add(place: str, code: str, monkeypatch) -> None:
    """Adds a row to a table, a method to a class, or an objective to a recipe, as a block says:
    "TABLE in FILE", "method of CLASS in FILE" or "objective in FILE"."""
    what, path = place.split(" in ")
    if what == "objective":
        recipe, found = re.subn(
            r"^from \S+ import \w+ as objective\n", "", (ROOT / path).read_text(), flags=re.M
        )
        assert found == 1, f"{path}: expected one objective that is imported, found {found}"
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(recipe.replace("\ndef stage(", f"\n{code}\n\ndef stage("))
        return
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    names = dict(vars(module))
    if what.startswith("method of "):
        exec(code, names)
        (name,) = re.findall(r"^def (\w+)", code, re.MULTILINE)
        cls = getattr(module, what.removeprefix("method of "))
        monkeypatch.setattr(cls, name, names[name], raising=False)
        return
    if what == "WRITING":
        exec(code, names)
        new = [task for task in names["WRITING"] if task not in registry.WRITING]
        assert [*registry.WRITING, *new] == list(names["WRITING"])
        for name, family in registry.FAMILIES.items():
            if set(registry.WRITING) <= set(family.tasks):
                more = dataclasses.replace(family, tasks=(*family.tasks, *new))
                monkeypatch.setitem(registry.FAMILIES, name, more)
    else:
        for key, value in eval(f"{{{code}}}", names).items():
            monkeypatch.setitem(getattr(module, what), key, value)


def forget(folder: Path) -> None:
    """Takes what was imported from a folder out of the modules that are known."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(folder):
            del sys.modules[name]
            package, _, leaf = name.rpartition(".")
            if hasattr(sys.modules.get(package), leaf):
                delattr(sys.modules[package], leaf)


@pytest.mark.parametrize("path", [path for paths in TESTS.values() for path in paths])
def test_example_keeps_its_own_tests(path, added, tmp_path, request):
    spec = importlib.util.spec_from_file_location(Path(path).stem, added / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = {name: f for name, f in vars(module).items() if name.startswith("test_")}
    assert tests
    for name, test in tests.items():
        own = tmp_path / name
        own.mkdir()
        wanted = inspect.signature(test).parameters
        test(**{w: own if w == "tmp_path" else request.getfixturevalue(w) for w in wanted})
