"""The public encoder-decoder model: lines, or whole pages, in; readings, or any text, out."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig

from vlm.compat.torch import with_child
from vlm.families.base import evaluating, require_batch_size, require_list
from vlm.families.decoder_only.batch import Row, collate
from vlm.families.encoder_decoder import generate as transcribe
from vlm.families.encoder_decoder.module import EncoderDecoder
from vlm.families.encoder_decoder.processor import LineProcessor
from vlm.families.text_reader import TextReader, name_of
from vlm.metrics.calibration import apply_temperature
from vlm.ocr import tagged_text
from vlm.ocr.from_generation import lines_of
from vlm.ocr.results import Reading, Token, Transcript
from vlm.ocr.streaming import batches, check_images, filter_with_warning, open_each
from vlm.text.decoders import positions_of
from vlm.text.generation import Generation, Written

READS = ("lines", "pages")
"""What a model is shown at once: the image of a line (TrOCR), or a whole page (Donut)."""


@dataclass(kw_only=True, eq=False)
class EncoderDecoderModel(TextReader):
    """An encoder-decoder model with its processor, ready to use.

    processor: preprocessing and texts; its start and pad ids are the checkpoint's.
    end_ids: ids that end a text. max_new_tokens: the longest text, its end included. banned: ids
    that are never generated. generation: how the folder says that texts are generated, in
    transformers' names; greedy where it says nothing.
    reads: one of READS. prompt: what asks for the text of a page; None: the start ids alone. Both
    are kept in our own layout alone.
    Options carry transformers' names and are greedy by default.
    """

    module: EncoderDecoder
    processor: LineProcessor
    end_ids: tuple[int, ...]
    max_new_tokens: int
    banned: tuple[int, ...] = ()
    generation: dict[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    options: ClassVar[Collection[str]] = frozenset(GenerationConfig().to_dict())

    def ocr(
        self,
        images: Iterable,
        layout: str = "auto",
        batch_size: int = 16,
        num_beams: int = 1,
        min_confidence: float = 0.0,
        stream: bool = False,
        prompt: str | None = None,
        **options,
    ) -> list[Reading] | Iterator[Reading]:
        """What is written in each image. A model of lines is shown these, see `TextReader.ocr`.

        A model of whole pages (Donut) is shown the image as it is, with layout "auto" or "page".
        Its reading has a line for each field, whose box is the whole image, and `values`, its
        answer as values of JSON.
        prompt: what a model of pages is asked, literally; None: what it was trained on.
        batch_size: lines, or pages, that are read at once.
        stream: see `TextReader.ocr`; of pages, one batch is held at a time.
        Raises ValueError for a page as a line, a prompt to a model of lines, and where the prompt
        that a model was trained on asks a question.
        """
        if self.reads == "lines":
            if prompt is not None:
                raise ValueError("prompt: expected None, as this model reads lines without one")
            return super().ocr(
                images, layout, batch_size, num_beams, min_confidence, stream, **options
            )
        require_list(images)
        self._require_known(options)
        require_batch_size(batch_size)
        if layout not in ("auto", "page"):
            raise ValueError(
                f"layout: expected auto or page, as this model reads whole pages, found {layout!r}"
            )
        prompt = self.prompt if prompt is None else prompt
        if prompt is not None and "{question}" in prompt:
            raise ValueError(
                "prompt: this model was trained to answer questions; expected one in its words, "
                f"{prompt}, found none"
            )
        check_images(images, min_confidence)
        options = {"num_beams": num_beams, **options}
        readings = self._read_pages(images, prompt, batch_size, min_confidence, options)
        return readings if stream else list(readings)

    def _read_pages(
        self,
        images: Iterable,
        prompt: str | None,
        batch_size: int,
        min_confidence: float,
        options: dict[str, Any],
    ) -> Iterator[Reading]:
        """The readings of whole pages, which are opened and read a batch at a time."""
        for held in batches(open_each(images), lambda held: len(held) == batch_size):
            names, pages = zip(*held)
            del held
            generated = self.generate(pages, [prompt] * len(pages), batch_size, **options)
            sizes_hw = [(page.height, page.width) for page in pages]
            del pages  # before the next ones are opened
            for name, one, size_hw in zip(names, generated, sizes_hw):
                reading = self._page(one, prompt, size_hw)
                yield filter_with_warning(reading, name, min_confidence)

    def generate(
        self,
        images: Sequence,
        prompts: Sequence[str | None] | None = None,
        batch_size: int = 16,
        num_beams: int = 1,
        **options,
    ) -> list[Generation]:
        """What the model writes on each image after a literal prompt (None: its start alone)."""
        self._require_known(options)
        require_batch_size(batch_size)
        require_list(images)
        require_list(prompts, "prompts")
        prompts = [None] * len(images) if prompts is None else prompts
        if len(prompts) != len(images):
            raise ValueError(f"there are {len(images)} images and {len(prompts)} prompts")
        done: list[Generation | None] = [None] * len(images)
        with evaluating(self.module), torch.inference_mode():
            for first in range(0, len(images), batch_size):
                part = range(first, min(first + batch_size, len(images)))
                rows = [
                    self.processor.encode_image(images[i], prompts[i], name_of(images[i], i))
                    for i in part
                ]
                for i, (ids, logprobs) in zip(part, self._write(rows, num_beams, **options)):
                    text = self.processor.decode(ids)
                    done[i] = Generation(text, tuple(ids), tuple(logprobs))
        return done

    def score(
        self,
        images: Sequence,
        prompts: Sequence[str | None] | None,
        answers: Sequence[str],
        batch_size: int = 16,
    ) -> torch.Tensor:
        """Log-probability of each answer, its end included, on its image: fp32[N], nats."""
        require_batch_size(batch_size)
        require_list(images)
        require_list(prompts, "prompts")
        require_list(answers, "answers")
        prompts = [None] * len(images) if prompts is None else prompts
        if not len(images) == len(prompts) == len(answers):
            raise ValueError(
                f"there are {len(images)} images, {len(prompts)} prompts and {len(answers)} answers"
            )
        scores = torch.zeros(len(images))
        with evaluating(self.module):
            for first in range(0, len(images), batch_size):
                part = range(first, min(first + batch_size, len(images)))
                rows = [
                    self.processor.encode_literal(
                        [images[i]], prompts[i], answers[i], name_of(images[i], i)
                    )
                    for i in part
                ]
                batch = collate(rows, self.processor.pad_id).to(self.device, self.pixel_dtype)
                scores[list(part)] = transcribe.score(self.module, batch).cpu()
        return scores

    def with_size(self, size_hw: tuple[int, int], **changes: Any) -> EncoderDecoderModel:
        """The same weights for views of other (rows, columns) in pixels, such as (64, 1024) for
        lines; positions are resized as the encoder does it, nothing is trained.

        changes: other fields of the PixelSpec, such as fit="height", patch_px=16, under which a
            line keeps its shape and a batch is bucketed by width.
        Raises ValueError where the image tokenizer cannot take such views.
        """
        box = {"resize_hw": None} if "fit" in changes else {}  # of the fit before
        spec = replace(self.processor.pixel_spec.with_size(size_hw), **(box | changes))
        tokenizer = copy.copy(self.module.tokenizer)
        tokenizer.config = replace(tokenizer.config, pixel_spec=spec)
        tokenizer.pixel_spec = spec
        tokenizer.tokens_for(size_hw)  # whether it can, before any compute
        module = with_child(self.module, "tokenizer", tokenizer)
        processor = copy.copy(self.processor)
        processor.pixel_spec = spec
        return replace(self, module=module, processor=processor)

    def _encode(self, image, name: str) -> Row:
        return self.processor.encode_image(image, None, name)

    def _read(self, rows: Sequence[Row], num_beams: int, **options) -> list[Transcript]:
        return [self._transcript(*pair) for pair in self._write(rows, num_beams, **options)]

    def _write(self, rows: Sequence[Row], num_beams: int, **options) -> list[Written]:
        """Ids and log-probabilities of what is generated for each row."""
        batch = collate(rows, self.processor.pad_id).to(self.device, self.pixel_dtype)
        most, positions = self.max_new_tokens, positions_of(self.module.text.config)
        if positions is not None:  # a prompt takes some of them
            most = max(1, min(most, positions + 1 - max(len(row.ids) for row in rows)))
        given = {
            "groups": batch.groups,
            "start_ids": self.processor.start_ids,
            "end_ids": self.end_ids,
            "pad_id": self.processor.pad_id,
            "prompts": [row.ids.tolist() for row in rows],
            "banned": self.banned,
            "max_new_tokens": options.pop("max_new_tokens", most),
        }
        if num_beams == 1 and not options:
            return transcribe.greedy(self.module, **given)
        options = {k: v for k, v in self.generation.items() if k != "num_beams"} | options
        return transcribe.beam(self.module, **given, num_beams=num_beams, **options)

    def _transcript(self, ids: list[int], logprobs: list[float]) -> Transcript:
        tokens, _ = self._tokens(ids, logprobs, self.processor.pieces(ids))
        return Transcript(tuple(tokens), apply_temperature(sum(logprobs), self.temperatures.line))

    def _page(self, generated: Generation, prompt: str | None, size_hw: tuple[int, int]) -> Reading:
        """What was generated for a page of size_hw pixels. Fields that the prompt begins, after its
        first token, which names the task, are part of the answer."""
        pieces = tagged_text.pieces(self.processor, generated.ids)
        tokens, end = self._tokens(generated.ids, generated.logprobs, pieces)
        begun = self.processor.prompt_ids(prompt)[1:]
        values = tagged_text.read_json(self.processor, [*begun, *generated.ids])
        return Reading(lines_of(tokens, end, size_hw), size_hw, values)

    def _tokens(
        self, ids: Sequence[int], logprobs: Sequence[float], pieces: Sequence[str]
    ) -> tuple[list[Token], float]:
        """The tokens of a text, and the confidence of its end; 1 where it has none."""
        warmth = self.temperatures.token
        tokens = [Token(piece, apply_temperature(p, warmth)) for piece, p in zip(pieces, logprobs)]
        ended = bool(ids) and ids[-1] in self.end_ids
        return (tokens[:-1], tokens[-1].confidence) if ended else (tokens, 1.0)
