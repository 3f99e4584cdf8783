"""From a conversation with images to rows: ids, image positions, pixels, scored tokens.

The chat template writes the conversation with images and answers marked, `MarkedText` makes ids of
it; here images are read, boxes written, and rows put together and cut to the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from vlm.box_codecs import BoxCodec
from vlm.data.boxes import check_boxes
from vlm.data.example import BadRow, Box, Example, NonCausal, Skipped, Turn, Video
from vlm.families.decoder_only.batch import IMAGE, Row
from vlm.families.decoder_only.chat_template import (
    ANSWER,
    END,
    PROBE,
    SLOT,
    ChatTemplate,
    Template,
    begun_after_images,
    require_no_marks,
    slotted,
    user_turn,
)
from vlm.families.decoder_only.docked_text import SpanTokenizer
from vlm.families.decoder_only.image_layout import ImageLayout, PositionNumbers, StreamLayout
from vlm.families.decoder_only.marked_text import MarkedText
from vlm.families.decoder_only.timed_frames import TimedFrames
from vlm.geometry import Resize
from vlm.image_tokens import is_text, map_pixels, meta_pixels
from vlm.pixels import BadImage, image_size, open_image

MARK = "<image>"
"""Stands for an image in a literal prompt (`generate`, `score`), unless a published system has its
own mark."""


class Processor:
    """Images and text in, rows of ids and pixels out.

    text_tokenizer: a fast transformers tokenizer with a chat template.
    pixel_spec: the image tokenizer's own preprocessing.
    layout_for: the layout of an image of (rows, columns) pixels in the stream.
    system: the system message put before every conversation that has none; None leaves that to
        the template, "" asks for an empty one (none where the template takes no system message).
    max_tokens: the longest row; None means no limit. overflow says what happens to longer rows:
        "drop" skips them, "shrink" cuts text from the end. Neither ever cuts an image run.
    box_codec: how boxes are written; None where the model writes none.
    image_mark: stands for an image in a literal prompt.
    prefix: whether the model reads all that is before an answer at once, as prefix decoders do. A
        row then has one answer, which becomes ids apart from its prompt: those of the prompt are
        the same with and without it.
    template: how the chat template is used.
    framed: whether a literal prompt is a user's message, which the chat template frames (as
        PaliGemma's own processor does with its text); else it is read as it stands.
    position_numbers: of the language model's position ids, as in `StreamLayout`.
    frames: how a video stands in the stream; None for models that read none.
    docked: makes views of non-causal texts; None where the model has no docked text encoder.
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
        box_codec: BoxCodec | None = None,
        image_mark: str = MARK,
        prefix: bool = False,
        framed: bool = False,
        template: Template | None = None,
        position_numbers: PositionNumbers = 1,
        frames: TimedFrames | None = None,
        docked: SpanTokenizer | None = None,
    ) -> None:
        if overflow not in ("drop", "shrink"):
            raise ValueError(f"overflow is 'drop' or 'shrink', found {overflow!r}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, found {max_tokens}")
        self.text_tokenizer = text_tokenizer
        self.template = template or Template()
        self.marked_text = MarkedText(text_tokenizer, apart=prefix)
        self.chat_template = ChatTemplate(text_tokenizer, self.template, system)
        self.pixel_spec = pixel_spec
        self.layout_for = layout_for
        self.max_tokens = max_tokens
        self.overflow = overflow
        self.box_codec = box_codec
        self.image_mark = image_mark
        self.prefix = prefix
        self.framed = framed
        self.position_numbers = position_numbers
        self.frames = frames
        self.docked = docked
        self.end_id = int(self._ids(PROBE, [], "chat template")[0][-1])

    @property
    def system(self) -> str | None:
        """The system message put before every conversation that has none; see the class."""
        return self.chat_template.system

    @property
    def box_codec(self) -> BoxCodec | None:
        """How boxes are written. Setting it raises ValueError where the text tokenizer lacks one of
        its tokens (each is one id)."""
        return self._box_codec

    @box_codec.setter
    def box_codec(self, codec: BoxCodec | None) -> None:
        if codec is not None:
            self._require_tokens(codec)
        self._box_codec = codec

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
        return self._encode(example, _pixels)

    def measure(self, example: Example) -> Row | Skipped:
        """What `encode` gives, its pixels on the meta device, where tensors have shapes and no
        values: of images the headers alone are read.

        Raises BadRow or BadImage as `encode` does, but not for damage after a header.
        """
        return self._encode(example, _shapes)

    def _encode(self, example: Example, read: Callable) -> Row | Skipped:
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
        views, images, turns = self._look(example, read)
        ids, scored, unscored = self._ids(turns, images, example.name)
        first = turns[0]
        return self._fit(
            Row(
                name=example.name,
                ids=ids,
                scored=scored,
                **_by_kind(views),
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
        views, images, turns = self._look(example, _pixels)
        return replace(self.prompt_row(turns, images, example.name), **_by_kind(views))

    def prompt_row(self, turns: Sequence[Turn], images: Sequence[ImageLayout], name: str) -> Row:
        """A row to generate from, without pixels: a conversation whose images were seen before, up
        to the opening of the assistant's turn.

        images: the layout of each image, in the order of the turns.
        Raises BadRow naming both numbers where it is longer than `max_tokens`.
        """
        ids, scored, _ = self._ids(turns, images, name, open_answer=True)
        self._require_room(name, len(ids))
        return Row(name=name, ids=ids, scored=scored, views=(), layout=self._layout(images))

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
            seen, layout, _ = self._views(image, number, name, _pixels)
            views += seen
            layouts.append(layout)
        if self.framed:
            turn = user_turn(prompt, self.image_mark)
            marked = self.chat_template.render((turn,), name, open_answer=True)
        else:
            marked = prompt.replace(self.image_mark, SLOT)
        if answer is not None:
            marked += f"{ANSWER}{answer}{END}"
        adds = not self.framed and not self.template.begins_after_images
        if self.template.begins_after_images:
            marked = begun_after_images(marked, self.text_tokenizer.bos_token)
        ids, scored, _ = self.marked_text.tokenize(marked, layouts, name, adds)
        if answer is not None:
            ids = torch.cat([ids, torch.tensor([self.end_id])])
            scored = torch.cat([scored, torch.tensor([True])])
        self._require_room(name, len(ids))
        layout = self._layout(layouts)
        return Row(name=name, ids=ids, scored=scored, views=tuple(views), layout=layout)

    def _layout(self, images: Sequence[ImageLayout]) -> StreamLayout:
        return StreamLayout(
            images=tuple(images),
            sees="prefix" if self.prefix else "causal",
            position_numbers=self.position_numbers,
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens skipped."""
        return self.text_tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _look(
        self, example: Example, read: Callable
    ) -> tuple[list, list[ImageLayout], tuple[Turn, ...]]:
        """Views of the example's images and non-causal texts, the layout of each in the order of
        the turns, and the turns with boxes written out. read: `_pixels` or `_shapes`."""
        views, layouts, sizes = [], [], []
        images = iter(example.images)
        for part in (part for turn in example.turns for part in turn.content):
            if part is None:
                seen, layout, size_hw = self._views(next(images), len(layouts), example.name, read)
                views += seen
                layouts.append(layout)
                sizes.append(size_hw)
            elif isinstance(part, NonCausal):
                view, layout = self._dock(part, example.name)
                views.append((view, (len(layouts), 0)))
                layouts.append(layout)
        return views, layouts, self._write_boxes(example, sizes)

    def _views(
        self, image, number: int, name: str, read: Callable
    ) -> tuple[list, ImageLayout, tuple[int, int]]:
        """The views of one image or video, each with its (image, view) numbers, its layout, and its
        rows and columns (those of a video's first frame). read: `_pixels` or `_shapes`."""
        frames, spec, layout = (image,), self.pixel_spec, None
        if isinstance(image, Video):
            layout = self._video_layout(image, name)
            frames, spec = image.frames, self.frames.pixel_spec
        views, sizes = [], []
        for frame in frames:
            try:
                pixels, size_hw = read(frame, spec)
            except BadImage as error:
                raise BadImage(f"{name}: {error}") from error
            views += pixels
            sizes.append(size_hw)
        numbered = [(view, (number, i)) for i, view in enumerate(views)]
        return numbered, layout or self.layout_for(sizes[0]), sizes[0]

    def _video_layout(self, video: Video, name: str) -> ImageLayout:
        if self.frames is None:
            raise BadRow(f"{name}: this model reads no videos, found one; give it images")
        view = self.layout_for(self.frames.pixel_spec.tile.size_hw).spans[-1]
        try:
            return self.frames(video, view)
        except ValueError as error:
            raise BadRow(f"{name}: {error}") from error

    def _write_boxes(self, example: Example, sizes: list[tuple[int, int]]) -> tuple[Turn, ...]:
        """The example's turns with boxes as text; those that no turn writes are checked too, since
        figures may be drawn from them."""
        on_videos = [box for box in example.boxes if isinstance(example.images[box.image], Video)]
        if on_videos:
            raise BadRow(
                f"{example.name}: expected boxes on images, found one on image "
                f"{on_videos[0].image}, which is a video"
            )
        boxes = check_boxes(example.boxes, sizes, example.name)
        if not any(turn.box_numbers for turn in example.turns):
            return example.turns
        if self.box_codec is None:
            raise BadRow(
                f"{example.name}: the answers hold boxes, but this model writes none; "
                "give it <loc> tokens to write them with by --loc-bins"
            )
        resizes = {box.image: self.pixel_spec.resize_record(sizes[box.image]) for box in boxes}
        return tuple(
            replace(turn, content=self._written(turn.content, boxes, resizes))
            for turn in example.turns
        )

    def _written(
        self, content: Sequence[str | int | None], boxes: Sequence[Box], resizes: dict[int, Resize]
    ) -> tuple[str | None, ...]:
        """A turn's content with boxes as text; neighbours on one image are written together."""
        written: list[str | None] = []
        for image, parts in groupby(
            content, lambda part: boxes[part].image if isinstance(part, int) else None
        ):
            if image is None:
                written += parts
                continue
            chosen = [boxes[number] for number in parts]
            before = written.pop() if written and type(written[-1]) is str else ""
            xyxy_px, labels = [box.xyxy_px for box in chosen], [box.label for box in chosen]
            written.append(self.box_codec.write(xyxy_px, resizes[image], labels, before))
        return tuple(written)

    def _dock(self, text: NonCausal, name: str) -> tuple[Tensor, ImageLayout]:
        """The view and the layout of a non-causal text."""
        if self.docked is None:
            raise BadRow(
                f"{name}: the row holds a non-causal text, {text[:20]!r}, but this model has no "
                "docked text encoder to read it; compose it with one (docked)"
            )
        return self.docked(str(text), name)

    def _document(self, example: Example) -> Row:
        (turn,) = example.turns
        if not turn.text.strip():
            raise BadRow(f"{example.name}: expected a document's text, found none")
        require_no_marks(turn, example.name)
        views, layouts, _ = self._look(example, _pixels)
        marked = "".join(map(slotted, turn.content)).strip()
        adds = not self.template.begins_after_images
        if not adds:
            marked = begun_after_images(marked, self.text_tokenizer.bos_token)
        ids, _, _ = self.marked_text.tokenize(marked, layouts, example.name, adds)
        if ids[-1] == self.text_tokenizer.eos_token_id:  # some tokenizers write it, and most do not
            ids = ids[:-1]
        ids = torch.cat([ids, torch.tensor([self.end_id])])
        return Row(
            name=example.name,
            ids=ids,
            scored=ids != IMAGE,
            **_by_kind(views),
            layout=self._layout(layouts),
        )

    def _require_tokens(self, codec: BoxCodec) -> None:
        split = [token for token in codec.tokens if len(self._plain_ids(token)) != 1]
        if split:
            raise ValueError(
                f"the text tokenizer writes {len(split)} of {len(codec.tokens)} box tokens with "
                f"several ids, such as {split[0]}: expected each as one; add them with "
                "vlm.vocabulary.grow"
            )

    def _plain_ids(self, text: str) -> list[int]:
        return self.text_tokenizer(text, add_special_tokens=False)["input_ids"]

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
        videos = [number for number, image in enumerate(images) if image.is_video]
        marked = self.chat_template.render(turns, name, open_answer, videos)
        adds = self.template.special_tokens
        ids, scored, unscored = self.marked_text.tokenize(marked, images, name, adds)
        if open_answer:
            return ids, torch.zeros_like(scored), unscored
        last = self.marked_text.score_ends(ids, scored, name)
        return ids[:last], scored[:last], unscored[:last]

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
        images = sum(not image.is_text for image in row.layout.images[:kept])
        return replace(
            row,
            ids=row.ids[:end],
            scored=row.scored[:end],
            views=tuple(view for view in row.views if view[1][0] < kept),
            texts=tuple(view for view in row.texts if view[1][0] < kept),
            layout=row.layout.first(kept),
            boxes=tuple(box for box in row.boxes if box.image < images),
            cut=int((row.ids[end:] != IMAGE).sum()),
            unscored=None if row.unscored is None else row.unscored[:end],
        )


def _pixels(image, spec) -> tuple[list, tuple[int, int]]:
    """The views of an image, and its rows and columns."""
    one_image = open_image(image)
    return spec(one_image), (one_image.height, one_image.width)


def _shapes(image, spec) -> tuple[list, tuple[int, int]]:
    """What `_pixels` gives, of its header alone."""
    size_hw = image_size(image)
    views = [
        map_pixels(lambda tensor: tensor[0], meta_pixels(view_hw, torch.float32))
        for view_hw in spec.view_sizes(size_hw)
    ]
    return views, size_hw


def _by_kind(views: Sequence[tuple]) -> dict[str, tuple]:
    """Views as a row has them, those of images and those of non-causal texts."""
    return {
        "views": tuple(view for view in views if not is_text(view[0])),
        "texts": tuple(view for view in views if is_text(view[0])),
    }
