"""Readings as files: text, JSON, hOCR 1.2 and ALTO 4, written one page after another.

Boxes are in pixels of the images; texts are in logical order, whatever way they run. The XML of a
page is built as a tree, so that every text is escaped; characters that XML 1.0 cannot hold become
U+FFFD.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from typing import NamedTuple, TextIO

from vlm.ocr.results import Line, Reading, Word, XyxyPx

Named = Iterable[tuple[str, Reading]]
"""Pages, each with the name of its image."""

ALTO = "http://www.loc.gov/standards/alto/ns-v4#"
XHTML = "http://www.w3.org/1999/xhtml"
SIDEWAYS_DEGREES = 45.0
"""Lines turned by more have a text angle in hOCR, others a base line's slope."""
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class PageWriter:
    """Writes pages to a text stream as they come, in one of FORMATS; `close` writes what ends the
    file, after which it is whole however many pages it has."""

    def __init__(self, stream: TextIO, format: str) -> None:
        self.stream, self.format, self.pages = stream, FORMATS[format], 0

    def add(self, name: str, reading: Reading, heading: str | None = None) -> None:
        """Writes a page. name: of its image. heading: the name of the file that begins with this
        page, where the format is to show it."""
        before = self.format.between if self.pages else self.format.start(name)
        if heading is not None:
            before += self.format.heading(heading)
        self.pages += 1
        self.stream.write(before + self.format.page(self.pages, name, reading))
        self.stream.flush()

    def close(self) -> None:
        self.stream.write(("" if self.pages else self.format.start(None)) + self.format.end)
        self.stream.flush()


def to_text(pages: Named) -> str:
    """The lines of all pages, each page ended by a form feed but the last, as tesseract does."""
    return _whole(pages, "text")


def to_json(pages: Named) -> str:
    """A list of pages with their lines and words.

    Each page: "image", "width", "height", "text", "confidence", "lines", and of a model that
    answers with values, "values"; each line: "text", "confidence", "xyxy_px", "corners_px",
    "words"; each word: "text", "confidence", "xyxy_px", which is null where the model does not say
    where a word stands. End exclusive, origin top left.
    """
    return _whole(pages, "json")


def to_hocr(pages: Named) -> str:
    """hOCR 1.2: ocr_page, ocr_line and ocrx_word, with bbox and x_wconf in percent.

    A turned line has its base line, or beyond SIDEWAYS_DEGREES its textangle. Words of unknown
    place have no bbox.
    """
    return _whole(pages, "hocr")


def to_alto(pages: Named) -> str:
    """ALTO 4: one TextBlock a page, a TextLine with its outline for each line, a String for each
    word with WC in 0 to 1, and SP between two words."""
    return _whole(pages, "alto")


def _whole(pages: Named, format: str) -> str:
    stream = StringIO()
    writer = PageWriter(stream, format)
    for name, reading in pages:
        writer.add(name, reading)
    writer.close()
    return stream.getvalue()


def _text_page(number: int, name: str, reading: Reading) -> str:
    return reading.text + "\n"


def _json_page(number: int, name: str, reading: Reading) -> str:
    values = {
        "image": name,
        "width": reading.size_hw[1],
        "height": reading.size_hw[0],
        "text": reading.text,
        "confidence": _rounded(reading.confidence),
        **({} if reading.values is None else {"values": reading.values}),
        "lines": [_line_values(line) for line in reading.lines],
    }
    text = json.dumps(values, ensure_ascii=False, indent=2)
    return "  " + text.replace("\n", "\n  ")  # no text has a line break of its own in JSON


HOCR_END = "</body></html>\n"


def _hocr_start(name: str | None) -> str:
    html = ET.Element("html", {"xmlns": XHTML, "xml:lang": "und", "lang": "und"})
    head = ET.SubElement(html, "head")
    ET.SubElement(head, "title").text = "reading"
    for key, value in (("ocr-system", "vlm"), ("ocr-capabilities", "ocr_page ocr_line ocrx_word")):
        ET.SubElement(head, "meta", {"name": key, "content": value})
    ET.SubElement(html, "body").text = "\n"
    begun = ET.tostring(html, encoding="unicode").removesuffix(HOCR_END.strip())
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE html>\n{begun}'


def _hocr_page(number: int, name: str, reading: Reading) -> str:
    height, width = reading.size_hw
    image = _clean(name).replace("\\", "\\\\").replace('"', '\\"')
    title = f'image "{image}"; bbox 0 0 {width} {height}; ppageno {number - 1}'
    page = _hocr(None, "div", "ocr_page", f"page_{number}", title)
    for n, line in enumerate(reading.lines, 1):
        title = f"bbox {_whole_box(line.xyxy_px)}{_hocr_turn(line)}"
        title += f"; x_wconf {round(100 * line.confidence)}"
        span = _hocr(page, "span", "ocr_line", f"line_{number}_{n}", title)
        for w, word in enumerate(line.words, 1):
            title = f"x_wconf {round(100 * word.confidence)}"
            if word.xyxy_px is not None:
                title = f"bbox {_whole_box(word.xyxy_px)}; {title}"
            element = _hocr(span, "span", "ocrx_word", f"word_{number}_{n}_{w}", title)
            element.text = _clean(word.text)
            element.tail = " " if w < len(line.words) else None
        span.tail = "\n"
    return ET.tostring(page, encoding="unicode") + "\n"


ALTO_END = "</Layout></alto>\n"


def _alto_start(name: str | None) -> str:
    root = ET.Element("alto", {"xmlns": ALTO, "SCHEMAVERSION": "4.4"})
    description = ET.SubElement(root, "Description")
    ET.SubElement(description, "MeasurementUnit").text = "pixel"
    if name is not None:
        source = ET.SubElement(description, "sourceImageInformation")
        ET.SubElement(source, "fileName").text = _clean(name)
    ET.SubElement(root, "Layout").text = "\n"
    begun = ET.tostring(root, encoding="unicode").removesuffix(ALTO_END.strip())
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{begun}'


def _alto_page(number: int, name: str, reading: Reading) -> str:
    height, width = reading.size_hw
    size = {"HEIGHT": str(height), "WIDTH": str(width)}
    page = ET.Element("Page", {"ID": f"page_{number}", "PHYSICAL_IMG_NR": str(number), **size})
    space = ET.SubElement(page, "PrintSpace", {"HPOS": "0", "VPOS": "0", **size})
    if reading.lines:
        box = _alto_box(_around([line.xyxy_px for line in reading.lines]))
        block = ET.SubElement(space, "TextBlock", {"ID": f"block_{number}", **box})
        for n, line in enumerate(reading.lines, 1):
            _alto_line(block, f"{number}_{n}", line)
    return ET.tostring(page, encoding="unicode") + "\n"


def _alto_line(block: ET.Element, number: str, line: Line) -> None:
    text_line = ET.SubElement(
        block, "TextLine", {"ID": f"line_{number}", **_alto_box(line.xyxy_px)}
    )
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in line.corners_px)
    ET.SubElement(ET.SubElement(text_line, "Shape"), "Polygon", {"POINTS": points})
    for w, word in enumerate(line.words or (Word("", line.confidence),), 1):
        if w > 1:
            ET.SubElement(text_line, "SP")
        values = {"ID": f"word_{number}_{w}", "CONTENT": _clean(word.text)}
        values["WC"] = f"{word.confidence:.4f}"
        values |= {} if word.xyxy_px is None else _alto_box(word.xyxy_px)
        ET.SubElement(text_line, "String", values)


class Format(NamedTuple):
    """suffix: how its files end. start: what stands before the pages, by the name of the first
    image, None where there is none. page: a page, by its number from 1. between, end: what stands
    between two pages and after the last. heading: what names a file over its first page, where
    pages of several are in one stream: nothing in formats that name the image of each page."""

    suffix: str
    start: Callable[[str | None], str]
    page: Callable[[int, str, Reading], str]
    between: str
    end: str
    heading: Callable[[str], str] = lambda file: ""


FORMATS = {
    "text": Format(".txt", lambda name: "", _text_page, "\f", "", lambda file: f"==> {file} <==\n"),
    "json": Format(".json", lambda name: "[\n", _json_page, ",\n", "\n]\n"),
    "hocr": Format(".hocr", _hocr_start, _hocr_page, "", HOCR_END),
    "alto": Format(".xml", _alto_start, _alto_page, "", ALTO_END),
}
"""Name of a format -> how it is written."""


def _line_values(line: Line) -> dict:
    words = [
        {
            "text": word.text,
            "confidence": _rounded(word.confidence),
            "xyxy_px": None if word.xyxy_px is None else [round(v, 2) for v in word.xyxy_px],
        }
        for word in line.words
    ]
    return {
        "text": line.text,
        "confidence": _rounded(line.confidence),
        "xyxy_px": [round(value, 2) for value in line.xyxy_px],
        "corners_px": [[round(value, 2) for value in corner] for corner in line.corners_px],
        "words": words,
    }


def _rounded(confidence: float) -> float:
    return round(confidence, 6)


def _clean(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _whole_box(box: XyxyPx) -> str:
    """The smallest box of whole pixels around a box."""
    x0, y0, x1, y1 = box
    return f"{math.floor(x0)} {math.floor(y0)} {math.ceil(x1)} {math.ceil(y1)}"


def _around(boxes: Sequence[XyxyPx]) -> XyxyPx:
    x0, y0, x1, y1 = zip(*boxes)
    return min(x0), min(y0), max(x1), max(y1)


def _hocr_turn(line: Line) -> str:
    """Base line or text angle of a turned line, as a property after another; "" of a level one.

    hOCR counts a base line from the bottom left of the box, y down, and angles counter-clockwise.
    """
    a, b, c, d = line.corners_px
    degrees = math.degrees(math.atan2(b[1] - a[1], b[0] - a[0]))
    if abs(degrees) > SIDEWAYS_DEGREES:
        return f"; textangle {-degrees % 360:.1f}"
    slope = (c[1] - d[1]) / max(c[0] - d[0], 1e-6)
    if not slope:
        return ""
    at_left = d[1] + slope * (line.xyxy_px[0] - d[0])
    return f"; baseline {slope:.4f} {at_left - line.xyxy_px[3]:.1f}"


def _hocr(parent: ET.Element | None, tag: str, kind: str, identity: str, title: str) -> ET.Element:
    values = {"class": kind, "id": identity, "title": title}
    return ET.Element(tag, values) if parent is None else ET.SubElement(parent, tag, values)


def _alto_box(box: XyxyPx) -> dict[str, str]:
    x0, y0, x1, y1 = box
    return {
        "HPOS": f"{x0:.1f}",
        "VPOS": f"{y0:.1f}",
        "WIDTH": f"{x1 - x0:.1f}",
        "HEIGHT": f"{y1 - y0:.1f}",
    }
