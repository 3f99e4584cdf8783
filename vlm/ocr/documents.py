"""Image files and PDFs as one sequence of pages, each opened when it is its turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vlm.ocr.pdf import BadPdf, Pdf, count_pages, is_pdf
from vlm.pixels import BadImage, image_size, open_image
from vlm.pixels.image_ref import ImageRef


class Page(NamedTuple):
    """file: the one that it is of. name: what messages and results call it: the file's path, with
    "[3]" after it for the third page of a PDF. image: its pixels, RGB; None once nobody needs
    them."""

    file: Path
    name: str
    image: Image.Image | None


def check_files(
    files: Iterable[Path], password: str | None = None
) -> tuple[list[Path], int, list[str]]:
    """The files that can be read, as far as their beginnings tell, the number of their pages, and
    what is wrong with each of the others."""
    readable, pages, faults = [], 0, []
    for path in files:
        try:
            if is_pdf(path):
                pages += count_pages(path, password)
            else:
                image_size(ImageRef(path, str(path)))
                pages += 1
            readable.append(path)
        except (BadImage, BadPdf, OSError) as error:
            faults.append(str(error))
    return readable, pages, faults


def open_pages(
    files: Iterable[Path],
    faults: list[str],
    skip: bool = False,
    dpi: float = 200,
    password: str | None = None,
) -> Iterator[Page]:
    """Yields the pages of files in order.

    faults: what is wrong with a file or page that cannot be read is added here. skip: goes on after
        it; else it is the last.
    dpi, password: of PDFs, see `vlm.ocr.pdf.Pdf`.
    """
    for path in files:
        try:
            if not is_pdf(path):
                yield Page(path, str(path), open_image(path))
                continue
            with Pdf(path, dpi, password) as pdf:
                for index in range(len(pdf)):
                    try:
                        yield Page(path, pdf.name(index), pdf.image(index))
                    except BadPdf as error:
                        faults.append(str(error))
                        if not skip:
                            return
        except (BadImage, BadPdf, OSError) as error:
            faults.append(str(error))
            if not skip:
                return
