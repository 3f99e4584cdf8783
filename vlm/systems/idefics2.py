"""Idefics2: SigLIP at an image's own size, a perceiver, and Mistral.

The long side of an image is brought to at most 980 pixels, then each side to at least 378; a
patch's position is found by fractions (`vlm.tokenizers.bucketed`). With `do_image_splitting`, which
the published folder asks for, its quarters are views before the whole. A gated MLP brings tokens to
the language model's width, where 64 latents read each view. A mark stands before, between and after
views; images with no text between them share one.

The number of image tokens follows from the layout alone; transformers takes views that are zero all
over for padding, and drops them.

Parameters by pattern, for stages: "tokenizer.*" (SigLIP), "adaptor.parts.0.*" (the MLP),
"adaptor.parts.1.*" (the perceiver), "text.*". The authors train the adaptor in full and both
backbones through LoRA, at squares of 384 pixels first.

Source: arXiv 2405.02246; transformers, `idefics2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MistralConfig,
    PreTrainedConfig,
)

from vlm import adaptors
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly, ImageLayouts
from vlm.families.decoder_only.processor import Processor
from vlm.families.decoder_only.view_order import Fenced
from vlm.families.published_files import open_part, read_reference
from vlm.image_tokens import ImageTokenizer
from vlm.pixels import HALF, PixelSpec, from_transformers
from vlm.systems.compose import context_of
from vlm.systems.published import (
    KeyMap,
    first_names,
    listed_banned_ids,
    listed_stop_ids,
    published_name,
    read_json,
    save_decoder_only,
    use_published_template,
)
from vlm.systems.smolvlm import SIGLIP_FIELDS
from vlm.tokenizers import bucketed, quarters
from vlm.weights import load_weights, read_weights

SOURCE = "arXiv 2405.02246; HuggingFaceM4/idefics2-8b* on the hub"

CAPTION_PROMPT = "What do we see in this image?"
"""Source: the card of HuggingFaceM4/idefics2-8b."""

IMAGE_MARK, FENCE = "<image>", "<fake_token_around_image>"
"""Stands for an image in prompts; before, between and after its views.
Source: transformers, `processing_idefics2.py`."""

IMAGE_TOKENS = 64
"""Image tokens of a view where a folder's processor says nothing. Source: as above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A published size, in the words of transformers' configurations."""

    vision: Mapping[str, Any]
    perceiver: Mapping[str, Any]
    text: Mapping[str, Any]


SIZES = {
    "8b": Size(
        vision={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_channels": 3,
            "image_size": 980,
            "patch_size": 14,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "attention_dropout": 0.0,
        },
        perceiver={
            "hidden_act": "silu",
            "hidden_size": 4096,
            "rms_norm_eps": 1e-5,
            "resampler_n_latents": 64,
            "resampler_depth": 3,
            "resampler_n_heads": 16,
            "resampler_head_dim": 96,
            "num_key_value_heads": 4,
        },
        text={
            "vocab_size": 32003,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
    )
}
"""Published sizes. In billions of parameters the tower holds 0.418, MLP and perceiver 0.743, the
language model 7.111 and its head 0.131.
Source: config.json of HuggingFaceM4/idefics2-8b; transformers, `configuration_idefics2.py`."""

VIEW = PixelSpec(
    size_hw=(980, 980),
    fit="shrink",
    resample="bilinear",
    min_side_px=378,
    mean=HALF.mean,
    std=HALF.std,
)
"""Source: preprocessor_config.json of HuggingFaceM4/idefics2-8b."""


def build(size: str) -> DecoderOnly:
    """A published size with random weights; under `torch.device("meta")`, shapes alone.

    Raises ValueError naming the sizes.
    """
    if size not in SIZES:
        raise ValueError(f"Idefics2 size {size!r} is not one of {', '.join(SIZES)}")
    said = SIZES[size]
    tokenizer = _image_tokenizer(said.vision, VIEW, splits=True)
    return _compose(tokenizer, said.perceiver, MistralConfig(**said.text)).eval()


def load(folder: Path, values: dict[str, Any]) -> DecoderOnlyModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    where = str(folder)
    config, text_tokenizer = open_part(AutoConfig, folder), open_part(AutoTokenizer, folder)
    reader = open_part(AutoImageProcessor, folder)
    _require_known(config, folder)
    perceiver, text_config = config.perceiver_config.to_dict(), config.text_config
    text_config.tie_word_embeddings = config.tie_word_embeddings
    key_map = key_map_of(perceiver["resampler_depth"])
    state, unused = first_names(read_weights(folder), key_map, (), where)
    vision = {name: getattr(config.vision_config, name) for name in SIGLIP_FIELDS}
    splits, reader.do_image_splitting = bool(reader.do_image_splitting), False
    with init_empty_weights(include_buffers=False):
        tokenizer = _image_tokenizer(vision, from_transformers(reader), splits)
        module = _compose(tokenizer, perceiver, text_config)
    module.text.tie_weights()  # making parameters empty unties them
    load_weights(module, state, where, partial(published_name, key_map=key_map))
    module.text.generation_config = GenerationConfig()
    image_mark = getattr(text_tokenizer, "image_token", IMAGE_MARK)
    fence = getattr(text_tokenizer, "image_boundary_token", FENCE)
    _require_tokens(text_tokenizer, (image_mark, fence), where)
    template = use_published_template(text_tokenizer, folder, image_mark)
    processor = Processor(
        text_tokenizer,
        tokenizer.pixel_spec,
        ImageLayouts(tokenizer, module.adaptor, Fenced(mark=fence)),
        max_tokens=context_of(module.text),
        image_mark=image_mark,
        template=template,
    )
    return DecoderOnlyModel(
        module=module.eval(),
        processor=processor,
        stop_ids=listed_stop_ids(folder, processor),
        banned_ids=listed_banned_ids(folder, processor, fence),
        caption_prompt=CAPTION_PROMPT,
        reference=read_reference(folder, values["model_type"], unused),
    )


def save(model: DecoderOnlyModel, folder: Path) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with what has
    changed since (weights, dtype, vocabulary).

    Raises ValueError for weights that the layout cannot represent.
    """
    _, perceiver = model.module.adaptor.parts
    save_decoder_only(model, folder, key_map_of(perceiver.config.depth))


def _require_known(config: PreTrainedConfig, folder: Path) -> None:
    """Raises ValueError for an activation that no published model has, and where the folder's
    processor writes another number of image tokens for a view than the model gives."""
    for part in ("text_config", "perceiver_config"):
        found = getattr(config, part).hidden_act
        if found != "silu":
            raise ValueError(f"{folder}: {part}.hidden_act: expected 'silu', found {found!r}")
    said = read_json(folder / "processor_config.json").get("image_seq_len", IMAGE_TOKENS)
    given = config.perceiver_config.resampler_n_latents
    if said != given:
        raise ValueError(
            f"{folder}: the processor writes {said} image tokens for a view, the model gives "
            f"{given}"
        )


def _require_tokens(text_tokenizer, marks: tuple[str, ...], where: str) -> None:
    missing = [mark for mark in marks if mark not in text_tokenizer.get_vocab()]
    if missing:
        raise ValueError(
            f"{where}: expected tokens {' and '.join(marks)} in the text tokenizer, without "
            f"{' and '.join(missing)}"
        )


def _image_tokenizer(vision: Mapping[str, Any], spec: PixelSpec, splits: bool) -> ImageTokenizer:
    config = {**vision, "model_type": bucketed.MODEL_TYPE, "vision_use_head": False}
    tower = bucketed.build(bucketed.Config(vision_config=config, pixel_spec=spec))
    return quarters.QuartersTokenizer(tower, splits=splits)


def _compose(
    tokenizer: ImageTokenizer, perceiver: Mapping[str, Any], text_config: PreTrainedConfig
) -> DecoderOnly:
    width = text_config.hidden_size
    mlp = {
        "kind": "gated_mlp",
        "in_width": tokenizer.dim,
        "hidden_width": text_config.intermediate_size,
        "out_width": width,
    }
    resampler = {
        "kind": "perceiver",
        "width": perceiver["hidden_size"],
        "latents": perceiver["resampler_n_latents"],
        "depth": perceiver["resampler_depth"],
        "heads": perceiver["resampler_n_heads"],
        "kv_heads": perceiver["num_key_value_heads"],
        "head_width": perceiver["resampler_head_dim"],
        "mlp": "gated",
        "mlp_width": 4 * perceiver["hidden_size"],
        "norm": "rms",
        "eps": perceiver["rms_norm_eps"],
    }
    adaptor = adaptors.build({"kind": "chain", "parts": [mlp, resampler]})
    return DecoderOnly(tokenizer, adaptor, AutoModelForCausalLM.from_config(text_config))


BLOCK = (
    ("input_latents_norm.", "norm_latents."),
    ("input_context_norm.", "norm_context."),
    ("self_attn.q_proj.", "query."),
    ("self_attn.k_proj.", "key."),
    ("self_attn.v_proj.", "value."),
    ("self_attn.o_proj.", "out."),
    ("post_attention_layernorm.", "norm_mlp."),
    ("mlp.", "mlp."),
)
"""Within a block of the perceiver."""


def key_map_of(depth: int) -> KeyMap:
    """(published prefix, our prefix), read in both directions. depth: blocks of the perceiver."""
    theirs, ours = "model.connector.perceiver_resampler.", "adaptor.parts.1."
    return [
        ("model.vision_model.", "tokenizer.inner.backbone."),
        ("model.connector.modality_projection.", "adaptor.parts.0.mlp."),
        (f"{theirs}latents", f"{ours}latents"),
        (f"{theirs}norm.", f"{ours}norm."),
        *(
            (f"{theirs}layers.{block}.{published}", f"{ours}blocks.{block}.{name}")
            for block in range(depth)
            for published, name in BLOCK
        ),
        ("model.text_model.", "text.model."),
        ("lm_head.", "text.lm_head."),
    ]
