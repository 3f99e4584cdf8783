"""The command of models that read text: ocr.

Pages are opened as they are needed and results written as they are there, so that neither the
number of files nor that of their pages fills the memory, and what was read stays where it stops.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TextIO

import tyro

from vlm.config import require_least

if TYPE_CHECKING:
    from PIL import Image

    from vlm.ocr.results import Reading

PAGES_AT_ONCE = 8
"""Pages that a model of whole pages is given together, at most."""


class _Page(NamedTuple):
    """file: the one that it is of. name: what messages and results call it. picture: None once it
    is no longer needed."""

    file: Path
    name: str
    picture: Image.Image | None


@dataclass(frozen=True, kw_only=True)
class Ocr:
    """Read the text of pictures and PDFs, line by line in reading order."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(name="images")]
    """Picture and PDF files."""
    model: str = "line-reader"
    """The reader: the one that comes with the package, a run folder, a model folder or a hub id."""
    layout: Literal["auto", "line", "page"] = "auto"
    """page finds the lines; line takes each picture as one; auto decides by what is on it. Models
    of whole pages (Donut, PaliGemma) are shown the page."""
    prompt: str | None = None
    """What a model of whole pages is asked, literally; by default what it was trained on."""
    format: Literal["text", "json", "hocr", "alto"] = "text"
    """json has boxes, confidences and words, and Donut's answers as values; hocr and alto are
    XML."""
    out: Path | None = None
    """Where to write instead of the terminal: a file for all, or a folder for one file each. Both
    grow as pages are read; in a folder a file ends in .new until it is whole."""
    bad_pages: Literal["raise", "skip"] = "raise"
    """Files and pages that cannot be read: stop and name them, those that are missing or neither
    picture nor PDF before any is read; or leave them out, and name them at the end."""
    draw: Path | None = None
    """Draw lines, their confidences and texts into this PNG file; of several pages into files with
    -1, -2 and so on before .png."""
    min_confidence: float = 0.0
    """Lines below it are left out, and counted; 0 to 1."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    batch_size: int = 16
    """Lines, or whole pages, read at once."""
    dpi: int = 200
    """Pixels to the inch at which PDFs are drawn."""
    password: str | None = None
    """Of an encrypted PDF."""
    device: str = "auto"
    """auto takes a GPU where there is one."""
    dtype: str = "auto"
    """auto keeps the model's own where the device is fast in it, else takes float32; or float32,
    bfloat16, float16."""

    def run(self) -> None:
        self._check()
        left_out: list[str] = []
        files = self._files(left_out)
        if left_out and (self.bad_pages == "raise" or not files):
            raise ValueError(_together(left_out, len(self.files)))
        import vlm
        from vlm.ocr.pages import keep_sure

        model = vlm.load(self.model, device=self.device, dtype=self.dtype)
        self._check_model(model)
        results = _Results(self.out, self.format)
        total = sum(pages for _, pages in files)
        count, unsure = 0, 0
        try:
            for page, reading in self._readings(model, files, total, left_out):
                reading, dropped = keep_sure(reading, self.min_confidence)
                count, unsure = count + 1, unsure + dropped
                results.add(page, reading)
                if self.draw is not None:
                    from vlm.draw import draw_reading

                    path = self._drawing(count, total)
                    draw_reading(page.picture, reading).save(path)
            cut = left_out and left_out[-1].startswith(f"{results.file}[")  # at a page of this file
            if not cut or self.bad_pages == "skip":
                results.finish()
        finally:
            results.stop()
        if unsure:
            print(
                f"{unsure} lines of a confidence below {self.min_confidence:g} left out",
                file=sys.stderr,
            )
        if left_out and self.bad_pages == "raise":
            raise ValueError(
                f"{left_out[0]} (what was read before it is written; --bad-pages skip leaves such "
                "pages out)"
            )
        if left_out and not count:
            raise ValueError(_together(left_out, len(left_out)))
        if left_out:
            print(
                f"{len(left_out)} files or pages left out:", *left_out, sep="\n  ", file=sys.stderr
            )

    def _check(self) -> None:
        """Raises ValueError for options that cannot be."""
        if not self.files:
            raise ValueError("name at least one picture or PDF")
        require_least(self, num_beams=1, batch_size=1, dpi=1)
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"--min-confidence: expected 0 to 1, found {self.min_confidence}")
        if self.draw is not None and (
            self.draw.suffix.lower() != ".png" or not self.draw.absolute().parent.is_dir()
        ):
            raise ValueError(f"--draw: expected a .png file in a folder, found {self.draw}")
        if self.out is None:
            return
        if not self.out.absolute().parent.is_dir():
            raise ValueError(f"--out: expected a place in a folder, found {self.out}")
        if self.out.is_dir():
            names = Counter(path.stem for path in self.files)
            name, times = names.most_common(1)[0]
            if times > 1:
                raise ValueError(f"--out: several files would be written to {name} in {self.out}")

    def _check_model(self, model: Any) -> None:
        """Raises ValueError for a model that does not read, or not as it is asked to."""
        reads = getattr(model, "reads", None)
        if reads is None:
            raise ValueError(
                f"{self.model}: a {model.module.family} model reads no text; expected a model of "
                "the family line_reader, encoder_decoder or prefix_decoder"
            )
        if reads == "pages" and self.layout == "line":
            raise ValueError(f"--layout line: {self.model} reads a picture as a whole")
        if reads == "lines" and self.prompt is not None:
            raise ValueError(f"--prompt: {self.model} reads lines, and is asked nothing")

    def _files(self, left_out: list[str]) -> list[tuple[Path, int]]:
        """The files that can be read, as far as their beginnings tell, with their numbers of pages;
        of others what is wrong is added to `left_out`."""
        from vlm.data.example import ImageRef
        from vlm.ocr.pdf import BadPdf, count_pages, is_pdf
        from vlm.pixels import BadImage, image_size

        files = []
        for path in self.files:
            try:
                if is_pdf(path):
                    files.append((path, count_pages(path, self.password)))
                else:
                    image_size(ImageRef(path, str(path)))
                    files.append((path, 1))
            except (BadImage, BadPdf, OSError) as error:
                left_out.append(str(error))
        return files

    def _readings(
        self, model: Any, files: list[tuple[Path, int]], total: int, left_out: list[str]
    ) -> Iterator[tuple[_Page, Reading]]:
        """Each page with what is read on it, under a progress bar."""
        from tqdm import tqdm

        from vlm.ocr.pages import read_each

        options: dict[str, Any] = {"num_beams": self.num_beams} if self.num_beams > 1 else {}
        held: deque[_Page] = deque()

        def opened() -> Iterator[tuple[str, Image.Image]]:
            for page in self._pages([path for path, _ in files], left_out):
                held.append(page if self.draw is not None else page._replace(picture=None))
                yield page.name, page.picture

        if model.reads == "lines":
            readings = read_each(model, opened(), self.layout, self.batch_size, **options)
        else:
            if self.prompt is not None:
                options["prompt"] = self.prompt
            readings = _read_whole(model, opened(), self.batch_size, options)
        # Between texts on a terminal a bar would only stand in the way.
        seen = self.out is None and sys.stdout.isatty()
        with tqdm(total=total, unit="page", disable=True if seen or total == 1 else None) as bar:
            while True:
                with warnings.catch_warnings(record=True) as heard:
                    warnings.simplefilter("always", UserWarning)
                    reading = next(readings, None)
                for warning in heard:
                    bar.write(f"warning: {warning.message}", file=sys.stderr)
                if reading is None:
                    return
                yield held.popleft(), reading
                bar.update()

    def _pages(self, files: Iterable[Path], left_out: list[str]) -> Iterator[_Page]:
        """The pages of files in order. What is wrong with one that cannot be read is added to
        `left_out`; unless such are skipped, it is the last."""
        from vlm.ocr.pdf import BadPdf, Pdf, is_pdf
        from vlm.pixels import BadImage, open_image

        for path in files:
            try:
                if not is_pdf(path):
                    yield _Page(path, str(path), open_image(path))
                    continue
                with Pdf(path, self.dpi, self.password) as pdf:
                    for index in range(len(pdf)):
                        try:
                            yield _Page(path, pdf.name(index), pdf.picture(index))
                        except BadPdf as error:
                            left_out.append(str(error))
                            if self.bad_pages == "raise":
                                return
            except (BadImage, BadPdf, OSError) as error:
                left_out.append(str(error))
                if self.bad_pages == "raise":
                    return

    def _drawing(self, number: int, pages: int) -> Path:
        if pages == 1:
            return self.draw
        return self.draw.with_name(f"{self.draw.stem}-{number}{self.draw.suffix}")


class _Results:
    """Where readings go, page after page: the terminal, one file, or for each input a file in a
    folder, which has its name once it is whole."""

    def __init__(self, out: Path | None, format: str) -> None:
        self.out, self.format = out, format
        self.each = out is not None and out.is_dir()
        self.file: Path | None = None
        self.stream: TextIO | None = None

    def add(self, page: _Page, reading: Reading) -> None:
        if self.each and page.file != self.file:
            self.finish()
        if self.stream is None:
            self._begin(page.file)
        self.pages.add(page.name, reading)

    def finish(self) -> None:
        """Ends what is being written, which is whole."""
        if self.stream is not None and self.each:
            self.stop()
            os.replace(self.path, self.path.with_suffix(""))

    def stop(self) -> None:
        """Ends what is being written, however far it has come."""
        if self.stream is None:
            return
        self.pages.close()
        if self.stream is not sys.stdout:
            self.stream.close()
        self.stream = None

    def _begin(self, file: Path) -> None:
        from vlm.ocr.writers import FORMATS, PageWriter

        self.file = file
        if self.out is None:
            self.stream = sys.stdout
        else:
            name = f"{file.stem}{FORMATS[self.format].suffix}.new"
            self.path = self.out / name if self.each else self.out
            self.stream = self.path.open("w", encoding="utf-8")
        self.pages = PageWriter(self.stream, self.format)


def _read_whole(
    model: Any,
    pages: Iterator[tuple[str, Image.Image]],
    batch_size: int,
    options: dict[str, Any],
) -> Iterator[Reading]:
    """What a model of whole pages reads, as many at once as it is given together."""
    most = min(batch_size, PAGES_AT_ONCE)
    while part := list(islice(pages, most)):
        yield from model.ocr([picture for _, picture in part], batch_size=most, **options)


def _together(faults: list[str], count: int) -> str:
    """One message of all faults among so many files or pages."""
    hint = "--bad-pages skip reads the others"
    if len(faults) == 1:
        return faults[0] if count == 1 else f"{faults[0]} ({hint})"
    listed = "\n  ".join(faults)
    hint = "" if len(faults) == count else f"; {hint}"
    return f"{len(faults)} of {count} files or pages cannot be read{hint}:\n  {listed}"
