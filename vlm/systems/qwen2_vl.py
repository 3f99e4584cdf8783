"""Qwen2-VL and Qwen2.5-VL on images: a transformer at native size, 2 x 2 tokens joined, Qwen2.

Both sides of an image become whole blocks of 28 pixels, its area within limits, so that it has as
many tokens as its size asks for. The language model's position ids have three numbers: temporal,
row and column. Qwen2.5-VL's image encoder attends over windows of 112 pixels in all but four of its
blocks. Videos are refused by name.

Boxes in text: Qwen2-VL's are in thousandths of the image's sides, Qwen2.5-VL's in pixels of the
resized image; `pixel_spec.resize_record` leads there and back, one scale for each axis, no offset.

Parameters by pattern, for stages: "tokenizer.*" (image encoder), "adaptor.*" (patch merger),
"text.*". The authors train the image encoder, then all, then all but the image encoder.

Folders are those of the authors (text fields in the whole of config.json, weights named "visual."
and "model.layers.") and those that transformers 5 writes.

Source: arXiv 2409.12191, 2502.13923; transformers, `qwen2_vl` and `qwen2_5_vl`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)

from vlm import adaptors
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly, ImageLayouts
from vlm.families.decoder_only.processor import Processor
from vlm.families.published_files import open_part, read_reference
from vlm.pixels import tile_from_transformers
from vlm.pixels.area import AreaSpec
from vlm.systems.compose import context_of
from vlm.systems.published import (
    KeyMap,
    first_names,
    listed_stop_ids,
    published_name,
    save_decoder_only,
    use_published_template,
)
from vlm.text.causal import causal_language_model
from vlm.tokenizers import native_vit
from vlm.weights import load_weights, read_weights

SOURCE = "arXiv 2409.12191, 2502.13923; Qwen/Qwen2-VL-*, Qwen/Qwen2.5-VL-* on the hub"

CAPTION_PROMPT = "Describe this image."
"""Source: the cards of Qwen/Qwen2-VL-2B-Instruct and Qwen/Qwen2.5-VL-3B-Instruct."""
IMAGE_MARK = "<|image_pad|>"
"""What the chat template writes for an image, between <|vision_start|> and <|vision_end|>."""
ROTARY_BASE = 10000.0
"""Of the image encoder, where its configuration does not say.
Source: transformers, `Qwen2VLVisionRotaryEmbedding`."""


def load(folder: Path, values: dict[str, Any]) -> DecoderOnlyModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    where = str(folder)
    config, text_tokenizer = open_part(AutoConfig, folder), open_part(AutoTokenizer, folder)
    reader = open_part(AutoImageProcessor, folder)
    _require_known(config, reader, where)
    state, unused = first_names(read_weights(folder), KEY_MAP, (), where)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    with init_empty_weights(include_buffers=False):
        module = compose(config, _pixel_spec(reader, where))
    module.text.tie_weights()  # making parameters empty unties them
    load_weights(module, state, where, lambda key: published_name(key, KEY_MAP))
    module.text.generation_config = GenerationConfig()
    template = use_published_template(text_tokenizer, folder, IMAGE_MARK)
    processor = Processor(
        text_tokenizer,
        module.tokenizer.pixel_spec,
        ImageLayouts(module.tokenizer, module.adaptor),
        max_tokens=context_of(module.text),
        image_mark=IMAGE_MARK,
        template=template,
        position_numbers=3,
    )
    return DecoderOnlyModel(
        module=module.eval(),
        processor=processor,
        stop_ids=listed_stop_ids(folder, processor),
        caption_prompt=CAPTION_PROMPT,
        reference=read_reference(folder, values["model_type"], unused),
    )


def save(model: DecoderOnlyModel, folder: Path) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with what has
    changed since (weights, dtype, vocabulary).

    Raises ValueError for weights that the layout cannot represent.
    """
    save_decoder_only(model, folder, KEY_MAP)


def compose(config: PreTrainedConfig, pixel_spec: AreaSpec) -> DecoderOnly:
    """The system of a configuration of transformers, with random weights."""
    vision, own = config.vision_config, OWN[config.model_type]
    windowed = own["norm"] == "rms"
    width = vision.hidden_size if windowed else vision.embed_dim
    tokenizer = native_vit.build(
        native_vit.Config(
            width=width,
            depth=vision.depth,
            heads=vision.num_heads,
            mlp_width=vision.intermediate_size if windowed else int(width * vision.mlp_ratio),
            patch_px=vision.patch_size,
            patch_frames=vision.temporal_patch_size,
            norm=own["norm"],
            mlp=own["mlp"],
            rotary_base=_rotary(vision).get("rope_theta", ROTARY_BASE),
            pixel_spec=pixel_spec,
            window_px=vision.window_size if windowed else None,
            whole_blocks=tuple(vision.fullatt_block_indexes) if windowed else (),
        )
    )
    adaptor = adaptors.build(
        {
            "kind": "normed_shuffle",
            "in_width": width,
            "out_width": vision.out_hidden_size if windowed else vision.hidden_size,
            "ratio": vision.spatial_merge_size,
            "norm": own["norm"],
            "eps": native_vit.EPS,
        }
    )
    return DecoderOnly(tokenizer, adaptor, causal_language_model(config.text_config))


OWN = {
    "qwen2_vl": {"norm": "layer", "mlp": "quick_gelu", "hidden_act": "quick_gelu"},
    "qwen2_5_vl": {"norm": "rms", "mlp": "gated_silu", "hidden_act": "silu"},
}
"""`model_type` -> the norms and MLPs of its image encoder."""


def _require_known(config: PreTrainedConfig, reader: Any, where: str) -> None:
    """Raises ValueError naming each setting of a folder that is not one of the published kinds, or
    in which model and image processor differ."""
    vision, text = config.vision_config, config.text_config
    windowed = config.model_type == "qwen2_5_vl"
    out_key = "out_hidden_size" if windowed else "hidden_size"
    settings = {
        "vision_config.hidden_act": (vision.hidden_act, OWN[config.model_type]["hidden_act"]),
        "vision_config.in_channels": (vision.in_channels, 3),
        "vision_config.rope_parameters.rope_type": (
            _rotary(vision).get("rope_type", "axial"),
            "axial",
        ),
        f"vision_config.{out_key}": (getattr(vision, out_key), text.hidden_size),
        "the image processor's patch_size": (reader.patch_size, vision.patch_size),
        "the image processor's merge_size": (reader.merge_size, vision.spatial_merge_size),
    }
    wrong = [
        f"{field}: expected {expected!r}, found {found!r}"
        for field, (found, expected) in settings.items()
        if found != expected
    ]
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}")


def _rotary(vision: PreTrainedConfig) -> dict[str, Any]:
    """The rotary positions of the image encoder; empty where the configuration does not say."""
    return getattr(vision, "rope_parameters", None) or {}


def _pixel_spec(reader: Any, where: str) -> AreaSpec:
    """The preprocessing of an image processor, its limits in either spelling."""
    size = dict(reader.size)
    least = size.get("shortest_edge") or size.get("min_pixels")
    most = size.get("longest_edge") or size.get("max_pixels")
    if not (least and most):
        raise ValueError(
            f"{where}: expected an image processor with min_pixels and max_pixels, or a size with "
            f"shortest_edge and longest_edge, found size {size}"
        )
    block = tile_from_transformers(reader, reader.patch_size * reader.merge_size)
    return AreaSpec(block=block, min_pixels=least, max_pixels=most)


_VISION = dict(depth=32, num_heads=16, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
_VISION_2 = dict(_VISION, embed_dim=1280, mlp_ratio=4)
_VISION_2_5 = dict(
    _VISION,
    hidden_size=1280,
    intermediate_size=3420,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
_TEXT_7B = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    rms_norm_eps=1e-6,
)
SIZES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-2B-Instruct": dict(
        model_type="qwen2_vl",
        tie_word_embeddings=True,
        vision_config=dict(_VISION_2, hidden_size=1536),
        text_config=dict(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151936,
            rms_norm_eps=1e-6,
        ),
    ),
    "Qwen/Qwen2-VL-7B-Instruct": dict(
        model_type="qwen2_vl",
        tie_word_embeddings=False,
        vision_config=dict(_VISION_2, hidden_size=3584),
        text_config=_TEXT_7B,
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": dict(
        model_type="qwen2_5_vl",
        tie_word_embeddings=True,
        vision_config=dict(_VISION_2_5, out_hidden_size=2048),
        text_config=dict(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
            rms_norm_eps=1e-6,
        ),
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": dict(
        model_type="qwen2_5_vl",
        tie_word_embeddings=False,
        vision_config=dict(_VISION_2_5, out_hidden_size=3584),
        text_config=_TEXT_7B,
    ),
}
"""Published sizes, as `AutoConfig.for_model` takes them, `compose` after it.
Source: config.json of each on the hub."""


KEY_MAP: KeyMap = [
    ("visual.merger.ln_q.", "adaptor.norm."),
    ("visual.merger.mlp.", "adaptor.mlp."),
    ("visual.", "tokenizer."),
    ("model.", "text.model."),
    ("lm_head.", "text.lm_head."),
    ("model.visual.merger.ln_q.", "adaptor.norm."),
    ("model.visual.merger.mlp.", "adaptor.mlp."),
    ("model.visual.", "tokenizer."),
    ("model.language_model.", "text.model."),
]
"""(published prefix, our prefix), read in both directions; first the authors' names, which
transformers 5 writes too, then those of its classes."""
