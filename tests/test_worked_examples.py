"""The worked examples of vlm/README.md, carried out as their reader would: files are written where
their blocks say, rows are added to the tables that they name, and the tests among them pass."""

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

from vlm import tokenizers
from vlm.families import registry

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "vlm" / "README.md").read_text()
BLOCK = re.compile(r"^```python ([^\n]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^## (Add [^\n]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
EXAMPLES = {name: BLOCK.findall(text) for name, text in SECTION.findall(PAGE)}
TESTS = {
    name: [path for path, _ in blocks if path.startswith("tests/")]
    for name, blocks in EXAMPLES.items()
}


def test_page_has_the_four_examples_each_with_a_test():
    assert list(EXAMPLES) == [
        "Add an image tokenizer",
        "Add a published system",
        "Add a family",
        "Add a task",
    ]
    assert all(TESTS.values())


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
    """Adds a row to a table, or a method to a class, as a block says: "TABLE in FILE" or "method of
    CLASS in FILE"."""
    what, path = place.split(" in ")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    names = dict(vars(module))
    if what.startswith("method of "):
        exec(code, names)
        (name,) = re.findall(r"^def (\w+)", code, re.MULTILINE)
        cls = getattr(module, what.removeprefix("method of "))
        monkeypatch.setattr(cls, name, names[name], raising=False)
        return
    imports, row = re.fullmatch(r"((?:from [^\n]+\n)*)\n*(.*)", code, re.DOTALL).groups()
    if what == "WRITING":
        exec(code, names)
        new = [task for task in names["WRITING"] if task not in registry.WRITING]
        assert [*registry.WRITING, *new] == list(names["WRITING"])
        for name, family in registry.FAMILIES.items():
            if set(registry.WRITING) <= set(family.tasks):
                more = dataclasses.replace(family, tasks=(*family.tasks, *new))
                monkeypatch.setitem(registry.FAMILIES, name, more)
    else:
        exec(imports, names)
        for key, value in eval(f"{{{row}}}", names).items():
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
