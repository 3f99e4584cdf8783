"""Any image tokenizer with any language model: our own composition and our own folder layout.

A folder holds config.json (family, parts, prompt), model.safetensors and `text_tokenizer/`; of a
model that came from a published system, also that folder's small files, in `reference/`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import AutoConfig, GenerationConfig

from vlm import adaptors, box_codecs, tokenizers
from vlm.data.grounding import GROUND_PROMPT
from vlm.families import native_layout
from vlm.families.decoder_only import view_order
from vlm.families.decoder_only.chat_template import Template
from vlm.families.decoder_only.docked_text import DockedText, SpanTokenizer
from vlm.families.decoder_only.image_layout import PositionNumbers
from vlm.families.decoder_only.model import ANSWER_PROMPT, DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly, ImageLayouts
from vlm.families.decoder_only.processor import MARK, Processor
from vlm.families.decoder_only.timed_frames import TimedFrames
from vlm.families.decoder_only.view_order import InTurn
from vlm.families.registry import model_of
from vlm.text import encoders as text_encoders
from vlm.text.causal import causal_language_model
from vlm.text.decoders import positions_of
from vlm.weights import load_weights, read_weights

SOURCE = "our own"
DOCKED_TOKENIZER = "docked_tokenizer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder(native_layout.Folder):
    """What config.json says of a decoder-only or prefix model.

    adaptor: a configuration with its `kind`. stop_ids: ids that end an answer. banned_ids: ids that
    are never written. box_codec: how boxes are written, a configuration with its `kind`; None: not
    at all. views: how the views of an image follow each other, likewise. template: how the chat
    template is used. position_numbers: as in `StreamLayout`. frames: how a video stands in the
    stream. docked: the configuration of a docked text encoder, whose tokenizer is in
    `docked_tokenizer/`; None: there is none. The rest is the prompts'.
    """

    adaptor: dict[str, Any]
    stop_ids: tuple[int, ...]
    caption_prompt: str
    system: str | None
    max_tokens: int | None
    ground_prompt: str = GROUND_PROMPT
    labelled_boxes: bool = False
    answer_prompt: str = ANSWER_PROMPT
    ocr_prompt: str | None = None
    box_codec: dict[str, Any] | None = None
    image_mark: str = MARK
    framed: bool = False
    views: dict[str, Any] = field(default_factory=lambda: view_order.config_of(InTurn()))
    template: Template = field(default_factory=Template)
    position_numbers: PositionNumbers = 1
    banned_ids: tuple[int, ...] = ()
    frames: TimedFrames | None = None
    docked: dict[str, Any] | None = None


F = TypeVar("F", bound=Folder)


def save(model: DecoderOnlyModel, folder: Path, merge: bool = True) -> None:
    """Writes our own layout; see the module's docstring. merge: whether LoRA is merged into the
    weights that are written, or kept as layers of its own."""
    native_layout.write(model, Folder(**described(model)), folder, merge)
    if model.processor.docked is not None:
        model.processor.docked.text_tokenizer.save_pretrained(folder / DOCKED_TOKENIZER)


def described(model: DecoderOnlyModel) -> dict[str, Any]:
    """The values of a model's `Folder`, by field."""
    docked = model.module.docked
    return dict(
        family=model.module.family,
        tokenizer=tokenizers.config_to_dict(model.module.tokenizer),
        adaptor=adaptors.config_of(model.module.adaptor),
        text=model.module.text.config.to_dict(),
        stop_ids=model.stop_ids,
        banned_ids=model.banned_ids,
        caption_prompt=model.caption_prompt,
        system=model.processor.system,
        max_tokens=model.processor.max_tokens,
        ground_prompt=model.ground_prompt,
        labelled_boxes=model.labelled_boxes,
        answer_prompt=model.answer_prompt,
        ocr_prompt=model.ocr_prompt,
        box_codec=box_codecs.config_of(model.processor.box_codec),
        image_mark=model.processor.image_mark,
        framed=model.processor.framed,
        views=view_order.config_of(model.processor.layout_for.views),
        template=model.processor.template,
        position_numbers=model.processor.position_numbers,
        frames=model.processor.frames,
        docked=None if docked is None else text_encoders.config_of(docked.encoder),
    )


def load(folder: Path, values: dict[str, Any]) -> DecoderOnlyModel:
    """The model in a folder of our own layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit.
    """
    return load_as(DecoderOnly, folder, values)


def load_as(
    module_class: type[DecoderOnly],
    folder: Path,
    values: dict[str, Any],
    folder_class: type[F] = Folder,
    between: Callable[[F], tuple[nn.Module, ...]] = lambda said: (),
) -> Any:
    """What `load` gives, as the public model of the family whose module's class this is.

    folder_class: what config.json says. between: the parts of the module, with fresh weights, that
        its class takes between the adaptor and the language model.
    """
    said = native_layout.read_description(folder_class, folder, with_box_codec(values))

    def make() -> DecoderOnly:
        return module_class(
            tokenizers.build(said.tokenizer),
            adaptors.build(said.adaptor),
            *between(said),
            causal_language_model(AutoConfig.for_model(**said.text)),
            **({} if said.docked is None else {"docked": _docked(said)}),
        )

    module = native_layout.empty(make, folder, said.lora)
    module.text.tie_weights()
    load_weights(module, read_weights(folder), where=str(folder))
    module.text.generation_config = GenerationConfig()
    processor = Processor(
        native_layout.read_text_tokenizer(folder),
        module.tokenizer.pixel_spec,
        ImageLayouts(module.tokenizer, module.adaptor, view_order.build(said.views)),
        system=said.system,
        max_tokens=said.max_tokens,
        box_codec=box_codecs.build(said.box_codec),
        image_mark=said.image_mark,
        prefix=module.sees == "prefix",
        framed=said.framed,
        template=said.template,
        position_numbers=said.position_numbers,
        frames=said.frames,
        docked=_span_tokenizer(module, folder),
    )
    return model_of(
        module=module.eval(),
        processor=processor,
        stop_ids=said.stop_ids,
        banned_ids=said.banned_ids,
        caption_prompt=said.caption_prompt,
        ground_prompt=said.ground_prompt,
        labelled_boxes=said.labelled_boxes,
        answer_prompt=said.answer_prompt,
        ocr_prompt=said.ocr_prompt,
        reference=native_layout.read_origin(folder, said.reference),
    )


def with_box_codec(values: dict[str, Any]) -> dict[str, Any]:
    """What config.json holds, with how boxes are written under `box_codec`: older folders have
    <loc> tokens under `loc`, without a kind.

    >>> with_box_codec({"family": "decoder_only", "loc": {"bins": 16}})
    {'family': 'decoder_only', 'box_codec': {'kind': 'loc', 'bins': 16}}
    """
    if "loc" not in values:
        return values
    rest = {key: value for key, value in values.items() if key != "loc"}
    loc = values["loc"]
    return rest | {"box_codec": None if loc is None else {"kind": "loc", **loc}}


def _docked(said: Folder) -> DockedText:
    """The docked text encoder of a folder, its weights random."""
    width = AutoConfig.for_model(**said.text).get_text_config().hidden_size
    return DockedText(text_encoders.build(said.docked), width)


def _span_tokenizer(module: DecoderOnly, folder: Path) -> SpanTokenizer | None:
    """What makes views of non-causal texts, where the model has a docked encoder."""
    if module.docked is None:
        return None
    text_tokenizer = text_encoders.load_tokenizer(folder / DOCKED_TOKENIZER)
    return SpanTokenizer(text_tokenizer, positions_of(module.docked.encoder.backbone.config))
