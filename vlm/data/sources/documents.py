"""Plain text as rows: documents to read without images, all of which is learned.

    PATH.txt          paragraphs of a UTF-8 file, separated by empty lines
    python:train      paragraphs of the manual that comes with Python itself; also python:val

Short paragraphs are joined with those that follow and long ones are cut between words, so that rows
are of like length.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlm.data.example import BadRow, BadSource, Example, Turn
from vlm.data.sources.base import Derived, Source

SPLITS = ("train", "val")
CHARACTERS = 400
"""Length that documents are brought to, about 100 tokens."""


class Documents(Source):
    """Texts in memory, each a row.

    texts: each at least one character that is not blank.
    """

    def __init__(self, texts: Iterable[str], name: str) -> None:
        self.name = name
        self._texts = list(texts)
        self.require_rows()

    @classmethod
    def from_file(cls, path: str | Path) -> Documents:
        """The paragraphs of a UTF-8 text file. Raises BadSource naming it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadSource(f"{path}: expected a text file in UTF-8 ({error})") from error
        source = cls(sized(re.split(r"\n\s*\n", text)), str(path))
        source.files = (path,)
        return source

    @classmethod
    def from_manual(cls, split: str) -> Documents:
        """Paragraphs of Python's own manual (the PSF's licence), "train" or "val"."""
        if split not in SPLITS:
            raise BadSource(f"python:{split}: expected one of {', '.join(SPLITS)}")
        from pydoc_data.topics import topics

        return cls(
            (
                text
                for topic in sorted(topics)
                for text in sized(p for p in _paragraphs(topics[topic]) if _split(p) == split)
            ),
            f"python:{split}",
        )

    def __len__(self) -> int:
        return len(self._texts)

    def row_name(self, row: int) -> str:
        return f"{self.name}[{row}]"

    def read(self, row: int) -> Example:
        return Example(self.row_name(row), (Turn("text", (self._texts[row],)),))


class TextOnly(Derived):
    """Another source, whose rows must have no image: reading one that has raises BadRow."""

    def read(self, row: int) -> Example:
        example = self.source.read(row)
        if example.images:
            raise BadRow(f"{example.name}: expected text alone, found {len(example.images)} images")
        return example


def sized(paragraphs: Iterable[str], characters: int = CHARACTERS) -> Iterator[str]:
    """Documents of at most about `characters`, in order: short paragraphs joined, long ones cut.

    >>> list(sized(["one two three four", "five", "six"], characters=10))
    ['one two', 'three four', 'five\\n\\nsix']
    """
    held = ""
    for paragraph in filter(str.strip, paragraphs):
        for part in _cut(paragraph.strip(), characters):
            if held and len(held) + 2 + len(part) > characters:
                yield held
                held = ""
            held = f"{held}\n\n{part}" if held else part
    if held:
        yield held


def _cut(text: str, characters: int) -> Iterator[str]:
    while len(text) > characters:
        end = text.rfind(" ", 1, characters + 1)
        end = characters if end < 1 else end
        yield text[:end].rstrip()
        text = text[end:].lstrip()
    yield text


def _paragraphs(topic: str) -> Iterator[str]:
    """A topic's paragraphs, lines joined; rulers of headings are skipped."""
    for paragraph in re.split(r"\n\s*\n", topic):
        lines = [line.strip() for line in paragraph.splitlines()]
        yield " ".join(line for line in lines if line and not re.fullmatch(r"[*=\-~^]+", line))


def _split(paragraph: str) -> str | None:
    """Whose a paragraph is, by a hash of its words: a sixteenth is val, a sixteenth nobody's."""
    words = " ".join(paragraph.split())
    return {"0": None, "1": "val"}.get(hashlib.md5(words.encode()).hexdigest()[0], "train")
