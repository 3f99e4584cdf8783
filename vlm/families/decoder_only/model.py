"""The public decoder-only model: images and text in, captions, answers, boxes and scores out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from vlm.data.example import Box, Example, Turn
from vlm.data.grounding import GROUND_PROMPT
from vlm.families.base import Model, evaluating, require_batch_size, require_list
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import Batch, Row, collate
from vlm.families.decoder_only.chat import Chat, read_messages
from vlm.families.decoder_only.ground import find
from vlm.families.decoder_only.head import require_own_logits
from vlm.families.decoder_only.module import DecoderOnly
from vlm.families.decoder_only.processor import Processor
from vlm.text.generation import Generation

WINDOW = 8
"""Batches of rows that are sorted by length together."""
CAPTION_PROMPT = "Describe the picture."
ANSWER_PROMPT = "{question}"


@dataclass(kw_only=True, eq=False)
class DecoderOnlyModel(Model):
    """A vision-language model with its processor, ready to use.

    stop_ids: ids that end an answer. banned_ids: ids that are never written, such as those of image
    marks. caption_prompt: what asks for a caption where nothing else is said. ground_prompt: what
    asks for the boxes of a `{phrase}`. labelled_boxes: whether its answer names the phrase after
    each box. answer_prompt: what is written for a `{question}`. ocr_prompt: what asks for the text
    in an image; None where it was trained on none.
    `images` holds, per example, an image (path, bytes, PIL image or array) or a list of images.
    Options carry transformers' names and are greedy by default. With `do_sample=True`, `seed` makes
    what is drawn repeatable for the same rows in the same batches; torch's global generators stay
    as they are.
    Raises ValueError for a language model whose own logits are not those that it would be trained
    and scored by.
    """

    module: DecoderOnly
    processor: Processor
    stop_ids: tuple[int, ...]
    caption_prompt: str = CAPTION_PROMPT
    ground_prompt: str = GROUND_PROMPT
    labelled_boxes: bool = False
    answer_prompt: str = ANSWER_PROMPT
    ocr_prompt: str | None = None
    banned_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_own_logits(self.module.text)

    def caption(
        self, images: Sequence, prompt: str | None = None, batch_size: int = 16, **options
    ) -> list[str]:
        """A caption for each image; `prompt` (None: the prompt it was trained on) asks for it."""
        require_list(images)
        asked = self.caption_prompt if prompt is None else prompt
        written = self._ask(images, [asked] * len(images), batch_size, **options)
        return [generation.text for generation in written]

    def answer(
        self, images: Sequence, questions: Sequence[str], batch_size: int = 16, **options
    ) -> list[str]:
        """The answer to each question about its image or images, which come before it."""
        prompt = self.answer_prompt
        written = self._ask(images, questions, batch_size, prompt, **options)
        return [generation.text for generation in written]

    def chat(
        self, messages: Sequence[dict], stream: bool = False, **options
    ) -> str | Iterator[str]:
        """The answer to the last message of a conversation.

        messages: transformers' chat format, see `vlm.families.decoder_only.chat`; the last is the
        user's. stream: gives pieces of the answer as they are written; joined, they are the answer.
        To go on with a conversation without encoding its images anew, keep a
        `vlm.families.decoder_only.chat.Chat`.
        Raises ValueError naming the message, what was expected and what was found.
        """
        turns = read_messages(messages)
        if not turns or turns[-1][0].role != "user":
            found = f"{turns[-1][0].role}'s" if turns else "no message"
            raise ValueError(f"messages: expected the last to be the user's, found {found}")
        return Chat(self, messages[:-1]).ask(messages[-1]["content"], stream=stream, **options)

    def ground(
        self,
        images: Sequence,
        phrases: Sequence[str | Sequence[str]],
        batch_size: int = 16,
        **options,
    ) -> list[list[Box]]:
        """The boxes of phrases in each image, in its own pixels, phrase after phrase, the phrase
        being their label; their scores lie in 0 to 1.

        phrases: for each image one, or a list. A phrase whose answer cannot be read has no box;
        `vlm.families.decoder_only.ground.find`, which takes the same options, says why.
        Raises ValueError for a model that writes no boxes.
        """
        found = find(self, images, phrases, batch_size, **options)
        return [[box for answer in answers for box in answer.boxes] for answers in found]

    def answer_examples(
        self, examples: Sequence[Example], batch_size: int = 16, **options
    ) -> list[str]:
        """What the model writes in place of each example's last answer."""
        rows = (self.processor.encode_prompt(example.question()) for example in examples)
        return [g.text for g in self._generate(rows, len(examples), batch_size, **options)]

    def write_after(self, rows: Sequence[Row], batch_size: int = 16, **options) -> list[Generation]:
        """What the model writes after rows that `processor.encode_prompt` made; none for none."""
        return self._generate(rows, len(rows), batch_size, **options)

    def generate(
        self, images: Sequence, prompts: Sequence[str], batch_size: int = 16, **options
    ) -> list[Generation]:
        """What the model writes after literal prompts, in which the processor's
        `image_mark` stands for each image."""
        rows = (
            self.processor.encode_literal(image_list, prompt, name=name_of(image_list, i))
            for i, (image_list, prompt) in enumerate(_pairs(images, prompts, "prompts"))
        )
        return self._generate(rows, len(images), batch_size, **options)

    def score(
        self,
        images: Sequence,
        prompts: Sequence[str],
        answers: Sequence[str],
        batch_size: int = 16,
    ) -> torch.Tensor:
        """Log-probability of each answer, end token included, after its literal prompt: fp32[N],
        nats."""
        require_list(answers, "answers")
        if len(answers) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(answers)} answers")
        rows = (
            self.processor.encode_literal(image_list, prompt, answers[i], name_of(image_list, i))
            for i, (image_list, prompt) in enumerate(_pairs(images, prompts, "prompts"))
        )
        scores = torch.zeros(len(prompts))
        for indices, batch in self._batches(rows, len(prompts), batch_size, "right"):
            scores[indices] = -engine.answer_losses(self.module, batch).cpu()
        return scores

    def _ask(
        self,
        images: Sequence,
        questions: Sequence[str],
        batch_size: int,
        prompt: str = ANSWER_PROMPT,
        **options,
    ) -> list[Generation]:
        """What is written for each question as `prompt` puts it, the images before it."""
        rows = (
            self.processor.encode_prompt(
                question_about(image_list, prompt.format(question=question), name_of(image_list, i))
            )
            for i, (image_list, question) in enumerate(_pairs(images, questions, "questions"))
        )
        return self._generate(rows, len(images), batch_size, **options)

    def _generate(
        self,
        rows: Iterable[Row],
        count: int,
        batch_size: int,
        seed: int | None = None,
        **options,
    ) -> list[Generation]:
        engine.check_options(options, seed)
        done: list[Generation | None] = [None] * count
        with engine.seeded(seed, self.device):
            for indices, batch in self._batches(rows, count, batch_size, "left"):
                written = engine.generate(
                    self.module,
                    batch,
                    self.stop_ids,
                    self.processor.pad_id,
                    self.banned_ids,
                    **options,
                )
                for index, (ids, logprobs) in zip(indices, written):
                    text = self.processor.decode(ids)
                    done[index] = Generation(text, tuple(ids), tuple(logprobs))
        return done

    def _batches(
        self, rows: Iterable[Row], count: int, batch_size: int, padding: str
    ) -> Iterator[tuple[list[int], Batch]]:
        """Batches of rows of like length, with the rows' numbers; in evaluation mode.

        Rows are made a window at a time, so that images are never all in memory.
        """
        require_batch_size(batch_size)
        numbered = enumerate(rows)
        with (
            evaluating(self.module),
            tqdm(total=count, desc="examples", disable=count <= 64, leave=False) as bar,
        ):
            while window := list(islice(numbered, WINDOW * batch_size)):
                window.sort(key=lambda item: len(item[1].ids))
                for start in range(0, len(window), batch_size):
                    indices, part = zip(*window[start : start + batch_size])
                    batch = collate(part, self.processor.pad_id, padding)
                    yield list(indices), batch.to(self.device, self.pixel_dtype)
                    bar.update(len(part))


def question_about(images: Sequence, question: str, name: str) -> Example:
    """A question about images, which come before it, without its answer."""
    content = (*[None] * len(images), *([question] if question else []))
    return Example(name, (Turn("user", content),), tuple(images))


def _pairs(images: Sequence, texts: Sequence[str], what: str) -> Iterator[tuple[list, str]]:
    if isinstance(images, (str, bytes, Path)) or isinstance(texts, str):
        raise ValueError(f"images and {what} are lists, one entry for each example")
    if len(images) != len(texts):
        raise ValueError(f"there are {len(images)} images and {len(texts)} {what}")
    for image_list, text in zip(images, texts):
        yield list(image_list) if isinstance(image_list, (list, tuple)) else [image_list], text


def name_of(images: Sequence, index: int) -> str:
    for image in images:
        if isinstance(image, (str, Path)):
            return str(image)
    return f"example {index}"
