"""Where phrases are in an image: boxes in the caller's pixels, each with its score.

A model answers with location tokens, four for a box. An image is encoded once, however many
phrases are asked of it. What cannot be read as boxes gives none and says why; it never raises.

Shapes: B phrase, T text position, P packed image tokens, D decoder width, Z vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from vlm.data.example import Box, Example, Turn
from vlm.families.base import evaluating
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import Row, collate
from vlm.families.decoder_only.processor import Processor
from vlm.geometry import Resize
from vlm.pixels import open_image

if TYPE_CHECKING:
    from vlm.families.base import Model

MAX_NEW_TOKENS = 4 * 32
"""Longest answer where nothing else is asked: 32 boxes."""
NO_BOX = "no location tokens"
NOT_FOURS = "location tokens not in fours"
NO_AREA = "a box without area"


@dataclass(frozen=True, slots=True)
class Found:
    """What a model answered to where a phrase is.

    phrase: what was asked for, which is the boxes' label.
    boxes: in the order written, in the image's own pixels, cut at its border. A box's score is
        the geometric mean of the probabilities of its four tokens, in 0 to 1.
    text: what the model wrote.
    fault: why something written is no box: NO_BOX (there was nothing to read), NOT_FOURS (location
        tokens in a row are no whole boxes: none of the answer is taken), NO_AREA (a box that is
        inverted or empty is skipped); None where all was read.
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
    seed: int | None = None,
    **options,
) -> list[list[Found]]:
    """The answer to each phrase of each image.

    images: images (paths, bytes, PIL images or arrays). phrases: for each, one or a list.
    batch_size: images encoded, and phrases answered, at once.
    prompt: asks for a `{phrase}`; None takes the one that the model was trained on.
    constrained: allows nothing but whole boxes, the text after each where the model writes some,
        and the end. Scores stay those of the model's own distribution.
    seed: of what is drawn, with `do_sample=True`.
    options: transformers' names, greedy by default, at most MAX_NEW_TOKENS tokens.
    Raises ValueError for a model without location tokens and for arguments that do not fit,
    BadImage naming the image.
    """
    asked = _asked(images, phrases)
    prompt = model.ground_prompt if prompt is None else prompt
    _check(model, prompt, batch_size)
    options = {"max_new_tokens": MAX_NEW_TOKENS, **options}
    engine.check_options(options, seed)
    bins = _bins(model)
    if constrained:
        only = BoxesOnly(tuple(bins), model.stop_ids, model.labelled_boxes)
        given = options.get("logits_processor", ())
        options["logits_processor"] = LogitsProcessorList([*given, only])
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
                phrase, resize = question.phrase, question.resize
                answer = read_answer(phrase, written, model.processor, bins, resize)
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


def read_answer(
    phrase: str,
    written: engine.Written,
    processor: Processor,
    bins: dict[int, int],
    resize: Resize,
) -> Found:
    """The boxes in what was written; other tokens may stand between them.

    bins: id of each location token -> its number. resize: how the image came into its view.
    """
    ids, logprobs = written
    text = processor.decode(ids)
    runs, at = [], 0
    for is_location, group in groupby(ids, key=bins.__contains__):
        length = len(list(group))
        if is_location:
            runs.append(range(at, at + length))
        at += length
    if not runs:
        return Found(phrase, (), text, NO_BOX)
    if any(len(run) % 4 for run in runs):
        return Found(phrase, (), text, NOT_FOURS)
    fours = [run[i : i + 4] for run in runs for i in range(0, len(run), 4)]
    decoded = processor.loc.decode([[bins[ids[t]] for t in four] for four in fours], resize)
    boxes = []
    for four, box in zip(fours, decoded.tolist()):
        if box[0] < box[2] and box[1] < box[3]:
            score = min(1.0, math.exp(sum(logprobs[t] for t in four) / 4))
            boxes.append(Box(0, tuple(box), phrase, score))
    return Found(phrase, tuple(boxes), text, None if len(boxes) == len(fours) else NO_AREA)


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


def _bins(model: Model) -> dict[int, int]:
    tokens = model.processor.loc.tokens
    ids = model.processor.text_tokenizer.convert_tokens_to_ids(list(tokens))
    return {id: number for number, id in enumerate(ids)}


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


def _check(model: Model, prompt: str, batch_size: int) -> None:
    if model.processor.loc is None:
        raise ValueError(
            "ground: this model has no <loc> tokens to write boxes with; decoder-only models that "
            "were trained with --loc-bins have them"
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
