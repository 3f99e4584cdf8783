"""Rows in a JSON file: one object a line (.jsonl), or one list of objects (.json).

Either way only the byte offsets of the rows stay in memory. A list is indexed by scanning its
brackets and strings, so a file larger than memory opens too.
"""

from __future__ import annotations

import json
import mmap
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.example import BadRow, BadSource, Example
from vlm.data.sources.base import FolderImages, ImageRoot, Source, read_bytes
from vlm.data.sources.keys import UnreadKeys
from vlm.data.sources.row import RowFormat, example_from_row
from vlm.data.sources.tar import TarImages
from vlm.pixels.image_ref import ImageRef

CHUNK_BYTES = 1 << 24
_STRING = r'"(?:[^"\\]++|\\.)*+"'  # possessive: never given back, so a long one costs no stack


def _balanced(depth: int) -> str:
    """A pattern for what may stand between two brackets, with `depth` levels of brackets in it."""
    inner = rf"|[{{\[]{_balanced(depth - 1)}[}}\]]" if depth else ""
    return rf'(?:[^"{{}}\[\]]++|{_STRING}{inner})*+'


# A whole object of few levels, which is a usual row, in one match; or a string; or one bracket.
_TOKEN = re.compile(rf'\{{{_balanced(4)}\}}|{_STRING}|[{{}}\[\]"]'.encode(), re.DOTALL)


class RowsSource(Source):
    """The rows of a .jsonl or .json file, in its order.

    path: the file.
    image_root: the folder that image paths start from, or a .tar file whose members they name;
        None: the file's own folder.
    Rows are named FILE:LINE in a .jsonl file (lines count from 1, empty ones are no rows), and
    FILE[ROW] in a .json file (rows count from 0).
    Raises BadSource where the file is missing, empty, or no list.
    """

    def __init__(
        self,
        path: str | Path,
        form: RowFormat | None = None,
        image_root: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        self._path = Path(path)
        self.files = (self._path,)
        self.name = name or self._path.name
        self._form = form or RowFormat()
        self.unread = UnreadKeys(self._form.ignore)
        if not self._path.is_file():
            raise BadSource(f"{path}: expected a file of rows, found none")
        self._is_list = self._path.suffix.lower() == ".json"
        index = _index_list if self._is_list else index_lines
        self._starts, self._ends, self._lines = index(self._path)
        self._images = image_root_at(self._path.parent if image_root is None else image_root)
        self.require_rows()

    def __len__(self) -> int:
        return len(self._starts)

    def row_name(self, row: int) -> str:
        if self._is_list:
            return f"{self._path.name}[{row}]"
        return f"{self._path.name}:{self._lines[row]}"

    def read(self, row: int) -> Example:
        name = self.row_name(row)
        start, end = int(self._starts[row]), int(self._ends[row])
        data = read_bytes(self._path, start, end - start, name)
        values = load_json(data, name)
        return example_from_row(values, name, self._form, self._find, unread=self.unread)

    def _find(self, value: Any, row_name: str) -> ImageRef:
        if not isinstance(value, str):
            raise BadRow(f"{row_name}: expected an image path, found {str(value)[:80]!r}")
        return self._images.find(value, row_name)


def image_root_at(path: str | Path) -> ImageRoot:
    """The place of images at `path`: a folder, or a .tar file."""
    if Path(path).suffix.lower() == ".tar":
        return TarImages(path)
    if not Path(path).is_dir():
        raise BadSource(f"{path}: expected a folder or a .tar file of images, found neither")
    return FolderImages(path)


def load_json(data: bytes, name: str) -> Any:
    """The value that `data` holds. Raises BadRow with the place of the first error."""
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        within = f"line {error.lineno} column {error.colno} of the row"
        raise BadRow(f"{name}: expected JSON, found an error at {within}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise BadRow(
            f"{name}: expected UTF-8, found byte {error.start} of the row not to be"
        ) from error
    except RecursionError as error:
        raise BadRow(f"{name}: expected a row, found brackets too deep to read") from error


def index_lines(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, end, line number) of each line that is not empty, int64[N] each."""
    ends = [np.empty(0, np.int64)]
    size = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
        end = np.concatenate(ends)
        if len(end) == 0 or end[-1] != size - 1:
            end = np.append(end, size)
        start = np.append(0, end[:-1] + 1)
        keep = end > start
        for row in np.flatnonzero(keep & (end - start <= 8)):  # too short for a row: blank perhaps
            file.seek(start[row])
            keep[row] = bool(file.read(int(end[row] - start[row])).strip())
    return start[keep], end[keep], np.flatnonzero(keep) + 1


def _index_list(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, end, row number) of each object in the file's one list, int64[N] each.

    Only the marks at depth 0 (the list) and 1 (its rows) matter. `after` is where the last of
    these ended, so that what stands between two rows can be seen to be one comma.
    """
    starts, ends = array("q"), array("q")
    depth, after = 0, 0
    if path.stat().st_size == 0:
        raise BadSource(f"{path.name}: expected a list of rows, found an empty file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        after = list_start = 3 if data[:3] == b"\xef\xbb\xbf" else 0
        for match in _TOKEN.finditer(data):
            mark, position = match.group()[:1], match.start()
            if mark in b"{[":
                if depth == 0 and (mark != b"[" or after != list_start):
                    raise _not_rows(path, data, position)
                comma = b"," if starts else b""
                if depth <= 1 and data[after:position].strip() != comma:
                    raise _not_rows(path, data, position)
                if depth == 1 and mark != b"{":
                    raise _not_rows(path, data, position)
                if depth == 0:
                    after = match.end()
                elif depth == 1:
                    starts.append(position)
                if match.end() == position + 1:
                    depth += 1
                elif depth == 1:
                    ends.append(match.end())
                    after = match.end()
            elif mark in b"}]":
                depth -= 1
                if depth == 1:
                    ends.append(match.end())
                if depth < 0 or (depth == 0 and data[after:position].strip()):
                    raise _not_rows(path, data, position)
                if depth <= 1:
                    after = match.end()
            elif depth <= 1 or match.group() == b'"':  # a string for a row, or one without its end
                raise _not_rows(path, data, position)
        if depth or after == list_start or data[after:].strip():
            raise BadSource(
                f"{path.name}: expected a list of rows, found row {len(ends)} without its end: "
                "the file is cut short or holds no list"
            )
    return np.array(starts, np.int64), np.array(ends, np.int64), np.arange(len(starts))


def _not_rows(path: Path, data: mmap.mmap, position: int) -> BadSource:
    line = data[:position].count(b"\n") + 1
    found = data[position : position + 40].decode("utf-8", "replace")
    return BadSource(
        f"{path.name}: expected one list of objects, found {found!r} at line {line}; "
        "a file with one object a line is named .jsonl"
    )
