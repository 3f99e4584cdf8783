"""The pages of a PDF as pictures, drawn by PDFium (package pypdfium2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vlm.pixels import MAX_PIXELS

POINTS_TO_THE_INCH = 72


class BadPdf(ValueError):
    """A PDF that cannot be read; the message names the file, what was expected and found."""


def is_pdf(path: Path) -> bool:
    """Whether a file begins as a PDF does, whatever it is called; its mark may stand anywhere in
    the first 1,024 bytes (ISO 32000-1, Annex H.3.4.1)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"%PDF-" in file.read(1024)


def count_pages(path: Path, password: str | None = None) -> int:
    """The number of pages. Raises BadPdf where the file does not open."""
    document = _open(path, password)
    try:
        return len(document)
    finally:
        document.close()


def pdf_pages(
    path: Path, dpi: float = 200, password: str | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[str, Image.Image]]:
    """Each page's name, such as "a.pdf[3]" for the third, and its picture, RGB on white.

    dpi: pixels to the inch. max_pixels: the most rows times columns, judged before a page is drawn.
    Raises BadPdf naming the file where it is encrypted or broken, holds no page, or holds one that
    is too large.
    """
    if not dpi > 0:
        raise ValueError(f"dpi must be above 0, found {dpi}")
    import pypdfium2 as pdfium

    document = _open(path, password)
    try:
        for number in range(len(document)):
            name = f"{path}[{number + 1}]"
            try:
                page = document[number]
                width, height = (side * dpi / POINTS_TO_THE_INCH for side in page.get_size())
                if width * height > max_pixels:
                    raise BadPdf(
                        f"{name}: expected at most {max_pixels} pixels, found {height:.0f} × "
                        f"{width:.0f} at {dpi:g} dpi; try fewer dots per inch"
                    )
                bitmap = page.render(scale=dpi / POINTS_TO_THE_INCH, may_draw_forms=False)
                picture = bitmap.to_pil().convert("RGB")
                bitmap.close()
                page.close()
            except pdfium.PdfiumError as error:
                raise BadPdf(f"{name}: expected a page, found a broken one ({error})") from error
            yield name, picture
    finally:
        document.close()


def _open(path: Path, password: str | None):
    import pypdfium2 as pdfium
    import pypdfium2.raw as raw

    try:
        document = pdfium.PdfDocument(path, password=password)
    except FileNotFoundError as error:
        raise BadPdf(f"{path}: expected a PDF, found nothing at this path") from error
    except pdfium.PdfiumError as error:
        if error.err_code == raw.FPDF_ERR_PASSWORD:
            found = "none was given" if password is None else "the one that was given is wrong"
            raise BadPdf(
                f"{path}: an encrypted PDF, which needs a password, and {found}"
            ) from error
        raise BadPdf(f"{path}: expected a whole PDF, found a broken one ({error})") from error
    if len(document) == 0:
        document.close()
        raise BadPdf(f"{path}: expected pages, found none")
    return document
