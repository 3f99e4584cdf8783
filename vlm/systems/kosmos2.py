"""Kosmos-2: CLIP's tokens read by 64 latents, in the stream of a causal language model of its own.

Tokens are those of CLIP L/14 at 224 pixels after its closing norm, the class token among them.
Latents see them and each other in one attention, and stand in the stream between `<image>` and
`</image>`. The language model has LayerNorms inside its layers ("Magneto") and multiplies all
vectors by the square root of their width, those of images too.

Places are written with tokens of a 32 x 32 grid over the image, `<patch_index_0000>` to
`<patch_index_1023>`: the cells of a box's upper left and lower right corner, after the phrase that
they ground, `<phrase> a dog</phrase><object><patch_index_0044><patch_index_0863></object>`. A
prompt that begins with `<grounding>` asks for that. Each of these tokens is one id, which decoding
keeps.

Parameters by pattern, for stages: "tokenizer.*" (CLIP), "adaptor.*", "text.*".

Folders are those that the authors published and those that transformers writes.

Source: arXiv 2306.14824; microsoft/kosmos-2-patch14-224 on the hub; transformers, `kosmos2`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoProcessor, GenerationConfig, Kosmos2Config

from vlm import adaptors
from vlm.box_codecs import KOSMOS2, KOSMOS2_PROMPT
from vlm.families.decoder_only.chat_template import SLOT
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly, ImageLayouts
from vlm.families.decoder_only.processor import Processor
from vlm.families.published_files import open_part, read_reference
from vlm.pixels import PixelSpec, from_transformers
from vlm.systems.compose import context_of
from vlm.systems.published import (
    KeyMap,
    first_names,
    listed_stop_ids,
    published_name,
    require_rows,
    save_decoder_only,
)
from vlm.text.causal import causal_language_model
from vlm.tokenizers import transformers as encoders
from vlm.weights import load_weights, read_weights

SOURCE = "arXiv 2306.14824; microsoft/kosmos-2-patch14-224 on the hub"

PROMPTS = {
    "caption": "An image of",
    "answer": "Question: {question} Answer:",
    "ground": KOSMOS2_PROMPT,
    "caption, grounded": "<grounding> An image of",
    "describe, grounded": "<grounding> Describe this image in detail:",
    "answer, grounded": "<grounding> Question: {question} Answer:",
}
"""What asks for what. Source: arXiv 2306.14824, section 4; the card of
microsoft/kosmos-2-patch14-224."""
CAPTION_PROMPT = PROMPTS["caption"]

IMAGE_MARK, IMAGE_END = "<image>", "</image>"

DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
"""Of the language model, 0.1 in part in published folders; here none drops, so that a run's losses
are the same however it is split."""

CHAT_TEMPLATE = f"""\
{{{{- bos_token -}}}}
{{%- for message in messages -%}}
{{{{- ' ' + message['content'] | replace('{SLOT}', '{IMAGE_MARK}{SLOT}{IMAGE_END} ') -}}}}
{{%- if message['role'] == 'assistant' -%}}{{{{- eos_token -}}}}{{%- endif -%}}
{{%- endfor -%}}"""
"""The form of its training data, for contents that are plain text with marked images: texts one
after the other, each answer ended. Source: transformers, `Kosmos2Processor`."""

CLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)


def load(folder: Path, values: dict[str, Any]) -> DecoderOnlyModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    where = str(folder)
    config, reader = open_part(AutoConfig, folder), open_part(AutoProcessor, folder)
    state, unused = first_names(read_weights(folder), KEY_MAP, UNUSED, where)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    spec = from_transformers(reader.image_processor)
    _require_size(spec, config, where)
    with init_empty_weights(include_buffers=False):
        module = compose(config, spec)
    module.text.tie_weights()  # making parameters empty unties them
    load_weights(module, state, where, lambda key: published_name(key, KEY_MAP))
    module.text.generation_config = GenerationConfig()
    text_tokenizer = reader.tokenizer
    require_rows(text_tokenizer, config.text_config.vocab_size, where)
    text_tokenizer.chat_template = CHAT_TEMPLATE
    processor = Processor(
        text_tokenizer,
        spec,
        ImageLayouts(module.tokenizer, module.adaptor),
        max_tokens=context_of(module.text),
        image_mark=IMAGE_MARK,
        framed=True,
        box_codec=KOSMOS2,
    )
    return DecoderOnlyModel(
        module=module.eval(),
        processor=processor,
        stop_ids=listed_stop_ids(folder, processor),
        caption_prompt=CAPTION_PROMPT,
        answer_prompt=PROMPTS["answer"],
        ground_prompt=PROMPTS["ground"],
        reference=read_reference(folder, values["model_type"], unused),
    )


def save(model: DecoderOnlyModel, folder: Path) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with what has
    changed since (weights, dtype, vocabulary).

    Raises ValueError for weights that the layout cannot represent.
    """
    save_decoder_only(model, folder, KEY_MAP)


def compose(config: Kosmos2Config, pixel_spec: PixelSpec) -> DecoderOnly:
    """The system of a configuration of transformers, with random weights; under
    `torch.device("meta")`, shapes alone. The configuration's defaults are the published size, of
    1664.5 million parameters."""
    tokenizer = encoders.build(
        encoders.TransformersConfig(
            vision_config={name: getattr(config.vision_config, name) for name in CLIP_FIELDS}
            | {"model_type": "clip_vision_model"},
            layer=-1,
            prefix="keep",
            norm=True,
            pooled=False,
            pixel_spec=pixel_spec,
        )
    )
    adaptor = adaptors.build(
        {
            "kind": "latent_attention",
            "in_width": tokenizer.dim,
            "out_width": config.text_config.embed_dim,
            "queries": config.latent_query_num,
            "heads": config.text_config.attention_heads,
        }
    )
    text = copy.deepcopy(config.text_config)
    for name in DROPOUTS:
        setattr(text, name, 0.0)
    return DecoderOnly(tokenizer, adaptor, causal_language_model(text))


def _require_size(spec: PixelSpec, config: Kosmos2Config, where: str) -> None:
    """Raises ValueError where the image processor gives other pixels than CLIP has positions for:
    its class takes no others."""
    side = config.vision_config.image_size
    if spec.size_hw != (side, side):
        raise ValueError(
            f"{where}: expected images of {side} x {side} pixels, as the vision encoder has "
            f"positions for, found {spec.size_hw[0]} x {spec.size_hw[1]} of the image processor"
        )


UNUSED = (
    "vision_model.model.embeddings.position_ids",
    "text_model.model.embed_positions.weights",
)
"""Tables that older versions of transformers may have written, and that are made anew."""

KEY_MAP: KeyMap = [
    ("vision_model.model.", "tokenizer.backbone."),
    ("image_to_text_projection.dense.", "adaptor.project."),
    ("image_to_text_projection.latent_query", "adaptor.latents"),
    ("image_to_text_projection.x_attn.q_proj.", "adaptor.query."),
    ("image_to_text_projection.x_attn.k_proj.", "adaptor.key."),
    ("image_to_text_projection.x_attn.v_proj.", "adaptor.value."),
    ("image_to_text_projection.x_attn.out_proj.", "adaptor.out."),
    ("text_model.", "text."),
]
"""(published prefix, our prefix), read in both directions."""
