"""From a conversation with images to ids, image positions and the mask of scored tokens.

The language model's own chat template writes the prompt. Images and answers are marked while the
template runs by private-use characters, which are taken out before the text becomes ids: what the
model reads is what its template writes, with each image as its layout says (tags, line breaks, runs
of image tokens), and a text that spells "<image>" stays text.
Exactly the answers and the end token after each are scored, but for those whose turn says not to.
Longer than most files here: template, marks, boxes, masks and cutting are one way through a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlm.data.boxes import check_boxes
from vlm.data.example import BadRow, Example, Skipped, Turn
from vlm.families.decoder_only.batch import IMAGE, Row
from vlm.families.decoder_only.image_layout import ImageLayout, StreamLayout
from vlm.geometry import LocTokens
from vlm.image_tokens import map_pixels, meta_pixels
from vlm.pixels import BadImage, image_size, open_image

SLOT, ANSWER, END, CONTEXT = map(chr, range(0xE5C0, 0xE5C4))  # private-use marks, a character each
MARK = "<image>"
"""Stands for an image in a literal prompt (`generate`, `score`), unless a published system has its
own mark."""


PROBE = (Turn("user", ("a",)), Turn("assistant", ("b",)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """How a chat template is used.

    parts: whether it takes a message's content as a list of parts of type text or image; else it
        takes one text. answer_end: written after each answer, for templates that end none.
    special_tokens: whether the text tokenizer adds to what it writes the token that begins texts.
    """

    parts: bool = False
    answer_end: str = ""
    special_tokens: bool = False


class Processor:
    """Images and text in, rows of ids and pixels out.

    text_tokenizer: a fast transformers tokenizer with a chat template.
    pixel_spec: the image tokenizer's own preprocessing.
    layout_for: the layout of an image of (rows, columns) pixels in the stream.
    system: the system message put before every conversation that has none; None leaves that to
        the template, "" asks for an empty one (none where the template takes no system message).
    max_tokens: the longest row; None means no limit. overflow says what happens to longer rows:
        "drop" skips them, "shrink" cuts text from the end. Neither ever cuts an image run.
    loc: how boxes are written; None where the language model has no tokens for them.
    image_mark: stands for an image in a literal prompt.
    prefix: whether the model reads all that is before an answer at once, as prefix decoders do. A
        row then has one answer, which becomes ids apart from its prompt: those of the prompt are
        the same with and without it.
    template: how the chat template is used.
    framed: whether a literal prompt is a user's message, which the chat template frames (as
        PaliGemma's own processor does with its text); else it is read as it stands.
    """

    def __init__(
        self,
        text_tokenizer,
        pixel_spec,
        layout_for: Callable[[tuple[int, int]], ImageLayout],
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        overflow: str = "drop",
        loc: LocTokens | None = None,
        image_mark: str = MARK,
        prefix: bool = False,
        framed: bool = False,
        template: Template | None = None,
    ) -> None:
        if overflow not in ("drop", "shrink"):
            raise ValueError(f"overflow is 'drop' or 'shrink', found {overflow!r}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, found {max_tokens}")
        if not getattr(text_tokenizer, "is_fast", False):
            raise ValueError("the text tokenizer must be a fast one (it has to know offsets)")
        if not text_tokenizer.chat_template:
            raise ValueError(
                "the text tokenizer has no chat template, so answers cannot be told from prompts; "
                "set `text_tokenizer.chat_template`, or name a language model tuned to chat"
            )
        self.text_tokenizer = text_tokenizer
        self.pixel_spec = pixel_spec
        self.layout_for = layout_for
        self.system = system
        self.max_tokens = max_tokens
        self.overflow = overflow
        self._loc = None
        self.loc = loc
        self.image_mark = image_mark
        self.prefix = prefix
        self.framed = framed
        self.template = template or Template()
        self._special = {
            id for id, token in text_tokenizer.added_tokens_decoder.items() if token.special
        } | set(text_tokenizer.all_special_ids)
        self._template_options: dict[str, bool] = {}
        self._fit_template()
        self.end_id = int(self._ids(PROBE, [], "chat template")[0][-1])

    @property
    def loc(self) -> LocTokens | None:
        """How boxes are written. Setting it raises ValueError where the text tokenizer lacks one of
        the tokens (each is one id)."""
        return self._loc

    @loc.setter
    def loc(self, loc: LocTokens | None) -> None:
        if loc is not None:
            self._require_loc_tokens(loc)
        self._loc = loc

    @property
    def pad_id(self) -> int:
        """The id at padding, which no loss and no real position ever sees."""
        pad = self.text_tokenizer.pad_token_id
        return self.end_id if pad is None else pad

    def encode(self, example: Example) -> Row | Skipped:
        """A training row: the conversation up to the end token of its last answer, or a document
        with the end token, all of it scored.

        Raises BadRow or BadImage naming the row where an image cannot be read or there is no
        answer. Gives Skipped where the row does not fit `max_tokens` and cannot be shrunk.
        """
        return self._encode(example, self._see)

    def measure(self, example: Example) -> Row | Skipped:
        """What `encode` gives, its pixels on the meta device, where tensors have shapes and no
        values: of images the headers alone are read.

        Raises BadRow or BadImage as `encode` does, but not for damage after a header.
        """
        return self._encode(example, self._foresee)

    def _encode(self, example: Example, see: Callable) -> Row | Skipped:
        if example.is_document:
            return self._fit(self._document(example))
        answers = sum(turn.is_learned for turn in example.turns)
        if not answers:
            context = sum(turn.role == "assistant" for turn in example.turns)
            found = f"{context} that are not scored" if context else "none"
            raise BadRow(f"{example.name}: expected an assistant turn to learn from, found {found}")
        if self.prefix and answers > 1:
            raise BadRow(
                f"{example.name}: expected one answer, since this model reads all before it at "
                f"once, found {answers}; give each question a row of its own"
            )
        views, images, turns = self._look(example, see)
        ids, scored, unscored = self._ids(turns, images, example.name)
        first = turns[0]
        return self._fit(
            Row(
                name=example.name,
                ids=ids,
                scored=scored,
                views=tuple(views),
                layout=self._layout(images),
                boxes=example.boxes,
                unscored=unscored if unscored.any() else None,
                system=first.text if first.role == "system" else self.system,
            )
        )

    def encode_prompt(self, example: Example) -> Row:
        """A row to generate from: the conversation, then the opening of the assistant's turn.

        Raises BadRow naming both numbers where it is longer than `max_tokens`.
        """
        views, images, turns = self._look(example, self._see)
        ids, scored, _ = self._ids(turns, images, example.name, open_answer=True)
        self._require_room(example.name, len(ids))
        return Row(
            name=example.name,
            ids=ids,
            scored=scored,
            views=tuple(views),
            layout=self._layout(images),
        )

    def prompt_ids(self, turns: Sequence[Turn], images: Sequence[ImageLayout], name: str) -> Tensor:
        """The ids int64[T] of a conversation whose images were seen before, up to the opening
        of the assistant's turn; IMAGE at image positions.

        images: the layout of each image, in the order of the turns.
        Raises BadRow naming both numbers where it is longer than `max_tokens`.
        """
        ids, *_ = self._ids(turns, images, name, open_answer=True)
        self._require_room(name, len(ids))
        return ids

    def encode_literal(
        self, images: Sequence, prompt: str, answer: str | None = None, name: str = "prompt"
    ) -> Row:
        """A row from a literal prompt in which each `image_mark` stands for an image.

        Special tokens are added as the text tokenizer adds them by itself, or where prompts are
        `framed` the chat template. Where there is an answer, it and the end token are scored.
        Raises BadRow where marks and images differ in number, or the row is longer than
        `max_tokens`; BadImage naming the image.
        """
        marks = prompt.count(self.image_mark)
        if marks != len(images):
            raise BadRow(
                f"{name}: the prompt has {marks} {self.image_mark} marks, "
                f"there are {len(images)} images"
            )
        views, layouts = [], []
        for number, image in enumerate(images):
            seen, size_hw = self._see(image, number, name)
            views += seen
            layouts.append(self.layout_for(size_hw))
        if self.framed:
            marked = self.render((_user(prompt, self.image_mark),), name, open_answer=True)
        else:
            marked = prompt.replace(self.image_mark, SLOT)
        if answer is not None:
            marked += f"{ANSWER}{answer}{END}"
        ids, scored, _ = self._tokenize(marked, layouts, name, add_special_tokens=not self.framed)
        if answer is not None:
            ids = torch.cat([ids, torch.tensor([self.end_id])])
            scored = torch.cat([scored, torch.tensor([True])])
        self._require_room(name, len(ids))
        layout = self._layout(layouts)
        return Row(name=name, ids=ids, scored=scored, views=tuple(views), layout=layout)

    def render(self, turns: Sequence[Turn], name: str, open_answer: bool = False) -> str:
        """What the chat template writes, with images and answers still marked."""
        messages = []
        if self.system is not None and turns[0].role != "system":
            messages.append({"role": "system", "content": self._content((self.system,))})
        for turn in turns:
            if any(mark in turn.text for mark in (SLOT, ANSWER, END, CONTEXT)):
                raise BadRow(f"{name}: the text holds one of the private characters U+E5C0-U+E5C3")
            content = turn.content
            if turn.role == "assistant":
                if not (turn.text.strip() or open_answer):  # a model may have answered nothing
                    raise BadRow(f"{name}: expected an answer, found an empty assistant turn")
                said = "".join(SLOT if part is None else part for part in content).strip()
                mark = ANSWER if turn.scored else CONTEXT
                content = (f"{mark}{said}{END}{self.template.answer_end}",)
            messages.append({"role": turn.role, "content": self._content(content)})
        try:
            return self.text_tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=open_answer,
                **self._template_options,
            )
        except Exception as error:  # templates raise their own kinds of error
            raise BadRow(f"{name}: the chat template refuses this conversation: {error}") from error

    def _content(self, content: Sequence[str | None]) -> str | list[dict[str, str]]:
        """A message's texts and images (None) as the chat template takes them."""
        if not self.template.parts:
            return "".join(SLOT if part is None else part for part in content)
        return [
            {"type": "image"} if part is None else {"type": "text", "text": part}
            for part in content
        ]

    def _layout(self, images: Sequence[ImageLayout]) -> StreamLayout:
        return StreamLayout(images=tuple(images), sees="prefix" if self.prefix else "causal")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens skipped."""
        return self.text_tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _look(
        self, example: Example, see: Callable
    ) -> tuple[list, list[ImageLayout], tuple[Turn, ...]]:
        """Views of the example's images, the layout of each image, and the turns with boxes written
        out. see: `_see` or `_foresee`."""
        views, layouts, sizes = [], [], []
        for number, reference in enumerate(example.images):
            seen, size_hw = see(reference, number, example.name)
            views += seen
            layouts.append(self.layout_for(size_hw))
            sizes.append(size_hw)
        return views, layouts, self._write_boxes(example, sizes)

    def _see(self, image, number: int, name: str) -> tuple[list, tuple[int, int]]:
        """The views of one image, each with its (image, view) numbers, and its rows and columns."""
        try:
            one_image = open_image(image)
            views = [(view, (number, i)) for i, view in enumerate(self.pixel_spec(one_image))]
        except BadImage as error:
            raise BadImage(f"{name}: {error}") from error
        return views, (one_image.height, one_image.width)

    def _foresee(self, image, number: int, name: str) -> tuple[list, tuple[int, int]]:
        """What `_see` gives, by the image's header; pixels have shapes and no values."""
        try:
            size_hw = image_size(image)
        except BadImage as error:
            raise BadImage(f"{name}: {error}") from error
        views = []
        for view, view_hw in enumerate(self.pixel_spec.view_sizes(size_hw)):
            pixels = meta_pixels(view_hw, torch.float32)
            views.append((map_pixels(lambda tensor: tensor[0], pixels), (number, view)))
        return views, size_hw

    def _write_boxes(self, example: Example, sizes: list[tuple[int, int]]) -> tuple[Turn, ...]:
        """The example's turns with each box as its tokens; boxes that no turn writes are checked
        too, since figures may be drawn from them."""
        boxes = check_boxes(example.boxes, sizes, example.name)
        if not any(turn.box_numbers for turn in example.turns):
            return example.turns
        if self.loc is None:
            raise BadRow(
                f"{example.name}: the answers hold boxes, but this model has no <loc> tokens to "
                "write them; add them with --loc-bins"
            )
        written = []
        for box in boxes:
            resize = self.pixel_spec.resize_record(sizes[box.image])
            written.append(self.loc.write(box.xyxy_px, resize))
        return tuple(
            replace(t, content=tuple(written[p] if isinstance(p, int) else p for p in t.content))
            for t in example.turns
        )

    def _document(self, example: Example) -> Row:
        text = example.turns[0].text.strip()
        if not text:
            raise BadRow(f"{example.name}: expected a document's text, found none")
        ids = self.text_tokenizer(text, add_special_tokens=True)["input_ids"]
        if ids[-1] == self.text_tokenizer.eos_token_id:  # some tokenizers write it, and most do not
            ids = ids[:-1]
        ids = [*ids, self.end_id]
        return Row(
            name=example.name,
            ids=torch.tensor(ids),
            scored=torch.ones(len(ids), dtype=torch.bool),
            views=(),
            layout=self._layout(()),
        )

    def _require_loc_tokens(self, loc: LocTokens) -> None:
        split = [token for token in loc.tokens if len(self._plain_ids(token)) != 1]
        if split:
            raise ValueError(
                f"the text tokenizer writes {len(split)} of {loc.bins} <loc> tokens with several "
                f"ids, such as {split[0]}: expected each as one; add them with vlm.vocabulary.grow"
            )

    def _plain_ids(self, text: str) -> list[int]:
        return self.text_tokenizer(text, add_special_tokens=False)["input_ids"]

    def _fit_template(self) -> None:
        """Finds how the template writes a prompt exactly as it writes the text before an answer.

        Some take no system message, which an empty one does without; some open the answer with an
        empty line of thought unless they are told that thinking is off (Qwen3).
        Raises BadRow where prompt and training row would differ all the same.
        """
        if self.system == "":
            try:
                self.render(PROBE, "chat template")
            except BadRow:
                self.system = None
        for options in ({}, {"enable_thinking": False}):
            self._template_options = options
            trained = self.render(PROBE, "chat template").partition(ANSWER)[0]
            prompted = self.render(PROBE[:1], "chat template", open_answer=True)
            if trained.rstrip() == prompted.rstrip():
                return
        raise BadRow(
            "chat template: before an answer it writes "
            f"{trained!r}, but to ask for one {prompted!r}; a model trained on the first would not "
            "know the second. Set `text_tokenizer.chat_template`"
        )

    def _require_room(self, name: str, length: int) -> None:
        if self.max_tokens is not None and length > self.max_tokens:
            raise BadRow(f"{name}: {length} tokens, the context takes {self.max_tokens}")

    def _ids(
        self,
        turns: Sequence[Turn],
        images: Sequence[ImageLayout],
        name: str,
        open_answer: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, the mask of scored ones and the mask of answers that are not scored."""
        marked = self.render(turns, name, open_answer)
        adds = self.template.special_tokens
        ids, scored, unscored = self._tokenize(marked, images, name, add_special_tokens=adds)
        if open_answer:
            return ids, torch.zeros_like(scored), unscored
        ids_list, scored_list = ids.tolist(), scored.tolist()
        last = len(ids_list)
        for t in range(len(ids_list)):
            if scored_list[t] and (t + 1 == len(ids_list) or not scored_list[t + 1]):
                end = self._end_after(ids_list, t, name)
                scored[t : end + 1] = True
                last = end + 1
        return ids[:last], scored[:last], unscored[:last]

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

    def _tokenize(
        self,
        marked: str,
        images: Sequence[ImageLayout],
        name: str,
        add_special_tokens: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of a marked text, and masks of its answers, of scored ones and of the others. Text
        before, between and after spans of image tokens, that of layouts included, becomes ids
        piece by piece, each as it would after a special token."""
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
        pieces = "".join(a + b for a, b in zip(pieces, [*marks, ""])).split(SLOT)
        ids: list[int] = []
        within: list[str] = []  # the mark that opened what each id stands in
        opened = END
        for number, piece in enumerate(pieces):
            if number:
                ids += [IMAGE] * spans[number - 1].length
                within += [END] * spans[number - 1].length
            for part in _apart(piece) if self.prefix else (piece,):
                text, inside = "", []
                for character in part:
                    if character in (ANSWER, CONTEXT, END):
                        opened = character
                    else:
                        text += character
                        inside.append(opened)
                part_ids, offsets = self._piece(text, bool(ids), add_special_tokens)
                ids += part_ids
                within += [_mark_of(inside[start:end]) for start, end in offsets]
        scored, unscored = (
            torch.tensor([found == mark for found in within], dtype=torch.bool)
            for mark in (ANSWER, CONTEXT)
        )
        return torch.tensor(ids, dtype=torch.long), scored, unscored

    def _piece(
        self, text: str, continues: bool, add_special_tokens: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of one piece of text; a piece after an image is read after a
        special token, which is then taken off, so that no word-start mark is made up for it."""
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
        return ids, [(max(start - cut, 0), max(end - cut, 0)) for start, end in offsets]

    def _fit(self, row: Row) -> Row | Skipped:
        limit = self.max_tokens
        if limit is None or len(row.ids) <= limit:
            return row
        too_long = f"{len(row.ids)} tokens, the context takes {limit}"
        if self.overflow == "drop":
            return Skipped(row.name, too_long)
        scored = row.scored[:limit].nonzero()[:, 0]
        if not len(scored):
            return Skipped(row.name, f"{too_long}, and no answer is left when it is cut")
        end = int(scored[-1]) + 1  # an answer's token: every image run before it is whole
        image_ends = torch.tensor([image.length for image in row.layout.images]).cumsum(0)
        kept = int((image_ends <= (row.ids[:end] == IMAGE).sum()).sum())
        return replace(
            row,
            ids=row.ids[:end],
            scored=row.scored[:end],
            views=tuple(view for view in row.views if view[1][0] < kept),
            layout=row.layout.first(kept),
            boxes=tuple(box for box in row.boxes if box.image < kept),
            cut=int((row.ids[end:] != IMAGE).sum()),
            unscored=None if row.unscored is None else row.unscored[:end],
        )


def _mark_of(inside: list[str]) -> str:
    """What an id whose characters stand after these marks is of: an answer, where one is."""
    return next((mark for mark in (ANSWER, CONTEXT) if mark in inside), END)


def _apart(marked: str) -> tuple[str, ...]:
    """A marked text as what stands before the answer, where there is one, and the rest."""
    prompt, mark, rest = marked.partition(ANSWER)
    return (prompt, mark + rest) if mark else (marked,)


def _user(prompt: str, image_mark: str) -> Turn:
    """A literal prompt as the user's message, each mark standing for an image."""
    first, *others = prompt.split(image_mark)
    return Turn("user", (first, *(part for text in others for part in (None, text))))
