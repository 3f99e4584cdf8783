"""Settings of a run that trains an encoder-decoder reader (TrOCR's way)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from vlm.families.encoder_decoder import swap_text_tokenizer as swap
from vlm.families.encoder_decoder.model import EncoderDecoderModel
from vlm.families.published_files import open_part
from vlm.systems import compose_encoder_decoder
from vlm.systems.compose_encoder_decoder import DecoderSizes
from vlm.tokenizers.columns import ColumnsConfig, ColumnsTokenizer, line_spec
from vlm.training.runs.reading import NEW, ReadingSettings
from vlm.vocabulary import character_tokenizer

SIZES = ("decoder_width", "decoder_depth", "length")
"""Settings of a new text decoder."""


@dataclass(frozen=True, kw_only=True)
class TranscriberSettings(ReadingSettings):
    """Settings of a run that trains an encoder-decoder reader (TrOCR's way): one to go on from, or
    one of an image tokenizer and a text decoder."""

    out: Path = Path("runs/trocr")
    start: str | None = None
    """A model to go on from: TrOCR's folder or hub id, a run, or a folder of our own layout."""
    vision: str = NEW
    """The image tokenizer, where there is none to go on from: new (a small net for lines),
    "kind:id" of a pretrained one, or the folder of a model or run, such as one of
    recipes/line_reader.py."""
    decoder: str = NEW
    """The text decoder, where there is none to go on from: new, or the hub id or folder of a text
    model (BERT, RoBERTa, GPT-2 and their like), which gets fresh cross-attention."""
    text_tokenizer: str = "own"
    """own (the decoder's), characters (one token for each character of the alphabet), or the hub id
    or folder of one. Tokens that the decoder knows already keep what they learned."""
    line_px: tuple[int, int] | None = None
    """Rows and most columns that a pretrained encoder of squares sees instead: lines keep their
    shape, and positions are resized. Such as 64 1024."""
    decoder_width: int = 256
    """Width of a new decoder."""
    decoder_depth: int = 3
    """Its layers."""
    length: int = 96
    """The most tokens of a text of a new decoder."""
    vision_rate: float = 5e-4
    """Peak learning rate of the image tokenizer."""
    decoder_rate: float = 1e-3
    """Peak learning rate of the decoder and of what joins the two."""
    steps: int = 2000

    def build(self) -> EncoderDecoderModel:
        """The model to train. Raises ValueError for settings that do not go together, or that the
        way of building does not read."""
        if self.start is not None:
            self.require_not_given(f"start {self.start!r}", ("vision", "decoder", *SIZES))
        elif self.decoder != NEW:
            self.require_not_given(f"decoder {self.decoder!r}", SIZES)
        if self.start is not None:
            model = self._loaded()
        else:
            if self.decoder == NEW and self.text_tokenizer == "own":
                tokenizer = character_tokenizer(self.characters())
            else:
                tokenizer = self._tokenizer() if self.decoder == NEW else None
            sizes = DecoderSizes(
                width=self.decoder_width,
                depth=self.decoder_depth,
                heads=max(1, self.decoder_width // 64),
                mlp_width=4 * self.decoder_width,
                length=self.length,
            )
            model = compose_encoder_decoder.build(
                vision=_new_vision(self.seed) if self.vision == NEW else self.vision,
                text=sizes if self.decoder == NEW else self.decoder,
                text_tokenizer=tokenizer,
                prefix="drop" if self.vision == NEW else "keep",
                seed=self.seed,
            )
        if self.text_tokenizer != "own" and not (self.start is None and self.decoder == NEW):
            model = swap.with_tokenizer(model, self._tokenizer(), self.seed)
        if self.line_px is None:
            return model
        tokenizer, spec = model.module.tokenizer, model.processor.pixel_spec
        patch_px = spec.patch_px  # None where all views are of one size
        if patch_px is None:
            patch_px = spec.size_hw[1] // tokenizer.shapes_for(spec.size_hw)[0].grid_hw[1]
        return model.with_size(self.line_px, fit="height", patch_px=patch_px)

    def memory_remedies(self) -> tuple[str, ...]:
        new = self.start is None and self.decoder == NEW
        return ("shorten texts (--length)",) if new else ()

    def _loaded(self) -> EncoderDecoderModel:
        import vlm

        model = vlm.load(self.start, device="cpu", dtype="stored")
        if not isinstance(model, EncoderDecoderModel):
            raise ValueError(
                f"start {self.start!r}: expected an encoder-decoder model, found a "
                f"{model.module.family} one"
            )
        return model

    def _tokenizer(self) -> Any:
        if self.text_tokenizer == "characters":
            return character_tokenizer(self.characters())
        return open_part(AutoTokenizer, Path(self.text_tokenizer))


def _new_vision(seed: int) -> ColumnsTokenizer:
    """A fresh image tokenizer for lines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ColumnsTokenizer(ColumnsConfig(pixel_spec=line_spec(32)))
