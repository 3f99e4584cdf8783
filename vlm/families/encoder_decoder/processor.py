"""What encoder-decoder systems share: the processor of images and their texts, and the model with
what is needed to use it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from vlm.data.example import BadRow, Example, Skipped
from vlm.families.decoder_only.batch import Row
from vlm.image_tokens import Pixels
from vlm.pixels import BadImage, PixelSpec, open_image

OVERFLOWS = ("drop", "shrink")


class LineProcessor:
    """Images and the texts in them in, rows of ids and pixels out.

    A row is the decoder's stream: start ids, the text's ids, the end id. Exactly the text and the
    end are scored, by their positions: a pad id that is also the end id does no harm.
    text_tokenizer: a fast transformers tokenizer; its own first and last tokens are not added.
    pixel_spec: the image tokenizer's own preprocessing.
    start_ids: what each row begins with. end_id: what it ends with. pad_id: at padding.
    max_tokens: the longest row; None means no limit. overflow says what happens to longer ones:
        "drop" skips them, "shrink" cuts the text's end, the end id with it.
    prompt_starts: whether a literal prompt stands in place of the start ids (Donut) or after them.
    Raises ValueError naming the argument.
    """

    def __init__(
        self,
        text_tokenizer,
        pixel_spec: PixelSpec,
        *,
        start_ids: Sequence[int],
        end_id: int,
        pad_id: int,
        max_tokens: int | None = None,
        overflow: str = "drop",
        prompt_starts: bool = False,
    ) -> None:
        if overflow not in OVERFLOWS:
            raise ValueError(f"overflow is 'drop' or 'shrink', found {overflow!r}")
        if not start_ids:
            raise ValueError("start_ids: expected at least one id to begin with, found none")
        if max_tokens is not None and max_tokens <= len(start_ids):
            raise ValueError(
                f"max_tokens must be more than the {len(start_ids)} start ids, found {max_tokens}"
            )
        if not getattr(text_tokenizer, "is_fast", False):
            raise ValueError("the text tokenizer must be a fast one (it has to know offsets)")
        self.text_tokenizer = text_tokenizer
        self.pixel_spec = pixel_spec
        self.start_ids = tuple(start_ids)
        self.end_id = end_id
        self.pad_id = pad_id
        self.max_tokens = max_tokens
        self.overflow = overflow
        self.prompt_starts = prompt_starts

    def encode(self, example: Example) -> Row | Skipped:
        """A training row: the image, and the example's answer as the text to write.

        What the user's turn says is a literal prompt, which is not scored; a system message is not
        read.
        Raises BadRow or BadImage naming the row where there is not one learned answer, more than
        one question, or no image; where an image cannot be read, or the text has characters that
        the vocabulary lacks, or spells one of the tokenizer's own marks, which would end it early.
        Gives Skipped where the row is longer than `max_tokens` and must not be cut.
        """
        answers = sum(turn.is_learned for turn in example.turns)
        if answers != 1:
            unscored = sum(turn.role == "assistant" for turn in example.turns) - answers
            found = f"{answers}, and {unscored} that are not scored" if unscored else str(answers)
            raise BadRow(f"{example.name}: expected one text to write, found {found}")
        questions = [turn.text for turn in example.turns if turn.role == "user"]
        if len(questions) > 1:
            raise BadRow(
                f"{example.name}: expected at most one question, which the text is written after, "
                f"found {len(questions)}; give each a row of its own"
            )
        prompt = "".join(questions)
        start = self.prompt_ids(prompt or None, example.name)
        return self._row(example.name, example.images, start, example.answer)

    def encode_literal(
        self, images: Sequence, prompt: str | None, answer: str, name: str = "prompt"
    ) -> Row:
        """A row that scores `answer` to a literal prompt; None: the start ids alone.

        Raises BadRow naming both numbers where it is longer than `max_tokens`.
        """
        row = self._row(name, images, self.prompt_ids(prompt, name), answer)
        if isinstance(row, Skipped):
            raise BadRow(f"{name}: {row.reason}")
        return row

    def encode_image(self, image, prompt: str | None = None, name: str = "image") -> Row:
        """A row to write from: the image, and the ids that writing begins with.

        image: anything that `vlm.pixels.open_image` takes.
        Raises BadImage naming the image.
        """
        ids = torch.tensor(self.prompt_ids(prompt, name))
        return Row(
            name=name,
            ids=ids,
            scored=torch.zeros_like(ids, dtype=torch.bool),
            views=self._see(image, 0, name),
        )

    def prompt_ids(self, prompt: str | None, name: str = "prompt") -> list[int]:
        """What a row begins with: the start ids, and a literal prompt after or in place of them.

        Raises BadRow naming characters that the vocabulary lacks.
        """
        if prompt is None:
            return list(self.start_ids)
        ids = self.text_ids(prompt, name)
        return ids if self.prompt_starts and ids else [*self.start_ids, *ids]

    def text_ids(self, text: str, name: str = "text") -> list[int]:
        """The ids of a text, without any that the tokenizer would put around it.

        Raises BadRow naming the characters that the vocabulary lacks, each once.
        """
        out = self.text_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, unknown = out["input_ids"], self.text_tokenizer.unk_token_id
        lacking = [
            text[start:end] for id, (start, end) in zip(ids, out["offset_mapping"]) if id == unknown
        ]
        if unknown is not None and lacking and lacking != [self.text_tokenizer.unk_token]:
            named = ", ".join(f"{part!r}" for part in dict.fromkeys(lacking))
            raise BadRow(
                f"{name}: the vocabulary lacks {len(lacking)} part(s) of the text: {named}"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens skipped."""
        return self._text(ids).strip()

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """What each id adds to the text; joined, they are `decode(ids)`. Special tokens add
        nothing, and of several ids that make one character the last adds it."""
        ids = list(ids)
        whole = self._text(ids)
        lead, text = len(whole) - len(whole.lstrip()), whole.strip()
        ends = [0]
        for count in range(1, len(ids)):
            part = self._text(ids[:count])
            end = ends[-1] if part.endswith("\ufffd") else len(part) - lead
            ends.append(min(max(end, ends[-1]), len(text)))
        ends.append(len(text))
        return tuple(text[a:b] for a, b in pairwise(ends))[: len(ids)]

    def _text(self, ids: Sequence[int]) -> str:
        return self.text_tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _row(self, name: str, images: Sequence, start: list[int], text: str) -> Row | Skipped:
        if not images:
            raise BadRow(f"{name}: expected an image of the text, found none")
        text_ids = self.text_ids(text, name)
        if own := {*self.start_ids, self.end_id, self.pad_id}.intersection(text_ids):
            marks = self.text_tokenizer.convert_ids_to_tokens(sorted(own))
            raise BadRow(
                f"{name}: expected a text without the tokenizer's own start, end and padding "
                f"marks, found {marks} in {text[:60]!r}"
            )
        ids = [*start, *text_ids, self.end_id]
        cut = max(0, len(ids) - (self.max_tokens or len(ids)))
        too_long = f"{len(ids)} tokens, the decoder takes {self.max_tokens}"
        if cut and self.overflow == "drop":
            return Skipped(name, too_long)
        if cut and self.max_tokens <= len(start):
            return Skipped(name, f"{too_long}, and nothing of the text is left when it is cut")
        ids = ids[: len(ids) - cut]
        return Row(
            name=name,
            ids=torch.tensor(ids),
            scored=torch.arange(len(ids)) >= len(start),
            views=tuple(
                view
                for number, image in enumerate(images)
                for view in self._see(image, number, name)
            ),
            cut=cut,
        )

    def _see(self, image, number: int, name: str) -> tuple[tuple[Pixels, tuple[int, int]], ...]:
        try:
            views = self.pixel_spec(open_image(image))
        except BadImage as error:
            raise BadImage(f"{name}: {error}") from error
        return tuple((view, (number, i)) for i, view in enumerate(views))
