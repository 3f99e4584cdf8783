"""Whether a folder holds an index: known before anything that takes seconds to import."""

from __future__ import annotations

from pathlib import Path

FILE = "index.json"


def index_file(path: Path) -> Path:
    """The file that describes the index in a folder. Raises ValueError where there is none."""
    where = path / FILE
    if not where.is_file():
        raise ValueError(f"{path}: expected an index ({FILE}), found none; see `vlm index`")
    return where
