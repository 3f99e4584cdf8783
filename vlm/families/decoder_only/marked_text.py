"""From marked text to ids, image positions and the masks of answers.

The marks are those of `vlm.families.decoder_only.chat_template`. Each image becomes what its layout
says: tags, line breaks, runs of image tokens. Exactly the answers and the end token after each are
scored, but for those that are context alone.

Shapes: T text position.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from vlm.data.example import BadRow
from vlm.families.decoder_only.batch import IMAGE
from vlm.families.decoder_only.chat_template import ANSWER, CONTEXT, END, SLOT
from vlm.families.decoder_only.image_layout import FenceSpaces, ImageLayout


class MarkedText:
    """Makes ids of marked text.

    text_tokenizer: a fast transformers tokenizer. apart: whether an answer becomes ids apart from
        its prompt, those of which are then the same with and without it.
    Raises ValueError for a tokenizer that is not fast.
    """

    def __init__(self, text_tokenizer, apart: bool) -> None:
        if not getattr(text_tokenizer, "is_fast", False):
            raise ValueError("the text tokenizer must be a fast one (it has to know offsets)")
        self.text_tokenizer = text_tokenizer
        self.apart = apart
        self._special = {
            id for id, token in text_tokenizer.added_tokens_decoder.items() if token.special
        } | set(text_tokenizer.all_special_ids)

    def tokenize(
        self,
        marked: str,
        images: Sequence[ImageLayout],
        name: str,
        add_special_tokens: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids int64[T] of a marked text, IMAGE at image positions, and two masks bool[T] of its
        answers: of scored ones, with the image positions in them, and of the others. Text before,
        between and after spans of image tokens, that of layouts included, becomes ids piece by
        piece, each as it would after a special token.

        Raises BadRow naming the row where marks and images differ in number, or the text is not
        valid Unicode.
        """
        try:
            marked.encode()
        except UnicodeEncodeError as error:
            found = marked[max(0, error.start - 10) : error.end + 10]
            raise BadRow(f"{name}: expected valid Unicode text, found {found!a}") from error
        pieces = marked.split(SLOT)
        if len(pieces) != len(images) + 1:
            raise BadRow(
                f"{name}: the chat template wrote {len(pieces) - 1} image marks for "
                f"{len(images)} images"
            )
        spans = [span for image in images for span in image.spans]
        marks = [image.marked(SLOT) for image in images]
        text = "".join(a + b for a, b in zip(pieces, [*marks, ""]))
        for fence, spaces in {(image.fence, image.fence_spaces) for image in images if image.fence}:
            text = _merge_fences(text, fence, spaces)
        pieces = text.split(SLOT)
        ids: list[int] = []
        within: list[str] = []  # the mark that opened what each id stands in
        opened = END
        for number, piece in enumerate(pieces):
            if number:
                ids += [IMAGE] * spans[number - 1].length
                within += [opened] * spans[number - 1].length
            for part in _apart(piece) if self.apart else (piece,):
                text, inside = "", []
                for character in part:
                    if character in (ANSWER, CONTEXT, END):
                        opened = character
                    else:
                        text += character
                        inside.append(opened)
                part_ids, offsets = self._piece(text, bool(ids), add_special_tokens)
                eos, ended = self.text_tokenizer.eos_token_id, number + 1 == len(pieces)
                if add_special_tokens and not ended and part_ids[-1:] == [eos]:
                    part_ids, offsets = part_ids[:-1], offsets[:-1]  # the whole ends later
                ids += part_ids
                within += [_mark_of(inside[start:end]) for start, end in offsets]
        scored, unscored = (
            torch.tensor([found == mark for found in within], dtype=torch.bool)
            for mark in (ANSWER, CONTEXT)
        )
        ids_T = torch.tensor(ids, dtype=torch.long)
        return ids_T, scored, unscored & (ids_T != IMAGE)

    def score_ends(self, ids: Tensor, scored: Tensor, name: str) -> int:
        """Marks in `scored`, in place, the end token after each scored answer and what stands
        before it, and takes marks off image positions; gives the length of the row that ends after
        the last.

        Raises BadRow naming the row where the chat template writes no end token.
        """
        ids_list, scored_list = ids.tolist(), scored.tolist()
        last = len(ids_list)
        for t in range(len(ids_list)):
            if scored_list[t] and (t + 1 == len(ids_list) or not scored_list[t + 1]):
                end = self._end_after(ids_list, t, name)
                scored[t : end + 1] = True
                last = end + 1
        scored[ids == IMAGE] = False
        return last

    def _end_after(self, ids: list[int], last: int, name: str) -> int:
        """The position of the end token after an answer whose last token stands at `last`."""
        for t in range(last + 1, len(ids)):
            if ids[t] in self._special:
                return t
            if ids[t] == IMAGE or self.text_tokenizer.decode([ids[t]]).strip():
                break
        raise BadRow(
            f"{name}: the chat template writes no end token after an answer; expected one of "
            f"{self.text_tokenizer.all_special_tokens}"
        )

    def _piece(
        self, text: str, continues: bool, add_special_tokens: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of one piece of text; a piece after an image is read after a
        special token, which is then taken off, so that no word-start mark is made up for it. A
        token of white space alone, of which some tokenizers' offsets have no character
        (GPT-NeoX's), has the last one."""
        anchor = self.text_tokenizer.eos_token if continues else None
        prefix = anchor or ""
        out = self.text_tokenizer(
            prefix + text,
            add_special_tokens=add_special_tokens and not continues,
            return_offsets_mapping=True,
        )
        ids, offsets = out["input_ids"], out["offset_mapping"]
        if anchor:
            ids, offsets = ids[1:], offsets[1:]
        cut = len(prefix)
        return ids, [
            (max(min(start, end - 1) - cut, 0), max(end - cut, 0)) for start, end in offsets
        ]


def _merge_fences(text: str, fence: str, spaces: FenceSpaces) -> str:
    """A marked text in which one fence stands where two images meet, with the spaces of `spaces`:
    "before_word" since some text tokenizers write no start of a word after a special token.

    Source: transformers, `processing_idefics2.py`, `Idefics2Processor.__call__`, and
    `processing_idefics.py`, `IdeficsProcessor.__call__`.
    """
    if spaces == "none":
        text = re.sub(f" *{re.escape(fence)} *", fence, text)
    text = text.replace(fence + fence, fence)
    if spaces == "none":
        return text
    marks = ANSWER + CONTEXT + END
    return re.sub(rf"{re.escape(fence)}(?=[{marks}]*[^\s<{SLOT}{marks}])", f"{fence} ", text)


def _mark_of(inside: list[str]) -> str:
    """What an id whose characters stand after these marks is of: an answer, where one is."""
    return next((mark for mark in (ANSWER, CONTEXT) if mark in inside), END)


def _apart(marked: str) -> tuple[str, ...]:
    """A marked text as what stands before the answer, where there is one, and the rest."""
    prompt, mark, rest = marked.partition(ANSWER)
    return (prompt, mark + rest) if mark else (marked,)
