"""Boxes drawn on pictures, to be looked at: predicted ones with their scores, true ones dashed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm.data.example import Box

COLOURS = (
    "#e6194b", "#1f77ff", "#008a3e", "#b35900", "#8a2be2",
    "#00808a", "#d6249f", "#5c6b00", "#7a4a2b", "#3b3b98",
)  # fmt: skip
"""Dark enough that white text can be read on them."""
LEAST_PX = 480
"""A drawing's longer side at least: smaller pictures are enlarged, so that labels can be read."""
TEXT_PX = 14
"""Height of letters in a drawing whose longer side is LEAST_PX; larger ones have larger letters."""
LEGEND = "full lines: predicted, with scores; dashed lines: true"


def draw_boxes(picture: Image.Image, boxes: Sequence[Box], true: Sequence[Box] = ()) -> Image.Image:
    """A new RGB picture with boxes on it, one colour for each label.

    boxes: predicted ones, in the picture's pixels: a full line with label and score.
    true: a dashed line in the same colour, on white; labelled where nothing of their label is
        predicted.
    Where the longer side is under LEAST_PX, the picture is enlarged by a whole number first.
    """
    scale = max(1, -(-LEAST_PX // max(picture.size)))
    size = picture.width * scale, picture.height * scale
    canvas = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
    ink = ImageDraw.Draw(canvas)
    colours = _colours([*boxes, *true])
    width, text_px = max(2, round(max(size) / 320)), round(TEXT_PX * max(size) / LEAST_PX)
    for box in true:
        _dashed(ink, _scaled(box, scale, size), colours[box.label], width)
    for box in boxes:
        x0, y0, x1, y1 = _scaled(box, scale, size)
        halo = x0 - 1, y0 - 1, x1 + 1, y1 + 1  # so that a red box is seen on a red thing
        ink.rectangle(halo, outline="white", width=width + 2)
        ink.rectangle((x0, y0, x1, y1), outline=colours[box.label], width=width)
    taken: list[Sequence[float]] = []
    known = {box.label for box in boxes}
    for box in [*boxes, *(box for box in true if box.label not in known)]:
        score = " true" if box.score is None else f" {box.score:.2f}"
        tag = _shorten(box.label + score, size[0] - 6, _font(text_px))
        place = _free_place(tag, text_px, _scaled(box, scale, size), size, taken)
        ink.rectangle(place, fill=colours[box.label])
        ink.text((place[0] + 3, place[1] + 1), tag, fill="white", font=_font(text_px))
        taken.append(place)
    return canvas


def draw_page(
    drawings: Sequence[Image.Image],
    titles: Sequence[str],
    path: Path,
    columns: int = 4,
    cell_px: int = LEAST_PX,
) -> None:
    """A page of drawings under their titles, as a PNG.

    cell_px: the side of the square that each drawing is brought into, its aspect kept.
    """
    if not drawings or len(drawings) != len(titles):
        raise ValueError(f"expected drawings with titles, found {len(drawings)}, {len(titles)}")
    columns = min(columns, len(drawings))
    gap, head = 12, TEXT_PX * 2
    rows = -(-len(drawings) // columns)
    step_x, step_y = cell_px + gap, cell_px + head + gap
    page = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap + head), "white")
    ink, font = ImageDraw.Draw(page), _font(TEXT_PX)
    ink.text((gap, gap), _shorten(LEGEND, page.width - 2 * gap, font), fill="#222222", font=font)
    for number, (drawing, title) in enumerate(zip(drawings, titles)):
        left, top = gap + number % columns * step_x, head + gap + number // columns * step_y
        ink.text((left, top), _shorten(title, cell_px, font), fill="#222222", font=font)
        scale = cell_px / max(drawing.size)
        size = tuple(max(1, round(side * scale)) for side in drawing.size)
        filter = Image.Resampling.NEAREST if scale == 1 else Image.Resampling.LANCZOS
        page.paste(drawing.resize(size, filter), (left, top + head))
    page.save(path, "PNG")


def _colours(boxes: Sequence[Box]) -> dict[str, str]:
    labels = dict.fromkeys(box.label for box in boxes)
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}


def _scaled(box: Box, scale: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The corner pixels of a box, which ends before x1 and y1: one at least, on the canvas."""
    x0, y0, x1, y1 = (value * scale for value in box.xyxy_px)
    x0, y0 = (max(0, min(round(start), side - 1)) for start, side in zip((x0, y0), size))
    x1, y1 = (min(round(end), side) - 1 for end, side in zip((x1, y1), size))
    return x0, y0, max(x0, x1), max(y0, y1)


def _dashed(ink: ImageDraw.ImageDraw, box: Sequence[float], colour: str, width: int) -> None:
    """The outline of a box: white, with dashes of a colour on it."""
    x0, y0, x1, y1 = box
    ink.rectangle((x0, y0, x1, y1), outline="white", width=width)
    dash = 4 * width
    for start in range(int(x0), int(x1) + 1, 2 * dash):
        end = min(start + dash, x1)
        for y in (y0, max(y0, y1 - width + 1)):
            ink.rectangle((start, y, end, min(y + width - 1, y1)), fill=colour)
    for start in range(int(y0), int(y1) + 1, 2 * dash):
        end = min(start + dash, y1)
        for x in (x0, max(x0, x1 - width + 1)):
            ink.rectangle((x, start, min(x + width - 1, x1), end), fill=colour)


def _free_place(
    text: str, px: int, box: Sequence[float], size: tuple[int, int], taken: Sequence[Sequence]
) -> tuple[float, float, float, float]:
    """Where a text can stand at a box, on the canvas and where no other stands, if there is such a
    place: above it, inside its top, below it, inside its bottom, or further down."""
    width, height = _font(px).getlength(text) + 6, px + 5
    x = max(0, min(box[0], size[0] - width))
    tops = [box[1] - height, box[1], box[3] + 1, box[3] - height]
    tops += [box[1] + n * height for n in range(1, 8)]
    ys = [max(0, min(top, size[1] - height)) for top in tops]
    places = [(x, y, x + width, y + height) for y in ys]
    return next((p for p in places if not any(_meet(p, other) for other in taken)), places[0])


def _meet(first: Sequence[float], second: Sequence[float]) -> bool:
    return (
        first[0] < second[2] and second[0] < first[2]
        and first[1] < second[3] and second[1] < first[3]
    )  # fmt: skip


def _shorten(text: str, width_px: float, font: ImageFont.FreeTypeFont) -> str:
    """A text of one line, cut to a width."""
    text = " ".join(text.split())
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…"


@cache
def _font(px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib carries: it has many scripts' letters."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf", px)
