"""The public prefix decoder model: a decoder-only model that may read text too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from vlm.families.base import require_batch_size, require_list
from vlm.families.decoder_only.generate import check_options
from vlm.families.decoder_only.model import DecoderOnlyModel, question_about
from vlm.families.prefix_decoder.module import PrefixDecoder
from vlm.ocr.from_generation import reading_of
from vlm.ocr.results import Reading
from vlm.ocr.streaming import batches, check_images, open_each

OCR_TOKENS = 512
"""Longest reading where nothing else is asked: as long as PaliGemma was trained on."""


@dataclass(kw_only=True, eq=False)
class PrefixDecoderModel(DecoderOnlyModel):
    """A model of the prefix family, which may read text too."""

    module: PrefixDecoder
    reads: ClassVar[str] = "pages"
    """See `vlm.families.text_reader.TextReader`."""

    def ocr(
        self,
        images: Iterable,
        batch_size: int = 16,
        prompt: str | None = None,
        stream: bool = False,
        seed: int | None = None,
        **options,
    ) -> list[Reading] | Iterator[Reading]:
        """The text in each image, by the lines of the answer; the model gives no boxes (see
        `vlm.ocr.from_generation`).

        images: paths, bytes, PIL images or arrays; any iterable, from which they are taken and
            opened a batch at a time.
        prompt: what asks for it; None: what the model was trained on.
        stream: gives an iterator that yields the readings of a batch before the next is opened.
        seed: of draws, as for the other tasks; one more for each further batch.
        options: transformers' names, greedy by default, at most OCR_TOKENS tokens.
        Raises ValueError for a model that was trained on no prompt for it.
        """
        prompt = self.ocr_prompt if prompt is None else prompt
        if prompt is None:
            raise ValueError(
                "ocr: this model was trained on no prompt for reading; such as were trained with "
                "recipes/paligemma.py --task ocr have one, as PaliGemma does"
            )
        require_list(images)
        require_batch_size(batch_size)
        options = {"max_new_tokens": OCR_TOKENS, **options}
        check_options(options, seed)
        check_images(images, min_confidence=0.0)
        readings = self._read_pages(images, prompt, batch_size, seed, options)
        return readings if stream else list(readings)

    def _read_pages(
        self,
        images: Iterable,
        prompt: str,
        batch_size: int,
        seed: int | None,
        options: dict[str, Any],
    ) -> Iterator[Reading]:
        """The readings of images, which are opened and read a batch at a time."""
        tokenizer = self.processor.text_tokenizer
        full = batches(open_each(images), lambda held: len(held) == batch_size)
        for number, held in enumerate(full):
            sizes_hw = [(image.height, image.width) for _, image in held]
            asked = (question_about([image], prompt, name) for name, image in held)
            rows = [self.processor.encode_prompt(question) for question in asked]
            del held  # before the next ones are opened
            drawn = None if seed is None else seed + number
            for written, size_hw in zip(
                self._generate(rows, len(rows), batch_size, drawn, **options), sizes_hw
            ):
                yield reading_of(written, tokenizer, size_hw)
