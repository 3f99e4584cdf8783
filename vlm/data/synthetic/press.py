"""Text set on a page, block by block: the ink, and where each line of it stands.

Columns of paragraphs under headings, ragged or justified, with a title, images of soft blobs and
a page number by chance; and no wear, which is `vlm.data.synthetic.pages`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm.compat.extras import needs
from vlm.data.synthetic.fonts import Font
from vlm.data.synthetic.text import TextSampler

with needs("ocr"):
    import cv2

PARTS = ("title", "heading", "paragraph", "number")
"""What a block of lines can be: of the page, of a column, and the page's number at its foot."""
WIDEST_SPACE = 1.0
"""Ems between two words of a justified line at most; where it took more the line stays ragged."""


@dataclass(frozen=True, slots=True)
class PageLine:
    """A line of a page, as it is drawn.

    corners_px: around its ink, clockwise from the text's own top left, on pixel edges.
    part: one of PARTS. column: its number from the left, -1 for what spans all. block: lines of one
        paragraph or heading share it.
    """

    text: str
    corners_px: tuple[tuple[float, float], ...]
    part: str
    column: int
    block: int

    @property
    def xyxy_px(self) -> tuple[float, float, float, float]:
        """The smallest upright box around it."""
        xs, ys = zip(*self.corners_px)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True, slots=True)
class Style:
    """How a page is set: sizes in pixels, `columns` of them with `gutter_px` between."""

    size_hw: tuple[int, int]
    margin_px: int
    body: Font
    heading: Font
    body_px: int
    leading: float
    columns: int
    gutter_px: int
    justified: bool
    indented: bool


class Press:
    """Sets a sampler's text on a page in a style, block by block; `print` does it, once.

    dice: decides what the style leaves open, and what the sampler says.
    """

    def __init__(self, style: Style, sampler: TextSampler, dice: Random) -> None:
        self.style, self.sampler, self.dice = style, sampler, dice
        self.mask = np.zeros(style.size_hw, np.uint8)
        self.lines: list[PageLine] = []
        self.block = 0

    def print(self) -> tuple[np.ndarray, list[PageLine]]:
        """The ink, uint8[H, W], and the lines in reading order."""
        style, dice = self.style, self.dice
        height, width = style.size_hw
        left, right = style.margin_px, width - style.margin_px
        top, bottom = style.margin_px, height - style.margin_px
        if dice.random() < 0.6:
            face = style.heading.at(round(style.body_px * dice.uniform(1.5, 2.8)))
            text = self._words(dice.randint(2, 7), style.heading)
            y = self._set(text, face, (left, right), top, bottom, "title", -1, dice.random() < 0.5)
            top = y + round(style.body_px * dice.uniform(0.6, 1.5))
        if dice.random() < 0.4:
            bottom -= round(2.2 * style.body_px)
            number = str(dice.randint(1, 999))
            foot = number, style.body.at(style.body_px), height - style.margin_px - style.body_px
        else:
            foot = None
        column_px = (right - left - (style.columns - 1) * style.gutter_px) // style.columns
        for column in range(style.columns):
            x0 = left + column * (column_px + style.gutter_px)
            self._fill(column, (x0, x0 + column_px), top, bottom)
        if foot is not None:
            text, face, y = foot
            self._set(text, face, (left, right), y, height, "number", -1, centred=True)
        return self.mask, self.lines

    def _fill(self, column: int, sides: tuple[int, int], y: int, bottom: int) -> None:
        """One column: paragraphs under headings, and by chance an image."""
        style, dice = self.style, self.dice
        end = bottom - round((bottom - y) * dice.choice((0, 0, 0, dice.uniform(0, 0.6))))
        start = y
        body = style.body.at(style.body_px)
        while y < end - 2 * style.body_px:
            roll = dice.random()
            if roll < 0.12 and y > start:
                y = self._image(sides, y + style.body_px // 2, end)
            elif roll < 0.35:
                face = style.heading.at(round(style.body_px * dice.uniform(1.0, 1.5)))
                text = self._words(dice.randint(1, 5), style.heading)
                y += round(0.5 * style.body_px) if y > start else 0
                barred = dice.random() < 0.15
                y = self._set(text, face, sides, y, end, "heading", column, barred=barred)
            text = self._words(dice.randint(8, 90), style.body)
            y = self._set(text, body, sides, y, end, "paragraph", column)
            y += 0 if style.indented else round(style.body_px * dice.uniform(0.3, 0.9))

    def _set(
        self,
        text: str,
        face: ImageFont.FreeTypeFont,
        sides: tuple[int, int],
        y: int,
        bottom: int,
        part: str,
        column: int,
        centred: bool = False,
        barred: bool = False,
    ) -> int:
        """Sets a block of text from `y` down to at most `bottom`; the row below it.

        barred: light on a dark bar.
        """
        style = self.style
        step = round(face.size * style.leading)
        indent = face.size * 1.4 if part == "paragraph" and style.indented else 0.0
        pad = face.size // 3 if barred else 0
        x0, x1 = sides[0] + pad, sides[1] - pad
        first = len(self.lines)
        top = y
        y += pad
        for words, is_last, start in _wrapped(text.split(), face, x1 - x0, indent):
            if y + step > bottom:
                break
            spread = part == "paragraph" and style.justified and not is_last
            shift = start
            if centred:
                shift = (x1 - x0 - face.getlength(" ".join(words))) / 2
            self._draw(words, face, x0 + shift, y, x1 if spread else None, part, column)
            y += step
        if len(self.lines) == first:  # no space left
            return bottom
        if barred:
            bar = self.mask[top : min(y + pad, bottom), sides[0] : sides[1]]
            np.subtract(255, bar, out=bar)
            y += pad + face.size // 3
        self.block += 1
        return y

    def _draw(self, words, face, x: float, y: int, end: float | None, part: str, column: int):
        """Draws one line; to `end` where it is justified."""
        line = Image.new("L", (self.style.size_hw[1], round(2 * face.size)))
        pen = ImageDraw.Draw(line)
        top = round(0.4 * face.size)
        widths = [face.getlength(word) for word in words]
        space = math.inf
        if end is not None and len(words) > 1:
            space = (end - x - sum(widths)) / (len(words) - 1)
        if space > WIDEST_SPACE * face.size:
            pen.text((x, top), " ".join(words), fill=255, font=face)
        else:
            for word, width in zip(words, widths):
                pen.text((x, top), word, fill=255, font=face)
                x += width + space
        box = line.getbbox()
        if box is None:
            return
        drawn = np.asarray(line)
        first = y - top
        rows = slice(max(0, first), min(self.mask.shape[0], first + len(drawn)))
        part_drawn = drawn[rows.start - first : rows.stop - first]
        np.maximum(self.mask[rows], part_drawn, out=self.mask[rows])
        x0, y0, x1, y1 = (float(value) for value in box)
        y0, y1 = y0 + first, y1 + first
        corners = ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
        self.lines.append(PageLine(" ".join(words), corners, part, column, self.block))

    def _image(self, sides: tuple[int, int], y: int, end: int) -> int:
        """An image of soft blobs in the column; the row below it."""
        dice, px = self.dice, self.style.body_px
        height = round(dice.uniform(4, 9) * px)
        if y + height > end:
            return y
        rng = np.random.default_rng(dice.randrange(2**32))
        cells = rng.random((dice.randint(3, 9), dice.randint(3, 12)), np.float32)
        width = round((sides[1] - sides[0]) * dice.uniform(0.5, 1.0))
        blobs = cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC)
        self.mask[y : y + height, sides[0] : sides[0] + width] = (blobs.clip(0, 1) * 230).astype(
            np.uint8
        )
        return y + height + px

    def _words(self, count: int, font: Font) -> str:
        """At least so many words that the font holds."""
        words: list[str] = []
        while len(words) < count:
            words += [word for word in self.sampler(self.dice).split() if font.holds(word)]
        return " ".join(words[:count])


def draw_style(dice: Random, fonts: Sequence[Font], columns: int | None) -> Style:
    """The style of a page of one family of fonts. columns: 1 or 2; None draws their number too."""
    families = sorted({font.family for font in fonts})
    family = dice.choice(families)
    of_family = [font for font in fonts if font.family == family]
    usual = [f for f in of_family if f.style == "normal" and 400 <= f.weight <= 500] or of_family
    bold = [font for font in of_family if font.style == "normal" and font.weight >= 600]
    columns = columns or dice.choice((1, 1, 2))
    body_px = dice.randint(17, 34)
    letters = dice.randint(28, 44) if columns == 2 else dice.randint(40, 75)  # in a line, about
    gutter = round(body_px * dice.uniform(1.3, 3.0))
    margin = round(body_px * dice.uniform(1.5, 4.0))
    width = round(columns * letters * 0.48 * body_px + (columns - 1) * gutter + 2 * margin)
    height = round(width * dice.uniform(1.0, 1.45))
    return Style(
        size_hw=(height, width),
        margin_px=margin,
        body=dice.choice(usual),
        heading=dice.choice(bold or usual),
        body_px=body_px,
        leading=dice.uniform(1.2, 1.65),
        columns=columns,
        gutter_px=gutter,
        justified=dice.random() < 0.5,
        indented=dice.random() < 0.5,
    )


def _wrapped(words: Sequence[str], face: ImageFont.FreeTypeFont, width: float, indent: float):
    """Lines of words that fit a width: words, whether the last of its block, and the indent."""
    waiting = list(words)
    start = indent
    while waiting:
        count = 1
        while (
            count < len(waiting) and start + face.getlength(" ".join(waiting[: count + 1])) <= width
        ):
            count += 1
        line, waiting = waiting[:count], waiting[count:]
        # A word longer than the line is cut, as there is nowhere to break it.
        while len(line[0]) > 1 and start + face.getlength(line[0]) > width:
            line[0] = line[0][:-1]
        yield line, not waiting, start
        start = 0.0
