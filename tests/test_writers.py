"""Readings as files: what is written is parsed back to the same words and boxes."""

import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from vlm.draw import draw_reading
from vlm.ocr.results import Line, Reading, Word
from vlm.ocr.writers import ALTO, FORMATS, XHTML, PageWriter, to_alto, to_hocr, to_json, to_text

LEVEL = ((10.0, 20.0), (90.0, 20.0), (90.0, 40.0), (10.0, 40.0))
TURNED = ((10.0, 50.0), (90.0, 58.0), (88.0, 78.0), (8.0, 70.0))
SIDEWAYS = ((10.0, 190.0), (10.0, 110.0), (30.0, 110.0), (30.0, 190.0))
NAME = 'a "b" & <c>.png'


def line(words, corners, confidence=0.5):
    xs, ys = zip(*corners)
    text = " ".join(word.text for word in words)
    return Line(text, confidence, tuple(words), (min(xs), min(ys), max(xs), max(ys)), corners)


READING = Reading(
    (
        line([Word("<b>&amp;", 0.25, (10.5, 20.0, 40.0, 40.0)), Word('"x"', 1.0)], LEVEL),
        line([Word("π\x0c", 0.75, (8.0, 50.0, 90.0, 78.0))], TURNED, 0.125),
        line([Word("up", 0.5, (10.0, 110.0, 30.0, 190.0))], SIDEWAYS),
        line([], ((0.0, 0.0), (5.0, 0.0), (5.0, 5.0), (0.0, 5.0)), 1.0),
    ),
    (200, 100),
)
PAGES = [(NAME, READING), ("blank.png", Reading((), (30, 40)))]
WORDS = READING.words
WRITE = {"text": to_text, "json": to_json, "hocr": to_hocr, "alto": to_alto}


def prop(element, name):
    found = re.search(rf"(?:^|; ){name} ([^;]*)", element.get("title"))
    return None if found is None else [float(value) for value in found[1].split()]


def test_text_ends_pages_with_form_feeds():
    assert to_text(PAGES) == READING.text + "\n\f\n"
    assert to_text([]) == ""


def test_json_holds_everything():
    first, second = json.loads(to_json(PAGES))
    assert (first["image"], first["width"], first["height"]) == (NAME, 100, 200)
    assert first["text"] == READING.text
    assert second["lines"] == []
    for values, true in zip(first["lines"], READING.lines, strict=True):
        assert values["text"] == true.text
        assert values["confidence"] == true.confidence
        assert tuple(values["xyxy_px"]) == true.xyxy_px
        assert tuple(map(tuple, values["corners_px"])) == true.corners_px
        for word, true_word in zip(values["words"], true.words, strict=True):
            box = word["xyxy_px"] and tuple(word["xyxy_px"])
            assert Word(word["text"], word["confidence"], box) == true_word


def test_hocr_parses_back_to_words_and_boxes():
    root = ET.fromstring(to_hocr(PAGES))
    pages = root.findall(f".//{{{XHTML}}}div[@class='ocr_page']")
    assert [prop(page, "bbox") for page in pages] == [[0, 0, 100, 200], [0, 0, 40, 30]]
    assert pages[0].get("title").startswith(r'image "a \"b\" & <c>.png"; ')
    lines = pages[0].findall(f"{{{XHTML}}}span[@class='ocr_line']")
    assert [prop(one, "bbox") for one in lines[:2]] == [[10, 20, 90, 40], [8, 50, 90, 78]]
    words = pages[0].findall(f".//{{{XHTML}}}span[@class='ocrx_word']")
    assert [word.text for word in words] == ["<b>&amp;", '"x"', "π\ufffd", "up"]
    assert [prop(word, "x_wconf") for word in words] == [[25], [100], [75], [50]]
    assert [prop(word, "bbox") for word in words[:2]] == [[10, 20, 40, 40], None]
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))


def test_hocr_says_how_a_line_is_turned():
    root = ET.fromstring(to_hocr(PAGES))
    level, turned, sideways, _ = root.iterfind(f".//{{{XHTML}}}span[@class='ocr_line']")
    assert prop(level, "baseline") is prop(level, "textangle") is None
    slope, offset = prop(turned, "baseline")
    # The foot of the line goes from (8, 70) to (88, 78); the box's bottom left is (8, 78).
    assert (slope, offset) == (0.1, -8.0)
    assert prop(sideways, "textangle") == [90.0]  # runs up: counter-clockwise


def test_alto_parses_back_to_words_and_boxes():
    root = ET.fromstring(to_alto(PAGES))
    space = {"a": ALTO}
    assert root.findtext("a:Description/a:MeasurementUnit", namespaces=space) == "pixel"
    assert root.findtext(".//a:fileName", namespaces=space) == NAME
    pages = root.findall(".//a:Page", space)
    assert [(page.get("WIDTH"), page.get("HEIGHT")) for page in pages] == [
        ("100", "200"),
        ("40", "30"),
    ]
    lines = pages[0].findall(".//a:TextLine", space)
    assert [box_of(one) for one in lines] == [true.xyxy_px for true in READING.lines]
    points = [one.find("a:Shape/a:Polygon", space).get("POINTS") for one in lines]
    corners = [tuple(tuple(map(float, p.split(","))) for p in text.split()) for text in points]
    assert corners == [true.corners_px for true in READING.lines]
    words = [word for word in pages[0].findall(".//a:String", space) if word.get("CONTENT")]
    assert [word.get("CONTENT") for word in words] == ["<b>&amp;", '"x"', "π\ufffd", "up"]
    assert [float(word.get("WC")) for word in words] == [word.confidence for word in WORDS]
    assert [box_of(word) for word in words] == [word.xyxy_px for word in WORDS]
    for one in lines:  # the schema wants strings in every line, and spaces between them
        kinds = [child.tag.partition("}")[2] for child in one if "Shape" not in child.tag]
        assert kinds == ["String", "SP"] * (len(kinds) // 2) + ["String"]


def box_of(element):
    if element.get("HPOS") is None:
        return None
    x, y, width, height = (float(element.get(k)) for k in ("HPOS", "VPOS", "WIDTH", "HEIGHT"))
    return (x, y, x + width, y + height)


@pytest.mark.parametrize("name", FORMATS)
def test_no_pages_and_blank_pages_are_written(name):
    assert FORMATS[name].suffix.startswith(".")
    for pages in ([], PAGES[1:]):
        text = WRITE[name](pages)
        if name in ("hocr", "alto"):
            ET.fromstring(text)


@pytest.mark.parametrize("name", FORMATS)
def test_pages_stand_in_the_stream_before_the_next_are_known(name):
    stream = io.StringIO()
    writer = PageWriter(stream, name)
    said = []
    for page in PAGES:
        writer.add(*page)
        said.append(stream.getvalue())
    assert READING.lines[0].text.split()[-1].strip('"') in said[0]
    assert said[1].startswith(said[0])
    writer.close()
    assert stream.getvalue() == WRITE[name](PAGES)


def test_json_keeps_every_kind_of_line_break_within_a_text():
    text = "a\u2028b\x85c\x0bd\te"
    reading = Reading((line([Word(text, 0.5)], LEVEL),), (200, 100), {"nm": ["x\u2029y"]})
    (page,) = json.loads(to_json([("a.png", reading)]))
    assert page["lines"][0]["words"][0]["text"] == text
    assert page["values"] == {"nm": ["x\u2029y"]}
    assert "values" not in json.loads(to_json(PAGES))[0]


@pytest.mark.parametrize("text", ["مرحبا بالعالم 123", "שלום עולם", "a שלום (b)", "\u202bx\u202c"])
def test_scripts_that_run_to_the_left_keep_logical_order_and_can_be_drawn(text):
    reading = Reading((line([Word(text, 0.5)], LEVEL),), (200, 100))
    assert to_text([("a.png", reading)]) == text + "\n"
    assert json.loads(to_json([("a.png", reading)]))[0]["text"] == text
    root = ET.fromstring(to_alto([("a.png", reading)]))
    assert root.find(".//a:String", {"a": ALTO}).get("CONTENT") == text
    drawn = np.asarray(draw_reading(Image.new("RGB", (100, 200), "white"), reading))
    assert drawn[:, drawn.shape[1] // 2 + 5 :].min() < 200


def test_drawn_reading_outlines_lines_by_confidence():
    image = Image.new("RGB", (300, 400), "white")
    sure = line([Word("yes", 1.0)], ((20.0, 40.0), (280.0, 40.0), (280.0, 90.0), (20.0, 90.0)), 1.0)
    unsure = line(
        [Word("no", 0.0)], ((20.0, 200.0), (280.0, 210.0), (280.0, 260.0), (20.0, 250.0)), 0.0
    )
    drawn = draw_reading(image, Reading((sure, unsure), (400, 300)))
    assert drawn.size == (2 * 600, 800)  # enlarged by 2, the texts beside
    pixels = np.asarray(drawn).astype(int)
    green = (pixels[..., 1] > pixels[..., 0] + 60).nonzero()
    red = (pixels[..., 0] > pixels[..., 1] + 60).nonzero()
    assert green[0].max() < 200 < 380 < red[0].min()
    for _, columns in (green, red):  # outlined on the left, written on the right
        assert (columns < 600).any()
        assert (columns > 600).any()
    assert np.asarray(image).min() == 255  # the caller's image is untouched
    wide = draw_reading(Image.new("RGB", (900, 60), "white"), Reading((), (60, 900)))
    assert wide.size == (900, 120)
