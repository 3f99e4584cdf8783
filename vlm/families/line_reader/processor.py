"""Lines of text as a line reader takes them: images at their own widths, texts as characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from vlm.data.example import BadRow, Example
from vlm.families.line_reader.batch import LineRow
from vlm.losses.ctc import BLANK
from vlm.pixels import PixelSpec, open_image


class LineProcessor:
    """Images and texts of lines, for a reader of `characters`.

    pixel_spec: the preprocessing. characters: each once; the id of the first is 1.
    Raises ValueError for characters that are given twice, or none.
    """

    def __init__(self, pixel_spec: PixelSpec, characters: str) -> None:
        twice = sorted({c for c in characters if characters.count(c) > 1})
        if not characters or twice:
            raise ValueError(f"expected characters, each once, found {characters!r}, twice {twice}")
        self.pixel_spec, self.characters = pixel_spec, characters
        self._ids = {character: i for i, character in enumerate(characters, start=1)}

    def normal(self, text: str) -> str:
        """The text as it is learned and scored: composed (NFC), runs of white space as one space.

        >>> LineProcessor(None, "ab").normal(" a\\tb ")
        'a b'
        """
        return " ".join(unicodedata.normalize("NFC", text).split())

    def encode_text(self, text: str, name: str) -> tuple[int, ...]:
        """The ids of a text's characters.

        Raises BadRow naming the characters that the reader does not know, and how often they come.
        """
        text = self.normal(text)
        unknown = {c: text.count(c) for c in sorted(set(text) - self._ids.keys())}
        if unknown:
            found = ", ".join(
                f"{c!r} (U+{ord(c):04X}, {count} times)" for c, count in unknown.items()
            )
            raise BadRow(f"{name}: expected characters that the reader knows, found {found}")
        return tuple(self._ids[c] for c in text)

    def encode(self, example: Example) -> LineRow:
        """A line with its text.

        Raises BadRow where there is not one image, or no text; BadImage for its image.
        """
        if len(example.images) != 1 or not example.answer.strip():
            raise BadRow(
                f"{example.name}: expected one image and its text, found {len(example.images)} "
                f"images and the text {example.answer[:40]!r}"
            )
        ids = self.encode_text(example.answer, example.name)
        (pixels,) = self.pixel_spec(open_image(example.images[0]))
        return LineRow(example.name, pixels, ids)

    def encode_image(self, image, name: str) -> LineRow:
        """A line to be read."""
        (pixels,) = self.pixel_spec(open_image(image, name=name))
        return LineRow(name, pixels, ())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; blanks are skipped."""
        return "".join(self.characters[id - 1] for id in ids if id != BLANK)
