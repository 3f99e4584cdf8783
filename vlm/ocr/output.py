"""Where readings are written, page after page: the terminal, one file, or a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO

from vlm.ocr.results import Reading
from vlm.ocr.writers import FORMATS, PageWriter


class Output:
    """Writes readings as they come; leaving it as a context ends what is being written, however far
    it has come.

    out: None for the terminal; a file for all pages; or a folder, which gets a file for each file
        of pages. Such a one ends in .new until it is whole.
    format: one of `vlm.ocr.writers.FORMATS`.
    headed: whether pages of several files follow each other, each file under its name.
    file: the one whose pages are being written.
    """

    def __init__(self, out: Path | None, format: str, headed: bool = False) -> None:
        self.out, self.format = out, format
        self.file: Path | None = None
        self._in_folder = out is not None and out.is_dir()
        self._headed = headed and not self._in_folder
        self._stream: TextIO | None = None

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def add(self, file: Path, name: str, reading: Reading) -> None:
        """Writes what was read on a page of `file`; name: the page's own."""
        if self._in_folder and file != self.file:
            self.finish()
        if self._stream is None:
            self._begin(file)
        heading = str(file) if self._headed and file != self.file else None
        self.file = file
        self._pages.add(name, reading, heading)

    def finish(self) -> None:
        """Ends what is being written, which is whole."""
        if self._stream is not None and self._in_folder:
            self._stop()
            os.replace(self._path, self._path.with_suffix(""))

    def _begin(self, file: Path) -> None:
        if self.out is None:
            self._stream = sys.stdout
        else:
            name = f"{file.stem}{FORMATS[self.format].suffix}.new"
            self._path = self.out / name if self._in_folder else self.out
            self._stream = self._path.open("w", encoding="utf-8")
        self._pages = PageWriter(self._stream, self.format)

    def _stop(self) -> None:
        if self._stream is None:
            return
        self._pages.close()
        if self._stream is not sys.stdout:
            self._stream.close()
        self._stream = None
