"""What is drawn to be looked at: boxes on images, queries beside their hits, lines of text beside
what was read of them, confidence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm.data.example import Box

if TYPE_CHECKING:
    from vlm.metrics.calibration import Calibration
    from vlm.ocr.results import Reading

COLOURS = (
    "#e6194b", "#1f77ff", "#008a3e", "#b35900", "#8a2be2",
    "#00808a", "#d6249f", "#5c6b00", "#7a4a2b", "#3b3b98",
)  # fmt: skip
"""Dark enough that white text can be read on them."""
LEAST_PX = 480
"""A drawing's longer side at least: smaller images are enlarged, so that labels can be read."""
TEXT_PX = 14
"""Height of text in a drawing whose longer side is LEAST_PX; larger ones have larger text."""
LEGEND = "full lines: predicted, with scores; dashed lines: true"
HITS_LEGEND = "left: the query; beside it: its best hits, with their scores"
GREEN, RED, GREY, BLACK = "#1f9d4a", "#d02020", "#cccccc", "#222222"
LINE_PX = 64
"""The most height of a line of text on a page of them."""


class Hit(NamedTuple):
    """Something that a query found.

    thing: an image or a text. right: whether it should be found; None where that is not known.
    """

    thing: Image.Image | str
    score: float
    right: bool | None = None


def draw_boxes(image: Image.Image, boxes: Sequence[Box], true: Sequence[Box] = ()) -> Image.Image:
    """A new RGB image with boxes on it, one colour for each label.

    boxes: predicted ones, in the image's pixels: a full line with label and score.
    true: a dashed line in the same colour, on white; labelled where nothing of their label is
        predicted.
    Where the longer side is under LEAST_PX, the image is enlarged by a whole number first.
    """
    scale = max(1, -(-LEAST_PX // max(image.size)))
    size = image.width * scale, image.height * scale
    canvas = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    colours = _colours([*boxes, *true])
    width, text_px = max(2, round(max(size) / 320)), round(TEXT_PX * max(size) / LEAST_PX)
    for box in true:
        _dashed(draw, _scaled(box, scale, size), colours[box.label], width)
    for box in boxes:
        x0, y0, x1, y1 = _scaled(box, scale, size)
        halo = x0 - 1, y0 - 1, x1 + 1, y1 + 1  # so that a red box is seen on a red thing
        draw.rectangle(halo, outline="white", width=width + 2)
        draw.rectangle((x0, y0, x1, y1), outline=colours[box.label], width=width)
    taken: list[Sequence[float]] = []
    known = {box.label for box in boxes}
    for box in [*boxes, *(box for box in true if box.label not in known)]:
        score = " true" if box.score is None else f" {box.score:.2f}"
        tag = shorten(box.label + score, size[0] - 6, font_of(text_px))
        spot = _free_spot(tag, text_px, _scaled(box, scale, size), size, taken)
        draw.rectangle(spot, fill=colours[box.label])
        draw.text((spot[0] + 3, spot[1] + 1), tag, fill="white", font=font_of(text_px))
        taken.append(spot)
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
    draw, font = ImageDraw.Draw(page), font_of(TEXT_PX)
    draw.text((gap, gap), shorten(LEGEND, page.width - 2 * gap, font), fill="#222222", font=font)
    for number, (drawing, title) in enumerate(zip(drawings, titles)):
        left, top = gap + number % columns * step_x, head + gap + number // columns * step_y
        draw.text((left, top), shorten(title, cell_px, font), fill="#222222", font=font)
        scale = cell_px / max(drawing.size)
        size = tuple(max(1, round(side * scale)) for side in drawing.size)
        filter = Image.Resampling.NEAREST if scale == 1 else Image.Resampling.LANCZOS
        page.paste(drawing.resize(size, filter), (left, top + head))
    page.save(path, "PNG")


def draw_hits(
    queries: Sequence[Image.Image | str],
    hits: Sequence[Sequence[Hit]],
    path: Path,
    notes: Sequence[str] | None = None,
    cell_px: int = 160,
) -> None:
    """A page of queries, each an image or a text, beside their hits, best first, as a PNG.

    notes: what is said under each query. cell_px: the side of the square that each image or text
    is brought into.
    """
    notes = [""] * len(queries) if notes is None else notes
    if not queries or not len(queries) == len(hits) == len(notes):
        raise ValueError(
            f"expected queries with hits and notes, found {len(queries)}, {len(hits)}, {len(notes)}"
        )
    gap, foot = 10, TEXT_PX + 10
    step_x, step_y = cell_px + gap, cell_px + foot + gap
    columns = 1 + max(map(len, hits))
    known = any(hit.right is not None for row in hits for hit in row)
    font, small = font_of(TEXT_PX), font_of(TEXT_PX - 2)
    legend = f"{HITS_LEGEND}; right ones in green" if known else HITS_LEGEND
    width = max(columns * step_x + 3 * gap, int(font.getlength(legend)) + 2 * gap)
    page = Image.new("RGB", (width, len(queries) * step_y + gap + 2 * foot), "white")
    draw = ImageDraw.Draw(page)
    draw.text((gap, gap), legend, fill=BLACK, font=font)
    for number, (query, row, note) in enumerate(zip(queries, hits, notes)):
        top = gap + 2 * foot + number * step_y - foot // 2
        if number:
            draw.line((gap, top - gap, width - gap, top - gap), fill="#eeeeee")
        _cell(page, draw, query, (gap, top), cell_px)
        note = shorten(note, cell_px, small)
        draw.text((gap, top + cell_px + 3), note, fill="#666666", font=small)
        for rank, hit in enumerate(row, 1):
            left = 2 * gap + rank * step_x
            _cell(page, draw, hit.thing, (left, top), cell_px)
            frame = (left - 2, top - 2, left + cell_px + 1, top + cell_px + 1)
            colour = GREEN if hit.right else GREY
            draw.rectangle(frame, outline=colour, width=4 if hit.right else 1)
            text = f"{hit.score:.3f}" + (" \N{CHECK MARK}" if hit.right else "")
            colour = GREEN if hit.right else "#666666"
            draw.text((left, top + cell_px + 3), text, fill=colour, font=small)
    page.save(path, "PNG")


def draw_reading(image: Image.Image, reading: Reading) -> Image.Image:
    """A new RGB image: the lines outlined on the image, and beside it what was read on them,
    each text where its line stands; from red to green by confidence, which stands after each.

    Where the longer side is under LEAST_PX, both are enlarged by a whole number.
    """
    scale = max(1, -(-LEAST_PX // max(image.size)))
    width, height = image.width * scale, image.height * scale
    # A shallow image has its texts below it: beside it they would be far from it.
    below = width > 2 * height
    canvas = Image.new("RGB", (width, 2 * height) if below else (2 * width, height), "white")
    canvas.paste(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    dx, dy = (0, height) if below else (width, 0)
    draw = ImageDraw.Draw(canvas)
    pen = max(1, round(max(width, height) / 800))
    for line in reading.lines:
        colour = _by_confidence(line.confidence)
        outline = [(x * scale, y * scale) for x, y in line.corners_px]
        draw.line([*outline, outline[0], outline[1]], fill=colour, width=pen)
        x0, y0, x1, y1 = (value * scale for value in line.xyxy_px)
        mark = f" {line.confidence:.2f}"
        text = " ".join(line.text.split())
        px = max(6, min(round(0.75 * (y1 - y0)), 60))
        free = min(max(x1 - x0, 3 * px), width - x0)
        while px > 6 and font_of(px).getlength(text + mark) > free:
            px -= 1
        small = max(6, round(0.6 * px))
        at = x0 + dx, (y0 + y1) / 2 + dy
        draw.text(at, text, fill=colour, font=font_of(px), anchor="lm")
        at = at[0] + font_of(px).getlength(text), at[1]
        draw.text(at, mark, fill="#888888", font=font_of(small), anchor="lm")
    edge = [(0, height), (width, height)] if below else [(width, 0), (width, height)]
    draw.line(edge, fill=GREY)
    return canvas


def _by_confidence(confidence: float) -> str:
    """From red at 0 over amber to green at 1, dark enough to be read on white."""
    hue = 120 * min(1.0, max(0.0, confidence)) ** 2
    return f"hsl({hue:.0f}, 85%, 36%)"


def draw_lines(
    images: Sequence[Image.Image],
    truths: Sequence[str],
    reads: Sequence[str],
    path: Path,
    notes: Sequence[str] | None = None,
    width_px: int = 900,
) -> None:
    """A page of lines of text, each over what it says and what was read of it, as a PNG.

    Characters that are wrong are red in what was read and green in the truth; wrong spaces are
    shown, and a caret stands where something is missing.
    notes: what is said over each line. width_px: of the widest image.
    """
    from vlm.metrics.text import differences

    notes = [""] * len(images) if notes is None else notes
    if not images or not len(images) == len(truths) == len(reads) == len(notes):
        raise ValueError(
            f"expected images with truths, reads and notes, found {len(images)}, "
            f"{len(truths)}, {len(reads)} and {len(notes)}"
        )
    gap, text_px, line_px = 12, TEXT_PX + 2, TEXT_PX + 8
    scales = [min(width_px / p.width, LINE_PX / p.height) for p in images]
    shown = [
        p.convert("RGB").resize(
            (max(1, round(p.width * s)), max(1, round(p.height * s))), Image.Resampling.LANCZOS
        )
        for p, s in zip(images, scales)
    ]
    height = sum(image.height + 3 * line_px + 2 * gap for image in shown)
    page = Image.new("RGB", (width_px + 2 * gap, height + gap), "white")
    draw, font, small = ImageDraw.Draw(page), font_of(text_px), font_of(TEXT_PX - 2)
    top = gap
    for image, truth, read, note in zip(shown, truths, reads, notes):
        draw.text((gap, top), shorten(note, width_px, small), fill="#666666", font=small)
        top += line_px
        page.paste(image, (gap, top))
        top += image.height + 4
        pairs = differences(truth, read)
        for side, colour in ((0, GREEN), (1, RED)):
            x = float(gap)
            for pair in pairs:
                same, text = pair[0] == pair[1], pair[side]
                if not same:
                    text = text.replace(" ", "\N{OPEN BOX}") or ("\N{CARET}" if side else "")
                draw.text((x, top), text, fill=BLACK if same else colour, font=font)
                x += font.getlength(text)
            top += line_px
        top += 2 * gap - 4
        draw.line((gap, top - gap, width_px + gap, top - gap), fill="#eeeeee")
    page.save(path, "PNG")


def draw_reliability(
    calibration: Calibration,
    title: str,
    path: Path,
    confidence: str = "probability of the best class",
    examples: str = "examples",
) -> None:
    """Accuracy against confidence by bins, with how many examples each holds, as a PNG.

    confidence, examples: what the axes are called.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    left, width = calibration.edges[:-1], np.diff(calibration.edges)
    full = calibration.count > 0
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(5, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    above.bar(left[full], calibration.accuracy[full], width[full], align="edge", color="#9db8d9",
              edgecolor="white", label="accuracy")  # fmt: skip
    above.plot(calibration.confidence[full], calibration.accuracy[full], "o", color="#1f4e8c",
               markersize=4, label="at the bin's mean confidence")  # fmt: skip
    above.plot([0, 1], [0, 1], "--", color="#888888", linewidth=1, label="as confident as right")
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right")
    above.legend(loc="upper left", fontsize=8, frameon=False)
    above.set_title(f"calibration error (ECE) {calibration.error:.3f}", fontsize=10)
    below.bar(left, calibration.count, width, align="edge", color="#bbbbbb", edgecolor="white")
    below.set(xlabel=confidence, ylabel=examples)
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10, wrap=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cell(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    thing: Image.Image | str,
    corner: tuple[int, int],
    px: int,
) -> None:
    """An image, or a text in lines, in the middle of a square."""
    left, top = corner
    if isinstance(thing, str):
        font, margin, line_px = font_of(TEXT_PX), 8, TEXT_PX + 5
        lines = _wrap(thing, px - 2 * margin, (px - 2 * margin) // line_px, font)
        y = top + (px - len(lines) * line_px) / 2
        for i, line in enumerate(lines):
            x = left + (px - font.getlength(line)) / 2
            draw.text((x, y + i * line_px), line, fill=BLACK, font=font)
        return
    scale = px / max(thing.size)
    size = tuple(max(1, round(side * scale)) for side in thing.size)
    image = thing.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    page.paste(image, (left + (px - size[0]) // 2, top + (px - size[1]) // 2), image)


def _wrap(text: str, width_px: float, most: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """A text in at most so many lines of a width; the last is cut where there is more."""
    words, lines = text.split(), []
    while words and len(lines) < most:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width_px:
            count += 1
        if len(lines) + 1 == most:
            count = len(words)
        lines.append(shorten(" ".join(words[:count]), width_px, font))
        del words[:count]
    return lines


def _colours(boxes: Sequence[Box]) -> dict[str, str]:
    labels = dict.fromkeys(box.label for box in boxes)
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}


def _scaled(box: Box, scale: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The corner pixels of a box, which ends before x1 and y1: one at least, on the canvas."""
    x0, y0, x1, y1 = (value * scale for value in box.xyxy_px)
    x0, y0 = (max(0, min(round(start), side - 1)) for start, side in zip((x0, y0), size))
    x1, y1 = (min(round(end), side) - 1 for end, side in zip((x1, y1), size))
    return x0, y0, max(x0, x1), max(y0, y1)


def _dashed(draw: ImageDraw.ImageDraw, box: Sequence[float], colour: str, width: int) -> None:
    """The outline of a box: white, with dashes of a colour on it."""
    x0, y0, x1, y1 = box
    draw.rectangle((x0, y0, x1, y1), outline="white", width=width)
    dash = 4 * width
    for start in range(int(x0), int(x1) + 1, 2 * dash):
        end = min(start + dash, x1)
        for y in (y0, max(y0, y1 - width + 1)):
            draw.rectangle((start, y, end, min(y + width - 1, y1)), fill=colour)
    for start in range(int(y0), int(y1) + 1, 2 * dash):
        end = min(start + dash, y1)
        for x in (x0, max(x0, x1 - width + 1)):
            draw.rectangle((x, start, min(x + width - 1, x1), end), fill=colour)


def _free_spot(
    text: str, px: int, box: Sequence[float], size: tuple[int, int], taken: Sequence[Sequence]
) -> tuple[float, float, float, float]:
    """Where a text can stand at a box, on the canvas and where no other stands, if there is such a
    place: above it, inside its top, below it, inside its bottom, or further down."""
    width, height = font_of(px).getlength(text) + 6, px + 5
    x = max(0, min(box[0], size[0] - width))
    tops = [box[1] - height, box[1], box[3] + 1, box[3] - height]
    tops += [box[1] + n * height for n in range(1, 8)]
    ys = [max(0, min(top, size[1] - height)) for top in tops]
    spots = [(x, y, x + width, y + height) for y in ys]
    return next((p for p in spots if not any(_meet(p, other) for other in taken)), spots[0])


def _meet(first: Sequence[float], second: Sequence[float]) -> bool:
    return (
        first[0] < second[2] and second[0] < first[2]
        and first[1] < second[3] and second[1] < first[3]
    )  # fmt: skip


def shorten(text: str, width_px: float, font: ImageFont.FreeTypeFont) -> str:
    """A text of one line, cut to a width."""
    text = " ".join(text.split())
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…"


@cache
def font_of(px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib carries: it has the characters of many scripts."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf", px)
