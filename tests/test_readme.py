import ast
import re
from pathlib import Path

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
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    names -= {"build", "runs", "vlm.egg-info", "__pycache__"}
    assert names == {"pyproject.toml", "vlm", "recipes", "tests", "eval", "README.md", "LICENSE"}


def test_package_data_stays_small():
    size = sum(p.stat().st_size for p in (ROOT / "vlm/data/sample").iterdir())
    assert size < 8e6
