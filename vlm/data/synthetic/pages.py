"""Drawn pages of text whose lines, boxes, reading order and structure are true by construction.

A page follows from (seed, row) alone: a title or none, one or two columns of paragraphs under
headings, ragged or justified, an image or none, a page number or none; then turned by a few
degrees, inked, lit and worn. For line finders, for reading order, and for readers of whole pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from xml.sax.saxutils import escape

import numpy as np

from vlm.compat.extras import needs
from vlm.data.example import BadSource, Box, Example, caption_example
from vlm.data.sources.base import Source
from vlm.data.synthetic import degrade
from vlm.data.synthetic.fonts import BadFont, find_fonts
from vlm.data.synthetic.lines import ALPHABETS, ppm
from vlm.data.synthetic.options import Options, read_options
from vlm.data.synthetic.press import PageLine, Press, draw_style
from vlm.data.synthetic.text import BadText, TextSampler, documentation, lines_of
from vlm.pixels.image_ref import ImageRef

with needs("ocr"):
    import cv2

MOST_TURN = 4.0
"""Degrees that pages are turned by at most."""


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


class Pages(Source):
    """Drawn pages: the answer is the tagged transcript, the boxes are the lines' with their texts.

    count: the number of rows. seed: any integer.
    fonts: as `find_fonts` takes them. text: "english" (Python's documentation) or a text file in
        UTF-8; split: which of its lines are used.
    kind: one of `degrade.KINDS`. columns: 1 or 2; None gives each page its own number.
    Images are uncompressed bytes, drawn when a row is read. Rows are named NAME[ROW].
    Raises BadSource, BadFont or BadText naming what does not fit.
    """

    drawn = True

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
        self._sampler = TextSampler(lines, characters, split, made=0.05)
        letters = "".join(c for c in characters if c.isascii())
        self.fonts = [font for font in find_fonts(fonts) if font.holds(letters)]
        if not self.fonts:
            raise BadFont(f"{self.name}: no font of {fonts!r} holds all of ASCII")
        self.require_rows()

    @classmethod
    def from_text(cls, text: str, prompt: str = "") -> Pages:
        """Pages of "COUNT:KEY=VALUE:..."; keys are seed, fonts, text, split, kind and columns.
        Raises BadSource naming the part that does not fit."""
        usage = (
            ":seed=3 :fonts=any :text=english :split=train "
            f":kind={'|'.join(degrade.KINDS)} :columns=1|2"
        )
        count, given = read_options(text, _OPTIONS, "pages", usage)
        try:
            return cls(count, **given, prompt=prompt, name=f"pages:{text}")
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
        style = draw_style(dice, self.fonts, self._columns)
        press = Press(style, self._sampler, dice)
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
    leave letters of `body_px` to be read. `degrade.see` takes an image for one line."""
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


_OPTIONS: Options = {
    "seed": ("seed", int),
    "fonts": ("fonts", str),
    "text": ("text", str),
    "split": ("split", str),
    "kind": ("kind", str),
    "columns": ("columns", int),
}
