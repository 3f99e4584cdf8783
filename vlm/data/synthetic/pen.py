"""Writing by hands that no font holds.

A hand is made up: each of its letters is taken from one of a few fonts, bent in its own way, and
every time that it is written it comes out a little different. Most hands write with a pen, whose
stroke is as wide everywhere: then the middles of a letter's strokes are drawn anew. A reader that
learns from a few fonts of handwriting learns those fonts; there is no end of these hands.

Shapes: H W pixel rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from vlm.compat.extras import needs
from vlm.data.synthetic.fonts import Font

with needs("ocr"):
    import cv2

HEIGHT = 32
"""Pixels of the letter x as letters are bent; a line is scaled when it is done."""
RISE, FALL = 76, 44
"""Rows kept above and below the line that letters stand on."""


@dataclass(frozen=True, slots=True)
class _Glyph:
    """A letter standing on row `RISE`: uint8[RISE + FALL, W], its foot's first column, and how far
    the next letter is, in pixels."""

    mask: np.ndarray
    left: int
    advance: float


class Hand:
    """A made-up hand.

    families: fonts by family, of which it takes some. dice: what it is drawn from; the same dice
    write the same.
    """

    def __init__(self, families: Sequence[Sequence[Font]], dice: Generator) -> None:
        of = [families[dice.integers(len(families))] for _ in range(dice.choice((1, 1, 2, 3)))]
        self._dice = dice
        self._pen = dice.uniform(0.8, 3.2) if dice.random() < 0.75 else 0.0
        # The middles of light strokes are those that a pen would follow.
        self._fonts = [_lightest(f, dice) if self._pen else f[dice.integers(len(f))] for f in of]
        self._wide = float(np.clip(dice.normal(0.92, 0.17), 0.55, 1.35))
        self._bends = dice.uniform(0.3, 2.4)  # of a letter's shape, in pixels
        self._shakes = dice.uniform(0.0, 1.2)  # each time it is written
        self._unlike = dice.uniform(0.0, 0.10)  # in size and place, as a share
        self._slant = float(np.clip(dice.normal(0.05, 0.14), -0.35, 0.45))
        self._apart = dice.uniform(-2.0, 5.0)
        self._space = dice.uniform(10.0, 26.0) + max(0.0, self._apart)
        self._letters: dict[str, tuple] = {}

    def holds(self, text: str) -> bool:
        """Whether one of its fonts has each character of a text."""
        return all(any(font.holds(c) for font in self._fonts) for c in text)

    def write(self, text: str, height: float) -> np.ndarray:
        """The text as ink, uint8[H, W], cut to what is drawn; the letter x is about `height` pixels
        high. Raises ValueError for a character that none of its fonts has."""
        dice, pieces, x = self._dice, [], 8.0
        for character in text:
            if character == " ":
                x += self._space * dice.uniform(0.8, 1.25)
                continue
            glyph, wide, tall, lift, bends = self._letter(character)
            wide = wide * (1 + dice.normal(0, self._unlike / 2))
            tall = tall * (1 + dice.normal(0, self._unlike / 3))
            rise = lift + dice.normal(0, self._unlike / 2) * HEIGHT
            field = bends + dice.normal(0, self._shakes, bends.shape)
            mask, left = self._bent(glyph, wide, tall, rise, field.astype(np.float32))
            pieces.append((mask, round(x) - left))
            x += max(2.0, glyph.advance * wide + self._apart * dice.uniform(0.6, 1.4))
        return self._inked(pieces, height / HEIGHT)

    def _letter(self, character: str) -> tuple:
        """The hand's own form of a character, the same all over a line."""
        if character not in self._letters:
            dice = self._dice
            having = [font for font in self._fonts if font.holds(character)]
            if not having:
                raise ValueError(f"expected a character of the hand's fonts, found {character!r}")
            font = having[dice.integers(len(having))]
            wide = self._wide * (1 + dice.normal(0, self._unlike))
            tall = 1 + dice.normal(0, self._unlike / 2)
            lift = dice.normal(0, self._unlike / 3) * HEIGHT
            bends = dice.normal(0, self._bends, (5, 3, 2))
            glyph = _glyph(font, character, self._pen > 0)
            self._letters[character] = (glyph, wide, tall, lift, bends)
        return self._letters[character]

    def _bent(self, glyph: _Glyph, wide: float, tall: float, rise: float, field: np.ndarray):
        """A letter scaled, slanted and bent, uint8[RISE + FALL, W], and its foot's column."""
        H, W = glyph.mask.shape
        slant_px = int(abs(self._slant) * RISE + 6)
        out_w = int(W * wide) + 2 * slant_px
        field = cv2.resize(field, (out_w, H), interpolation=cv2.INTER_CUBIC)
        y = np.arange(H, dtype=np.float32)[:, None] - RISE
        x = np.arange(out_w, dtype=np.float32)[None] - slant_px
        from_x = (x + self._slant * y) / np.float32(wide) + field[..., 0]
        from_y = (y + np.float32(rise)) / np.float32(tall) + RISE + field[..., 1]
        bent = cv2.remap(glyph.mask, from_x, from_y, cv2.INTER_LINEAR, borderValue=0)
        return bent, round(slant_px + glyph.left * wide)

    def _inked(self, pieces: list[tuple[np.ndarray, int]], scale: float) -> np.ndarray:
        least = min((start for _, start in pieces), default=0)
        most = max((start + mask.shape[1] for mask, start in pieces), default=1)
        line = np.zeros((RISE + FALL, most - least), np.uint8)
        for mask, start in pieces:
            part = line[:, start - least : start - least + mask.shape[1]]
            np.maximum(part, mask, out=part)
        if self._pen:
            # Middles are one pixel wide, fainter where they were bent: all near them is inked.
            reach = cv2.distanceTransform((line < 90).astype(np.uint8), cv2.DIST_L2, 3)
            line = (np.clip(self._pen + 0.5 - reach, 0, 1) * 255).astype(np.uint8)
        rows, columns = np.flatnonzero(line.any(1)), np.flatnonzero(line.any(0))
        if not len(rows):
            return np.zeros((max(1, round(HEIGHT * scale)), 2), np.uint8)
        line = line[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        size = max(2, round(line.shape[1] * scale)), max(2, round(line.shape[0] * scale))
        return cv2.resize(line, size, interpolation=cv2.INTER_AREA)


def _lightest(family: Sequence[Font], dice: Generator) -> Font:
    lightest = min(font.weight for font in family)
    light = [font for font in family if font.weight == lightest]
    return light[dice.integers(len(light))]


@lru_cache(maxsize=20_000)
def _glyph(font: Font, character: str, pen: bool) -> _Glyph:
    """A character at the size where the font's x is `HEIGHT` high, or its strokes' middles."""
    size = _size(font)
    face = font.at(size)
    left, _, right, _ = face.getbbox(character, anchor="ls")
    image = Image.new("L", (max(1, right - left) + 8, RISE + FALL))
    ImageDraw.Draw(image).text((4 - left, RISE), character, fill=255, font=face, anchor="ls")
    mask = np.asarray(image)
    return _Glyph(_middles(mask) if pen else mask, 4 - left, face.getlength(character))


@lru_cache(maxsize=1024)
def _size(font: Font) -> int:
    _, top, _, bottom = font.at(100).getbbox("x" if font.holds("x") else "0", anchor="ls")
    return max(8, round(100 * HEIGHT / max(1, bottom - top)))


def _middles(mask: np.ndarray) -> np.ndarray:
    """The middles of strokes, one pixel wide: edges are taken off from all sides in turn, where
    that parts nothing (thinning by the eight L-shaped patterns of Golay's alphabet)."""
    thin = (mask > 127).astype(np.uint8)
    for _ in range(HEIGHT):
        before = int(thin.sum())
        for pattern in _EDGES:
            thin = thin - cv2.morphologyEx(thin, cv2.MORPH_HITMISS, pattern)
        if int(thin.sum()) == before:
            break
    return thin * np.uint8(255)


_SIDE = np.int8([[-1, -1, -1], [0, 1, 0], [1, 1, 1]])
_CORNER = np.int8([[0, -1, -1], [1, 1, -1], [0, 1, 0]])
_EDGES = [np.rot90(edge, turn).copy() for turn in range(4) for edge in (_SIDE, _CORNER)]
