"""Pages through a reader of lines: what is cut, in which order, and where it lies."""

import warnings

import numpy as np
import pytest
from PIL import Image

from tests.pages import PARAGRAPH, WidthReader, draw_lines, overlap
from vlm.ocr import pages as read
from vlm.ocr.line_detection.detect import find_lines
from vlm.ocr.pages import read_each, read_pages
from vlm.ocr.results import Token, Transcript
from vlm.ocr.streaming import filter_by_confidence
from vlm.pixels import BadImage


def test_lines_of_all_pages_are_read_in_one_call():
    pages = [draw_lines(PARAGRAPH, px=20)[0], draw_lines(PARAGRAPH[:2], px=30)[0]]
    reader = WidthReader()
    readings = read_pages(reader, pages, batch_size=3, num_beams=2)
    assert reader.batches == [(7, 3, {"num_beams": 2})]
    assert [len(reading.lines) for reading in readings] == [5, 2]
    assert [reading.size_hw for reading in readings] == [(p.height, p.width) for p in pages]


@pytest.mark.parametrize(("name", "value"), [("WINDOW", 3), ("WINDOW_PIXELS", 300_000)])
def test_pages_are_opened_as_they_are_needed(monkeypatch, name, value):
    """Two pages at a time: of five lines and about 150,000 pixels each."""
    monkeypatch.setattr(read, name, value)
    page = draw_lines(PARAGRAPH, px=20)[0].resize((500, 300))
    found = find_lines(page)
    monkeypatch.setattr(read, "find_lines", lambda image: found)
    monkeypatch.setattr(read, "runs_sideways", lambda image: False)
    reader, opened = WidthReader(), []
    pages = (opened.append(n) or page for n in range(5))
    assert [len(opened) for _ in read_each(reader, pages, "page", 3)] == [2, 2, 4, 4, 5]
    assert [lines for lines, *_ in reader.batches] == [10, 10, 5]
    whole = read_pages(WidthReader(), [page] * 5, "page", 3)
    assert [reading.text for reading in whole] == [whole[0].text] * 5


def test_missing_file_is_named_before_any_is_read(tmp_path):
    page = draw_lines(PARAGRAPH, px=20)[0]
    reader = WidthReader()
    with pytest.raises(BadImage, match=r"gone\.png"):
        read_pages(reader, [page, tmp_path / "gone.png"])
    assert not reader.batches


def test_an_image_that_turns_out_damaged_comes_after_the_readings_before_it(tmp_path):
    page = draw_lines(PARAGRAPH[:1], px=20)[0]
    page.save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    readings = read_each(WidthReader(), [page, tmp_path / "cut.png", page])
    assert next(readings).size_hw == (page.height, page.width)
    with pytest.raises(BadImage, match=r"cut\.png"):
        next(readings)


def test_long_image_given_as_a_line_is_not_looked_for_lines(monkeypatch):
    monkeypatch.setattr(read, "find_lines", lambda image: pytest.fail("looked for"))
    (reading,) = read_pages(WidthReader(), [Image.new("L", (600, 100), 200)], layout="line")
    assert len(reading.lines) == 1


def test_lines_and_words_lie_where_their_ink_is():
    image, true = draw_lines(PARAGRAPH, px=24)
    (reading,) = read_pages(WidthReader(), [image])
    for line, box in zip(reading.lines, true):
        assert overlap(line.xyxy_px, box) > 0.85
        first, second = (word.xyxy_px for word in line.words)
        middle = (line.xyxy_px[0] + line.xyxy_px[2]) / 2
        assert first == pytest.approx((*line.xyxy_px[:2], middle, line.xyxy_px[3]), abs=0.6)
        assert second == pytest.approx((middle, *line.xyxy_px[1:]), abs=0.6)


def test_image_of_one_line_is_read_whole():
    image, _ = draw_lines(["One line of text"], px=32, left=12, top=6)
    image = image.crop((0, 0, image.width, 56))
    reader = WidthReader()
    (reading,) = read_pages(reader, [image])
    assert reader.images == [image]
    assert reading.text == f"{image.width} {image.height}"
    assert reading.lines[0].xyxy_px == (0, 0, *image.size)


def test_one_line_on_a_large_page_is_cut_out():
    image, true = draw_lines(["One line of text"], px=24, top=200)
    page = Image.new("RGB", (image.width, 700), "white")
    page.paste(image)
    (reading,) = read_pages(WidthReader(), [page])
    assert len(reading.lines) == 1
    assert overlap(reading.lines[0].xyxy_px, true[0]) > 0.85


def test_page_given_as_a_line_warns_and_names_the_image(tmp_path):
    image, _ = draw_lines(PARAGRAPH, px=20)
    path = tmp_path / "page.png"
    image.save(path)
    with pytest.warns(
        UserWarning, match=r"page\.png: 5 lines of text .* a full page given"
    ) as heard:
        (reading,) = read_pages(WidthReader(), [path], layout="line")
    assert len(heard) == 1
    assert reading.text == f"{image.width} {image.height}"
    line, _ = draw_lines(PARAGRAPH[:1], px=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_pages(WidthReader(), [line], layout="line")


def test_blank_image_has_no_lines_but_as_a_line_an_empty_one():
    for size in ((300, 400), (400, 30)):
        blank = Image.new("RGB", size, "white")
        reader = WidthReader()
        (reading,) = read_pages(reader, [blank])
        assert (reading.lines, reading.text, reading.confidence) == ((), "", 1.0)
        assert not reader.batches
    (reading,) = read_pages(reader, [blank], layout="line")
    assert [(line.text, line.confidence) for line in reading.lines] == [("", 0.9)]


def test_unsure_lines_are_left_out_and_counted():
    image, _ = draw_lines(PARAGRAPH, px=20)
    reader = WidthReader(confidences=(0.9, 0.2))
    with pytest.warns(UserWarning, match="image 1: 2 lines of a confidence below 0.5 skipped"):
        (reading,) = read_pages(reader, [image], min_confidence=0.5)
    assert [line.confidence for line in reading.lines] == [0.9] * 3
    (full,) = read_pages(reader, [image])
    assert filter_by_confidence(full, 0.5) == (reading, 2)


class SidewaysReader:
    """Sure of images whose first column of ink is as in `upright`; so it knows the right turn."""

    def __init__(self, upright):
        self.upright = np.asarray(upright.convert("L"), np.float32)

    def read_lines(self, images, batch_size):
        return [self._read(image) for image in images]

    def _read(self, image):
        same = image.size[0] > image.size[1]
        if same:
            grey = np.asarray(image.convert("L").resize(self.upright.shape[::-1]), np.float32)
            same = np.corrcoef(grey.ravel(), self.upright.ravel())[0, 1] > 0.8
        token = Token("right" if same else "wrong", 0.9 if same else 0.3, (0.0, 1.0))
        return Transcript((token,), token.confidence)


@pytest.mark.parametrize("turn", [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270])
def test_vertical_line_is_read_the_way_it_runs(turn):
    image, _ = draw_lines(["A vertical line of text"], px=32, left=12, top=6)
    upright = image.crop((0, 0, image.width, 56))
    turned = upright.transpose(turn)
    (reading,) = read_pages(SidewaysReader(upright), [turned])
    assert reading.text == "right"
    (line,) = reading.lines
    width, height = turned.size
    assert line.xyxy_px == (0, 0, width, height)
    corner = (0, height) if turn == Image.Transpose.ROTATE_90 else (width, 0)
    assert line.corners_px[0] == corner  # where the text begins
    assert line.words[0].xyxy_px == (0, 0, width, height)


def test_vertical_line_is_read_where_nothing_is_found_upright():
    """Slender letters that lie on their sides are no letters to the finder."""
    image, _ = draw_lines(["illi lilil il"], px=24, left=20, top=20)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    assert not find_lines(turned)
    (reading,) = read_pages(WidthReader(), [turned], layout="page")
    (line,) = reading.lines
    (x0, y0), (x1, y1) = line.corners_px[:2]
    assert abs(x0 - x1) < 2 < 60 < abs(y0 - y1)


@pytest.mark.parametrize("size", [(300, 5), (20000, 40), (40, 3000), (1, 1)])
def test_images_of_any_shape_are_read(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, size[::-1], np.uint8))
    for layout in ("auto", "page"):
        (reading,) = read_pages(WidthReader(), [image], layout=layout)
        assert reading.size_hw == size[::-1]
    (reading,) = read_pages(WidthReader(), [Image.new("L", size)], layout="line")
    assert len(reading.lines) == 1


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="layout: expected auto, line, page, found 'word'"):
        read_pages(WidthReader(), [], layout="word")
    with pytest.raises(ValueError, match="min_confidence: expected 0 to 1, found 3"):
        read_pages(WidthReader(), [], min_confidence=3)
    with pytest.raises(BadImage, match=r"gone\.png"):
        read_pages(WidthReader(), [tmp_path / "gone.png"])
    assert read_pages(WidthReader(), []) == []
