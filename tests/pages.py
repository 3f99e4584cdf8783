"""Drawn text whose boxes are known, and a reader that needs no weights."""

from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from vlm.ocr.pages import read_each
from vlm.ocr.results import Token, Transcript

DEJAVU = str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
PARAGRAPH = (
    "The quick brown fox, jumping over",
    "a lazy dog: \"Why?\" it asked, 'why?'",
    "Nobody knew the answer - it was 17.50",
    "degrees; and yes, every page has one",
    "more line than it needs (or so we say).",
)


def draw_lines(lines, px, width=None, left=30, top=30, leading=1.5):
    """Black text on white, and the box of each line's ink: x0, y0, x1, y1, end exclusive."""
    font = ImageFont.truetype(DEJAVU, px)
    step = round(leading * px)
    longest = max(round(font.getlength(line)) for line in lines)
    size = (width or left + longest + 30, top + step * len(lines) + 30)
    image = Image.new("RGB", size, "white")
    boxes = []
    for number, line in enumerate(lines):
        layer = Image.new("L", size)
        ImageDraw.Draw(layer).text((left, top + number * step), line, fill=255, font=font)
        boxes.append(tuple(float(value) for value in layer.getbbox()))
        image.paste((0, 0, 0), mask=layer)
    return image, boxes


def write_pdf(path, *objects, trailer=b""):
    """A PDF of these objects, numbered from 1, the first its catalogue."""
    body, places = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    count = len(objects) + 1
    table = b"xref\n0 %d\n0000000000 65535 f \n" % count
    table += b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF"
    path.write_bytes(body + table + end % (count, trailer, len(body)))
    return path


def overlap(a, b):
    """Intersection over union of two boxes."""
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / area


class WidthReader:
    """Reads each image's width and height, as two words over its left and right half; of an
    image without contrast, nothing."""

    reads = "lines"

    class module:
        family = "line_reader"

    def __init__(self, confidences=(0.9,)):
        self.confidences, self.batches, self.images = confidences, [], []

    def read_lines(self, images, batch_size, **options):
        self.batches.append((len(images), batch_size, options))
        self.images += images
        transcripts = []
        for number, image in enumerate(images):
            confidence = self.confidences[number % len(self.confidences)]
            low, high = image.convert("L").getextrema()
            if high - low < 20:
                transcripts.append(Transcript((), confidence))
                continue
            tokens = (
                Token(str(image.width), confidence, (0.0, 0.5)),
                Token(" ", 1.0, (0.5, 0.5)),
                Token(str(image.height), 1.0, (0.5, 1.0)),
            )
            transcripts.append(Transcript(tokens, confidence))
        return transcripts

    def ocr(self, images, stream, **options):
        assert stream
        return read_each(self, images, **options)
