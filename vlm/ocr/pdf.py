"""The pages of a PDF as images, drawn by PDFium (package pypdfium2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vlm.compat.extras import needs
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


class Pdf:
    """An open PDF, whose pages are drawn when they are asked for; ends as a context.

    dpi: pixels to the inch. max_pixels: the most rows times columns of a page.
    Raises BadPdf naming the file where it is encrypted or broken, or holds no page.
    """

    def __init__(
        self,
        path: Path,
        dpi: float = 200,
        password: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if not dpi > 0:
            raise ValueError(f"dpi must be above 0, found {dpi}")
        self.path, self.dpi, self.max_pixels = path, dpi, max_pixels
        self._document = _open(path, password)

    def __enter__(self) -> Pdf:
        return self

    def __exit__(self, *_) -> None:
        self._document.close()

    def __len__(self) -> int:
        return len(self._document)

    def name(self, index: int) -> str:
        """What a page, counted from 0, is called: "a.pdf[3]" for the third."""
        return f"{self.path}[{index + 1}]"

    def image(self, index: int) -> Image.Image:
        """A page, counted from 0: RGB on white, what its form's fields hold included.

        Raises BadPdf naming the page where it is broken, or too large, before it is drawn.
        """
        with needs("ocr"):
            import pypdfium2 as pdfium

        name, scale = self.name(index), self.dpi / POINTS_TO_THE_INCH
        try:
            page = self._document[index]
            width, height = (side * scale for side in page.get_size())
            if width * height > self.max_pixels:
                raise BadPdf(
                    f"{name}: expected at most {self.max_pixels} pixels, found {height:.0f} × "
                    f"{width:.0f} at {self.dpi:g} dpi; try fewer dots per inch"
                )
            bitmap = page.render(scale=scale)
            image = bitmap.to_pil().convert("RGB")
            bitmap.close()
            page.close()
        except pdfium.PdfiumError as error:
            raise BadPdf(f"{name}: expected a page, found a broken one ({error})") from error
        return image


def count_pages(path: Path, password: str | None = None) -> int:
    """The number of pages. Raises BadPdf where the file does not open."""
    with Pdf(path, password=password) as pdf:
        return len(pdf)


def pdf_pages(
    path: Path, dpi: float = 200, password: str | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[str, Image.Image]]:
    """Each page's name and image; see `Pdf`, which the arguments and errors are of."""
    with Pdf(path, dpi, password, max_pixels) as pdf:
        for index in range(len(pdf)):
            yield pdf.name(index), pdf.image(index)


def _open(path: Path, password: str | None):
    with needs("ocr"):
        import pypdfium2 as pdfium
        import pypdfium2.raw as raw

    try:
        document = pdfium.PdfDocument(path, password=password)
        document.init_forms()  # before any page is opened, or what fields hold is not drawn
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
