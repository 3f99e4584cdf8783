"""Packages of extras: without them the rest opens, and each task says in one line what it lacks."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import vlm
from tests.pages import PARAGRAPH, draw_lines
from vlm import cli
from vlm.compat.extras import ABOUT, MissingExtra, needs
from vlm.data.sources.spec import open_source
from vlm.evaluation import main
from vlm.retrieval import nearest
from vlm.training.run_folder import Run

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MODULES = {
    "ocr": ("cv2", "pypdfium2", "jiwer", "faker", "fontTools"),
    "retrieval": ("faiss",),
    "eval": ("pycocotools", "pycocoevalcap", "sacrebleu"),
    "data": ("datasets",),
    "tensorboard": ("tensorboard",),
    "quantize": ("bitsandbytes",),
}


@pytest.fixture
def lacks(monkeypatch):
    """Makes packages impossible to import, and what imports them to be imported anew."""

    def take(*packages, anew=()):
        for name in list(sys.modules):
            if name.partition(".")[0] in packages or name in anew:
                parent, _, child = name.rpartition(".")
                if parent in sys.modules:  # which gets the module of before back, too
                    monkeypatch.setattr(
                        sys.modules[parent], child, sys.modules[name], raising=False
                    )
                monkeypatch.delitem(sys.modules, name)
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return take


def told(package, extra):
    return re.escape(f'{ABOUT[extra]}: expected the package {package}, which is not installed; '
                     f'try: pip install "vlm[{extra}]"')  # fmt: skip


def test_extras_of_pyproject_are_those_that_are_told_and_all_has_them():
    assert set(EXTRAS) == {*ABOUT, "all", "test"}
    (whole,) = map(Requirement, EXTRAS["all"])
    assert whole.extras == set(ABOUT) - {"quantize"}
    assert "vlm[all]" in EXTRAS["test"]


def imported_under(extra_call: ast.With) -> set[str]:
    """The packages that a `with needs(...)` imports; torch's writer of curves is tensorboard's."""
    found = set()
    for node in ast.walk(extra_call):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {"tensorboard" if n == "torch.utils.tensorboard" else n.split(".")[0] for n in found}


def test_each_extra_has_the_packages_that_are_imported_under_its_name():
    """And pyproject asks for those that hold them, and no others."""
    found = {extra: set() for extra in MODULES}
    for path in (ROOT / "vlm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            calls = [item.context_expr for item in getattr(node, "items", [])]
            for call in calls if isinstance(node, ast.With) else []:
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "needs":
                    found[call.args[0].value] |= imported_under(node)
    assert found == {extra: set(modules) for extra, modules in MODULES.items()}
    holders = packages_distributions()
    for extra, modules in MODULES.items():
        asked = {canonicalize_name(Requirement(text).name) for text in EXTRAS[extra]}
        assert len(asked) == len(modules), extra
        for module in modules:
            assert asked & {*map(canonicalize_name, holders.get(module, [module]))}, module


IMPORTS = """
import sys
for name in {packages}:
    sys.modules[name] = None
import vlm, vlm.cli
from vlm.families.registry import FAMILIES
from importlib import import_module
for family in FAMILIES.values():
    family.model_class, import_module(family.layout)
for name in ("stage1_adaptor", "contrastive", "line_reader", "trocr", "paligemma", "finetune"):
    import_module("recipes." + name)
vlm.load, vlm.build
from vlm.data.sources.spec import open_source
assert len(open_source("sample:train"))
"""


@pytest.mark.slow
def test_everything_is_imported_without_any_extra():
    packages = [name for modules in MODULES.values() for name in modules]
    code = IMPORTS.format(packages=packages)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("cv2", "vlm.ocr.line_detection.detect"),
        ("cv2", "vlm.data.synthetic.degrade"),
        ("jiwer", "vlm.metrics.text"),
        ("pycocotools", "vlm.metrics.boxes"),
        ("pycocoevalcap", "vlm.metrics.caption"),
        ("sacrebleu", "vlm.metrics.caption"),
    ],
)
def test_modules_of_one_task_name_its_extra(lacks, package, module):
    extra = next(extra for extra, modules in MODULES.items() if package in modules)
    lacks(package, anew=(module,))
    with pytest.raises(MissingExtra, match=told(package, extra)):
        import_module(module)


def test_pages_of_pdfs_need_the_extra_ocr(lacks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vlm, "load", lambda *_, **__: pytest.fail("opened"), raising=False)
    Image.new("RGB", (30, 30)).save(tmp_path / "a.pdf", "PDF")
    lacks("pypdfium2")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["ocr", str(tmp_path / "a.pdf")])
    assert stopped.value.code == 1
    assert re.fullmatch(f"error: {told('pypdfium2', 'ocr')}\n", capsys.readouterr().err)


def test_lines_of_pages_need_the_extra_ocr(lacks, tmp_path, capsys, monkeypatch):
    draw_lines(PARAGRAPH[:1], px=20)[0].save(tmp_path / "a.png")
    reader = vlm.load("line-reader", "cpu", "float32")
    monkeypatch.setattr(vlm, "load", lambda *_, **__: reader, raising=False)
    lacks("cv2", anew=("vlm.ocr.pages", "vlm.ocr.line_detection.detect"))
    with pytest.raises(SystemExit):
        cli.main(["ocr", str(tmp_path / "a.png")])
    assert re.fullmatch(f"error: {told('cv2', 'ocr')}\n", capsys.readouterr().err)


def test_drawn_words_of_a_language_need_the_extra_ocr(lacks):
    lacks("faker")
    with pytest.raises(MissingExtra, match=told("faker", "ocr")):
        open_source("lines:4:text=el_GR:alphabet=greek")


def test_indices_need_the_extra_retrieval(lacks):
    nearest.faiss_library.cache_clear()
    lacks("faiss")
    with pytest.raises(MissingExtra, match=told("faiss", "retrieval")):
        nearest.faiss_library()


def test_parquet_files_need_the_extra_data(lacks, tmp_path):
    (tmp_path / "rows.parquet").touch()
    lacks("datasets")
    with pytest.raises(MissingExtra, match=told("datasets", "data")):
        open_source(str(tmp_path / "rows.parquet"))


def test_a_run_without_tensorboard_says_so_once_and_logs_the_rest(lacks, tmp_path, capsys):
    lacks("tensorboard", anew=[n for n in sys.modules if n.startswith("torch.utils.tensorboard")])
    run = Run(tmp_path / "run", {}, {})
    run.open(0)
    for step in (1, 2):
        run.log(step, {"loss": 1.0})
    assert [line["step"] for line in run.history()] == [1, 2]
    said = f"curves are in metrics.jsonl alone: {told('tensorboard', 'tensorboard')}\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    assert not (tmp_path / "run" / "tensorboard").exists()


EVALUATIONS = pytest.mark.parametrize(
    ("task", "metrics", "package", "options"),
    [
        ("caption", "caption", "sacrebleu", ["--model", "x"]),
        ("grounding", "boxes", "pycocotools", ["--model", "x", "--data", "scenes:3"]),
        ("ocr", "text", "jiwer", ["--model", "x"]),
    ],
)


@EVALUATIONS
def test_evaluations_name_their_extra_before_a_model_is_opened(
    lacks, capsys, monkeypatch, task, metrics, package, options
):
    monkeypatch.setattr(vlm, "load", lambda *_, **__: pytest.fail("opened"), raising=False)
    lacks(package, anew=(f"vlm.evaluation.{task}", f"vlm.metrics.{metrics}"))
    extra = next(extra for extra, modules in MODULES.items() if package in modules)
    with pytest.raises(SystemExit) as stopped:
        main(task, options)
    assert stopped.value.code == 1
    assert re.fullmatch(f"error: {told(package, extra)}\n", capsys.readouterr().err)


@EVALUATIONS
def test_help_of_evaluations_needs_no_extra(lacks, capsys, task, metrics, package, options):
    lacks(package, anew=(f"vlm.evaluation.{task}", f"vlm.metrics.{metrics}"))
    for ask in (lambda: main(task, ["--help"]), lambda: cli.main(["eval", task, "--help"])):
        with pytest.raises(SystemExit) as stopped:
            ask()
        assert stopped.value.code == 0
        assert "--data" in capsys.readouterr().out


def test_a_package_that_is_there_and_broken_fails_with_its_own_error():
    with pytest.raises(ImportError, match="no libGL") as caught, needs("ocr"):
        raise ImportError("no libGL")
    assert not isinstance(caught.value, MissingExtra)
