"""Rows of a TSV file (tab-separated values): images and their texts, a pair a line, under a header.

    image	text
    lines/0001.png	He said "no" & left.

Nothing is quoted or escaped: a quotation mark is a quotation mark, a backslash a backslash. Only
the byte offsets of lines stay in memory.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from vlm.data.example import BadRow, BadSource, Example, caption_example
from vlm.data.sources.base import Source, read_bytes
from vlm.data.sources.json_rows import image_root_at, index_lines
from vlm.data.sources.keys import HARMLESS, ROW_MEANING, UnreadKeys
from vlm.data.sources.row import (
    CAPTION_KEYS,
    EXTRA_KEYS,
    TALK_KEYS,
    RowFormat,
    example_from_row,
)

_BOM = b"\xef\xbb\xbf"


class TsvSource(Source):
    """The lines of a .tsv file below its header, in its order; columns are found by their names.

    path: the file, in UTF-8 with or without a mark of that, lines ending in LF or CRLF. Empty lines
        are no rows.
    form: which columns are read. image: None means "image". caption: None means "caption" or else
        "text". A column "system" holds system messages; others are counted, and stop where they
        change what a row means, as keys of JSON do.
    image_root: the folder that image paths start from, or a .tar file whose members they name;
        None: the file's own folder.
    Rows are named FILE:LINE (lines count from 1, the header's too).
    Raises BadSource where the file is missing, has no header with these columns, or no row.
    Reading a row raises BadRow where it has not as many fields as the header, no text, or no
    image where its path leads.
    """

    def __init__(
        self,
        path: str | Path,
        form: RowFormat | None = None,
        image_root: str | Path | None = None,
    ) -> None:
        self._path = Path(path)
        self.files = (self._path,)
        self.name = self._path.name
        form = form or RowFormat()
        self._form = form
        self.unread = UnreadKeys(form.ignore)
        if not self._path.is_file():
            raise BadSource(f"{path}: expected a file of rows, found none")
        starts, ends, lines = index_lines(self._path)
        if not len(starts):
            raise BadSource(f"{self.name}: expected a header and rows, found an empty file")
        self._columns = self._header(int(starts[0]), int(ends[0]), int(lines[0]))
        self._image = self._column(("image",) if form.image is None else (form.image,))
        self._text = self._column(CAPTION_KEYS if form.caption is None else (form.caption,))
        self._starts, self._ends, self._lines = starts[1:], ends[1:], lines[1:]
        self._images = image_root_at(self._path.parent if image_root is None else image_root)
        self.require_rows()
        self._more = self._note_columns()

    def __len__(self) -> int:
        return len(self._starts)

    def row_name(self, row: int) -> str:
        return f"{self.name}:{self._lines[row]}"

    def read(self, row: int) -> Example:
        name = self.row_name(row)
        start, end = int(self._starts[row]), int(self._ends[row])
        data = read_bytes(self._path, start, end - start, name)
        try:
            fields = _fields(data)
        except UnicodeDecodeError as error:
            raise BadRow(
                f"{name}: expected UTF-8, found byte {error.start} of the row not to be"
            ) from error
        if len(fields) != len(self._columns):
            raise BadRow(
                f"{name}: expected {len(self._columns)} tab-separated fields "
                f"({', '.join(self._columns)}), found {len(fields)}: {'⇥'.join(fields)[:80]!r}"
            )
        text = fields[self._text]
        if not text.strip():
            raise BadRow(
                f"{name}: expected a text in the column {self._columns[self._text]}, found none"
            )
        more = {column: fields[index] for column, index in self._more if fields[index]}
        image = self._images.find(fields[self._image], name)
        if not more:
            return caption_example(name, image, text, self._form.prompt)
        form = replace(self._form, image=None, caption=None)
        row = more | {"caption": text}
        return example_from_row(row, name, form, self._images.find, (image,), self.unread)

    def _note_columns(self) -> list[tuple[str, int]]:
        """The columns beside image and text that say more of a row, with their indices; those
        that are skipped are counted, each by all rows, shown by the first."""
        says_more = {*ROW_MEANING, *EXTRA_KEYS, *TALK_KEYS} - self._form.ignore
        untold = HARMLESS | (self._form.chosen_away - says_more)
        more, rest = [], []
        for index, column in enumerate(self._columns):
            if index not in (self._image, self._text) and column not in untold:
                (more if column in says_more else rest).append((column, index))
        start, end = int(self._starts[0]), int(self._ends[0])
        with contextlib.suppress(BadRow, UnicodeDecodeError):  # which reading the row says
            fields = _fields(read_bytes(self._path, start, end - start, self.row_name(0)))
            for column, index in rest:
                value = fields[index] if index < len(fields) else None
                self.unread.note(column, value, self.row_name(0), count=len(self))
        return more

    def _header(self, start: int, end: int, line: int) -> list[str]:
        data = read_bytes(self._path, start, end - start, self.name)
        try:
            return [column.strip() for column in _fields(data.removeprefix(_BOM))]
        except UnicodeDecodeError as error:
            raise BadSource(
                f"{self.name}: expected UTF-8, found byte {error.start} of line {line} not to be"
            ) from error

    def _column(self, names: tuple[str, ...]) -> int:
        """The index of the first of these columns that there is."""
        found = [name for name in names if name in self._columns]
        if not found:
            raise BadSource(
                f"{self.name}: expected a first line of tab-separated columns, one of them "
                f"{' or '.join(names)}, found {self._columns}; name others with ?image= and "
                "?caption= after the file"
            )
        if self._columns.count(found[0]) > 1:
            raise BadSource(
                f"{self.name}: expected one column {found[0]}, found "
                f"{self._columns.count(found[0])}"
            )
        return self._columns.index(found[0])


def _fields(line: bytes) -> list[str]:
    return line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8").split("\t")
