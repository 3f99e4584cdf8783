"""Any image tokenizer with any language model: our own composition and our own folder layout.

A folder holds config.json (family, parts, prompt), model.safetensors and `text_tokenizer/`; of a
model that came from a published system, also that folder's small files, in `reference/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from vlm import adaptors, tokenizers
from vlm.data.grounding import GROUND_PROMPT
from vlm.families import native_layout
from vlm.families.decoder_only import view_order
from vlm.families.decoder_only.model import ANSWER_PROMPT, CAPTION_PROMPT, DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly, Places
from vlm.families.decoder_only.processor import MARK, Processor, Template
from vlm.families.decoder_only.view_order import InTurn
from vlm.families.prefix_decoder.module import PrefixDecoder
from vlm.families.registry import model_of
from vlm.geometry import LocTokens
from vlm.systems.pretrained import DEMO, load_text, load_text_tokenizer, load_vision
from vlm.vocabulary import grow
from vlm.weights import load_weights, read_weights

SOURCE = "our own"
MASKS = {"causal": DecoderOnly, "prefix": PrefixDecoder}
"""What a place of the stream sees -> the family whose mask it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder(native_layout.Folder):
    """What config.json says of a decoder-only or prefix model.

    adaptor: a configuration with its `kind`. stop_ids: ids that end an answer. loc: how boxes are
    written; None: not at all. views: how the views of an image follow each other, a configuration
    with its `kind`. template: how the chat template is used. The rest is the prompts'.
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
    loc: LocTokens | None = None
    image_mark: str = MARK
    framed: bool = False
    views: dict[str, Any] = field(default_factory=lambda: view_order.config_of(InTurn()))
    template: Template = field(default_factory=Template)


def build(
    *,
    vision: str = DEMO,
    text: str = DEMO,
    adaptor: str = "pixel_shuffle",
    adaptor_depth: int = 2,
    shuffle_ratio: int = 2,
    queries: int = 64,
    system: str | None = None,
    caption_prompt: str = CAPTION_PROMPT,
    max_tokens: int | None = None,
    overflow: str = "drop",
    size_hw: tuple[int, int] | None = None,
    vision_layer: int = -1,
    text_layers: int | None = None,
    mask: str = "causal",
    seed: int = 0,
) -> DecoderOnlyModel:
    """A model of pretrained parts and a fresh adaptor, whose language model reads the pictures.

    vision: "demo", or "kind:id" such as "transformers:google/siglip-base-patch16-224",
        "timm:vit_base_patch16_dinov2" or "open_clip:ViT-B-32:laion2b_s34b_b79k".
    text: "demo", or a causal language model's hub id or folder, tuned to chat.
    adaptor: "linear", "mlp", "pixel_shuffle" or "resampler", as wide as the language model.
    max_tokens: longest row; None takes the language model's context. overflow: what happens to
        longer rows, see `Processor`.
    text_layers: how many of the language model's first layers are kept, for small and fast
        models; None keeps all.
    mask: "causal", a decoder-only model; or "prefix", where pictures and prompt see each other and
        the answer alone is causal, as in PaliGemma.
    seed: of the adaptor's weights; the global generator is left as it is.
    Raises OSError or FetchError where weights cannot be had, ValueError for what does not fit.
    """
    if mask not in MASKS:
        raise ValueError(f"mask is one of {', '.join(MASKS)}, found {mask!r}")
    image_tokenizer = load_vision(vision, size_hw, vision_layer)
    language = load_text(text)
    if text_layers is not None:
        keep_layers(language, text_layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bridge = adaptors.build(
            adaptor_config(
                adaptor,
                in_width=image_tokenizer.dim,
                out_width=language.config.get_text_config().hidden_size,
                depth=adaptor_depth,
                ratio=shuffle_ratio,
                queries=queries,
            )
        )
    module = MASKS[mask](image_tokenizer, bridge, language)
    places = Places(image_tokenizer, bridge)
    places(image_tokenizer.pixel_spec.size_hw)  # whether the parts fit, before any work
    processor = Processor(
        load_text_tokenizer(text),
        image_tokenizer.pixel_spec,
        places,
        system=system,
        max_tokens=context_of(language) if max_tokens is None else max_tokens,
        overflow=overflow,
        prefix=mask == "prefix",
    )
    ends = stop_ids(processor, language)
    language.generation_config = GenerationConfig()  # its own habits would be lost when saved
    return model_of(
        module=module.eval(), processor=processor, stop_ids=ends, caption_prompt=caption_prompt
    )


def keep_layers(language: torch.nn.Module, count: int) -> None:
    """Cuts a language model off after its first `count` layers, in place; its final norm and head
    stay. Raises ValueError where it has fewer."""
    config = language.config.get_text_config()
    if not 1 <= count <= config.num_hidden_layers:
        raise ValueError(
            f"text_layers must be 1 to {config.num_hidden_layers}, which this language model has, "
            f"found {count}"
        )
    decoder = language.get_decoder()
    decoder.layers = decoder.layers[:count]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


def add_loc_tokens(model: DecoderOnlyModel, loc: LocTokens, *, seed: int = 0) -> None:
    """Gives a model the tokens that boxes are written with, in place: ids and rows.

    seed: of the rows' first values.
    Raises ValueError where it writes boxes in another way already.
    """
    had = model.processor.loc
    if had is not None and had != loc:
        raise ValueError(f"this model writes boxes as {had}, not as {loc}")
    grow(model.module.text, model.processor.text_tokenizer, loc.tokens, seed=seed)
    model.processor.loc = loc


def context_of(language: torch.nn.Module) -> int | None:
    """The longest row that the language model was made for; None where it does not say."""
    return getattr(language.config.get_text_config(), "max_position_embeddings", None)


def adaptor_config(
    kind: str, *, in_width: int, out_width: int, depth: int, ratio: int, queries: int
) -> dict[str, Any]:
    """The configuration of an adaptor by name, its hidden layers as wide as the language model."""
    widths = {"in_width": in_width, "out_width": out_width}
    deep = {"depth": depth, "hidden_width": out_width}
    known = {
        "linear": {"kind": "mlp", **widths, "depth": 1, "hidden_width": out_width},
        "mlp": {"kind": "mlp", **widths, **deep},
        "pixel_shuffle": {
            "kind": "pixel_shuffle",
            **widths,
            **deep,
            "ratio": ratio,
            "norm": True,
            "positions": 6,
        },
        "resampler": {
            "kind": "resampler",
            **widths,
            "depth": depth,
            "queries": queries,
            "heads": max(1, out_width // 64),
        },
    }
    if kind not in known:
        raise ValueError(f"adaptor {kind!r} is not one of {', '.join(known)}")
    return known[kind]


def stop_ids(processor: Processor, language: torch.nn.Module) -> tuple[int, ...]:
    """Ids that end an answer: the template's end token and the language model's own."""
    own = getattr(language, "generation_config", None)
    own = getattr(own, "eos_token_id", None)
    listed = own if isinstance(own, (list, tuple)) else [] if own is None else [own]
    return tuple(dict.fromkeys([processor.end_id, *listed]))


def save(model: DecoderOnlyModel, folder: Path, merge: bool = True) -> None:
    """Writes our own layout; see the module's docstring. merge: whether LoRA is merged into the
    weights that are written, or kept as layers of its own."""
    description = Folder(
        family=model.module.family,
        tokenizer=tokenizers.config_to_dict(model.module.tokenizer),
        adaptor=adaptors.config_of(model.module.adaptor),
        text=model.module.text.config.to_dict(),
        stop_ids=model.stop_ids,
        caption_prompt=model.caption_prompt,
        system=model.processor.system,
        max_tokens=model.processor.max_tokens,
        ground_prompt=model.ground_prompt,
        labelled_boxes=model.labelled_boxes,
        answer_prompt=model.answer_prompt,
        ocr_prompt=model.ocr_prompt,
        loc=model.processor.loc,
        image_mark=model.processor.image_mark,
        framed=model.processor.framed,
        views=view_order.config_of(model.processor.places_for.views),
        template=model.processor.template,
    )
    native_layout.write(model, description, folder, merge)


def load(folder: Path, values: dict[str, Any]) -> DecoderOnlyModel:
    """The model in a folder of our own layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit.
    """
    said = native_layout.read_description(Folder, folder, values)
    families = {family.family: family for family in MASKS.values()}
    if said.family not in families:
        raise ValueError(
            f"{folder / 'config.json'}: family {said.family!r} is not one of {', '.join(families)}"
        )

    def make() -> DecoderOnly:
        return families[said.family](
            tokenizers.build(said.tokenizer),
            adaptors.build(said.adaptor),
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**said.text)),
        )

    module = native_layout.empty(make, folder, said.lora)
    module.text.tie_weights()
    load_weights(module, read_weights(folder), where=str(folder))
    module.text.generation_config = GenerationConfig()
    processor = Processor(
        native_layout.read_text_tokenizer(folder),
        module.tokenizer.pixel_spec,
        Places(module.tokenizer, module.adaptor, view_order.build(said.views)),
        system=said.system,
        max_tokens=said.max_tokens,
        loc=said.loc,
        image_mark=said.image_mark,
        prefix=said.family == PrefixDecoder.family,
        framed=said.framed,
        template=said.template,
    )
    return model_of(
        module=module.eval(),
        processor=processor,
        stop_ids=said.stop_ids,
        caption_prompt=said.caption_prompt,
        ground_prompt=said.ground_prompt,
        labelled_boxes=said.labelled_boxes,
        answer_prompt=said.answer_prompt,
        ocr_prompt=said.ocr_prompt,
        reference=native_layout.read_origin(folder, said.reference),
    )
