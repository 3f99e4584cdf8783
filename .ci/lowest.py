"""Prints what pip is to install to have the lowest versions that pyproject allows: a line for each
library whose minor version here is a newer one than that."""

import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

pyproject = Path(__file__).parent.parent / "pyproject.toml"
for text in tomllib.loads(pyproject.read_text())["project"]["dependencies"]:
    wanted = Requirement(text)
    (lowest,) = (s.version for s in wanted.specifier if s.operator == ">=")
    parts = Version(lowest).release
    if Version(version(wanted.name)).release[: len(parts)] != parts:
        print(f"{wanted.name}=={lowest}.*")
