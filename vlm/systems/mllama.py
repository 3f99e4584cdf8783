"""Mllama (Llama 3.2 Vision): tiles of a canvas as the memory that gated blocks of a LLaMA read.

An image is up to four tiles on a canvas, encoded together (`vlm.tokenizers.mllama`) and brought by
one linear map to the language model's width; blocks of gated cross-attention stand before some of
its layers. In the text an image is one mark, whose vector is a row of the input table past those of
the head. Text sees the image before it, and those whose marks stand side by side with that one's.

The published counting of layers goes through both kinds: of 40, the blocks are 3, 8, ..., 38.

Text that sees no image gets nothing from the blocks, as in the authors' code. transformers gives it
the mean of all that its row's images hold, absent tiles included, so that text before an image
depends on it. `use_reference_mask` makes a model compute that, to compare the two.

Parameters by pattern, for stages: "tokenizer.*" (the vision encoder), "adaptor.*", "cross.*" (the
blocks), "text.*". The authors train the first three and leave the language model as it was.

Longer than most files here: published sizes, what a folder may say, and the map of its weight names
stand together, as in every system.

Source: arXiv 2407.21783, section 7; meta-llama/llama-models, `models/llama3/multimodal`;
transformers, `mllama`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    MllamaConfig,
    PreTrainedConfig,
)

from vlm import adaptors
from vlm.families.cross_attended.blocks import GatedBlockConfig
from vlm.families.cross_attended.model import CrossAttendedModel
from vlm.families.cross_attended.module import Cross, CrossAttended, CrossConfig
from vlm.families.decoder_only.module import ImageLayouts
from vlm.families.decoder_only.processor import Processor
from vlm.families.decoder_only.view_order import Marked
from vlm.families.published_files import open_part, read_reference
from vlm.pixels import OPENAI, PixelSpec, tile_from_transformers
from vlm.pixels.canvas import layouts
from vlm.systems.compose import context_of
from vlm.systems.published import (
    KeyMap,
    first_names,
    listed_stop_ids,
    published_name,
    read_json,
    save_decoder_only,
    use_published_template,
)
from vlm.text.causal import SPARE_ROWS, causal_language_model
from vlm.tokenizers import mllama as tiles
from vlm.weights import load_weights, read_weights

SOURCE = "arXiv 2407.21783; meta-llama/Llama-3.2-{11B,90B}-Vision* on the hub"

MARK = "<|image|>"
SPARE = 8
"""Rows of the input table that the head has not. Source: transformers, `modeling_mllama.py`,
`MllamaTextModel`."""

PLAIN_TEMPLATE = (
    "{%- set begun = namespace(yes=false) -%}"
    "{%- for message in messages -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<|image|>' }}"
    "{%- else -%}"
    "{%- if not begun.yes -%}{%- set begun.yes = true -%}{{ bos_token }}{%- endif -%}"
    "{{ part['text'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and not begun.yes -%}{{ bos_token }}{%- endif -%}"
)
"""For folders of the base models, which have no chat template: texts and images as they are, with
the token that begins texts where the published processor puts it, after the first images, and the
one that ends texts after answers.
Source: transformers, `processing_mllama.py`, `build_string_from_input`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A published size, in the words of transformers' configurations."""

    vision: dict[str, Any]
    text: dict[str, Any]


VISION = {
    "image_size": 560,
    "patch_size": 14,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "vision_output_dim": 7680,
    "max_num_tiles": 4,
    "norm_eps": 1e-5,
}
TEXT = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SIZES = {
    "11b": Size(
        vision=VISION,
        text=TEXT
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "cross_attention_layers": list(range(3, 40, 5)),
        },
    ),
    "90b": Size(
        vision=VISION,
        text=TEXT
        | {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 100,
            "num_attention_heads": 64,
            "cross_attention_layers": list(range(3, 100, 5)),
        },
    ),
}
"""Published sizes, named as the authors do. 11b: 10,670 million parameters, of which the vision
encoder has 864 and the linear map 31. Source: config.json of the published folders."""

TILE_560 = PixelSpec(
    size_hw=(560, 560),
    fit="stretch",
    resample="bilinear",
    mean=OPENAI.mean,
    std=OPENAI.std,
)
"""Source: preprocessor_config.json of the published folders."""


def build(size: str) -> CrossAttended:
    """A published size with random weights; under `torch.device("meta")`, shapes alone.

    Raises ValueError naming the sizes.
    """
    if size not in SIZES:
        raise ValueError(f"Mllama size {size!r} is not one of {', '.join(SIZES)}")
    sizes = SIZES[size]
    config = MllamaConfig(
        vision_config=sizes.vision,
        text_config=sizes.text,
        image_token_index=sizes.text["vocab_size"],
    )
    return _compose(config, TILE_560).eval()


def load(folder: Path, values: dict[str, Any]) -> CrossAttendedModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    where = str(folder)
    config, text_tokenizer = open_part(AutoConfig, folder), open_part(AutoTokenizer, folder)
    reader = open_part(AutoImageProcessor, folder)
    _require_known(config, reader, text_tokenizer, where)
    key_map = key_map_of(
        config.text_config.cross_attention_layers, config.text_config.num_hidden_layers
    )
    state, unused = first_names(read_weights(folder), key_map, (), where)
    with init_empty_weights(include_buffers=False):
        module = _compose(config, tile_from_transformers(reader, config.vision_config.image_size))
    load_weights(module, state, where, lambda key: published_name(key, key_map))
    module.text.generation_config = GenerationConfig()
    _use_plain_template(text_tokenizer, folder)
    template = use_published_template(text_tokenizer, folder, MARK)
    processor = Processor(
        text_tokenizer,
        module.tokenizer.pixel_spec,
        ImageLayouts(module.tokenizer, module.adaptor, Marked()),
        max_tokens=context_of(module.text),
        image_mark=MARK,
        template=replace(template, begins_after_images=True),
    )
    return CrossAttendedModel(
        module=module.eval(),
        processor=processor,
        stop_ids=listed_stop_ids(folder, processor),
        reference=read_reference(folder, values["model_type"], unused),
    )


def save(model: CrossAttendedModel, folder: Path) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with what has
    changed since (weights, dtype).

    Raises ValueError for weights that the layout cannot represent.
    """
    save_decoder_only(model, folder, _key_map_of_module(model.module))


def use_reference_mask(model: CrossAttendedModel, on: bool = True) -> None:
    """Makes a model compute transformers' rule for text that sees no image, in place, or with
    `on=False` the authors' again. Folders of our own layout keep which one it is."""
    cross, tokenizer = model.module.cross, model.module.tokenizer
    cross.config = replace(cross.config, blind="unmasked" if on else "nothing")
    tokenizer.config = replace(tokenizer.config, absent=on)


def _compose(config: PreTrainedConfig, tile: PixelSpec) -> CrossAttended:
    vision, text = config.vision_config, config.text_config
    tokenizer = tiles.build(
        tiles.Config(
            width=vision.hidden_size,
            heads=vision.attention_heads,
            mlp_width=vision.intermediate_size,
            depth=vision.num_hidden_layers,
            global_depth=vision.num_global_layers,
            taken=tuple(vision.intermediate_layers_indices),
            patch_px=vision.patch_size,
            max_tiles=vision.max_num_tiles,
            eps=vision.norm_eps,
            pixel_spec=tile,
        )
    )
    width = text.hidden_size
    adaptor = adaptors.build(
        {
            "kind": "mlp",
            "in_width": tokenizer.dim,
            "out_width": width,
            "depth": 1,
            "hidden_width": width,
        }
    )
    cross = Cross(
        CrossConfig(
            block=GatedBlockConfig(
                width=width,
                memory_width=width,
                heads=text.num_attention_heads,
                kv_heads=text.num_key_value_heads,
                head_width=width // text.num_attention_heads,
                mlp_width=text.intermediate_size,
                eps=text.rms_norm_eps,
            ),
            before=_before(text.cross_attention_layers),
            sees="latest_group",
            mark_id=config.image_token_index,
        )
    )
    return CrossAttended(tokenizer, adaptor, cross, causal_language_model(_llama(text)))


def _llama(text: PreTrainedConfig) -> LlamaConfig:
    """The language model without its blocks."""
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    return LlamaConfig(
        **{name: getattr(text, name) for name in same},
        num_hidden_layers=text.num_hidden_layers - len(text.cross_attention_layers),
        attention_dropout=text.dropout,
        tie_word_embeddings=False,
        **{SPARE_ROWS: SPARE},
    )


def _before(cross_layers: list[int]) -> tuple[int, ...]:
    """The language model's own layers that have a block before them, of blocks in the published
    counting.

    >>> _before([3, 8, 13])
    (3, 7, 11)
    """
    return tuple(layer - number for number, layer in enumerate(cross_layers))


def _use_plain_template(text_tokenizer: Any, folder: Path) -> None:
    """Gives a text tokenizer a template where its folder has none."""
    if text_tokenizer.chat_template or read_json(folder / "chat_template.json"):
        return
    text_tokenizer.chat_template = PLAIN_TEMPLATE


def _require_known(config: PreTrainedConfig, reader: Any, text_tokenizer: Any, where: str) -> None:
    """Raises ValueError naming each setting of a folder that is not one of the published kind, or
    in which its processor and its weights disagree."""
    vision, text = config.vision_config, config.text_config
    side, most = vision.image_size, vision.max_num_tiles
    layers = text.cross_attention_layers
    width = vision.hidden_size * (1 + len(vision.intermediate_layers_indices))
    expected = {
        "vision_config.hidden_act": (vision.hidden_act, "gelu"),
        "vision_config.vision_output_dim": (vision.vision_output_dim, width),
        "vision_config.supported_aspect_ratios": (
            [tuple(hw) for hw in vision.supported_aspect_ratios],
            list(layouts(most)),
        ),
        "text_config.hidden_act": (text.hidden_act, "silu"),
        "text_config.cross_attention_layers": (layers, sorted({*layers})),
        "the image processor's max_image_tiles": (reader.max_image_tiles, most),
        "the image processor's size": (
            (reader.size["height"], reader.size["width"]),
            (side, side),
        ),
        f"the id of {MARK} in the text tokenizer": (
            text_tokenizer.convert_tokens_to_ids(MARK),
            config.image_token_index,
        ),
    }
    wrong = [
        f"{field}: expected {wanted!r}, as the weights have it, found {found!r}"
        for field, (found, wanted) in expected.items()
        if found != wanted
    ]
    if any(layer + 1 in (*layers, text.num_hidden_layers) for layer in layers):
        wrong.append(
            "text_config.cross_attention_layers: expected a layer of the language model's own "
            f"after each, found {layers} of {text.num_hidden_layers}"
        )
    rows = text.vocab_size + SPARE
    if len(text_tokenizer) > rows:
        wrong.append(
            f"text tokenizer: expected at most {rows} tokens, the rows of the input table, found "
            f"{len(text_tokenizer)}"
        )
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}")


BLOCK = (
    ("input_layernorm.", "attention_norm."),
    ("cross_attn.", ""),
    ("cross_attn_attn_gate", "attention_gate"),
    ("post_attention_layernorm.", "mlp_norm."),
    ("mlp.", "mlp."),
    ("cross_attn_mlp_gate", "mlp_gate"),
)
"""Of a block: (published name or its beginning, ours)."""
ATTENTION = ("q_proj.", "k_proj.", "v_proj.", "o_proj.", "q_norm.", "k_norm.")


def key_map_of(cross_layers: list[int], layers: int) -> KeyMap:
    """(published prefix, our prefix), read in both directions.

    cross_layers: the blocks, in the published counting. layers: how many there are of both kinds.
    """
    return [
        row
        for before, decoder, head in (
            ("", "language_model.model.", "language_model.lm_head."),
            ("model.", "model.language_model.", "lm_head."),
        )
        for row in _rows(before, decoder, head, cross_layers, layers)
    ]


def _rows(
    before: str, decoder: str, head: str, cross_layers: list[int], layers: int
) -> list[tuple[str, str]]:
    """The map in the names of the authors' folders, or of transformers' class."""
    rows = [
        (f"{before}vision_model.", "tokenizer."),
        (f"{before}multi_modal_projector.", "adaptor.layers.0."),
        (f"{decoder}embed_tokens.", "text.model.embed_tokens."),
        (f"{decoder}norm.", "text.model.norm."),
        (head, "text.lm_head."),
    ]
    own = [layer for layer in range(layers) if layer not in cross_layers]
    rows += [
        (f"{decoder}layers.{layer}.", f"text.model.layers.{n}.") for n, layer in enumerate(own)
    ]
    for number, layer in enumerate(cross_layers):
        published, ours = f"{decoder}layers.{layer}.", f"cross.blocks.{number}."
        for theirs, its in BLOCK:
            leaves = ATTENTION if theirs == "cross_attn." else ("",)
            rows += [(published + theirs + leaf, ours + its + leaf) for leaf in leaves]
    return rows


def _key_map_of_module(module: CrossAttended) -> KeyMap:
    """The key map of a module, by the blocks that it has."""
    layers = [layer + number for number, layer in enumerate(module.cross.config.before)]
    total = module.text.config.num_hidden_layers + len(layers)
    return key_map_of(layers, total)
