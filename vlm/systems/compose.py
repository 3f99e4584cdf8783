"""A model of any image tokenizer and any language model: pretrained parts and a fresh adaptor."""

from __future__ import annotations

import torch
from transformers import GenerationConfig

from vlm import adaptors
from vlm.adaptors import adaptor_config
from vlm.box_codecs import LocTokens
from vlm.families.decoder_only.docked_text import (
    DockedText,
    SpanTokenizer,
    require_both_directions,
)
from vlm.families.decoder_only.model import CAPTION_PROMPT, DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly, ImageLayouts
from vlm.families.decoder_only.processor import Processor
from vlm.families.decoder_only.view_order import InTurn, Marked
from vlm.families.prefix_decoder.module import PrefixDecoder
from vlm.families.registry import model_of
from vlm.systems.compose_cross import cross_attended
from vlm.systems.pretrained import DEMO, load_text, load_text_tokenizer, load_vision
from vlm.text import encoders as text_encoders
from vlm.text.decoders import positions_of
from vlm.vocabulary import grow

MASKS = {"causal": DecoderOnly, "prefix": PrefixDecoder}
"""What a position of the stream sees -> the module whose mask it is."""


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
    cross_every: int | None = None,
    docked: str | None = None,
    seed: int = 0,
) -> DecoderOnlyModel:
    """A model of pretrained parts and a fresh adaptor, whose language model reads the images.

    vision: "demo", or "kind:id" such as "transformers:google/siglip-base-patch16-224",
        "timm:vit_base_patch16_dinov2" or "open_clip:ViT-B-32:laion2b_s34b_b79k".
    text: "demo", or a causal language model's hub id or folder, tuned to chat.
    adaptor: "linear", "mlp", "pixel_shuffle", "resampler" or "perceiver" (Flamingo's), to the
        language model's width.
    max_tokens: longest row; None takes the language model's context. overflow: what happens to
        longer rows, see `Processor`.
    text_layers: how many of the language model's first layers are kept, for small and fast
        models; None keeps all.
    mask: "causal", a decoder-only model; or "prefix", where images and prompt see each other and
        the answer alone is causal, as in PaliGemma.
    cross_every: gated cross-attention blocks before each so many-th layer of the language model,
        which reads the images beside the text, as in Flamingo; None places image tokens in it.
    docked: a text encoder's hub id or folder, such as BERT's, that reads non-causal texts of rows
        in both directions through a linear connector (MetaLM's semi-causal language modeling);
        None docks none.
    seed: of the weights of adaptor, blocks and connector; the global generator is left as it is.
    Raises OSError or FetchError where weights cannot be had, ValueError for what does not fit.
    """
    if mask not in MASKS:
        raise ValueError(f"mask is one of {', '.join(MASKS)}, found {mask!r}")
    for option, given in (("cross_every", cross_every), ("docked", docked)):
        if given is not None and mask != "causal":
            raise ValueError(f"{option} needs mask 'causal', found {mask!r}")
    if cross_every is not None and docked is not None:
        raise ValueError(
            f"docked {docked!r}: expected no cross_every, since its states stand in the text "
            f"stream, found {cross_every}"
        )
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
        if cross_every is None:
            module = MASKS[mask](image_tokenizer, bridge, language)
        else:
            module = cross_attended(image_tokenizer, bridge, language, cross_every)
    spans = None if docked is None else dock(module, docked, seed)
    views = InTurn() if cross_every is None else Marked()
    layout_for = ImageLayouts(image_tokenizer, bridge, views)
    layout_for(image_tokenizer.pixel_spec.size_hw)  # whether the parts fit, before any work
    processor = Processor(
        load_text_tokenizer(text),
        image_tokenizer.pixel_spec,
        layout_for,
        system=system,
        max_tokens=context_of(language) if max_tokens is None else max_tokens,
        overflow=overflow,
        prefix=mask == "prefix",
        docked=spans,
    )
    ends = stop_ids(processor, language)
    language.generation_config = GenerationConfig()  # its own habits would be lost when saved
    return model_of(
        module=module.eval(), processor=processor, stop_ids=ends, caption_prompt=caption_prompt
    )


def dock(module: DecoderOnly, source: str, seed: int) -> SpanTokenizer:
    """Docks a pretrained text encoder to a model through a fresh connector, in place; gives what
    makes views of the texts that it reads.

    source: a hub id or folder. Raises OSError where there is none, ValueError for an encoder that
    does not read in both directions.
    """
    encoder = text_encoders.load(source, "mean", masked=True)
    require_both_directions(encoder, source)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module.docked = DockedText(encoder, module.text.config.get_text_config().hidden_size)
    text_tokenizer = text_encoders.load_tokenizer(source)
    return SpanTokenizer(text_tokenizer, positions_of(encoder.backbone.config))


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
    had = model.processor.box_codec
    if had is not None and had != loc:
        raise ValueError(f"this model writes boxes as {had}, not as {loc}")
    grow(model.module.text, model.processor.text_tokenizer, loc.tokens, seed=seed)
    model.processor.box_codec = loc


def context_of(language: torch.nn.Module) -> int | None:
    """The longest row that the language model was made for; None where it does not say."""
    return getattr(language.config.get_text_config(), "max_position_embeddings", None)


def stop_ids(processor: Processor, language: torch.nn.Module) -> tuple[int, ...]:
    """Ids that end an answer: the template's end token and the language model's own."""
    own = getattr(language, "generation_config", None)
    own = getattr(own, "eos_token_id", None)
    listed = own if isinstance(own, (list, tuple)) else [] if own is None else [own]
    return tuple(dict.fromkeys([processor.end_id, *listed]))
