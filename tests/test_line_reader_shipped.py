"""The packaged line reader: what `vlm.load("line-reader")` gives on any machine."""

import subprocess
import sys

import pytest

import vlm
from vlm.data.sources import open_source
from vlm.data.synthetic.text import ASCII, MARKS
from vlm.families.line_reader.layout import SHIPPED
from vlm.metrics.text import compare_texts
from vlm.pixels import open_image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reader():
    return vlm.load("line-reader", device="cpu")


def test_package_file_is_small_and_has_a_card():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 15 * 2**20
    card = (SHIPPED / "README.md").read_text()
    assert all(word in card for word in ("recipes/line_reader.py", "hours", "tesseract", "licence"))


def test_vocabulary_holds_printable_ascii_and_typographic_signs(reader):
    assert set(ASCII + MARKS) <= set(reader.processor.characters)


def test_it_reads_printed_lines_with_calibrated_confidence(reader):
    """Clean print in the system's or matplotlib's fonts, whatever the machine has."""
    source = open_source("lines:40:seed=3:split=validation:fonts=any:kind=clean")
    examples = [source[row] for row in range(40)]
    read = reader.read_lines([open_image(example.images[0]) for example in examples])
    found = compare_texts([e.answer for e in examples], [line.text for line in read])
    assert found.result().metrics()["cer"] < 0.03
    assert all(0 <= line.confidence <= 1 for line in read)
    assert sum(line.confidence for line in read) / len(read) > 0.7


def test_vlm_ocr_reads_a_page_with_no_model_named(tmp_path):
    source = open_source("pages:1:seed=1:kind=clean")
    page = tmp_path / "page.png"
    open_image(source[0].images[0]).save(page)
    done = subprocess.run(
        [sys.executable, "-m", "vlm.cli", "ocr", str(page)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    words = set(source[0].answer.replace("\n", " ").split())
    assert len(words & set(done.stdout.split())) > 0.6 * len(words)
