"""Readings as files: text, JSON, hOCR 1.2 and ALTO 4.

Boxes are in pixels of the pictures. The XML is built as a tree, so that every text is escaped;
characters that XML 1.0 cannot hold become U+FFFD.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from vlm.inference.reading import Line, Reading, Word, XyxyPx

Named = Sequence[tuple[str, Reading]]
"""Pages, each with the name of its picture."""

ALTO = "http://www.loc.gov/standards/alto/ns-v4#"
XHTML = "http://www.w3.org/1999/xhtml"
SIDEWAYS_DEGREES = 45.0
"""Lines turned by more have a text angle in hOCR, others a base line's slope."""
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_text(pages: Named) -> str:
    """The lines of all pages, each page ended by a form feed but the last, as tesseract does."""
    return "\f".join(reading.text + "\n" for _, reading in pages)


def to_json(pages: Named, indent: int | None = 2) -> str:
    """A list of pages with their lines and words.

    Each page: "image", "width", "height", "text", "confidence", "lines"; each line: "text",
    "confidence", "xyxy_px", "corners_px", "words"; each word: "text", "confidence", "xyxy_px",
    which is null where the model does not say where a word stands. End exclusive, origin top left.
    """
    values = [
        {
            "image": name,
            "width": reading.size_hw[1],
            "height": reading.size_hw[0],
            "text": reading.text,
            "confidence": _rounded(reading.confidence),
            "lines": [_line_values(line) for line in reading.lines],
        }
        for name, reading in pages
    ]
    return json.dumps(values, ensure_ascii=False, indent=indent)


def to_hocr(pages: Named) -> str:
    """hOCR 1.2: ocr_page, ocr_line and ocrx_word, with bbox and x_wconf in percent.

    A turned line has its base line, or beyond SIDEWAYS_DEGREES its textangle. Words of unknown
    place have no bbox.
    """
    ET.register_namespace("", XHTML)
    html = ET.Element(f"{{{XHTML}}}html", {"xml:lang": "und", "lang": "und"})
    head = ET.SubElement(html, f"{{{XHTML}}}head")
    ET.SubElement(head, f"{{{XHTML}}}title").text = "reading"
    for key, value in (("ocr-system", "vlm"), ("ocr-capabilities", "ocr_page ocr_line ocrx_word")):
        ET.SubElement(head, f"{{{XHTML}}}meta", {"name": key, "content": value})
    body = ET.SubElement(html, f"{{{XHTML}}}body")
    for p, (name, reading) in enumerate(pages, 1):
        height, width = reading.size_hw
        image = _clean(name).replace("\\", "\\\\").replace('"', '\\"')
        title = f'image "{image}"; bbox 0 0 {width} {height}; ppageno {p - 1}'
        page = _hocr(body, "div", "ocr_page", f"page_{p}", title)
        for n, line in enumerate(reading.lines, 1):
            title = f"bbox {_whole_box(line.xyxy_px)}{_hocr_turn(line)}"
            title += f"; x_wconf {round(100 * line.confidence)}"
            span = _hocr(page, "span", "ocr_line", f"line_{p}_{n}", title)
            for w, word in enumerate(line.words, 1):
                title = f"x_wconf {round(100 * word.confidence)}"
                if word.xyxy_px is not None:
                    title = f"bbox {_whole_box(word.xyxy_px)}; {title}"
                element = _hocr(span, "span", "ocrx_word", f"word_{p}_{n}_{w}", title)
                element.text = _clean(word.text)
                element.tail = " " if w < len(line.words) else None
            span.tail = "\n"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE html>\n'
        + ET.tostring(html, encoding="unicode")
        + "\n"
    )


def to_alto(pages: Named) -> str:
    """ALTO 4: one TextBlock a page, a TextLine with its outline for each line, a String for each
    word with WC in 0 to 1, and SP between two words."""
    ET.register_namespace("", ALTO)
    root = ET.Element(f"{{{ALTO}}}alto", {"SCHEMAVERSION": "4.4"})
    description = _alto(root, "Description")
    _alto(description, "MeasurementUnit").text = "pixel"
    if pages:
        source = _alto(description, "sourceImageInformation")
        _alto(source, "fileName").text = _clean(pages[0][0])
    layout = _alto(root, "Layout")
    for p, (_, reading) in enumerate(pages, 1):
        height, width = reading.size_hw
        size = {"HEIGHT": str(height), "WIDTH": str(width)}
        page = _alto(layout, "Page", {"ID": f"page_{p}", "PHYSICAL_IMG_NR": str(p), **size})
        space = _alto(page, "PrintSpace", {"HPOS": "0", "VPOS": "0", **size})
        if not reading.lines:
            continue
        place = _alto_box(_around([line.xyxy_px for line in reading.lines]))
        block = _alto(space, "TextBlock", {"ID": f"block_{p}", **place})
        for n, line in enumerate(reading.lines, 1):
            identity = {"ID": f"line_{p}_{n}", **_alto_box(line.xyxy_px)}
            text_line = _alto(block, "TextLine", identity)
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in line.corners_px)
            _alto(_alto(text_line, "Shape"), "Polygon", {"POINTS": points})
            for w, word in enumerate(line.words or (Word("", line.confidence),), 1):
                if w > 1:
                    _alto(text_line, "SP")
                values = {"ID": f"word_{p}_{n}_{w}", "CONTENT": _clean(word.text)}
                values["WC"] = f"{word.confidence:.4f}"
                values |= {} if word.xyxy_px is None else _alto_box(word.xyxy_px)
                _alto(text_line, "String", values)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


FORMATS = {
    "text": (to_text, ".txt"),
    "json": (to_json, ".json"),
    "hocr": (to_hocr, ".hocr"),
    "alto": (to_alto, ".xml"),
}
"""Name of a format -> what writes it, and how its files end."""


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
    """Base line or text angle of a turned line, as a property behind another; "" of a level one.

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


def _hocr(parent: ET.Element, tag: str, kind: str, identity: str, title: str) -> ET.Element:
    values = {"class": kind, "id": identity, "title": title}
    return ET.SubElement(parent, f"{{{XHTML}}}{tag}", values)


def _alto(parent: ET.Element, tag: str, values: dict[str, str] | None = None) -> ET.Element:
    return ET.SubElement(parent, f"{{{ALTO}}}{tag}", values or {})


def _alto_box(box: XyxyPx) -> dict[str, str]:
    x0, y0, x1, y1 = box
    return {
        "HPOS": f"{x0:.1f}",
        "VPOS": f"{y0:.1f}",
        "WIDTH": f"{x1 - x0:.1f}",
        "HEIGHT": f"{y1 - y0:.1f}",
    }
