"""The command of models that read text: ocr."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

if TYPE_CHECKING:
    from PIL import Image

    from vlm.inference.reading import Reading

PAGES_AT_ONCE = 8
"""Pages whose lines are read together: full batches, and few pictures in memory."""


class _Page(NamedTuple):
    """file: which of the command's files it is of. name: what messages and results call it."""

    file: int
    name: str
    picture: Image.Image


@dataclass(frozen=True, kw_only=True)
class Ocr:
    """Read the text of pictures and PDFs, line by line in reading order."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(name="images")]
    """Picture and PDF files."""
    model: str = "line-reader"
    """The reader: the one that comes with the package, a run folder, a model folder or a hub id."""
    layout: Literal["auto", "line", "page"] = "auto"
    """page finds the lines; line takes each picture as one; auto decides by what is on it."""
    format: Literal["text", "json", "hocr", "alto"] = "text"
    """json has boxes, confidences and words; hocr and alto are XML."""
    out: Path | None = None
    """Where to write instead of the terminal: a file for all, or a folder for one file each."""
    draw: Path | None = None
    """Draw lines, their confidences and texts into this PNG file; of several pages into files with
    -1, -2 and so on before .png."""
    min_confidence: float = 0.0
    """Lines below it are left out, and counted; 0 to 1."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    batch_size: int = 16
    """Lines read at once."""
    dpi: int = 200
    """Pixels to the inch at which PDFs are drawn."""
    password: str | None = None
    """Of an encrypted PDF."""
    device: str = "auto"
    """auto takes a GPU where there is one."""
    dtype: str = "auto"
    """auto keeps the model's own; else float32, bfloat16 or float16."""

    def run(self) -> None:
        counts = self._check()
        import vlm
        from vlm.pages.read import keep_sure

        model = vlm.load(self.model, device=self.device, dtype=self.dtype)
        if not (hasattr(model, "read_lines") or hasattr(model, "ocr")):
            raise ValueError(
                f"{self.model}: a {model.module.family} model reads no text; expected a model of "
                "the family line_reader, encoder_decoder or prefix_decoder"
            )
        if not hasattr(model, "read_lines") and self.layout == "line":
            raise ValueError(
                f"--layout line: a {model.module.family} model reads a picture as a whole"
            )
        read: list[list[tuple[str, Reading]]] = [[] for _ in self.files]
        left_out = drawn = 0
        for page, reading in self._readings(model, sum(counts)):
            reading, unsure = keep_sure(reading, self.min_confidence)
            left_out += unsure
            read[page.file].append((page.name, reading))
            if self.draw is not None:
                from vlm.draw import draw_reading

                drawn += 1
                draw_reading(page.picture, reading).save(self._drawing(drawn, sum(counts)))
        self._write(read)
        if left_out:
            print(
                f"{left_out} lines of a confidence below {self.min_confidence:g} left out",
                file=sys.stderr,
            )

    def _check(self) -> list[int]:
        """The number of pages of each file, once all files and options are known to be sound."""
        if not self.files:
            raise ValueError("name at least one picture or PDF")
        for name in ("num_beams", "batch_size", "dpi"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be at least 1, found {getattr(self, name)}")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"--min-confidence: expected 0 to 1, found {self.min_confidence}")
        if self.draw is not None and (
            self.draw.suffix.lower() != ".png" or not self.draw.absolute().parent.is_dir()
        ):
            raise ValueError(f"--draw: expected a .png file in a folder, found {self.draw}")
        self._check_out()
        from vlm.data.example import ImageRef
        from vlm.pages.pdf import count_pages, is_pdf
        from vlm.pixels import image_size

        counts = []
        for path in self.files:
            if is_pdf(path):
                counts.append(count_pages(path, self.password))
            else:
                image_size(ImageRef(path, str(path)))
                counts.append(1)
        return counts

    def _check_out(self) -> None:
        if self.out is None:
            return
        if not self.out.absolute().parent.is_dir():
            raise ValueError(f"--out: expected a place in a folder, found {self.out}")
        if self.out.is_dir():
            names = [self._name_in(self.out, path) for path in self.files]
            twice = {str(name) for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"--out: several files would be written to {min(twice)}")

    def _readings(self, model, pages: int) -> Iterator[tuple[_Page, Reading]]:
        """Each page with what is read on it, under a progress bar."""
        from tqdm import tqdm

        from vlm.pages.read import read_pages

        options = {"num_beams": self.num_beams} if self.num_beams > 1 else {}
        waiting: list[_Page] = []
        with tqdm(total=pages, unit="page", disable=None if pages > 1 else True) as bar:

            def read() -> Iterator[tuple[_Page, Reading]]:
                with warnings.catch_warnings(record=True) as heard:
                    warnings.simplefilter("always", UserWarning)
                    pictures = [page.picture for page in waiting]
                    if hasattr(model, "read_lines"):
                        names = [page.name for page in waiting]
                        readings = read_pages(
                            model, pictures, self.layout, self.batch_size, names=names, **options
                        )
                    else:
                        readings = model.ocr(pictures, self.batch_size, **options)
                for warning in heard:
                    bar.write(f"warning: {warning.message}", file=sys.stderr)
                yield from zip(waiting, readings)
                bar.update(len(waiting))

            for page in self._pages():
                waiting.append(page)
                if len(waiting) == PAGES_AT_ONCE:
                    yield from read()
                    waiting = []
            if waiting:
                yield from read()

    def _pages(self) -> Iterator[_Page]:
        from vlm.pages.pdf import is_pdf, pdf_pages
        from vlm.pixels import open_image

        for number, path in enumerate(self.files):
            if is_pdf(path):
                for name, picture in pdf_pages(path, self.dpi, self.password):
                    yield _Page(number, name, picture)
            else:
                yield _Page(number, str(path), open_image(path))

    def _write(self, read: list[list[tuple[str, Reading]]]) -> None:
        from vlm.pages.write import FORMATS

        write, _ = FORMATS[self.format]
        if self.out is not None and self.out.is_dir():
            for path, pages in zip(self.files, read):
                _replace(self._name_in(self.out, path), write(pages))
            return
        pages = [page for of_file in read for page in of_file]
        if self.out is not None:
            _replace(self.out, write(pages))
        else:
            sys.stdout.write(write(pages).rstrip("\n") + "\n")

    def _name_in(self, folder: Path, path: Path) -> Path:
        from vlm.pages.write import FORMATS

        return folder / (path.stem + FORMATS[self.format][1])

    def _drawing(self, number: int, pages: int) -> Path:
        if pages == 1:
            return self.draw
        return self.draw.with_name(f"{self.draw.stem}-{number}{self.draw.suffix}")


def _replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
