"""Images with their captions as rows and batches of contrastive models.

A text is brought to ids once, here, for training, evaluation and the public model alike: cut to
the model's context with its end token kept and the cut counted, and padded as the model was
trained. SigLIP attends its pads, so that its texts always have the full length;
there is no way to ask for less.

Shapes: B example, V view, T text position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm.data.example import BadRow, Example
from vlm.families.contrastive.batch import Pair, Texts, stack_ids
from vlm.image_tokens import Pixels
from vlm.pixels import BadImage, PixelSpec, open_image


class PairProcessor:
    """Images to pixels and texts to ids, as a model was trained. Holds no weights.

    text_tokenizer: of transformers; what it does to a text (lower case, clean-up, its own first
        and end tokens) is done. pixel_spec: of the image tokenizer.
    length: the most tokens of a text, those of the tokenizer itself included.
    pad_to_length: whether each text is padded to `length` (SigLIP), on the side that the tokenizer
        says, or a batch's texts only to its longest, at their end.
    lower_case: whether texts are brought to lower case before the tokenizer sees them.
    end_id: an id put after each text, for tokenizers that put none (those of language models).
    Raises ValueError where a text must be padded and the tokenizer has no pad token.
    """

    def __init__(
        self,
        text_tokenizer,
        pixel_spec: PixelSpec,
        *,
        length: int,
        pad_to_length: bool,
        lower_case: bool = False,
        end_id: int | None = None,
    ) -> None:
        self.text_tokenizer = text_tokenizer
        self.pixel_spec = pixel_spec
        self.length = length
        self.pad_to_length = pad_to_length
        self.lower_case = lower_case
        self.end_id = end_id
        if pad_to_length and text_tokenizer.pad_token_id is None:
            raise ValueError(
                f"texts are padded to {length} tokens, but the tokenizer has no pad token"
            )
        (self._own,) = self._encode([""], None)
        if len(self._own) >= length:
            raise ValueError(
                f"length {length} leaves no token beside {len(self._own)} tokens of every text"
            )

    @property
    def pad_id(self) -> int:
        """What stands where a text has ended; 0 where the tokenizer names none, as no model that
        masks its pads sees it."""
        pad_id = self.text_tokenizer.pad_token_id
        return 0 if pad_id is None else pad_id

    def encode(self, example: Example) -> Pair:
        """The image and caption of an example; what was asked before the caption is ignored.

        Raises BadRow naming the row where it has not exactly one image and one caption of which
        the model reads something; BadImage for an image that cannot be read.
        """
        answers = [turn for turn in example.turns if turn.is_learned]
        if len(answers) != 1:
            raise BadRow(f"{example.name}: expected one caption, found {len(answers)}")
        if len(example.images) != 1:
            raise BadRow(f"{example.name}: expected one image, found {len(example.images)}")
        if not example.answer.strip():
            raise BadRow(f"{example.name}: expected a caption, found an empty text")
        (ids,), (cut,) = self._rows([example.answer])
        if ids == self._own:
            raise BadRow(
                f"{example.name}: expected a caption, found {example.answer[:80]!r}, of which the "
                "text tokenizer leaves nothing"
            )
        ids, valid = self.pad([ids], self.length if self.pad_to_length else len(ids))
        return Pair(
            name=example.name,
            ids=ids[0],
            views=self.views(example.images[0], example.name),
            cut=cut,
            valid=valid[0],
            pad_id=self.pad_id,
        )

    def texts(self, texts: Sequence[str]) -> Texts:
        """Texts as one padded batch.

        Raises ValueError for what is no list of texts, and for a text without a single token.
        """
        rows, cut = self.rows(texts)
        return Texts(*self.pad(rows), tuple(cut))

    def rows(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """The ids of each text, not yet padded, and how many tokens of it were cut. Raises as
        `texts` does."""
        rows, cut = self._rows(texts)
        for i, row in enumerate(rows):
            if not row:
                raise ValueError(f"texts[{i}]: expected a text, found {texts[i]!r}, without tokens")
        return rows, cut

    def unread(self, texts: Sequence[str]) -> list[int]:
        """The indices of texts of which the model reads nothing: their ids are those of an empty
        one. SigLIP's tokenizer leaves punctuation out, so that "!!!" is such a text."""
        return [i for i, row in enumerate(self._rows(texts)[0]) if row == self._own]

    def _rows(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """What `rows` gives, of texts without tokens too."""
        if isinstance(texts, str):
            raise ValueError("texts is a list, one entry for each text; found one text")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts[{i}]: expected a text, found {type(text).__name__}")
        rows = self._encode(texts, None) if texts else []
        cut = [0] * len(rows)
        for i, row in enumerate(rows):
            if len(row) > self.length:
                (rows[i],) = self._encode([texts[i]], self.length)
                cut[i] = len(row) - len(rows[i])
        return rows, cut

    def pad(
        self, rows: Sequence[Sequence[int]], length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows of ids as ids int64[B, T] and valid bool[B, T].

        length: T; None takes `self.length` where texts always have it, else the longest row.
        """
        if length is None and self.pad_to_length:
            length = self.length
        left = self.pad_to_length and self.text_tokenizer.padding_side == "left"
        whole = [(torch.tensor(row, dtype=torch.long), None, self.pad_id) for row in rows]
        return stack_ids(whole, length, left)

    def views(self, image, name: str) -> list[tuple[Pixels, tuple[int, int]]]:
        """The pixels of each view of an image, with its (image, view) numbers.

        image: what `open_image` takes. Raises BadImage naming `name` and the image.
        """
        try:
            views = self.pixel_spec(open_image(image))
        except BadImage as error:
            raise BadImage(f"{name}: {error}") from error
        return [(view, (0, i)) for i, view in enumerate(views)]

    def _encode(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        """The ids of texts, cut to `length` where it is given, end token kept."""
        if self.lower_case:
            texts = [text.lower() for text in texts]
        after = [] if self.end_id is None else [self.end_id]
        cut = {} if length is None else {"truncation": True, "max_length": length - len(after)}
        encoded = self.text_tokenizer(
            list(texts), return_attention_mask=False, verbose=False, **cut
        )
        return [[*row, *after] for row in encoded["input_ids"]]
