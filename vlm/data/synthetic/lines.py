"""Drawn lines of text as examples: any fonts, any text, and what paper and cameras do to them.

A line follows from (seed, row) alone. For training a reader, and for evaluating one on fonts and
lines that it never saw.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from vlm.compat.extras import needs
from vlm.data.example import BadSource, Example, caption_example
from vlm.data.sources.base import Source
from vlm.data.synthetic import degrade
from vlm.data.synthetic.fonts import BadFont, Font, find_fonts, holding
from vlm.data.synthetic.options import Options, read_options
from vlm.data.synthetic.pen import Hand
from vlm.data.synthetic.text import (
    ASCII,
    LONGEST,
    MARKS,
    BadText,
    TextSampler,
    documentation,
    lines_of,
    words_in,
)
from vlm.pixels.image_ref import ImageRef

with needs("ocr"):
    import cv2

ALPHABETS = {
    "english": ASCII + MARKS,
    "latin": ASCII + MARKS + "".join(chr(c) for c in range(0xC0, 0x180) if chr(c) not in "×÷"),
    "cyrillic": ASCII + "«»–—…№" + "".join(map(chr, range(0x410, 0x450))) + "ЁёЄєІіЇїҐґ",
    "greek": ASCII + "«»–—…·ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩΆΈΉΊΌΎΏΪΫ"
    + "αβγδεζηθικλμνξοπρςστυφχψωάέήίόύώϊϋΐΰ",
}  # fmt: skip
"""Characters that lines are written with, by name."""
HAND_SHARE = 0.22
"""Share of lines in handwriting, where there are such fonts: they are harder than their number."""


@dataclass(frozen=True, slots=True)
class DrawnLine:
    """What a row shows: the text, the font, and the kind of wear (of `degrade.KINDS` or
    `degrade.WEARS`).

    made_up: whether a made-up hand writes it, from all fonts (see `pen.Hand`), not the font.
    """

    text: str
    font: Font
    kind: str
    made_up: bool = False

    @property
    def hand(self) -> bool:
        """Whether it looks written by hand."""
        return self.made_up or self.font.hand


class Lines(Source):
    """Drawn lines with their text.

    count: the number of rows. seed: any integer.
    fonts: as `find_fonts` takes them. characters: the only ones that are written. text: "english"
        (Python's documentation), a text file, or faker's name of a language, such as "ru_RU".
    split: which lines are drawn, by what they say: "train" or "validation".
    kind: one of `degrade.KINDS`. made: share of made lines (numbers, codes, names). longest: the
        most characters of a line. hands: share of lines in made-up hands (see `pen.Hand`).
    Images are uncompressed bytes, drawn when a row is read. Rows are named NAME[ROW].
    Raises BadSource, BadFont or BadText naming what does not fit.
    """

    drawn = True

    def __init__(
        self,
        count: int,
        seed: int = 0,
        fonts: str | Sequence[str] = "any",
        characters: str = ALPHABETS["english"],
        text: str = "english",
        split: str = "train",
        kind: str = "mixed",
        made: float = 0.3,
        longest: int = LONGEST,
        hands: float = 0.0,
        name: str | None = None,
    ) -> None:
        if kind not in degrade.KINDS:
            raise BadSource(f"lines: expected a kind of {', '.join(degrade.KINDS)}, found {kind!r}")
        self.name = name or f"lines:{count}:seed={seed}"
        if not 0 <= hands <= 1:
            raise BadSource(f"lines: expected hands from 0 to 1, found {hands}")
        self._count, self._seed, self._kind, self._hands = count, seed, kind, hands
        self.characters = characters
        if text == "english":
            self._sampler = TextSampler(
                documentation(split), characters, split, made, longest=longest
            )
        elif text.endswith(".txt"):
            self._sampler = TextSampler(
                lines_of(text, split), characters, split, made, longest=longest
            )
        else:
            words = words_in(text)
            sentences = _sentences(words, seed)
            self._sampler = TextSampler(sentences, characters, split, made, words, longest)
        fonts = find_fonts(fonts)
        self.fonts = holding(fonts, "".join(c for c in characters if c.isalpha()))
        names = sorted({font.family for font in self.fonts})
        families = [[font for font in self.fonts if font.family == name] for name in names]
        self._families = families
        self._print = [family for family in families if not family[0].hand]
        self._hand = [family for family in families if family[0].hand]
        self.require_rows()

    @classmethod
    def from_text(cls, text: str) -> Lines:
        """Lines of "COUNT:KEY=VALUE:..."; keys are seed, fonts, alphabet (see `characters_of`),
        text, split, kind, made, longest and hands. Raises BadSource naming the part that does not
        fit."""
        usage = (
            f":seed=3 :fonts=any :alphabet={'|'.join(ALPHABETS)} :text=english :split=train "
            f":kind={'|'.join(degrade.KINDS)} :made=0.3 :longest=60 :hands=0"
        )
        count, given = read_options(text, _OPTIONS, "lines", usage)
        try:
            return cls(count, **given, name=f"lines:{text}")
        except (BadFont, BadText) as error:
            raise BadSource(f"lines:{text}: {error}") from error

    def __len__(self) -> int:
        return self._count

    def row_name(self, row: int) -> str:
        return f"{self.name}[{row}]"

    def line(self, row: int) -> DrawnLine:
        """What a row shows."""
        dice = Random(f"{self._seed}/{row}/line")
        text = self._sampler(dice)
        hand = self._hand and (not self._print or dice.random() < HAND_SHARE)
        families = self._hand if hand else self._print
        font = None
        for _ in range(20):  # most fonts hold most signs
            font = dice.choice(dice.choice(families))
            if font.holds(text):
                break
        else:
            text = "".join(c for c in text if ord(c) in font.characters).strip()
            text = text or next(c for c in self.characters if not c.isspace() and font.holds(c))
        rng = np.random.default_rng([self._seed % 2**32, row])
        kind = degrade.draw_kind(rng, self._kind)
        made_up = self._hands > 0 and rng.random() < self._hands
        # A made-up hand writes letter by letter, which is no way to write what joins.
        return DrawnLine(text, font, kind, made_up and not any(map(_joins, text)))

    def font_of(self, row: int) -> str:
        """The family of a row's font; "made-up" where a made-up hand writes it."""
        line = self.line(row)
        return "made-up" if line.made_up else line.font.family

    def hand_of(self, row: int) -> bool:
        """Whether a row is handwriting."""
        return self.line(row).hand

    def wear_of(self, row: int) -> str:
        """What a row's image suffers from."""
        return self.line(row).kind

    def image(self, row: int) -> np.ndarray:
        """A row's image: uint8[H, W, 3]."""
        return self._drawn(self.line(row), row)

    def read(self, row: int) -> Example:
        line, name = self.line(row), self.row_name(row)
        pixels = self._drawn(line, row)
        return caption_example(name, ImageRef(ppm(pixels), name), line.text, "")

    def _drawn(self, line: DrawnLine, row: int) -> np.ndarray:
        dice = np.random.default_rng([self._seed % 2**32, row, 1])
        return draw(line, dice, self._families)


def draw(
    line: DrawnLine, dice: np.random.Generator, families: Sequence[Sequence[Font]] = ()
) -> np.ndarray:
    """The image of a line: uint8[H, W, 3].

    families: the fonts, by family, that a made-up hand takes its letters from.
    """
    mask = _by_hand(line, dice, families) if line.made_up else write(line.text, line.font, dice)
    if line.kind in degrade.WEARS:
        return degrade.worn(_framed(mask, dice, line.kind), dice, line.kind)
    mask = degrade.bend(mask, dice, line.kind, line.hand)
    mask = degrade.ink(_framed(mask, dice, line.kind), dice, line.kind)
    return degrade.see(degrade.paint(mask, dice, line.kind), dice, line.kind)


def _by_hand(line: DrawnLine, dice: np.random.Generator, families) -> np.ndarray:
    hand = Hand(families, dice)
    if not hand.holds(line.text):
        hand = Hand([[line.font]], dice)
    return hand.write(line.text, float(np.clip(dice.lognormal(2.75, 0.28), 9, 36)))


def write(text: str, font: Font, dice: np.random.Generator) -> np.ndarray:
    """The text in a font of random size as ink, uint8[H, W], cut to what is drawn."""
    size = int(np.clip(dice.lognormal(3.45, 0.28), 18, 72))
    face = font.at(size)
    loose = dice.random()
    if loose < 0.06 and not any(map(_joins, text)):  # letters set apart or together, one by one
        mask = _spaced(text, face, dice.uniform(-0.03, 0.14) * size)
    else:
        mask = _mask(text, face)
    if dice.random() < 0.25:  # wider or narrower than the font
        width = max(4, round(mask.shape[1] * dice.uniform(0.8, 1.2)))
        mask = cv2.resize(mask, (width, mask.shape[0]), interpolation=cv2.INTER_AREA)
    return mask


def _joins(character: str) -> bool:
    """Whether a character hangs on its neighbours: a mark on a letter, or of a script that runs
    from right to left, as Arabic, whose letters change with those beside them."""
    return unicodedata.category(character)[0] == "M" or unicodedata.bidirectional(character) in (
        "R",
        "AL",
    )


def _mask(text: str, face) -> np.ndarray:
    left, top, right, bottom = face.getbbox(text)
    width, height = max(1, right - left), max(1, bottom - top)
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=face)
    return np.asarray(image)


def _spaced(text: str, face, extra: float) -> np.ndarray:
    """The text letter by letter, `extra` pixels more between them."""
    left, top, right, bottom = face.getbbox(text)
    width = int(right - left + abs(extra) * len(text) + 8)
    image = Image.new("L", (width, max(1, bottom - top)))
    pen, x = ImageDraw.Draw(image), 4.0 - left
    for letter in text:
        pen.text((x, -top), letter, fill=255, font=face)
        x += face.getlength(letter) + extra
    mask = np.asarray(image)
    inked = np.flatnonzero(mask.any(0))
    return mask[:, inked[0] : inked[-1] + 1] if len(inked) else mask


def _framed(mask: np.ndarray, dice: np.random.Generator, kind: str) -> np.ndarray:
    """The mask with margins around it, as a line finder cuts: often tight, sometimes wide."""
    H = mask.shape[0]
    wide = dice.random() < 0.25
    sides = dice.uniform(0, 0.6 if wide else 0.2, 4) * H
    top, bottom, left, right = (int(side) + (2 if kind == "clean" else 0) for side in sides)
    return np.pad(mask, ((top, bottom), (left, right + int(wide * dice.uniform(0, H)))))


def ppm(pixels: np.ndarray) -> bytes:
    """uint8[H, W, 3] as the bytes of an uncompressed image file."""
    H, W = pixels.shape[:2]
    return b"P6 %d %d 255\n" % (W, H) + pixels.tobytes()


def _sentences(words: Sequence[str], seed: int, count: int = 20000) -> list[str]:
    dice = Random(f"{seed}/sentences")
    return [" ".join(dice.choices(words, k=dice.randint(1, 7)))[:60] for _ in range(count)]


def characters_of(alphabet: str) -> str:
    """The characters of an alphabet: those of one of `ALPHABETS`, or all that a text file in UTF-8
    holds, composed (NFC), each once, in code order, and the space.

    Raises ValueError for an alphabet that is neither a name nor a file.
    """
    if alphabet in ALPHABETS:
        return ALPHABETS[alphabet]
    path = Path(alphabet)
    if not path.is_file():
        raise ValueError(f"alphabet {alphabet!r}: expected {', '.join(ALPHABETS)}, or a text file")
    try:
        text = unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, found byte {error.start} that is not") from error
    return "".join(sorted((set(text) - set("\n\r\t\ufeff")) | {" "}))


_OPTIONS: Options = {
    "seed": ("seed", int),
    "fonts": ("fonts", str),
    "alphabet": ("characters", characters_of),
    "text": ("text", str),
    "split": ("split", str),
    "kind": ("kind", str),
    "made": ("made", float),
    "longest": ("longest", int),
    "hands": ("hands", float),
}
