"""The public model: pictures and text in, captions, answers and scores out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from vlm import systems
from vlm.data.example import Box, Example, Turn
from vlm.families.contrastive.model import ContrastiveModel
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only import layout as composed
from vlm.families.decoder_only.batch import Batch, Row, collate
from vlm.families.decoder_only.chat import Chat, read_messages
from vlm.families.decoder_only.generate import Generation
from vlm.families.decoder_only.ground import find
from vlm.families.decoder_only.layout import ANSWER_PROMPT, Composition
from vlm.families.decoder_only.module import DecoderOnly
from vlm.families.decoder_only.processor import Processor
from vlm.families.encoder_decoder.model import Writer
from vlm.inference.ocr import Reader
from vlm.ocr.from_generation import read_written
from vlm.ocr.results import Reading
from vlm.pixels import open_image

WINDOW = 8
"""Batches of rows that are sorted by length together."""
OCR_TOKENS = 512
"""Longest reading where nothing else is asked: as long as PaliGemma was trained on."""
TASKS = {
    "ocr": "encoder-decoder models, line readers and prefix decoders that were trained to read",
    "embed_images": "contrastive models",
    "embed_texts": "contrastive models",
    "classify": "contrastive models",
}


def load(source: str | Path, device: str = "auto", dtype: str = "auto") -> Model | ContrastiveModel:
    """The model in a folder or under a hub id, ready to use.

    source: a model's folder, a run folder of a recipe (its `model/` is taken), a hub id, or a file
        of weights that another tool wrote, see `vlm.systems.weights_file`.
    device: "auto" takes a GPU where there is one. dtype: "auto" takes the text model's own for all
        parts, 16 bits only where the device multiplies faster in them, else float32; weights that
        are stored in float32 stay so. "stored" leaves each part as it was saved, to train on; else
        "float32", "bfloat16" or "float16", with a warning where the device is slow in it.
    Raises ValueError naming the folder and what was expected, OSError for an unknown hub id.
    """
    parts = systems.load(source, device, dtype)
    return FACES[parts.module.family](parts)


def build(*, dtype: str = "auto", **settings) -> Model:
    """A model composed of pretrained parts and a fresh adaptor, on the CPU; dtype is that of
    `load`, the other settings are those of `vlm.families.decoder_only.layout.build`."""
    parts = composed.build(**settings)
    systems.compute_in(parts.module, dtype, "cpu")
    return FACES[parts.module.family](parts)


class Model:
    """A vision-language model with its processor, ready to use.

    parts: what `vlm.systems` opened. module: the family's plain nn.Module. processor: its prompts
    and preprocessing.
    `images` holds, per example, a picture (path, bytes, PIL image or array) or a list of pictures.
    Options carry transformers' names and are greedy by default. With `do_sample=True`, `seed` makes
    what is drawn repeatable for the same rows in the same batches; torch's global generators stay
    as they are.
    """

    def __init__(self, parts: Composition) -> None:
        self.parts = parts
        self.module: DecoderOnly = parts.module
        self.processor: Processor = parts.processor

    def __getattr__(self, name: str):
        if name in TASKS:
            raise AttributeError(
                f"{name}: a {self.module.family} model cannot do this; it is done by {TASKS[name]}"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def caption(
        self, images: Sequence, prompt: str | None = None, batch_size: int = 16, **options
    ) -> list[str]:
        """A caption for each picture; `prompt` (None: the prompt it was trained on) asks for it."""
        asked = self.parts.caption_prompt if prompt is None else prompt
        written = self._ask(images, [asked] * len(images), batch_size, **options)
        return [generation.text for generation in written]

    def answer(
        self, images: Sequence, questions: Sequence[str], batch_size: int = 16, **options
    ) -> list[str]:
        """The answer to each question about its picture or pictures, which come before it."""
        prompt = self.parts.answer_prompt
        written = self._ask(images, questions, batch_size, prompt, **options)
        return [generation.text for generation in written]

    def chat(
        self, messages: Sequence[dict], stream: bool = False, **options
    ) -> str | Iterator[str]:
        """The answer to the last message of a conversation.

        messages: transformers' chat format, see `vlm.families.decoder_only.chat`; the last is the
        user's. stream: gives pieces of the answer as they are written; joined, they are the answer.
        To go on with a conversation without encoding its pictures anew, keep a
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
        """The boxes of phrases in each picture, in its own pixels, phrase after phrase, the phrase
        being their label; their scores lie in 0 to 1.

        phrases: for each picture one, or a list. A phrase whose answer cannot be read has no box;
        `vlm.families.decoder_only.ground.find`, which takes the same options, says why.
        Raises ValueError for a model without <loc> tokens.
        """
        found = find(self, images, phrases, batch_size, **options)
        return [[box for answer in answers for box in answer.boxes] for answers in found]

    def answer_examples(
        self, examples: Sequence[Example], batch_size: int = 16, **options
    ) -> list[str]:
        """What the model writes at the place of each example's last answer."""
        rows = (self.processor.encode_prompt(example.question()) for example in examples)
        return [g.text for g in self._generate(rows, len(examples), batch_size, **options)]

    def generate(
        self, images: Sequence, prompts: Sequence[str], batch_size: int = 16, **options
    ) -> list[Generation]:
        """What the model writes after literal prompts, in which "<image>" marks each picture."""
        rows = (
            self.processor.encode_literal(pictures, prompt, name=_name(pictures, i))
            for i, (pictures, prompt) in enumerate(_pairs(images, prompts, "prompts"))
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
        if len(answers) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(answers)} answers")
        rows = (
            self.processor.encode_literal(pictures, prompt, answers[i], _name(pictures, i))
            for i, (pictures, prompt) in enumerate(_pairs(images, prompts, "prompts"))
        )
        scores = torch.zeros(len(prompts))
        for indices, batch in self._batches(rows, len(prompts), batch_size, "right"):
            scores[indices] = -engine.answer_losses(self.module, batch).cpu()
        return scores

    def save(self, folder: str | Path, layout: str = "native", merge: bool = True) -> None:
        """Writes weights, configuration and processor files; `vlm.load(folder)` reads them.

        merge: whether LoRA is merged into the weights that are written (this model stays as it
            is), or written as layers of its own, to go on training with.
        """
        systems.save(self.parts, Path(folder), layout, merge)

    def _ask(
        self,
        images: Sequence,
        questions: Sequence[str],
        batch_size: int,
        prompt: str = ANSWER_PROMPT,
        **options,
    ) -> list[Generation]:
        """What is written for each question as `prompt` puts it, the pictures before it."""
        rows = (
            self.processor.encode_prompt(
                _question(pictures, prompt.format(question=question), _name(pictures, i))
            )
            for i, (pictures, question) in enumerate(_pairs(images, questions, "questions"))
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
                    self.module, batch, self.parts.stop_ids, self.processor.pad_id, **options
                )
                for index, (ids, logprobs) in zip(indices, written):
                    text = self.processor.decode(ids)
                    done[index] = Generation(text, tuple(ids), tuple(logprobs))
        return done

    def _batches(
        self, rows: Iterable[Row], count: int, batch_size: int, padding: str
    ) -> Iterator[tuple[list[int], Batch]]:
        """Batches of rows of like length, with the rows' numbers; in evaluation mode.

        Rows are made a window at a time, so that pictures are never all in memory.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        numbered = enumerate(rows)
        dtype = next(self.module.tokenizer.parameters()).dtype
        with (
            engine.evaluating(self.module),
            tqdm(total=count, desc="examples", disable=count <= 64, leave=False) as bar,
        ):
            while window := list(islice(numbered, WINDOW * batch_size)):
                window.sort(key=lambda item: len(item[1].ids))
                for start in range(0, len(window), batch_size):
                    indices, part = zip(*window[start : start + batch_size])
                    batch = collate(part, self.processor.pad_id, padding)
                    yield list(indices), batch.to(self.device, dtype)
                    bar.update(len(part))


class PrefixModel(Model):
    """A model of the prefix family, which may read text too."""

    reads = "pages"
    """See `vlm.inference.ocr.LineModel`."""

    def ocr(
        self, images: Sequence, batch_size: int = 16, prompt: str | None = None, **options
    ) -> list[Reading]:
        """The text in each picture, by the lines of the answer; the model says no places (see
        `vlm.ocr.from_generation`).

        prompt: what asks for it; None: what the model was trained on.
        options: transformers' names, greedy by default, at most OCR_TOKENS tokens.
        Raises ValueError for a model that was trained on no prompt for it.
        """
        prompt = self.parts.ocr_prompt if prompt is None else prompt
        if prompt is None:
            raise ValueError(
                "ocr: this model was trained on no prompt for reading; such as were trained with "
                "recipes/paligemma.py --task ocr have one, as PaliGemma does"
            )
        if isinstance(images, (str, bytes, Path)):
            raise ValueError("images is a list of pictures")
        sizes_hw: list[tuple[int, int]] = []

        def rows() -> Iterator[Row]:
            for i, image in enumerate(images):
                name = _name([image], i)
                picture = open_image(image, name=name)
                sizes_hw.append((picture.height, picture.width))
                yield self.processor.encode_prompt(_question([picture], prompt, name))

        options = {"max_new_tokens": OCR_TOKENS, **options}
        written = self._generate(rows(), len(images), batch_size, **options)
        tokenizer = self.processor.text_tokenizer
        return [read_written(done, tokenizer, size) for done, size in zip(written, sizes_hw)]


def _question(pictures: Sequence, question: str, name: str) -> Example:
    """A question about pictures, which come before it, without its answer."""
    content = (*[None] * len(pictures), *([question] if question else []))
    return Example(name, (Turn("user", content),), tuple(pictures))


def _pairs(images: Sequence, texts: Sequence[str], what: str) -> Iterator[tuple[list, str]]:
    if isinstance(images, (str, bytes, Path)) or isinstance(texts, str):
        raise ValueError(f"images and {what} are lists, one entry for each example")
    if len(images) != len(texts):
        raise ValueError(f"there are {len(images)} images and {len(texts)} {what}")
    for pictures, text in zip(images, texts):
        yield list(pictures) if isinstance(pictures, (list, tuple)) else [pictures], text


def _name(pictures: Sequence, index: int) -> str:
    for picture in pictures:
        if isinstance(picture, (str, Path)):
            return str(picture)
    return f"example {index}"


FACES = {
    "decoder_only": Model,
    "prefix_decoder": PrefixModel,
    "contrastive": ContrastiveModel,
    "line_reader": Reader,
    "encoder_decoder": Writer,
}
"""Family -> its public model."""
