"""Prints what pip is to install to have the lowest versions that pyproject allows: a line for each
library whose minor version here is a newer one than that.

Of extras, what has a tested range: both bounds."""

import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

pyproject = Path(__file__).parent.parent / "pyproject.toml"
project = tomllib.loads(pyproject.read_text())["project"]
for text in chain(project["dependencies"], *project["optional-dependencies"].values()):
    wanted = Requirement(text)
    bounds = {specifier.operator: specifier.version for specifier in wanted.specifier}
    if wanted.name in ("vlm", "ruff") or set(bounds) != {">=", "<"}:
        continue
    parts = Version(bounds[">="]).release
    if Version(version(wanted.name)).release[: len(parts)] != parts:
        print(f"{wanted.name}=={bounds['>=']}.*")
