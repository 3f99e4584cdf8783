"""LLaVA 1.5 and LLaVA-NeXT (1.6): CLIP's tokens through an MLP into a causal language model.

Tokens are those of CLIP's last block but one, without its norm; the class token is dropped
(`vision_feature_select_strategy` default) or kept (full). 1.5: one view of 336 pixels, 576 tokens.
NeXT: the whole image, then tiles of the best of some resolutions, joined to one grid without its
padding, each row ended by a learned vector ("adaptor.newline").

Parameters by pattern, for stages: "tokenizer.*" (CLIP), "adaptor.*", "text.*". The authors train
the adaptor alone, then adaptor and text; of NeXT all in the second stage.

Folders are those of llava-hf on the hub and those that transformers writes. CLIP's last block and
its closing norm are no part of the system: they are kept and written back as they were.

Source: arXiv 2310.03744 (1.5); llava-vl.github.io/blog/2024-01-30-llava-next; transformers, `llava`
and `llava_next`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
)

from vlm import adaptors
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly, ImageLayouts
from vlm.families.decoder_only.processor import Processor
from vlm.families.decoder_only.view_order import InTurn, Joined
from vlm.families.published_files import open_part, read_reference
from vlm.image_tokens import ImageTokenizer
from vlm.pixels import from_transformers, tile_from_transformers
from vlm.systems.compose import context_of
from vlm.systems.published import (
    KeyMap,
    architecture,
    first_names,
    listed_banned_ids,
    listed_stop_ids,
    published_name,
    save_decoder_only,
    use_published_template,
)
from vlm.tokenizers import pinpoint_tiles
from vlm.tokenizers import transformers as encoders
from vlm.weights import load_weights, read_weights

SOURCE = "arXiv 2310.03744; llava-hf/llava-1.5-*-hf and llava-hf/llava-v1.6-*-hf on the hub"

TOWER = "clip_vision_model"
PREFIX = {"default": "drop", "full": "keep"}
"""`vision_feature_select_strategy` -> what becomes of the class token."""


def load(folder: Path, values: dict[str, Any]) -> DecoderOnlyModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    where, model_type = str(folder), values["model_type"]
    config, reader = open_part(AutoConfig, folder), open_part(AutoProcessor, folder)
    _require_known(config, reader, where)
    key_map, tiled = KEY_MAPS[model_type], model_type == "llava_next"
    state, unused = first_names(read_weights(folder), key_map, _unused(config), where)
    text_config = config.text_config
    text_config.tie_word_embeddings = config.tie_word_embeddings
    with init_empty_weights(include_buffers=False):
        tokenizer = _tiles(config, reader, where) if tiled else _tower(config, reader)
        module = _compose(tokenizer, config, "newline_mlp" if tiled else "mlp")
    module.text.tie_weights()  # making parameters empty unties them
    load_weights(module, state, where, lambda key: published_name(key, key_map))
    module.text.generation_config = GenerationConfig()
    text_tokenizer, image_mark = reader.tokenizer, reader.image_token
    text_tokenizer.chat_template = reader.chat_template or text_tokenizer.chat_template
    template = use_published_template(text_tokenizer, folder, image_mark)
    processor = Processor(
        text_tokenizer,
        tokenizer.pixel_spec,
        ImageLayouts(tokenizer, module.adaptor, Joined() if tiled else InTurn()),
        max_tokens=context_of(module.text),
        image_mark=image_mark,
        template=template,
    )
    _require_length(processor, reader, where)
    return DecoderOnlyModel(
        module=module.eval(),
        processor=processor,
        stop_ids=listed_stop_ids(folder, processor),
        banned_ids=listed_banned_ids(folder, processor),
        reference=read_reference(folder, model_type, unused),
    )


def save(model: DecoderOnlyModel, folder: Path) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with what has
    changed since (weights, dtype, vocabulary).

    Raises ValueError for weights that the layout cannot represent.
    """
    save_decoder_only(model, folder, KEY_MAPS[model.reference.model_type])


def _require_known(config: PreTrainedConfig, reader: Any, where: str) -> None:
    """Raises ValueError naming each setting of a folder that is not one of the published kinds."""
    strategy = config.vision_feature_select_strategy
    joins = config.model_type == "llava_next"  # tiles, by their grids, where no class token stands
    settings = {
        "vision_config.model_type": (config.vision_config.model_type, (TOWER,)),
        "projector_hidden_act": (config.projector_hidden_act, ("gelu",)),
        "vision_feature_select_strategy": (strategy, ("default",) if joins else tuple(PREFIX)),
        "the processor's vision_feature_select_strategy": (
            reader.vision_feature_select_strategy or strategy,
            (strategy,),
        ),
    }
    wrong = [
        f"{field}: expected {' or '.join(map(repr, expected))}, found {found!r}"
        for field, (found, expected) in settings.items()
        if found not in expected
    ]
    if not isinstance(config.vision_feature_layer, int):
        wrong.append(
            f"vision_feature_layer: expected one layer, found {config.vision_feature_layer}"
        )
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}")


def _unused(config: PreTrainedConfig) -> list[str]:
    """Prefixes of CLIP's weights after the layer that is read: its later blocks and its norm."""
    depth = config.vision_config.num_hidden_layers
    after = range(config.vision_feature_layer % (depth + 1), depth)
    parts = ["post_layernorm.", *(f"encoder.layers.{layer}." for layer in after)]
    return [f"{prefix}{part}" for prefix in TOWERS for part in parts]


def _tower(config: PreTrainedConfig, reader: Any, pixel_spec: Any = None) -> ImageTokenizer:
    return encoders.build(
        encoders.TransformersConfig(
            vision_config=architecture(config.vision_config),
            layer=config.vision_feature_layer,
            prefix=PREFIX[config.vision_feature_select_strategy],
            norm=False,
            pooled=False,
            pixel_spec=pixel_spec or from_transformers(reader.image_processor),
        )
    )


def _tiles(config: PreTrainedConfig, reader: Any, where: str) -> ImageTokenizer:
    """CLIP over the whole image and its tiles. Raises ValueError where the model's and the
    processor's resolutions or sides differ."""
    images, side = reader.image_processor, config.vision_config.image_size
    pinpoints = [tuple(hw) for hw in config.image_grid_pinpoints]
    if [tuple(hw) for hw in images.image_grid_pinpoints] != pinpoints:
        raise ValueError(
            f"{where}: image_grid_pinpoints: expected {pinpoints}, as the model has, found "
            f"{images.image_grid_pinpoints} of the image processor"
        )
    size, crop = dict(images.size), dict(images.crop_size or {})
    sides = {value for value in (*size.values(), *crop.values()) if value is not None}
    if sides != {side}:
        raise ValueError(
            f"{where}: expected views of {side} pixels, as the vision encoder has positions for, "
            f"found size {size} and crop_size {crop}"
        )
    tower = _tower(config, reader, tile_from_transformers(images, side))
    return pinpoint_tiles.PinpointTilesTokenizer(tower, resolutions=tuple(pinpoints))


def _compose(tokenizer: ImageTokenizer, config: PreTrainedConfig, kind: str) -> DecoderOnly:
    width = config.text_config.hidden_size
    adaptor = adaptors.build(
        {
            "kind": kind,
            "in_width": tokenizer.dim,
            "out_width": width,
            "depth": 2,
            "hidden_width": width,
            "bias": config.multimodal_projector_bias,
        }
    )
    return DecoderOnly(tokenizer, adaptor, AutoModelForCausalLM.from_config(config.text_config))


def _require_length(processor: Processor, reader: Any, where: str) -> None:
    """Raises ValueError where the folder's processor counts other image tokens in a view than the
    model gives. Folders of before transformers 4.46 do not count."""
    if reader.patch_size is None:
        return
    spec = processor.pixel_spec
    (H, W), *_ = spec.view_sizes((1, 1))
    said = (H // reader.patch_size) * (W // reader.patch_size)
    said += reader.num_additional_image_tokens or 0
    said -= reader.vision_feature_select_strategy == "default"
    found = processor.layout_for((H, W)).spans[0].length
    if said != found:
        raise ValueError(
            f"{where}: the processor writes {said} image tokens for a view, the model gives {found}"
        )


TOWERS = (
    "vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
)
"""What CLIP is called in the authors' folders, and in those of transformers 5."""


def _key_map(backbone: str) -> KeyMap:
    return [
        *((tower, backbone) for tower in TOWERS),
        *(
            (f"{before}multi_modal_projector.linear_{number}.", f"adaptor.layers.{layer}.")
            for before in ("", "model.")
            for number, layer in ((1, 0), (2, 2))
        ),
        ("image_newline", "adaptor.newline"),
        ("model.image_newline", "adaptor.newline"),
        ("language_model.model.", "text.model."),
        ("language_model.lm_head.", "text.lm_head."),
        ("model.language_model.", "text.model."),
        ("lm_head.", "text.lm_head."),
    ]


KEY_MAPS: dict[str, KeyMap] = {
    "llava": [pair for pair in _key_map("tokenizer.backbone.") if "newline" not in pair[0]],
    "llava_next": _key_map("tokenizer.inner.backbone."),
}
"""`model_type` -> (published prefix, our prefix), read in both directions."""
