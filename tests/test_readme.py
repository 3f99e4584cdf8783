import ast
import re
import subprocess
from pathlib import Path

import pytest

from vlm import assets, tokenizers

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_lists_every_file_of_the_package():
    """Every file that holds more than a docstring."""
    listed = set(re.findall(r"^\| `(vlm/[\w/]+\.py)` \|", README, flags=re.MULTILINE))
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "vlm").rglob("*.py")}
    found = {path for path in found if len(ast.parse((ROOT / path).read_text()).body) > 1}
    assert listed == found


def test_readme_names_every_kind_and_asset():
    for name in (*tokenizers.KINDS, *assets.ASSETS):
        assert name in README


def test_top_level_holds_what_belongs_there():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    names = {line.split("/")[0] for line in listed.splitlines() if not line.startswith(".")}
    if not names:
        pytest.skip("this is no git checkout, so other folders may lie here")
    assert names == {"pyproject.toml", "vlm", "recipes", "tests", "eval", "README.md", "LICENSE"}


def test_every_link_of_the_readme_leads_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_package_data_stays_small():
    size = sum(p.stat().st_size for p in (ROOT / "vlm/data/sample").iterdir())
    assert size < 8e6
