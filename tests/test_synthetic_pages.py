"""Drawn pages: what they say of themselves is what was drawn."""

import pickle
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib import get_data_path

from tests.pages import PARAGRAPH, overlap
from vlm.data.example import BadSource
from vlm.data.synthetic.pages import MOST_TURN, Pages
from vlm.ocr.line_detection.detect import Found, find_lines
from vlm.ocr.reading_order import order
from vlm.pixels import open_image


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"{line} {n}" for n in range(8) for line in PARAGRAPH))
    return str(path)


@pytest.fixture(scope="module")
def options(text):
    return {"fonts": f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", "text": text}


def test_page_follows_from_seed_and_row_alone(options):
    first, again = (
        Pages(4, seed=1, **options),
        pickle.loads(pickle.dumps(Pages(4, seed=1, **options))),
    )
    assert again[2].images == first[2].images
    assert again[2].answer == first[2].answer
    assert Pages(4, seed=2, **options)[2].images != first[2].images
    assert first[0].images != first[1].images


def test_boxes_hold_the_ink_and_transcript_the_lines(options):
    source = Pages(6, seed=3, kind="clean", **options)
    for row in range(6):
        page, example = source.page(row), source[row]
        root = ET.fromstring(example.answer)
        assert root.tag == "page"
        texts = [line.text for line in page.lines]
        assert [element.text for element in root.iter("line")] == texts
        assert [box.label for box in example.boxes] == texts
        grey = np.asarray(open_image(example.images[0]).convert("L"))
        assert [len(list(column.iter("line"))) > 0 for column in root.iter("column")]
        left = grey.copy()
        for line in page.lines:
            x0, y0, x1, y1 = (round(value) for value in line.xyxy_px)
            assert np.ptp(grey[y0:y1, x0:x1]) > 200
            left[y0:y1, x0:x1] = 255
        if not any(tag in example.answer for tag in ("<heading>",)) and left.min() > 0:
            assert (left < 128).mean() < 0.2  # an image at most


def test_pages_turn_with_their_corners(options):
    source = Pages(12, seed=5, kind="print", **options)
    slopes = []
    for row in range(12):
        (ax, ay), (bx, by) = source.page(row).lines[0].corners_px[:2]
        slopes.append(np.degrees(np.arctan2(by - ay, bx - ax)))
    assert 0 < np.abs(slopes).max() <= MOST_TURN
    assert min(np.abs(slopes)) == 0


@pytest.mark.parametrize("columns", [1, 2])
def test_reading_order_of_true_lines_is_found(options, columns):
    source = Pages(12, seed=7, columns=columns, kind="print", **options)
    for row in range(12):
        found = [Found(line.corners_px) for line in source.page(row).lines]
        assert order(found[::-1]) == found


@pytest.mark.slow
def test_lines_of_pages_are_found_in_order(options):
    source = Pages(4, seed=9, kind="scan", **options)
    hit = total = 0
    for row in range(4):
        page = source.page(row)
        found = order(find_lines(open_image(source[row].images[0])))
        for line in page.lines:
            total += 1
            hit += any(overlap(one.xyxy_px, line.xyxy_px) > 0.5 for one in found)
    assert hit / total > 0.95


def test_text_form_sets_every_option(options):
    line = (
        f"4:seed=3:fonts={options['fonts']}:text={options['text']}:split=train:kind=clean:columns=2"
    )
    source = Pages.from_text(line, prompt="Read.")
    assert len(source) == 4
    assert source.row_name(1) == f"pages:{line}[1]"
    assert source[1].turns[0].content == (None, "Read.")
    direct = Pages(4, 3, options["fonts"], options["text"], "train", "clean", 2)
    assert source[1].images[0].data == direct[1].images[0].data


@pytest.mark.parametrize(
    "line",
    ["x", "5:colour=red", "0", "5:columns=3", "5:kind=torn", "5:fonts=none", "5:text=no.txt"],
)
def test_text_form_that_does_not_fit_is_refused(line, options):
    for key in ("fonts", "text"):
        if f"{key}=" not in line:
            line += f":{key}={options[key]}"
    with pytest.raises(BadSource, match="pages:"):
        Pages.from_text(line)
