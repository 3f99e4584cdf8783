"""Drawn pages of text whose lines, boxes, reading order and structure are true by construction.

A page follows from (seed, row) alone: a title or none, one or two columns of paragraphs under
headings, ragged or justified, a picture or none, a page number or none; then turned by a few
degrees, inked, lit and worn. For line finders, for reading order, and for readers of whole pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from xml.sax.saxutils import escape

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm.data.example import Box, Example, ImageRef, caption_example
from vlm.data.sources.base import BadSource, Source
from vlm.data.synthetic import degrade
from vlm.data.synthetic.fonts import BadFont, Font, find_fonts
from vlm.data.synthetic.lines import ALPHABETS, ppm
from vlm.data.synthetic.text import BadText, Writer, documentation, lines_of

PARTS = ("title", "heading", "paragraph", "number")
"""What a block of lines can be: of the page, of a column, and the page's number at its foot."""
MOST_TURN = 4.0
"""Degrees that pages are turned by at most."""

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
class DrawnPage:
    """pixels: uint8[H, W, 3]. lines: in reading order."""

    pixels: np.ndarray
    lines: tuple[PageLine, ...]

    @property
    def transcript(self) -> str:
        """The lines under tags: page, title, column, heading, paragraph, line, number; escaped as
        XML is, without line breaks."""
        out, open_column, open_block = ["<page>"], None, None

        def close(block_only: bool) -> None:
            nonlocal open_column, open_block
            if open_block is not None:
                out.append(f"</{open_block[1]}>")
                open_block = None
            if not block_only and open_column is not None:
                out.append("</column>")
                open_column = None

        for line in self.lines:
            column = line.column if line.column >= 0 else None
            if column != open_column:
                close(block_only=False)
                if column is not None:
                    out.append("<column>")
                open_column = column
            if (line.block, line.part) != open_block:
                close(block_only=True)
                out.append(f"<{line.part}>")
                open_block = line.block, line.part
            out.append(f"<line>{escape(line.text)}</line>")
        close(block_only=False)
        return "".join([*out, "</page>"])


@dataclass(frozen=True, slots=True)
class _Style:
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


class Pages(Source):
    """Drawn pages: the answer is the tagged transcript, the boxes are the lines' with their texts.

    count: the number of rows. seed: any integer.
    fonts: as `find_fonts` takes them. text: "english" (Python's documentation) or a text file in
        UTF-8; split: which of its lines are used.
    kind: one of `degrade.KINDS`. columns: 1 or 2; None gives each page its own number.
    Pictures are uncompressed bytes, drawn when a row is read. Rows are named NAME[ROW].
    Raises BadSource, BadFont or BadText naming what does not fit.
    """

    def __init__(
        self,
        count: int,
        seed: int = 0,
        fonts: str | Sequence[str] = "any",
        text: str = "english",
        split: str = "train",
        kind: str = "mixed",
        columns: int | None = None,
        prompt: str = "",
        name: str | None = None,
    ) -> None:
        if kind not in degrade.KINDS:
            raise BadSource(f"pages: expected a kind of {', '.join(degrade.KINDS)}, found {kind!r}")
        if columns not in (None, 1, 2):
            raise BadSource(f"pages: expected 1 or 2 columns, found {columns}")
        self.name = name or f"pages:{count}:seed={seed}"
        self._count, self._seed, self._kind = count, seed, kind
        self._columns, self._prompt = columns, prompt
        characters = ALPHABETS["english"]
        lines = documentation(split) if text == "english" else lines_of(text, split)
        self._writer = Writer(lines, characters, split, made=0.05)
        letters = "".join(c for c in characters if c.isascii())
        self.fonts = [font for font in find_fonts(fonts) if font.holds(letters)]
        if not self.fonts:
            raise BadFont(f"{self.name}: no font of {fonts!r} holds all of ASCII")
        self.require_rows()

    @classmethod
    def from_text(cls, text: str, prompt: str = "") -> Pages:
        """Pages of "COUNT:KEY=VALUE:..."; keys are seed, fonts, text, split, kind and columns.
        Raises BadSource naming the part that does not fit."""
        count, *parts = text.split(":")
        options = {}
        try:
            number = int(count)
            for part in parts:
                key, _, value = part.partition("=")
                options[key] = _OPTIONS[key](value)
        except (KeyError, ValueError) as error:
            raise BadSource(
                f"pages:{text}: expected pages:COUNT, then any of :seed=3 :fonts=any "
                f":text=english :split=train :kind={'|'.join(degrade.KINDS)} :columns=1|2"
            ) from error
        try:
            return cls(number, **options, prompt=prompt, name=f"pages:{text}")
        except (BadFont, BadText) as error:
            raise BadSource(f"pages:{text}: {error}") from error

    def __len__(self) -> int:
        return self._count

    def row_name(self, row: int) -> str:
        return f"{self.name}[{row}]"

    def page(self, row: int) -> DrawnPage:
        """What a row shows."""
        dice = Random(f"{self._seed}/{row}/page")
        rng = np.random.default_rng([self._seed % 2**32, row])
        kind = degrade.draw_kind(rng, self._kind)
        style = _style(dice, self.fonts, self._columns)
        press = _Press(style, self._writer, dice)
        mask, lines = press.print()
        if kind != "clean":
            mask, lines = _turn(mask, lines, dice)
        pixels = _see(degrade.paint(mask, rng, kind), rng, kind, style.body_px)
        return DrawnPage(pixels, tuple(lines))

    def read(self, row: int) -> Example:
        page, name = self.page(row), self.row_name(row)
        image = ImageRef(ppm(page.pixels), name)
        example = caption_example(name, image, page.transcript, self._prompt)
        boxes = tuple(Box(0, line.xyxy_px, line.text) for line in page.lines)
        return replace(example, boxes=boxes)


class _Press:
    """Sets text on a page, block by block: `print` gives the ink and the lines."""

    def __init__(self, style: _Style, writer: Writer, dice: Random) -> None:
        self.style, self.writer, self.dice = style, writer, dice
        self.mask = np.zeros(style.size_hw, np.uint8)
        self.lines: list[PageLine] = []
        self.block = 0

    def print(self) -> tuple[np.ndarray, list[PageLine]]:
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
        """One column: paragraphs under headings, and by chance a picture."""
        style, dice = self.style, self.dice
        end = bottom - round((bottom - y) * dice.choice((0, 0, 0, dice.uniform(0, 0.6))))
        start = y
        body = style.body.at(style.body_px)
        while y < end - 2 * style.body_px:
            roll = dice.random()
            if roll < 0.12 and y > start:
                y = self._picture(sides, y + style.body_px // 2, end)
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
        if len(self.lines) == first:  # no room left
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

    def _picture(self, sides: tuple[int, int], y: int, end: int) -> int:
        """A picture of soft blobs in the column; the row below it."""
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
            words += [word for word in self.writer(self.dice).split() if font.holds(word)]
        return " ".join(words[:count])


def _style(dice: Random, fonts: Sequence[Font], columns: int | None) -> _Style:
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
    return _Style(
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


def _turn(
    mask: np.ndarray, lines: Sequence[PageLine], dice: Random
) -> tuple[np.ndarray, list[PageLine]]:
    """The page turned around its middle by chance, its corners with it, on a canvas for all."""
    degrees = dice.choice((0.0, 0.0, dice.uniform(-MOST_TURN, MOST_TURN)))
    if not degrees:
        return mask, list(lines)
    height, width = mask.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    cos, sin = abs(matrix[0, 0]), abs(matrix[0, 1])
    size = math.ceil(width * cos + height * sin), math.ceil(width * sin + height * cos)
    matrix[:, 2] += (size[0] - width) / 2, (size[1] - height) / 2
    mask = cv2.warpAffine(mask, matrix, size, flags=cv2.INTER_LINEAR)
    # OpenCV's coordinates lie on pixel centres, corners on edges.
    moved = []
    for line in lines:
        points = (np.array(line.corners_px) - 0.5) @ matrix[:, :2].T + matrix[:, 2] + 0.5
        corners = tuple((float(x), float(y)) for x, y in points)
        moved.append(replace(line, corners_px=corners))
    return mask, moved


def _see(pixels: np.ndarray, rng: np.random.Generator, kind: str, body_px: int) -> np.ndarray:
    """The page as a scanner or camera gives it: light, blur, noise, compression, in strengths that
    leave letters of `body_px` to be read. `degrade.see` takes a picture for one line."""
    if kind in ("clean", "print"):
        return pixels
    height, width = pixels.shape[:2]
    work = pixels.astype(np.float32)
    photo = kind == "photo"
    if photo or rng.random() < 0.15:
        x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None]
        y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
        light = 0.85 + rng.normal(0, 0.25) * x + rng.normal(0, 0.25) * y
        if rng.random() < 0.3:  # a shadow with a soft edge
            edge = (x - rng.uniform(-0.4, 0.4)) + rng.normal(0, 0.5) * y
            light = light * (
                1 - rng.uniform(0.1, 0.45) / (1 + np.exp(-edge / rng.uniform(0.01, 0.1)))
            )
        work = work * np.clip(light, 0.3, 1.2)[..., None]
    if rng.random() < 0.5:
        work = cv2.GaussianBlur(work, (0, 0), rng.uniform(0.3, 0.045 * body_px))
    if rng.random() < 0.6:
        noise = rng.standard_normal((height, width), np.float32)[..., None]
        work = work + noise * rng.uniform(1, 14)
    seen = np.clip(work, 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        packed = cv2.imencode(".jpg", seen, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 92))])[
            1
        ]
        seen = cv2.imdecode(packed, cv2.IMREAD_COLOR)
    return seen


_OPTIONS: dict[str, Callable] = {
    "seed": int,
    "fonts": str,
    "text": str,
    "split": str,
    "kind": str,
    "columns": int,
}
