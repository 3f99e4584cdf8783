"""The public prefix decoder model: a decoder-only model that may read text too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlm.families.base import require_list
from vlm.families.decoder_only.batch import Row
from vlm.families.decoder_only.model import DecoderOnlyModel, name_of, question_about
from vlm.families.prefix_decoder.module import PrefixDecoder
from vlm.ocr.from_generation import read_written
from vlm.ocr.results import Reading
from vlm.pixels import open_image

OCR_TOKENS = 512
"""Longest reading where nothing else is asked: as long as PaliGemma was trained on."""


@dataclass(kw_only=True, eq=False)
class PrefixDecoderModel(DecoderOnlyModel):
    """A model of the prefix family, which may read text too."""

    module: PrefixDecoder
    reads: ClassVar[str] = "pages"
    """See `vlm.families.text_reader.TextReader`."""

    def ocr(
        self, images: Sequence, batch_size: int = 16, prompt: str | None = None, **options
    ) -> list[Reading]:
        """The text in each picture, by the lines of the answer; the model says no places (see
        `vlm.ocr.from_generation`).

        prompt: what asks for it; None: what the model was trained on.
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
        sizes_hw: list[tuple[int, int]] = []

        def rows() -> Iterator[Row]:
            for i, image in enumerate(images):
                name = name_of([image], i)
                picture = open_image(image, name=name)
                sizes_hw.append((picture.height, picture.width))
                yield self.processor.encode_prompt(question_about([picture], prompt, name))

        options = {"max_new_tokens": OCR_TOKENS, **options}
        written = self._generate(rows(), len(images), batch_size, **options)
        tokenizer = self.processor.text_tokenizer
        return [read_written(done, tokenizer, size) for done, size in zip(written, sizes_hw)]
