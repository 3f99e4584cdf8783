"""Idefics v1 (the open Flamingo): CLIP's tokens through a perceiver, read by blocks of a LLaMA.

Tokens are those of CLIP's last block, its class token first, without its closing norm; a perceiver
reads them where the folder has one. A block of gated cross-attention stands before each
`cross_layer_interval`-th layer. Text sees the image before it, that alone; text that sees none gets
nothing from the attention, and the feed-forward layer's all the same, as in the published code.
That code shows a text no image between an end of text (`</s>`) and the next image; here it sees the
latest all the same, so that later turns of a conversation with a base model do.

In the text an image is a mark between two fences, one of which two images side by side share; no
space stands beside a fence. Turns end with `<end_of_utterance>`, which base models have not.

The last rows of both tables (the mark, the fence, the end of a turn) are tensors of their own in
published folders, so that they could be trained while the others were not; here tables are whole.

Parameters by pattern, for stages: "tokenizer.*" (CLIP), "adaptor.*" (the perceiver), "cross.*" (the
blocks), "text.*". The authors train the adaptor, the blocks and the last rows; then all (instruct).

Longer than most files here: published sizes, what a folder may say, and the map of its weights
(which joins tables and cuts them again) stand together, as in every system.

Source: arXiv 2306.16527; transformers, `idefics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    IdeficsConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from vlm import adaptors
from vlm.families.cross_attended.blocks import GatedBlockConfig
from vlm.families.cross_attended.model import CrossAttendedModel
from vlm.families.cross_attended.module import Cross, CrossAttended, CrossConfig
from vlm.families.decoder_only.chat_template import SLOT, Template
from vlm.families.decoder_only.module import ImageLayouts
from vlm.families.decoder_only.processor import Processor
from vlm.families.decoder_only.view_order import Marked
from vlm.families.published_files import open_part, read_reference
from vlm.merge import Made, plain_state
from vlm.pixels import OPENAI, PixelSpec, from_transformers
from vlm.systems.compose import context_of
from vlm.systems.published import (
    KeyMap,
    first_names,
    listed_banned_ids,
    listed_stop_ids,
    published_name,
    write_config,
    write_grown_tokenizer,
)
from vlm.text.causal import causal_language_model
from vlm.tokenizers import transformers as encoders
from vlm.weights import load_weights, read_weights, save_state

SOURCE = "arXiv 2306.16527; HuggingFaceM4/idefics-{9b,80b}* on the hub"

MARK, FENCE, TURN_ENDS = "<image>", "<fake_token_around_image>", "<end_of_utterance>"
"""Source: transformers, `processing_idefics.py`."""

TEMPLATE = (
    "{{ bos_token }}"
    "{%% for message in messages %%}"
    "{%% if not loop.first %%}{{ '\\n' }}{%% endif %%}"
    "{{ message['role'] | capitalize }}:"
    "{%% if message['content'][0]['type'] == 'text' %%}{{ ' ' }}{%% endif %%}"
    "{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}" + SLOT + "{%% else %%}{{ part['text'] }}{%% endif %%}"
    "{%% endfor %%}"
    "%s"
    "{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '\\nAssistant:' }}{%% endif %%}"
)
"""A conversation of contents in parts, an image as `Processor` marks it, with what ends a turn.
Source: the card of HuggingFaceM4/idefics-9b-instruct."""
AFTER_ANSWERS = "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
"""What ends an answer of a base model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A published size, in the words of transformers' configurations."""

    vision: Mapping[str, Any]
    perceiver: Mapping[str, Any]
    text: Mapping[str, Any]


SIZES = {
    "9b": Size(
        vision={
            "embed_dim": 1280,
            "image_size": 224,
            "intermediate_size": 5120,
            "patch_size": 14,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
        },
        perceiver={
            "resampler_n_latents": 64,
            "resampler_depth": 6,
            "resampler_n_heads": 16,
            "resampler_head_dim": 96,
            "qk_layer_norms_perceiver": True,
        },
        text={
            "vocab_size": 32000,
            "additional_vocab_size": 2,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "cross_layer_interval": 4,
            "qk_layer_norms": True,
            "use_resampler": True,
        },
    )
}
"""Published sizes, of the base model. 9b: 8,930 million parameters, of which the blocks hold 1,435
and the perceiver 126.
Source: config.json of HuggingFaceM4/idefics-9b."""

VIEW_224 = PixelSpec(
    size_hw=(224, 224), fit="stretch", resample="bicubic", mean=OPENAI.mean, std=OPENAI.std
)
"""Source: transformers, `image_processing_idefics.py`."""


def build(size: str) -> CrossAttended:
    """A published size with random weights; under `torch.device("meta")`, shapes alone.

    Raises ValueError naming the sizes.
    """
    if size not in SIZES:
        raise ValueError(f"Idefics size {size!r} is not one of {', '.join(SIZES)}")
    said = SIZES[size]
    config = IdeficsConfig(
        **said.text, vision_config=dict(said.vision), perceiver_config=dict(said.perceiver)
    )
    return _compose(config, VIEW_224, mark_id=config.vocab_size + 1).eval()


def load(folder: Path, values: dict[str, Any]) -> CrossAttendedModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    where = str(folder)
    config, text_tokenizer = open_part(AutoConfig, folder), open_part(AutoTokenizer, folder)
    spec = from_transformers(open_part(AutoImageProcessor, folder))
    _require_known(config, spec, text_tokenizer, where)
    key_map = key_map_of(config)
    state, unused = first_names(read_weights(folder), key_map, _unused(config), where)
    mark_id = text_tokenizer.convert_tokens_to_ids(MARK)
    with init_empty_weights(include_buffers=False):
        module = _compose(config, spec, mark_id)
    module.text.tie_weights()  # making parameters empty unties them
    load_weights(module, _joined(state), where, lambda key: published_name(key, key_map))
    module.text.generation_config = GenerationConfig()
    ends_turns = TURN_ENDS in text_tokenizer.get_vocab()
    text_tokenizer.chat_template = TEMPLATE % (TURN_ENDS if ends_turns else AFTER_ANSWERS)
    processor = Processor(
        text_tokenizer,
        spec,
        ImageLayouts(module.tokenizer, module.adaptor, Marked(fence=FENCE)),
        max_tokens=context_of(module.text),
        image_mark=MARK,
        template=Template(parts=True),
    )
    return CrossAttendedModel(
        module=module.eval(),
        processor=processor,
        stop_ids=listed_stop_ids(folder, processor),
        banned_ids=listed_banned_ids(folder, processor, FENCE),
        reference=read_reference(folder, values["model_type"], unused),
    )


def save(model: CrossAttendedModel, folder: Path) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with what has
    changed since (weights, dtype, vocabulary, whether the head is tied).

    Raises ValueError for weights that the layout cannot represent.
    """
    module, reference = model.module, model.reference
    config = IdeficsConfig.from_dict(reference.config)
    key_map = key_map_of(config)
    state = {published_name(key, key_map): t for key, t in plain_state(module).items()}
    values, text_config = reference.config, module.text.config
    values["tie_word_embeddings"] = text_config.tie_word_embeddings
    values["additional_vocab_size"] = text_config.vocab_size - config.vocab_size
    reference.write(folder)
    write_config(values, next(module.text.parameters()).dtype, folder)
    write_grown_tokenizer(model.processor.text_tokenizer, folder)
    save_state({**reference.unused, **_split(state, config)}, folder)


def _compose(config: PreTrainedConfig, spec: PixelSpec, mark_id: int) -> CrossAttended:
    vision = config.vision_config
    same = ("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
            "image_size", "patch_size", "hidden_act", "layer_norm_eps",
            "attention_dropout")  # fmt: skip
    tokenizer = encoders.build(
        encoders.TransformersConfig(
            vision_config={name: getattr(vision, name) for name in same}
            | {"model_type": "clip_vision_model", "hidden_size": vision.embed_dim},
            layer=-1,
            prefix="keep",
            norm=False,
            pooled=False,
            pixel_spec=spec,
        )
    )
    width, heads = config.hidden_size, config.num_attention_heads
    block = GatedBlockConfig(
        width=width,
        memory_width=tokenizer.dim,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=config.intermediate_size,
        eps=config.rms_norm_eps,
        qk_norm=config.qk_layer_norms,
        gate="vector" if config.alpha_type == "vector" else "scalar",
    )
    cross = CrossConfig(
        block=block,
        before=tuple(range(0, config.num_hidden_layers, config.cross_layer_interval)),
        sees="latest",
        blind="feed_forward",
        mark_id=mark_id,
    )
    adaptor = adaptors.build(_adaptor(config, tokenizer.dim))
    return CrossAttended(tokenizer, adaptor, Cross(cross), causal_language_model(_llama(config)))


def _adaptor(config: PreTrainedConfig, width: int) -> dict[str, Any]:
    if not config.use_resampler:
        return {"kind": "identity", "width": width}
    said = config.perceiver_config
    return {
        "kind": "perceiver",
        "width": width,
        "latents": said.resampler_n_latents,
        "depth": said.resampler_depth,
        "heads": said.resampler_n_heads,
        "kv_heads": said.resampler_n_heads,
        "head_width": said.resampler_head_dim,
        "mlp": "relu",
        "mlp_width": 4 * width,
        "norm": "layer",
        "eps": 1e-5,
        "head_norm": said.qk_layer_norms_perceiver,
    }


def _llama(config: PreTrainedConfig) -> LlamaConfig:
    """The language model without its blocks, its tables whole."""
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
            "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
            "tie_word_embeddings")  # fmt: skip
    return LlamaConfig(
        **{name: getattr(config, name) for name in same},
        vocab_size=config.vocab_size + config.additional_vocab_size,
        num_key_value_heads=config.num_attention_heads,
    )


def _require_known(
    config: PreTrainedConfig, spec: PixelSpec, text_tokenizer: Any, where: str
) -> None:
    """Raises ValueError naming each setting of a folder that is not one of the published kind, or
    in which its processor and its weights disagree."""
    side, every = config.vision_config.image_size, config.cross_layer_interval
    expected = {
        "hidden_act": (config.hidden_act, ("silu",)),
        "dropout": (config.dropout, (0,)),
        "alpha_type": (config.alpha_type, ("float", "vector")),
        f"num_hidden_layers % {every}, the cross_layer_interval": (
            config.num_hidden_layers % every,
            (0,),
        ),
        "the image processor's size": (spec.size_hw, ((side, side),)),
    }
    wrong = [
        f"{field}: expected {' or '.join(map(repr, allowed))}, found {found!r}"
        for field, (found, allowed) in expected.items()
        if found not in allowed
    ]
    missing = [token for token in (MARK, FENCE) if token not in text_tokenizer.get_vocab()]
    if missing:
        wrong.append(f"text tokenizer: expected tokens {MARK} and {FENCE}, without {missing}")
    rows = config.vocab_size + config.additional_vocab_size
    if len(text_tokenizer) > rows:
        wrong.append(
            f"text tokenizer: expected at most {rows} tokens, the rows of the tables, found "
            f"{len(text_tokenizer)}"
        )
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}")


TABLES = {
    "model.embed_tokens.weight": "model.embed_tokens.additional_embedding.weight",
    "lm_head.weight": "lm_head.additional_fc.weight",
}
"""A table's first rows, and its last."""
GATES = ("alpha_cross_attn", "alpha_dense")


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights with whole tables, and gates of one axis."""
    joined = {key: t.flatten() if key.endswith(GATES) else t for key, t in state.items()}
    for first, last in TABLES.items():
        if first in joined and last in joined:
            joined[first] = torch.cat([joined[first], joined.pop(last)])
    return joined


def _split(
    state: Mapping[str, Tensor | Made], config: PreTrainedConfig
) -> dict[str, Tensor | Made]:
    """What `_joined` undoes."""
    shape = (1, 1, -1) if config.alpha_type == "vector" else (-1,)
    split = {key: t.view(shape) if key.endswith(GATES) else t for key, t in state.items()}
    for first, last in TABLES.items():
        whole, rows = split.get(first), config.vocab_size
        if whole is None:
            continue
        split[first] = _cut(whole, slice(None, rows))
        if len(whole.like if isinstance(whole, Made) else whole) > rows:
            split[last] = _cut(whole, slice(rows, None))
    return split


def _cut(table: Tensor | Made, rows: slice) -> Tensor | Made:
    if isinstance(table, Made):
        return Made(table.like[rows], lambda: table.make()[rows].clone())
    return Made(table[rows], lambda: table[rows].clone())


def _unused(config: PreTrainedConfig) -> list[str]:
    """Prefixes of weights that folders hold and no model uses: CLIP's closing norm, and what older
    versions of transformers wrote of positions."""
    layers = range(config.num_hidden_layers)
    return [
        "model.vision_model.post_layernorm.",
        "model.vision_model.embeddings.position_ids",
        *(f"model.layers.{layer}.self_attn.rotary_emb." for layer in layers),
        *(f"model.gated_cross_attn_layers.{n}.cross_attn.rotary_emb." for n in layers),
    ]


BLOCK = (
    ("input_layernorm.", "attention_norm."),
    ("cross_attn.q_proj.", "q_proj."),
    ("cross_attn.k_proj.", "k_proj."),
    ("cross_attn.v_proj.", "v_proj."),
    ("cross_attn.o_proj.", "o_proj."),
    ("cross_attn.q_layer_norm.", "q_norm."),
    ("cross_attn.k_layer_norm.", "k_norm."),
    ("alpha_cross_attn", "attention_gate"),
    ("post_attention_layernorm.", "mlp_norm."),
    ("mlp.", "mlp."),
    ("alpha_dense", "mlp_gate"),
)
"""Within a block of cross-attention."""
PERCEIVER_BLOCK = (
    ("0.context_layer_norm.", "norm_context."),
    ("0.latents_layer_norm.", "norm_latents."),
    ("0.q_layer_norm.", "norm_query."),
    ("0.k_layer_norm.", "norm_key."),
    ("0.q_proj.", "query."),
    ("0.k_proj.", "key."),
    ("0.v_proj.", "value."),
    ("0.output_proj.", "out."),
    ("1.ln.", "norm_mlp."),
    ("1.fc.", "mlp.0."),
    ("1.c_proj.", "mlp.2."),
)
"""Within a block of the perceiver."""


def key_map_of(config: PreTrainedConfig) -> KeyMap:
    """(published prefix, our prefix), read in both directions."""
    blocks = range(config.num_hidden_layers // config.cross_layer_interval)
    depth = config.perceiver_config.resampler_depth if config.use_resampler else 0
    perceiver = "model.perceiver_resampler."
    return [
        ("model.vision_model.", "tokenizer.backbone."),
        (f"{perceiver}latents", "adaptor.latents"),
        (f"{perceiver}layer_norm.", "adaptor.norm."),
        *(
            (f"{perceiver}blocks.{n}.{theirs}", f"adaptor.blocks.{n}.{ours}")
            for n in range(depth)
            for theirs, ours in PERCEIVER_BLOCK
        ),
        *(
            (f"model.gated_cross_attn_layers.{n}.{theirs}", f"cross.blocks.{n}.{ours}")
            for n in blocks
            for theirs, ours in BLOCK
        ),
        ("model.embed_tokens.", "text.model.embed_tokens."),
        ("model.layers.", "text.model.layers."),
        ("model.norm.", "text.model.norm."),
        ("lm_head.", "text.lm_head."),
    ]
