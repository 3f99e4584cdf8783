"""Where phrases are in an image: boxes in the caller's pixels, each with its score.

A model answers in its own way of writing boxes (`vlm.box_codecs`). An image is encoded once,
however many phrases are asked of it. What cannot be read as boxes gives none and says why; it never
raises.

Shapes: B phrase, T text position, P packed image tokens, D decoder width, Z vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from vlm.box_codecs import LocTokens
from vlm.data.example import Box, Example, Turn
from vlm.families.base import evaluating
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import Row, collate
from vlm.families.decoder_only.processor import Processor
from vlm.geometry import Resize
from vlm.pixels import open_image

if TYPE_CHECKING:
    from vlm.families.base import Model

MAX_BOXES = 32
"""Boxes that the longest answer has room for, where no length is asked for."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a model answered to where a phrase is.

    phrase: what was asked for, which is the boxes' label, whatever the model calls them.
    boxes: in the order written, in the image's own pixels, cut at its border. A box's score is the
        geometric mean of the probabilities of the ids that write its numbers, in 0 to 1.
    text: what the model wrote; of special tokens, those that its boxes are written with.
    fault: why something written is no box, one of `vlm.box_codecs`: NO_BOX (there was nothing to
        read), MALFORMED (one could not be read), NO_AREA (one is inverted or empty); None where all
        was read.
    """

    phrase: str
    boxes: tuple[Box, ...]
    text: str
    fault: str | None


def find(
    model: Model,
    images: Sequence,
    phrases: Sequence[str | Sequence[str]],
    batch_size: int = 16,
    *,
    prompt: str | None = None,
    constrained: bool = False,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    **options,
) -> list[list[Found]]:
    """The answer to each phrase of each image.

    images: images (paths, bytes, PIL images or arrays). phrases: for each, one or a list.
    batch_size: images encoded, and phrases answered, at once.
    prompt: asks for a `{phrase}`; None takes the one that the model was trained on.
    constrained: allows nothing but whole boxes, the text after each where the model writes some,
        and the end, for boxes of <loc> tokens. Scores stay those of the model's own distribution.
    max_new_tokens: the longest answer; None has room for MAX_BOXES boxes.
    seed: of what is drawn, with `do_sample=True`.
    options: transformers' names, greedy by default.
    Raises ValueError for a model that writes no boxes and for arguments that do not fit, BadImage
    naming the image.
    """
    asked = _asked(images, phrases)
    prompt = model.ground_prompt if prompt is None else prompt
    _check(model, prompt, batch_size, constrained)
    codec = model.processor.box_codec
    room = MAX_BOXES * codec.box_tokens if max_new_tokens is None else max_new_tokens
    options = {"max_new_tokens": room, **options}
    engine.check_options(options, seed)
    if constrained:
        ids = model.processor.text_tokenizer.convert_tokens_to_ids(list(codec.tokens))
        only = BoxesOnly(ids, model.stop_ids, model.labelled_boxes)
        given = options.get("logits_processor", ())
        options["logits_processor"] = LogitsProcessorList([*given, only])
    reader = AnswerReader(model.processor)
    found: list[list[Found]] = [[] for _ in images]
    count = sum(map(len, asked))
    with (
        evaluating(model.module),
        engine.seeded(seed, model.device),
        tqdm(total=count, desc="phrases", disable=count <= 64, leave=False) as bar,
    ):
        for start in range(0, len(images), batch_size):
            numbers = range(start, min(start + batch_size, len(images)))
            questions = _questions(model, images, asked, numbers, prompt)
            for question, written in _answers(model, questions, batch_size, options):
                answer = reader.read(question.phrase, written, question.resize)
                found[question.image].append(answer)
            bar.update(len(questions))
    return found


@dataclass(frozen=True, slots=True)
class _Question:
    """One phrase of one image: the image's number, what it is encoded to, where its pixels
    went, and the row to answer, without pixels."""

    image: int
    phrase: str
    resize: Resize
    encoded: Any
    row: Row


@torch.no_grad()
def _questions(
    model: Model,
    images: Sequence,
    asked: Sequence[Sequence[str]],
    numbers: range,
    prompt: str,
) -> list[_Question]:
    """The questions of some images, each of which is opened and encoded once."""
    numbers = [i for i in numbers if asked[i]]
    if not numbers:
        return []
    processor, rows, sizes = model.processor, [], []
    for i in numbers:
        name = str(images[i]) if isinstance(images[i], (str, Path)) else f"image {i}"
        image = open_image(images[i], name=name)
        turns = (_turn(prompt, asked[i][0]),)
        rows.append(processor.encode_prompt(Example(name, turns, (image,))))
        sizes.append((image.height, image.width))
    dtype = next(model.module.tokenizer.parameters()).dtype
    batch = collate(rows, processor.pad_id, "left").to(model.device, dtype)
    encoded = model.module.encode(batch.groups, batch.arrangement)
    questions = []
    for at, (i, row, size_hw) in enumerate(zip(numbers, rows, sizes)):
        resize = processor.pixel_spec.resize_record(size_hw)
        own = encoded.of(at)
        for phrase in asked[i]:
            asks = processor.prompt_row((_turn(prompt, phrase),), row.layout.images, row.name)
            questions.append(_Question(i, phrase, resize, own, asks))
    return questions


@torch.no_grad()
def _answers(
    model: Model, questions: list[_Question], batch_size: int, options: dict
) -> list[tuple[_Question, engine.Written]]:
    """Each question with what is written, in their order; those of like length go together."""
    written: list[engine.Written | None] = [None] * len(questions)
    order = sorted(range(len(questions)), key=lambda q: len(questions[q].row.ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        part = [questions[q] for q in chosen]
        batch = collate([question.row for question in part], model.processor.pad_id, "left")
        batch = batch.to(model.device)
        encoded = [question.encoded for question in part]
        images = type(encoded[0]).side_by_side(encoded)
        answers = engine.write(
            model.module,
            images,
            batch,
            model.stop_ids,
            model.processor.pad_id,
            model.banned_ids,
            **options,
        )
        for q, answer in zip(chosen, answers):
            written[q] = answer
    return list(zip(questions, written))


class AnswerReader:
    """Reads what a model wrote as boxes, in its own way of writing them."""

    def __init__(self, processor: Processor) -> None:
        self.codec, self.text_tokenizer = processor.box_codec, processor.text_tokenizer
        tokenizer = self.text_tokenizer
        special = {id: t.content for id, t in tokenizer.added_tokens_decoder.items() if t.special}
        special |= zip(tokenizer.all_special_ids, tokenizer.all_special_tokens)
        kept = {*self.codec.tags, *self.codec.tokens}
        self.hidden = {id for id, token in special.items() if token not in kept}

    def read(self, phrase: str, written: engine.Written, resize: Resize) -> Found:
        """The boxes in what was written for a phrase. resize: how the image came into its view."""
        shown = [(id, p) for id, p in zip(*written) if id not in self.hidden]
        ids = [id for id, _ in shown]
        text = self._decode(ids)
        read = self.codec.read(text, resize)
        spans = character_spans(self._decode, ids) if read.boxes else []
        boxes = []
        for box in read.boxes:
            own = [
                logprob
                for (_, logprob), (start, end) in zip(shown, spans)
                if any(start < last and first < end for first, last in box.spans)
            ]
            score = min(1.0, math.exp(sum(own) / len(own)))
            boxes.append(Box(0, box.xyxy_px, phrase, score))
        return Found(phrase, tuple(boxes), text.strip(), read.fault)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.text_tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def character_spans(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int]
) -> list[tuple[int, int]]:
    """The characters (start, end) of the text of `ids` that each of them writes, which are all of
    them in order: those that the text has gained once it is written. Of ids that write a character
    together, byte by byte, the last has it.

    >>> character_spans(lambda ids: "".join("a1)"[id] * 2 for id in ids), [0, 2, 1])
    [(0, 2), (2, 4), (4, 6)]
    """
    text, spans, start = decode(ids), [], 0
    for count in range(1, len(ids) + 1):
        so_far = decode(ids[:count])
        end = start
        while end < len(so_far) and end < len(text) and so_far[end] == text[end]:
            end += 1
        spans.append((start, end))
        start = end
    return spans


class BoxesOnly(LogitsProcessor):
    """Allows location tokens in fours, and an end after whole boxes.

    location_ids, stop_ids: ids of the two. labelled: whether other ids may follow a whole box.
    """

    def __init__(
        self, location_ids: Sequence[int], stop_ids: Sequence[int], labelled: bool = False
    ) -> None:
        self.location_ids, self.stop_ids = list(location_ids), list(stop_ids)
        self.labelled = labelled

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` float[B, Z] with -inf at what is not allowed after `input_ids` int64[B, T], the
        ids written so far."""
        locations = torch.tensor(self.location_ids, device=input_ids.device)
        run = torch.isin(input_ids, locations).long().flip(1).cumprod(1).sum(1)
        whole = run % 4 == 0
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        allowed[:, self.location_ids] = True
        if self.labelled and input_ids.shape[1]:
            allowed |= whole[:, None]
        allowed[:, self.stop_ids] = whole[:, None]
        return scores.masked_fill(~allowed, -math.inf)


def _turn(prompt: str, phrase: str) -> Turn:
    return Turn("user", (None, prompt.format(phrase=phrase)))


def _asked(images: Sequence, phrases: Sequence[str | Sequence[str]]) -> list[tuple[str, ...]]:
    """The phrases of each image. Raises ValueError naming the one that cannot be asked."""
    if isinstance(images, (str, bytes, Path)) or isinstance(phrases, str):
        raise ValueError("images and phrases are lists, one entry for each image")
    if len(images) != len(phrases):
        raise ValueError(f"there are {len(images)} images and {len(phrases)} entries of phrases")
    asked = []
    for i, (image, given) in enumerate(zip(images, phrases)):
        if isinstance(image, (list, tuple)):
            raise ValueError(f"images[{i}]: expected one image to find phrases in, found a list")
        listed = (given,) if isinstance(given, str) else tuple(given)
        for phrase in listed:
            if not isinstance(phrase, str) or not phrase.strip():
                raise ValueError(f"phrases[{i}]: expected a text to look for, found {phrase!r}")
        asked.append(listed)
    return asked


def _check(model: Model, prompt: str, batch_size: int, constrained: bool) -> None:
    codec = model.processor.box_codec
    if codec is None:
        raise ValueError(
            "ground: this model writes no boxes; decoder-only models that were trained with "
            "--loc-bins do, and published systems that were trained on boxes"
        )
    if constrained and not isinstance(codec, LocTokens):
        raise ValueError(
            "constrained: expected a model that writes boxes as <loc> tokens, found one that "
            f"writes them as {codec}; its answers are read as they come"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    require_prompt(prompt)


def require_prompt(prompt: str) -> None:
    """Raises ValueError for a prompt without {phrase}, or with other braces."""
    try:
        asks = prompt.format(phrase="\ue000") != prompt.format(phrase="")
    except (KeyError, IndexError, AttributeError, ValueError):
        asks = False
    if not asks:
        raise ValueError(
            f"expected a prompt with {{phrase}} where the phrase goes and no other braces, found "
            f"{prompt!r}"
        )
