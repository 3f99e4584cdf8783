"""TrOCR: a vision transformer's tokens, class token included, as the memory of a text decoder.

Encoders are ViT, DeiT (whose distillation token is attended to as well) and BEiT. The decoder is
post-norm, in three published kinds: base and large-handwritten (GELU, learned positions, tied
head), large-printed and stage-1 (ReLU, scaled embeddings, sinusoidal positions from pad + 1, no
embedding norm, own head), small (ReLU, scaled, learned positions, own head). Writing starts from
the folder's `decoder_start_token_id`, `</s>` in all that are published.

Images are stretched to a square. Lines keep their shape where they are given views of another
size (`EncoderDecoderModel.with_size`): the encoder's positions are resized, nothing is trained.

Folders are those of transformers' `VisionEncoderDecoderModel`. The encoder's pooling layer is no
part of the system. Where a folder has one it is kept and written back; some that are published
lack it, and there transformers makes a fresh one, which it never uses.

Source: arXiv 2109.10282; microsoft/unilm, `trocr`; transformers, `trocr`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    PreTrainedConfig,
    TrOCRConfig,
)

from vlm import adaptors
from vlm.families.encoder_decoder.model import EncoderDecoderModel
from vlm.families.encoder_decoder.module import EncoderDecoder
from vlm.families.encoder_decoder.processor import LineProcessor
from vlm.families.published_files import open_part, read_reference
from vlm.merge import plain_state
from vlm.pixels import HALF, PixelSpec, from_transformers
from vlm.systems.generation_config import read_said
from vlm.systems.published import KeyMap, first_names, published_name
from vlm.text import decoders as text_decoders
from vlm.tokenizers import transformers as encoders
from vlm.tokenizers.encoders import ENCODERS
from vlm.weights import load_weights, read_weights, save_weights

SOURCE = "arXiv 2109.10282; microsoft/trocr-{small,base,large}-* on the hub"
KIND = "trocr"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A published size, in the words of transformers' configurations."""

    vision: dict[str, Any]
    text: dict[str, Any]


_VIT = {
    "model_type": "vit",
    "image_size": 384,
    "patch_size": 16,
    "qkv_bias": False,
    "layer_norm_eps": 1e-12,
}
_BASE = _VIT | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_LARGE = _VIT | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
_SMALL = {
    "model_type": "deit",
    "image_size": 384,
    "patch_size": 16,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "layer_norm_eps": 1e-12,
}
_ROBERTA = {
    "vocab_size": 50265,
    "d_model": 1024,
    "decoder_layers": 12,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "max_position_embeddings": 512,
    "activation_function": "gelu",
    "scale_embedding": False,
    "use_learned_position_embeddings": True,
    "layernorm_embedding": True,
    "tie_word_embeddings": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_PRINTED = {
    "max_position_embeddings": 1024,
    "activation_function": "relu",
    "scale_embedding": True,
    "use_learned_position_embeddings": False,
    "layernorm_embedding": False,
    "tie_word_embeddings": False,
}

SIZES = {
    "small": Size(
        vision=_SMALL,
        text=_ROBERTA
        | {
            "vocab_size": 64044,
            "d_model": 256,
            "decoder_layers": 6,
            "decoder_attention_heads": 8,
            "decoder_ffn_dim": 1024,
            "cross_attention_hidden_size": 384,
            "activation_function": "relu",
            "scale_embedding": True,
            "tie_word_embeddings": False,
        },
    ),
    "base": Size(vision=_BASE, text=_ROBERTA | {"cross_attention_hidden_size": 768}),
    "large": Size(vision=_LARGE, text=_ROBERTA | {"cross_attention_hidden_size": 1024}),
    "large-printed": Size(
        vision=_LARGE, text=_ROBERTA | _PRINTED | {"cross_attention_hidden_size": 1024}
    ),
}
"""Published sizes; "large" is large-handwritten, "large-printed" also large-stage1. Source: the
config.json of microsoft/trocr-*; transformers, `convert_trocr_unilm_to_pytorch.py`."""

SPEC_384 = PixelSpec(
    size_hw=(384, 384), fit="stretch", resample="bilinear", mean=HALF.mean, std=HALF.std
)
"""Source: preprocessor_config.json of microsoft/trocr-*."""


def build(size: str) -> EncoderDecoder:
    """A published size with random weights; under `torch.device("meta")`, shapes alone.

    Raises ValueError naming the sizes.
    """
    if size not in SIZES:
        raise ValueError(f"TrOCR size {size!r} is not one of {', '.join(SIZES)}")
    sizes = SIZES[size]
    return compose(sizes.vision, TrOCRConfig(**sizes.text), SPEC_384).eval()


def compose(
    vision: dict[str, Any], text_config: PreTrainedConfig, pixel_spec: PixelSpec
) -> EncoderDecoder:
    """The architecture of transformers' `VisionEncoderDecoderModel` with random weights, all of the
    encoder's tokens kept; widths that differ are bridged by one linear layer, as it does."""
    tokenizer = encoders.build(
        encoders.TransformersConfig(
            vision_config=vision,
            layer=-1,
            prefix="keep",
            norm=ENCODERS[vision["model_type"]].norm is not None,
            pooled=False,
            pixel_spec=pixel_spec,
        )
    )
    width = text_decoders.memory_width(text_config)
    own = getattr(text_config, "cross_attention_hidden_size", None) is not None
    bridge: dict[str, Any] = {"kind": "identity", "width": width}
    if tokenizer.dim != width and not own:
        bridge = {
            "kind": "mlp",
            "in_width": tokenizer.dim,
            "out_width": width,
            "depth": 1,
            "hidden_width": width,
        }
    return EncoderDecoder(tokenizer, adaptors.build(bridge), text_decoders.build(text_config))


def load(folder: Path, values: dict[str, Any]) -> EncoderDecoderModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    where = str(folder)
    if not {"encoder", "decoder"} <= values.keys():
        raise ValueError(
            f"{folder / 'config.json'}: expected a whole model, with encoder and decoder, found "
            f"{values.get('model_type')!r} alone"
        )
    config, reader = open_part(AutoConfig, folder), open_part(AutoProcessor, folder)
    vision = plain_vision(config.encoder, folder)
    key_map = key_map_for(vision)
    state, unused = first_names(read_weights(folder), key_map, unused_of(vision), where)
    text_config = config.decoder
    text_config.tie_word_embeddings = text_config.tie_word_embeddings and not has_own_head(state)
    with init_empty_weights(include_buffers=False):
        module = compose(vision, text_config, from_transformers(reader.image_processor))
    module.text.tie_weights()  # making parameters empty unties them
    load_weights(module, state, where, lambda key: published_name(key, key_map))
    said = read_said(folder, values, text_decoders.positions_of(text_config))
    processor = LineProcessor(
        reader.tokenizer,
        module.tokenizer.pixel_spec,
        start_ids=(said.start_id,),
        end_id=said.end_ids[0],
        pad_id=said.pad_id,
        max_tokens=text_decoders.positions_of(text_config),
    )
    return EncoderDecoderModel(
        module=module.eval(),
        processor=processor,
        end_ids=said.end_ids,
        max_new_tokens=said.max_new_tokens,
        banned=said.banned,
        generation=said.generation,
        reference=read_reference(folder, KIND, unused),
    )


def save(model: EncoderDecoderModel, folder: Path) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with what has
    changed since (weights, dtype, vocabulary).

    Raises ValueError for weights and preprocessing that the layout cannot represent, before
    anything is written.
    """
    module, reference = model.module, model.reference
    key_map = key_map_for(module.tokenizer.config.vision_config)
    for key in plain_state(module):
        published_name(key, key_map)
    require_own_pixels(model)
    reference.write(folder)
    config, text_config = reference.config, module.text.config
    config["decoder"]["vocab_size"] = text_config.vocab_size
    config["decoder"]["tie_word_embeddings"] = text_config.tie_word_embeddings
    dtype = str(next(module.text.parameters()).dtype).removeprefix("torch.")
    for part in (config, config["encoder"], config["decoder"]):
        for name in {"dtype", "torch_dtype"} & part.keys():
            part[name] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    text_tokenizer = model.processor.text_tokenizer
    if open_part(AutoProcessor, folder).tokenizer.get_vocab() != text_tokenizer.get_vocab():
        text_tokenizer.save_pretrained(folder)
    name = partial(published_name, key_map=key_map)
    save_weights(module, folder, name, beside=reference.unused)


def require_own_pixels(model: EncoderDecoderModel) -> None:
    """Raises ValueError where the preprocessing is not what the published files say: transformers
    would show the encoder other images."""
    with TemporaryDirectory() as written:
        model.reference.write(Path(written))
        expected = from_transformers(open_part(AutoProcessor, Path(written)).image_processor)
    if model.processor.pixel_spec != expected:
        raise ValueError(
            "preprocessing that was changed cannot be represented in the Hugging Face format: "
            f"expected {expected}, found {model.processor.pixel_spec}; save it as layout 'native'"
        )


def plain_vision(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """An encoder's configuration as values. Raises ValueError naming an encoder that is not
    known."""
    if config.model_type not in ENCODERS:
        raise ValueError(
            f"{folder}: encoder {config.model_type!r} is not one of {', '.join(ENCODERS)}"
        )
    return {k: v for k, v in config.to_dict().items() if k not in encoders.BOOKKEEPING}


def has_own_head(state: dict[str, Tensor]) -> bool:
    """Whether a decoder's head differs from its embeddings. Class defaults say that they are tied,
    and folders that are not may leave the default out."""
    embeddings = state.get("decoder.model.decoder.embed_tokens.weight")
    heads = [state.get(f"decoder.{name}.weight") for name in ("output_projection", "lm_head")]
    head = next((head for head in heads if head is not None), None)
    if head is None or embeddings is None:
        return False
    return head.shape != embeddings.shape or not torch.equal(head, embeddings)


def key_map_for(vision: dict[str, Any]) -> KeyMap:
    """The names of a folder's weights, the encoder's layers written out; see `LAYER_MAP`."""
    layers: list[tuple[str, str]] = []
    if vision["model_type"] in PLAIN:
        for number in range(vision["num_hidden_layers"]):
            ours = f"tokenizer.backbone.layers.{number}."
            for published, own in LAYER_MAP:
                layers.append((f"encoder.encoder.layer.{number}.{published}", ours + own))
                layers.append((f"encoder.layers.{number}.{own}", ours + own))
    return [*layers, *KEY_MAP]


def unused_of(vision: dict[str, Any]) -> tuple[str, ...]:
    """Prefixes of weights that a folder may have and the model has not."""
    indices = tuple(
        f"encoder.encoder.layer.{number}.attention.attention.relative_position_bias."
        "relative_position_index"
        for number in range(vision.get("num_hidden_layers", 0))
    )
    return (*UNUSED, *indices)


PLAIN = ("vit", "deit", "beit")
"""Encoders whose layers have other names in files than in transformers' newer classes."""

UNUSED = (
    "encoder.pooler.",
    "encoder.embeddings.mask_token",
    "decoder.model.decoder.embed_positions._float_tensor",  # of sinusoidal positions, in old files
)

LAYER_MAP: KeyMap = [
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
    ("attention.attention.relative_position_bias.", "relative_position_bias."),  # BEiT
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
]
"""What lies in a layer of a plain vision transformer: (published prefix, our prefix)."""

KEY_MAP: KeyMap = [
    ("encoder.encoder.layer.", "tokenizer.backbone.layers."),
    ("encoder.layers.", "tokenizer.backbone.layers."),
    ("encoder.encoder.relative_position_bias.", "tokenizer.backbone.shared_position_bias."),
    ("encoder.", "tokenizer.backbone."),
    ("enc_to_dec_proj.", "adaptor.layers.0."),
    ("decoder.", "text."),
]
"""(published prefix, our prefix), read in both directions."""
