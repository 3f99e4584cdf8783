"""Versions beside pyproject's ranges: one line, whatever is installed, and never more."""

import os
import subprocess
import sys

import pytest

from vlm.compat import versions

NAME = "vlm-0.1.0.dist-info"


@pytest.fixture
def told(monkeypatch, capsys):
    """What is printed where vlm requires `requires` and `installed` is on the path."""

    def say(requires, installed):
        monkeypatch.setattr(versions.metadata, "requires", lambda name: requires)
        monkeypatch.setattr(versions, "installed_versions", lambda: installed)
        versions.warn_untested.cache_clear()
        versions.warn_untested()
        versions.warn_untested()
        return capsys.readouterr().err

    yield say
    versions.warn_untested.cache_clear()


RANGES = ["torch>=2.14,<2.15", "transformers<5.25,>=5.23", "timm>=1.0.31,<2",
          "tensorboard>=2.20; extra == 'tensorboard'", "pytest>=9; extra == 'test'"]  # fmt: skip
TESTED = {"torch": "2.14.1+cpu", "transformers": "5.24.0", "timm": "1.0.31"}


def test_versions_in_their_ranges_print_nothing(told):
    assert told(RANGES, TESTED) == ""
    assert told(RANGES, TESTED | {"transformers": "5.23.0"}) == ""
    assert told(RANGES, {"tensorboard": "2.20"}) == ""  # an extra's, and three that are missing
    assert told(RANGES, {"pytest": "8"}) == ""  # of development
    assert told(None, TESTED) == ""


def test_packages_of_extras_are_named_where_they_are_installed(told):
    assert told(RANGES, TESTED | {"tensorboard": "2.1"}) == (
        "warning: vlm is not tested with tensorboard 2.1 (older than >=2.20)\n"
    )


def test_older_and_newer_libraries_are_named_in_one_line_once(told):
    said = told(RANGES, {"torch": "2.15.0.dev3", "transformers": "5.25.1", "timm": "1.0.30"})
    assert said == (
        "warning: vlm is not tested with torch 2.15.0.dev3 (newer than >=2.14,<2.15); "
        "transformers 5.25.1 (newer than >=5.23,<5.25); timm 1.0.30 (older than >=1.0.31,<2)\n"
    )


def test_only_the_first_process_of_a_run_speaks(told, monkeypatch):
    newer = TESTED | {"transformers": "6.0"}
    monkeypatch.setenv("RANK", "1")
    assert told(RANGES, newer) == ""
    monkeypatch.setenv("RANK", "0")
    assert told(RANGES, newer).count("\n") == 1


def test_what_cannot_be_read_never_raises(told, monkeypatch):
    assert told(RANGES, TESTED | {"torch": "of today"}) == ""

    def missing(name):
        raise versions.metadata.PackageNotFoundError(name)

    versions.warn_untested.cache_clear()
    monkeypatch.setattr(versions.metadata, "requires", missing)
    versions.warn_untested()


def test_installed_versions_are_the_first_on_the_path(tmp_path, monkeypatch):
    for folder, version in (("first", "1.0"), ("second", "2.0")):
        (tmp_path / folder / f"Some_Lib-{version}.dist-info").mkdir(parents=True)
    (tmp_path / "second" / "other-3.dist-info").mkdir()
    (tmp_path / "second" / "no-library.txt").touch()
    missing = str(tmp_path / "missing")
    monkeypatch.setattr(sys, "path", [missing, str(tmp_path / "first"), str(tmp_path / "second")])
    assert versions.installed_versions() == {"some-lib": "1.0", "other": "3"}


BROKEN = "import sys; sys.modules['torch'] = None"
"""Importing torch fails: the line must come ahead of that."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "import vlm.cli; vlm.cli.main(['systems'])",
        f"{BROKEN}; import vlm; vlm.load",
        f"{BROKEN}; import vlm; vlm.build",
        "from recipes.line_reader import launch, Settings; launch.start(Settings, 0)",
    ],
)
def test_first_use_names_an_untested_library_in_one_line(command, tmp_path):
    """As installed: the metadata of vlm, and a library's whose folder says another version."""
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vlm\nVersion: 0.1.0\nRequires-Dist: numpy<1.5,>=1.4\n"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-c", command],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,  # the folder of the tests may hold the metadata of an editable install
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if "not tested with" in line]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("warning: vlm is not tested with numpy ")
    assert said[0].endswith("(newer than >=1.4,<1.5)")
