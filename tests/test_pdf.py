"""PDFs as images; those that are encrypted, broken or too large are named before any reading."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from tests.pages import PARAGRAPH, draw_lines, write_pdf
from vlm.ocr.line_detection.detect import find_lines
from vlm.ocr.pdf import BadPdf, Pdf, count_pages, is_pdf, pdf_pages

PADDING = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")


@pytest.fixture
def pdf(tmp_path):
    """Two pages, 4 x 3 inches and 2 x 5."""
    first = draw_lines(PARAGRAPH[:3], px=18)[0].resize((400, 300))
    path = tmp_path / "two.pdf"
    second = Image.new("RGB", (200, 500), "white")
    first.save(path, "PDF", resolution=100, save_all=True, append_images=[second])
    return path


def encrypted(path, password):
    """A PDF without content that RC4 at 40 bits protects (ISO 32000-1, 7.6.3, revision 2)."""
    identity = b"0123456789abcdef"
    padded = (password.encode() + PADDING)[:32]
    owner = rc4(hashlib.md5(padded).digest()[:5], padded)
    permissions = (-4 & 0xFFFFFFFF).to_bytes(4, "little")
    key = hashlib.md5(padded + owner + permissions + identity).digest()[:5]
    user = rc4(key, PADDING)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 144] >>",
        b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>"
        % (owner.hex().encode(), user.hex().encode()),
    ]
    identity = identity.hex().encode()
    return write_pdf(
        path, *objects, trailer=b"/Encrypt 4 0 R /ID [<%s> <%s>]" % (identity, identity)
    )


def rc4(key, data):
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    out, i, j = bytearray(), 0, 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def test_pages_come_in_order_at_the_asked_resolution(pdf):
    assert is_pdf(pdf)
    assert count_pages(pdf) == 2
    (first, one), (second, two) = pdf_pages(pdf, dpi=150)
    assert (first, second) == (f"{pdf}[1]", f"{pdf}[2]")
    assert one.mode == "RGB"
    assert np.abs(np.subtract([one.size, two.size], [(600, 450), (300, 750)])).max() <= 1
    assert len(find_lines(one)) == 3
    assert np.asarray(two).min() == 255


def test_encrypted_pdf_opens_with_its_password_alone(tmp_path):
    path = encrypted(tmp_path / "locked.pdf", "open sesame")
    with pytest.raises(BadPdf, match=r"locked\.pdf: an encrypted PDF.* none was given"):
        count_pages(path)
    with pytest.raises(BadPdf, match=r"locked\.pdf: an encrypted PDF.* given is wrong"):
        next(pdf_pages(path, password="open barley"))
    ((_, page),) = pdf_pages(path, dpi=72, password="open sesame")
    assert page.size == (72, 144)


def test_broken_pdf_is_named(tmp_path, pdf):
    broken = tmp_path / "broken.pdf"
    broken.write_bytes(b"%PDF-1.7\nno more")
    with pytest.raises(BadPdf, match=r"broken\.pdf: expected a whole PDF, found a broken one"):
        count_pages(broken)
    with pytest.raises(BadPdf, match=r"gone\.pdf: expected a PDF, found nothing"):
        next(pdf_pages(tmp_path / "gone.pdf"))


def test_page_of_too_many_pixels_is_refused_before_it_is_drawn(pdf):
    pages = pdf_pages(pdf, dpi=100, max_pixels=110_000)
    with pytest.raises(
        BadPdf, match=r"two\.pdf\[1\]: expected at most 110000 pixels, found 300 × 400"
    ):
        next(pages)
    with pytest.raises(ValueError, match="dpi must be above 0"):
        next(pdf_pages(pdf, dpi=0))


def test_what_a_field_of_a_form_holds_is_drawn(tmp_path):
    """A field without an appearance of its own, as many programs leave it to the reader to draw."""
    path = write_pdf(
        tmp_path / "form.pdf",
        b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] "
        b"/DA (/Helv 24 Tf 0 g) /DR << /Font << /Helv 5 0 R >> >> >> >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 100] /Annots [4 0 R] >>",
        b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (Filled in) /F 4 "
        b"/DA (/Helv 24 Tf 0 g) /Rect [20 30 280 70] /P 3 0 R >>",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    )
    ((_, page),) = pdf_pages(path, dpi=144)
    (line,) = find_lines(page)
    x0, y0, x1, y1 = line.xyxy_px
    assert 30 <= x0 < x1 <= 570
    assert 55 <= y0 < y1 <= 145
    grey = np.asarray(page.convert("L"))
    assert grey[:50].min() == 255 == grey[10, 10]  # the paper is not tinted


def test_pages_behind_a_broken_one_are_drawn(tmp_path):
    leaf = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 144] >>"
    path = write_pdf(
        tmp_path / "three.pdf",
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R 9 0 R 4 0 R] /Count 3 >>",
        leaf,
        leaf,
    )
    with Pdf(path, dpi=72) as pdf:
        assert len(pdf) == 3
        assert pdf.image(2).size == (72, 144)
        with pytest.raises(BadPdf, match=r"three\.pdf\[2\]: expected a page, found a broken one"):
            pdf.image(1)


def test_images_are_no_pdfs(tmp_path):
    draw_lines(PARAGRAPH, px=18)[0].save(tmp_path / "a.png")
    assert not is_pdf(tmp_path / "a.png")
    assert not is_pdf(tmp_path)
