"""Any image tokenizer with any text decoder that has cross-attention: our own composition and our
own folder layout.

A folder holds config.json (family, parts, ids), model.safetensors and `text_tokenizer/`; of a
model that came from a published system, also that folder's small files, in `reference/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
)

from vlm import adaptors, tokenizers
from vlm.families import native_layout
from vlm.families.encoder_decoder.model import EncoderDecoderModel
from vlm.families.encoder_decoder.module import EncoderDecoder
from vlm.families.encoder_decoder.processor import LineProcessor
from vlm.metrics.calibration import UNFITTED, Temperatures
from vlm.text import decoders as text_decoders
from vlm.weights import load_weights, read_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder(native_layout.Folder):
    """What config.json says of an encoder-decoder model.

    adaptor: a configuration with its `kind`. The rest is `LineProcessor`'s and
    `EncoderDecoderModel`'s.
    """

    adaptor: dict[str, Any]
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    pad_id: int
    max_tokens: int | None
    overflow: str
    prompt_starts: bool
    max_new_tokens: int
    banned: tuple[int, ...] = ()
    generation: dict[str, Any] = field(default_factory=dict)
    reads: str = "lines"
    prompt: str | None = None
    temperatures: Temperatures = UNFITTED


def save(model: EncoderDecoderModel, folder: Path, merge: bool = True) -> None:
    """Writes our own layout; see the module's docstring. merge: whether LoRA is merged into the
    weights that are written, or kept as layers of its own.

    Raises ValueError where the processor's images are not the image tokenizer's.
    """
    module, processor = model.module, model.processor
    if processor.pixel_spec != module.tokenizer.pixel_spec:
        raise ValueError(
            f"processor.pixel_spec: expected the image tokenizer's, {module.tokenizer.pixel_spec}, "
            f"found {processor.pixel_spec}; use EncoderDecoderModel.with_size"
        )
    description = Folder(
        family=module.family,
        tokenizer=tokenizers.config_to_dict(module.tokenizer),
        adaptor=adaptors.config_of(module.adaptor),
        text=text_decoders.plain_config(module.text.config),
        start_ids=processor.start_ids,
        end_ids=model.end_ids,
        pad_id=processor.pad_id,
        max_tokens=processor.max_tokens,
        overflow=processor.overflow,
        prompt_starts=processor.prompt_starts,
        max_new_tokens=model.max_new_tokens,
        banned=model.banned,
        generation=model.generation,
        reads=model.reads,
        prompt=model.prompt,
        temperatures=model.temperatures,
    )
    native_layout.write(model, description, folder, merge)


def load(folder: Path, values: dict[str, Any]) -> EncoderDecoderModel:
    """The model in a folder of our own layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit.
    """
    said = native_layout.read_description(Folder, folder, values)

    def make() -> EncoderDecoder:
        return EncoderDecoder(
            tokenizers.build(said.tokenizer),
            adaptors.build(said.adaptor),
            text_decoders.build(AutoConfig.for_model(**said.text)),
        )

    module = native_layout.empty(make, folder, said.lora)
    module.text.tie_weights()
    load_weights(module, read_weights(folder), where=str(folder))
    processor = LineProcessor(
        native_layout.read_text_tokenizer(folder),
        module.tokenizer.pixel_spec,
        start_ids=said.start_ids,
        end_id=said.end_ids[0],
        pad_id=said.pad_id,
        max_tokens=said.max_tokens,
        overflow=said.overflow,
        prompt_starts=said.prompt_starts,
    )
    return EncoderDecoderModel(
        module=module.eval(),
        processor=processor,
        end_ids=said.end_ids,
        max_new_tokens=said.max_new_tokens,
        banned=said.banned,
        generation=said.generation,
        reads=said.reads,
        prompt=said.prompt,
        temperatures=said.temperatures,
        reference=native_layout.read_origin(folder, said.reference),
    )
