"""Text to draw: English from Python's own documentation, any file, words of any alphabet.

Lines are split by what they say, not by where they come from: the first hexadecimal digit of the
MD5 of a line decides whether it is for training, for validation, or for nothing.
"""

from __future__ import annotations

import ast
import hashlib
import os
import string
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random

from vlm.assets import cache_folder
from vlm.compat.extras import needs

SPLITS = ("train", "validation", "reserved")
MARKS = "“”‘’–—…•€£¥¢§©®°±×÷™«»¡¿½¼¾†‡"
"""Typographic signs beside ASCII that English text uses."""
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "June", "July", "Aug", "Sept", "Oct", "Nov", "Dec")
ASCII = "".join(map(chr, range(32, 127)))
SHORTEST, LONGEST = 5, 60
"""Characters of a line of documentation that is taken whole."""


class BadText(ValueError):
    """A text that cannot be drawn from; the message names it."""


def split_of(line: str) -> str:
    """The split that a line belongs to, whatever it comes from; runs of white space count as one.

    >>> split_of("The quick brown fox"), split_of("  The quick\\tbrown fox ")
    ('train', 'train')
    """
    digit = hashlib.md5(" ".join(line.split()).encode(), usedforsecurity=False).hexdigest()[0]
    return {"0": "reserved", "1": "validation"}.get(digit, "train")


@lru_cache(maxsize=4)
def documentation(split: str) -> tuple[str, ...]:
    """Lines of Python's manual topics and of its library's docstrings, sorted, white space joined,
    `SHORTEST` to `LONGEST` characters long; rules and the like, without a letter or digit, are
    skipped."""
    return _kept((line for line in _documentation() if any(map(str.isalnum, line))), split)


def _documentation() -> list[str]:
    """Every line; from the cache where it was read before, as reading them takes seconds."""
    from pydoc_data.topics import topics

    version = sys.version.split()[0]
    path = cache_folder() / "text" / f"documentation-{version}.txt"
    if path.is_file():
        return path.read_text(encoding="utf-8").split("\n")
    found = {line for text in topics.values() for line in text.splitlines()}
    for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in source.parts and "test" not in source.parts:
            found.update(_docstring_lines(source))
    lines = sorted(line for line in found if "\n" not in line)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text("\n".join(lines), encoding="utf-8")
    os.replace(new, path)
    return lines


def lines_of(path: str | Path, split: str) -> tuple[str, ...]:
    """The lines of a text file in UTF-8 that belong to a split; longer ones are cut at spaces.

    Raises BadText naming a file that is not there, not UTF-8, or gives no line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadText(f"{path}: expected a text file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadText(f"{path}: expected UTF-8, found byte {error.start} that is not") from error
    pieces = [piece for line in text.splitlines() for piece in _cut(" ".join(line.split()))]
    kept = _kept(pieces, split, shortest=1)
    if not kept:
        raise BadText(f"{path}: expected lines of the split {split}, found none")
    return kept


def words_in(locale: str, count: int = 4000) -> tuple[str, ...]:
    """Words, names and places of a language by the package faker, such as "ru_RU" or "el_GR".

    Raises BadText where faker knows no such language.
    """
    with needs("ocr"):
        from faker import Faker
    try:
        faker = Faker(locale)
    except AttributeError as error:
        raise BadText(f"faker has no language {locale!r}; such as ru_RU, el_GR, uk_UA") from error
    faker.seed_instance(0)
    makers = [faker.word, faker.name, faker.city, faker.street_name, faker.company, faker.job]
    found = {word for i in range(count) for word in makers[i % len(makers)]().split()}
    return tuple(sorted(found | set(faker.words(count))))


def _docstring_lines(path: Path) -> Iterable[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # files that hold bad code on purpose
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield from text.splitlines()


def _kept(lines: Iterable[str], split: str, shortest: int = SHORTEST) -> tuple[str, ...]:
    if split not in SPLITS:
        raise BadText(f"expected a split of {', '.join(SPLITS)}, found {split!r}")
    joined = {" ".join(line.split()) for line in lines}
    fit = (line for line in joined if shortest <= len(line) <= LONGEST and line.isprintable())
    return tuple(sorted(line for line in fit if split_of(line) == split))


def _cut(line: str) -> list[str]:
    """A line in pieces of at most `LONGEST` characters, sharded at spaces where there are some."""
    pieces = []
    while len(line) > LONGEST:
        at = line.rfind(" ", 1, LONGEST + 1)
        at = at if at > 0 else LONGEST
        pieces.append(line[:at])
        line = line[at:].lstrip()
    return [*pieces, line] if line else pieces


class TextSampler:
    """Writes lines at random: out of given ones, and of made ones (numbers, dates, prices, codes,
    names), so that rare signs are seen too.

    lines: whole lines to draw from. characters: the only ones that may be written; what a line has
    besides is not drawn. split: the split that every line belongs to. made: share of
    made lines. words: for made lines; None takes the words of `lines`. longest: the most characters
    of a line, beyond which it is cut.
    Raises BadText where no line can be written with `characters`, and where these hold letters of
    which none of `lines` is written.
    """

    def __init__(
        self,
        lines: Sequence[str],
        characters: str,
        split: str,
        made: float = 0.3,
        words: Sequence[str] | None = None,
        longest: int = LONGEST,
    ) -> None:
        if not 1 <= longest <= LONGEST:
            raise BadText(f"longest: expected 1 to {LONGEST} characters, found {longest}")
        self.longest = longest
        known = set(characters)
        self.lines = [line for line in lines if known.issuperset(line)]
        self.characters, self.split, self.made = characters, split, made
        if words is None:
            found = {word for line in self.lines for word in line.split()}
            words = sorted(word for word in found if 1 < len(word) < 16)
        self.words = [word for word in words if known.issuperset(word)]
        self.letters = [c for c in characters if c.isalpha()]
        self.digits = [c for c in characters if c.isdigit()] or ["0"]
        self.signs = [c for c in characters if not c.isalnum() and not c.isspace()]
        if lines and not self.lines and self.letters:
            raise BadText(
                f"expected lines of the letters {''.join(self.letters)[:40]!r}, found none among "
                f"{len(lines)}, such as {lines[0]!r}; name the alphabet that they are written in"
            )
        if not self.lines and not self.words and not self.letters:
            raise BadText("expected lines, words or letters to write, found none")

    def __call__(self, dice: Random) -> str:
        """One line, 1 to `longest` characters, of this split."""
        while True:
            line = " ".join(self._draw(dice).split())[: self.longest].strip()
            if line and set(line) <= set(self.characters) and split_of(line) == self.split:
                return line

    def _draw(self, dice: Random) -> str:
        if self.lines and dice.random() >= self.made:
            return self._given(dice)
        kind = dice.choice((_number, _date, _price, _code, _name, _address, _mixed, _signs))
        return kind(self, dice)

    def _given(self, dice: Random) -> str:
        """A line that is given: whole, as some of its words, in capitals, in quotation marks."""
        line = dice.choice(self.lines)
        if dice.random() < 0.4:
            words = line.split()
            first = dice.randrange(len(words))
            line = " ".join(words[first : first + dice.randint(1, 6)])
        roll = dice.random()
        if roll < 0.06:
            return line.upper()
        if roll < 0.10:
            return line.title()
        if roll < 0.13:
            opening, closing = dice.choice(("“”", "‘’", "«»", '""', "''", "()", "[]"))
            return f"{opening}{line}{closing}"
        if roll < 0.16:
            return line.replace(" - ", " – ").replace("--", "—").replace("'", "’")
        return line

    def word(self, dice: Random) -> str:
        """A word, some in capitals; of random letters where there is no list of words."""
        if self.words and dice.random() < 0.8:
            word = dice.choice(self.words)
        else:
            word = "".join(
                dice.choice(self.letters or self.digits) for _ in range(dice.randint(2, 9))
            )
            word = word.lower()
        return dice.choice((word, word, word.capitalize(), word.upper()))

    def number(self, dice: Random, fewest: int = 1, most: int = 6) -> str:
        """Digits."""
        return "".join(dice.choice(self.digits) for _ in range(dice.randint(fewest, most)))


def _number(sampler: TextSampler, dice: Random) -> str:
    forms = (
        "{w}", "{w}.{p}", "{w},{p}", "-{w}.{p}", "+{w}", "{w}%", "{p}/{w}", "{w} × {p}", "±{p}",
        "{w} {p}", "{w}:{p}", "#{w}", "No. {w}", "{w}e-{p}", "(0{p}) {w}-{p}{p}", "+{p} {w} {w}",
        "{w}°", "{w} + {p} = {w}{p}", "~{w}", "<{w}>",
    )  # fmt: skip
    pieces = dice.choice((1, 1, 2, 3))
    return " ".join(
        dice.choice(forms).format(w=sampler.number(dice), p=sampler.number(dice, 1, 3))
        for _ in range(pieces)
    )


def _date(sampler: TextSampler, dice: Random) -> str:
    year, month, day = dice.randint(1890, 2049), dice.randint(1, 12), dice.randint(1, 28)
    named = MONTHS[month - 1]
    return dice.choice(
        (
            f"{year}-{month:02}-{day:02}",
            f"{day}.{month}.{year}",
            f"{month}/{day}/{year % 100:02}",
            f"{named} {day}, {year}",
            f"{day} {named} {year}",
            f"{dice.randrange(24):02}:{dice.randrange(60):02}",
            f"{year}–{year + dice.randint(1, 40)}",
            f"{dice.randint(1, 12)}:{dice.randrange(60):02} {dice.choice(('a.m.', 'PM'))}",
        )
    )


def _price(sampler: TextSampler, dice: Random) -> str:
    sign = dice.choice("$€£¥")
    amount = f"{sampler.number(dice, 1, 3)}.{dice.randrange(100):02}"
    line = dice.choice(
        (f"{sign}{amount}", f"{amount} {sign}", f"{sign} {sampler.number(dice, 1, 4)}")
    )
    return dice.choice((line, f"{sampler.word(dice)} {line}", f"{dice.randint(1, 99)} x {line}"))


def _code(sampler: TextSampler, dice: Random) -> str:
    letters = string.ascii_uppercase + string.digits
    block = lambda: "".join(dice.choice(letters) for _ in range(dice.randint(2, 6)))  # noqa: E731
    word = sampler.word(dice).lower()
    return dice.choice(
        (
            f"{block()}-{block()}", f"{block()}",
            f"{block()}/{block()}.{sampler.number(dice, 1, 2)}",
            f"{word}@{sampler.word(dice).lower()}.com", f"www.{word}.org/{block()}",
            f"{word}_{sampler.word(dice).lower()}({sampler.number(dice, 1, 2)})",
            f"{{{word}: [{sampler.number(dice, 1, 3)}]}}", f"C:\\{word}\\{block()}",
            f"${word} = {block()};", f"{word} & {block()} | {word}^2",
            f"~/{word}/*.{block().lower()}",
        )
    )  # fmt: skip


def _name(sampler: TextSampler, dice: Random) -> str:
    words = [sampler.word(dice).capitalize() for _ in range(dice.randint(1, 3))]
    start = dice.choice(("", "", "Mr. ", "Dr. ", "J. ", "Q. X. ", "St. "))
    return start + " ".join(words) + dice.choice(("", "", ", Jr.", " & Co.", ":", "?", "!", "’s"))


def _address(sampler: TextSampler, dice: Random) -> str:
    street = f"{sampler.word(dice).capitalize()} {dice.choice(('St.', 'Road', 'Ave', 'Lane'))}"
    house, town = dice.randint(1, 999), sampler.word(dice).upper()
    return f"{house} {street}, {town} {sampler.number(dice, 4, 5)}"


def _mixed(sampler: TextSampler, dice: Random) -> str:
    """Words with signs and numbers between them."""
    words = [
        sampler.word(dice) if dice.random() < 0.7 else sampler.number(dice)
        for _ in range(dice.randint(1, 7))
    ]
    if sampler.signs:
        for i in range(len(words)):
            if dice.random() < 0.35:
                sign = dice.choice(sampler.signs)
                words[i] = dice.choice((words[i] + sign, sign + words[i], sign, words[i] + sign))
    return " ".join(words)


def _signs(sampler: TextSampler, dice: Random) -> str:
    """Any characters in any order, so that none is read only where English has it."""
    any_of = sampler.characters
    return "".join(
        " " if dice.random() < 0.12 else dice.choice(any_of) for _ in range(dice.randint(3, 24))
    )
