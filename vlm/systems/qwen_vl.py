"""Qwen-VL, the original: a ViT-bigG, 256 queries on a grid, and Qwen 7B.

Images are stretched to 448 pixels; the 1,024 tokens of a ViT without class token become 256 in one
cross-attention layer whose queries and keys have 2-D sine positions, then pass a LayerNorm and a
square matrix. They stand between <img> and </img> in the text, where the authors' tokenizer writes
the image's path as bytes and pads, which their model replaces.

Folders are those of the authors on the hub, whose classes are code in the folder. It is never run:
it is kept, with the file of the text tokenizer, and written back, so that what is written opens as
before. generation_config.json says how a conversation is written: "chatml" (Qwen-VL-Chat) or "raw".
A literal prompt marks an image by `<img><imgpad></img>`.

Beyond `seq_length` tokens the authors' model scales its attention and rotary frequencies at
inference (log-n attention, dynamic NTK); up to there both change nothing, and longer rows are
refused. Boxes are text, (x, y) from 0 to 999 in tokens <box> and </box> after <ref>phrase</ref>.

Parameters by pattern, for stages: "tokenizer.*" (ViT), "adaptor.*", "text.*". The authors train
tokenizer and adaptor at 224 pixels, then all, then adaptor and text.

Source: arXiv 2308.12966; Qwen/Qwen-VL and Qwen/Qwen-VL-Chat on the hub (`modeling_qwen.py`,
`visual.py`, `tokenization_qwen.py`, `qwen_generation_utils.py`); vLLM, `qwen_vl.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from vlm import adaptors
from vlm.box_codecs import QWEN_VL
from vlm.families.decoder_only.chat_template import Template
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly, ImageLayouts
from vlm.families.decoder_only.processor import Processor
from vlm.families.published_files import read_reference
from vlm.merge import Made, plain_state
from vlm.pixels import OPENAI, PixelSpec
from vlm.systems.compose import context_of
from vlm.systems.published import (
    KeyMap,
    first_names,
    listed_stop_ids,
    published_name,
    write_config,
)
from vlm.systems.qwen_vl_text import (
    ADDED,
    CHATML,
    IMAGE_MARK,
    TIKTOKEN,
    TURN,
    conversation_format,
    read_text_tokenizer,
)
from vlm.tokenizers import plain_vit
from vlm.weights import load_weights, read_weights, save_state

SOURCE = "arXiv 2308.12966; Qwen/Qwen-VL and Qwen/Qwen-VL-Chat on the hub"

CAPTION_PROMPT = "Describe the image in English:"
"""Source: QwenLM/Qwen-VL, `eval_mm/evaluate_caption.py`."""

PUBLISHED = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "layer_norm_epsilon": 1e-6,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "seq_length": 2048,
    "vocab_size": 151936,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}
"""What the published config.json says of sizes; each key of it is needed. In billions of
parameters: 7.72 in the language model, 1.86 in the ViT with the square matrix that follows the
queries, 0.08 in the cross-attention; the paper's table 1 says 7.7, 1.9, 0.08 and 9.6 in all."""

TABLE_HW = (16, 16)
"""Rows and columns of the ViT's position table, of its first training at 224 pixels.
Source: `visual.py`, `VisionTransformer`; so are the three below."""
QUERIES = 256
"""Unless `visual.n_queries` says otherwise."""
HEAD_WIDTH = 128
"""Of the cross-attention."""
NORM_EPS = 1e-6


def load(folder: Path, values: dict[str, Any]) -> DecoderOnlyModel:
    """The model in a folder of the authors' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    where = str(folder)
    _require_known(values, f"{folder / 'config.json'}")
    template, answer_prompt, ground_prompt = conversation_format(folder)
    text_tokenizer = read_text_tokenizer(folder, values)
    text_tokenizer.chat_template = template
    with init_empty_weights(include_buffers=False):
        module = compose(values)
    key_map = key_map_of(values)
    state = split_fused(read_weights(folder))
    state, unused = first_names(state, key_map, UNUSED, where)
    load_weights(module, state, where, lambda key: published_name(key, key_map))
    module.text.generation_config = GenerationConfig()
    processor = Processor(
        text_tokenizer,
        module.tokenizer.pixel_spec,
        ImageLayouts(module.tokenizer, module.adaptor),
        max_tokens=context_of(module.text),
        image_mark=IMAGE_MARK,
        template=Template(parts=True),
        box_codec=QWEN_VL,
    )
    stop_ids = listed_stop_ids(folder, processor)
    if template == CHATML:  # the authors' `chat` stops there too
        stop_ids = (*stop_ids, text_tokenizer.convert_tokens_to_ids(TURN))
    return DecoderOnlyModel(
        module=module.eval(),
        processor=processor,
        stop_ids=stop_ids,
        caption_prompt=CAPTION_PROMPT,
        ground_prompt=ground_prompt,
        answer_prompt=answer_prompt,
        reference=read_reference(folder, values["model_type"], unused),
    )


def save(model: DecoderOnlyModel, folder: Path) -> None:
    """Writes the authors' layout: the files of the folder that the model came from, with the
    weights as they are now.

    Raises ValueError, before anything is written, for weights and new tokens that the layout cannot
    represent.
    """
    module, reference = model.module, model.reference
    config = reference.config
    key_map = key_map_of(config)
    state = {published_name(key, key_map): t for key, t in plain_state(module).items()}
    _require_no_new_tokens(model)
    reference.write(folder)
    write_config(config, next(module.text.parameters()).dtype, folder)
    save_state({**reference.unused, **join_fused(state)}, folder)


def build() -> DecoderOnly:
    """The published size with random weights; under `torch.device("meta")`, shapes alone."""
    return compose(PUBLISHED).eval()


def compose(values: Mapping[str, Any]) -> DecoderOnly:
    """The system with random weights.

    values: of a config.json, at least the keys of `PUBLISHED`.
    """
    visual, width = values["visual"], values["hidden_size"]
    side_px = visual["image_size"]
    spec = PixelSpec(
        size_hw=(side_px, side_px),
        fit="stretch",
        resample="bicubic",
        backend="pil",
        mean=OPENAI.mean,
        std=OPENAI.std,
    )
    tokenizer = plain_vit.build(
        plain_vit.PlainViTConfig(
            width=visual["width"],
            depth=visual["layers"],
            heads=visual["heads"],
            mlp_width=int(visual["width"] * visual["mlp_ratio"]),
            patch_px=visual["patch_size"],
            table_hw=TABLE_HW,
            norm_eps=NORM_EPS,
            pixel_spec=spec,
        )
    )
    side = math.isqrt(visual.get("n_queries", QUERIES))
    adaptor = adaptors.build(
        {
            "kind": "grid_resampler",
            "in_width": tokenizer.dim,
            "out_width": width,
            "queries_hw": (side, side),
            "heads": width // HEAD_WIDTH,
            "norm_eps": NORM_EPS,
        }
    )
    heads = values["num_attention_heads"]
    text_config = Qwen2Config(
        vocab_size=values["vocab_size"],
        hidden_size=width,
        intermediate_size=values["intermediate_size"] // 2,  # theirs counts both matrices
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=values["seq_length"],
        rms_norm_eps=values["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": float(values["rotary_emb_base"])},
        tie_word_embeddings=False,
    )
    return DecoderOnly(tokenizer, adaptor, AutoModelForCausalLM.from_config(text_config))


def _require_known(values: Mapping[str, Any], where: str) -> None:
    """Raises ValueError naming each setting of a config.json that is missing, or not that of the
    published kind. One that is left out has its default, which is the published one."""
    visual = values.get("visual")
    if not isinstance(visual, Mapping):
        raise ValueError(f"{where}: visual: expected the vision encoder's settings, found {visual}")
    missing = [key for key in PUBLISHED if key not in values]
    missing += [f"visual.{key}" for key in PUBLISHED["visual"] if key not in visual]
    if missing:
        raise ValueError(f"{where}: expected the keys {', '.join(missing)}, found none of them")
    width, queries = values["hidden_size"], visual.get("n_queries", QUERIES)
    expected = {
        "kv_channels": width // values["num_attention_heads"],
        "no_bias": True,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "tie_word_embeddings": False,
        "quantization_config": None,
    }
    wrong = [
        f"{key}: expected {value!r}, found {values[key]!r}"
        for key, value in expected.items()
        if key in values and values[key] != value
    ]
    if visual["output_dim"] != width or width % HEAD_WIDTH:
        wrong.append(
            f"visual.output_dim: expected hidden_size {width}, a multiple of {HEAD_WIDTH}, found "
            f"{visual['output_dim']}"
        )
    if math.isqrt(queries) ** 2 != queries:
        wrong.append(f"visual.n_queries: expected a square number, found {queries}")
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}")


def _require_no_new_tokens(model: DecoderOnlyModel) -> None:
    """Raises ValueError naming the tokens that were added to the published ones: the code of the
    folder says which there are."""
    lines = model.reference.files[TIKTOKEN].splitlines()
    first = sum(1 for line in lines if line.strip()) + len(ADDED)
    new = [t for t, id in model.processor.text_tokenizer.get_vocab().items() if id >= first]
    if new:
        raise ValueError(
            f"{len(new)} new tokens, such as {sorted(new)[:4]}, cannot be represented in Qwen-VL's "
            "layout, whose tokens are fixed; save the model in our own layout"
        )
    rows, said = model.module.text.config.vocab_size, model.reference.config["vocab_size"]
    if rows != said:
        raise ValueError(f"vocab_size: expected {said}, as config.json says, found {rows}")


FUSED = re.compile(r"\.attn\.c_attn(?=\.)|\.attn_pool\.attn\.in_proj(?=_)")
"""What queries, keys and values lie in one matrix and one bias of, one after the other."""
PARTS = ("q", "k", "v")
PART = re.compile(r"\[([qkv])\]")


def split_fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state with queries, keys and values apart: NAME.weight becomes NAME[q].weight,
    NAME[k].weight and NAME[v].weight."""
    apart: dict[str, Tensor] = {}
    for key, tensor in state.items():
        found = FUSED.search(key)
        if not found:
            apart[key] = tensor
            continue
        before, after = key[: found.end()], key[found.end() :]
        for part, rows in zip(PARTS, tensor.tensor_split(3)):
            apart[f"{before}[{part}]{after}"] = rows.clone()
    return apart


def join_fused(state: Mapping[str, Tensor | Made]) -> dict[str, Tensor | Made]:
    """The inverse of `split_fused`; what is joined is made when it is written."""
    joined: dict[str, Tensor | Made] = {}
    fused: dict[str, list[Tensor | Made]] = {}
    for key, tensor in state.items():
        if PART.search(key):
            fused.setdefault(PART.sub("", key), []).append(tensor)
        else:
            joined[key] = tensor
    for key, parts in fused.items():
        first = parts[0].like if isinstance(parts[0], Made) else parts[0]
        shape = (3 * first.shape[0], *first.shape[1:])
        like = torch.empty(shape, dtype=first.dtype, device="meta")
        joined[key] = Made(like, partial(_cat, parts))
    return joined


def _cat(parts: list[Tensor | Made]) -> Tensor:
    return torch.cat([part.make() if isinstance(part, Made) else part for part in parts])


UNUSED = ("transformer.rotary_emb.",)
"""Rotary frequencies, which some versions of the authors' code saved."""

_TEXT_BLOCK: KeyMap = [
    ("ln_1.", "input_layernorm."),
    *((f"attn.c_attn[{part}].", f"self_attn.{part}_proj.") for part in PARTS),
    ("attn.c_proj.", "self_attn.o_proj."),
    ("ln_2.", "post_attention_layernorm."),
    ("mlp.w1.", "mlp.up_proj."),
    ("mlp.w2.", "mlp.gate_proj."),
    ("mlp.c_proj.", "mlp.down_proj."),
]
_VISION_BLOCK: KeyMap = [
    ("ln_1.", "norm_attention."),
    ("attn.in_proj.", "qkv."),
    ("attn.out_proj.", "out."),
    ("ln_2.", "norm_mlp."),
    ("mlp.c_fc.", "mlp_in."),
    ("mlp.c_proj.", "mlp_out."),
]
_QUERIES: KeyMap = [
    ("query", "queries"),
    ("pos_embed", "positions"),
    ("kv_proj.", "project."),
    ("ln_q.", "norm_queries."),
    ("ln_kv.", "norm_images."),
    ("attn.in_proj[q]_", "to_query."),
    ("attn.in_proj[k]_", "to_key."),
    ("attn.in_proj[v]_", "to_value."),
    ("attn.out_proj.", "out."),
]


def key_map_of(values: Mapping[str, Any]) -> KeyMap:
    """(published prefix, our prefix), read in both directions; queries, keys and values apart.
    values: of a config.json."""
    text, vision = "transformer.h", "transformer.visual.transformer.resblocks"
    return [
        ("transformer.wte.", "text.model.embed_tokens."),
        *(
            (f"{text}.{layer}.{published}", f"text.model.layers.{layer}.{ours}")
            for layer in range(values["num_hidden_layers"])
            for published, ours in _TEXT_BLOCK
        ),
        ("transformer.ln_f.", "text.model.norm."),
        ("lm_head.", "text.lm_head."),
        ("transformer.visual.conv1.", "tokenizer.patch."),
        ("transformer.visual.positional_embedding", "tokenizer.positions"),
        ("transformer.visual.ln_pre.", "tokenizer.norm."),
        *(
            (f"{vision}.{layer}.{published}", f"tokenizer.blocks.{layer}.{ours}")
            for layer in range(values["visual"]["layers"])
            for published, ours in _VISION_BLOCK
        ),
        *((f"transformer.visual.attn_pool.{p}", f"adaptor.{ours}") for p, ours in _QUERIES),
        ("transformer.visual.ln_post.", "adaptor.norm."),
        ("transformer.visual.proj", "adaptor.projection"),
    ]
