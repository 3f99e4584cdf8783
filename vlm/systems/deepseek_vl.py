"""DeepSeek-VL, 1.3B and 7B: image tokens through an MLP into a LLaMA-shaped language model.

1.3B: SigLIP-L at 384 pixels, 576 tokens, a two-layer MLP. 7B: besides, SAM-B at 1024 pixels on
the same 24 x 24 grid; each tower has its own linear map, then both are joined, high first.

Parameters by pattern, for stages: "adaptor.*", "text.*", and for 1.3B "tokenizer.*", for 7B
"tokenizer.low.*" (SigLIP) and "tokenizer.high.*" (all that sees high resolution:
"tokenizer.high.backbone.*" is SAM itself, the rest brings it to the grid). The authors' third
stage freezes "tokenizer.high.*".

Folders are those that transformers writes. SigLIP's pooling head is no part of the system:
published folders lack it (`vision_use_head` false), and where a folder has one it is skipped and
said to be absent when the folder is written again; transformers' class then opens it complete,
and never used it. Layouts from before transformers knew the system (`model_type` multi_modality)
are not read.

Source: arXiv 2403.05525; github.com/deepseek-ai/DeepSeek-VL; transformers, `deepseek_vl` and
`deepseek_vl_hybrid`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from vlm import adaptors
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly, ImageLayouts
from vlm.families.decoder_only.processor import Processor
from vlm.families.published_files import open_part, read_reference
from vlm.image_tokens import ImageTokenizer
from vlm.merge import plain_state
from vlm.pixels import PixelSpec, from_transformers, pair_from_transformers
from vlm.pixels.spec import HALF, OPENAI
from vlm.systems.compose import context_of
from vlm.systems.published import (
    KeyMap,
    architecture,
    first_names,
    listed_banned_ids,
    listed_stop_ids,
    published_name,
    write_config,
    write_grown_tokenizer,
)
from vlm.tokenizers import paired, sam_hybrid
from vlm.tokenizers import transformers as encoders
from vlm.weights import load_weights, read_weights, save_weights

SOURCE = "arXiv 2403.05525; deepseek-community/deepseek-vl-{1.3b,7b}-{base,chat} on the hub"

SYSTEM_MESSAGE = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
"""Source: deepseek-ai/DeepSeek-VL, `deepseek_vl/models/processing_vlm.py`."""

IMAGE_MARK = "<image_placeholder>"

CHAT_TEMPLATE = f"""\
{{%- if messages[0]['role'] == 'system' -%}}
{{%- set system, turns = messages[0]['content'], messages[1:] -%}}
{{%- else -%}}
{{%- set system, turns = '{SYSTEM_MESSAGE}', messages -%}}
{{%- endif -%}}
{{%- if system -%}}{{{{ system + '\\n\\n' }}}}{{%- endif -%}}
{{%- for turn in turns -%}}
{{%- if turn['role'] == 'user' -%}}
{{{{ 'User: ' + turn['content'] | trim + '\\n\\n' }}}}
{{%- else -%}}
{{{{ 'Assistant: ' + turn['content'] | trim + eos_token }}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{ 'Assistant:' }}}}{{%- endif -%}}"""
"""The published conversation, for contents that are plain text. A system message stands in place
of the fixed one, as in the authors' code; an empty one removes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A published size, in the words of transformers' configurations.

    vision: SigLIP's. high: SAM's, or None. text: the language model's.
    """

    vision: dict[str, Any]
    high: dict[str, Any] | None
    text: dict[str, Any]


SIGLIP_L = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}
"""SigLIP-L/16-384 with exact GELU. Source: deepseek-ai/DeepSeek-VL, `siglip_vit.py`."""

SAM_B = {
    "model_type": "sam_vision_model",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_dim": 3072,
    "output_channels": 256,
    "image_size": 1024,
    "patch_size": 16,
    "window_size": 14,
    "global_attn_indexes": [2, 5, 8, 11],
}
"""Source: deepseek-ai/DeepSeek-VL, `sam.py`, `create_sam_vit`."""

TEXT = {
    "vocab_size": 102400,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "tie_word_embeddings": False,
}

SIZES = {
    "1.3b": Size(
        vision=SIGLIP_L,
        high=None,
        text=TEXT
        | {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
    "7b": Size(
        vision=SIGLIP_L,
        high=SAM_B,
        text=TEXT
        | {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 30,
            "num_attention_heads": 32,
        },
    ),
}
"""Published sizes, named as the authors do, after their language models. In billions of parameters
the language models' blocks hold 1.23 and 6.07, with both vocabulary matrices 1.65 and 6.91; the
whole systems 1.963 and 7.331, and with SigLIP's unused pooling head 1.975 and 7.344, which are the
3.95 and 14.69 GB of 16 bits that the authors publish.
Source: config.json and file sizes of deepseek-ai/deepseek-vl-{1.3b,7b}-base."""

LOW_384 = PixelSpec(
    size_hw=(384, 384),
    fit="pad",
    resample="bilinear",
    rounding="half_even",
    min_side_px=14,
    pad_rgb=(127, 127, 127),
    mean=HALF.mean,
    std=HALF.std,
)
HIGH_1024 = PixelSpec(
    size_hw=(1024, 1024),
    fit="pad",
    resample="bicubic",
    rounding="half_even",
    min_side_px=14,
    pad_rgb=(122, 116, 104),
    mean=OPENAI.mean,
    std=OPENAI.std,
)
"""Source: transformers, `convert_deepseek_vl_hybrid_weights_to_hf.py`; padding is the mean colour
cut to whole levels."""


def build(size: str) -> DecoderOnly:
    """A published size with random weights; under `torch.device("meta")`, shapes alone.

    Raises ValueError naming the sizes.
    """
    if size not in SIZES:
        raise ValueError(f"DeepSeek-VL size {size!r} is not one of {', '.join(SIZES)}")
    sizes = SIZES[size]
    tokenizer = _image_tokenizer(sizes.vision, sizes.high, LOW_384, HIGH_1024)
    return _compose(tokenizer, LlamaConfig(**sizes.text)).eval()


def load(folder: Path, values: dict[str, Any]) -> DecoderOnlyModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    where = str(folder)
    model_type = values["model_type"]
    config, reader = open_part(AutoConfig, folder), open_part(AutoProcessor, folder)
    state, unused = first_names(read_weights(folder), KEY_MAPS[model_type], UNUSED, where)
    text_config = config.text_config
    text_config.tie_word_embeddings = config.tie_word_embeddings and not _has_own_head(state)
    high = getattr(config, "high_res_vision_config", None)
    if high is None:
        low_spec, high_spec = from_transformers(reader.image_processor), None
    else:
        high_spec, low_spec = pair_from_transformers(reader.image_processor)
    with init_empty_weights(include_buffers=False):
        tokenizer = _image_tokenizer(
            architecture(config.vision_config), high and architecture(high), low_spec, high_spec
        )
        module = _compose(tokenizer, text_config)
    module.text.tie_weights()  # making parameters empty unties them
    load_weights(module, state, where, lambda key: published_name(key, KEY_MAPS[model_type]))
    module.text.generation_config = GenerationConfig()
    processor = Processor(
        with_template(reader.tokenizer),
        module.tokenizer.pixel_spec,
        ImageLayouts(module.tokenizer, module.adaptor),
        max_tokens=context_of(module.text),
        image_mark=reader.image_token,
    )
    count = processor.layout_for(low_spec.size_hw).length
    if count != reader.num_image_tokens:
        raise ValueError(
            f"{where}: the processor writes {reader.num_image_tokens} image tokens for an image, "
            f"the model gives {count}"
        )
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
    reference = model.reference
    key_map = KEY_MAPS[reference.model_type]
    module = model.module
    for key in plain_state(module):
        published_name(key, key_map)  # before anything is written
    reference.write(folder)
    config, text_config = reference.config, module.text.config
    tied = text_config.tie_word_embeddings
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    config["text_config"]["vocab_size"] = text_config.vocab_size
    if not reference.unused:
        config["vision_config"]["vision_use_head"] = False
    write_config(config, next(module.text.parameters()).dtype, folder)
    write_grown_tokenizer(model.processor.text_tokenizer, folder)
    name = partial(published_name, key_map=key_map)
    save_weights(module, folder, name, beside=reference.unused)


def with_template(text_tokenizer):
    """The tokenizer, its chat template now `CHAT_TEMPLATE`, after the token with which it begins
    every text, where it does."""
    begins = bool(text_tokenizer("")["input_ids"])
    text_tokenizer.chat_template = ("{{- bos_token -}}\n" if begins else "") + CHAT_TEMPLATE
    return text_tokenizer


def _image_tokenizer(
    vision: dict[str, Any],
    high: dict[str, Any] | None,
    low_spec: PixelSpec,
    high_spec: PixelSpec | None,
) -> ImageTokenizer:
    low_tower = encoders.build(
        encoders.TransformersConfig(
            vision_config=vision,
            layer=-1,
            prefix="drop",
            norm=True,
            pooled=False,
            pixel_spec=low_spec,
        )
    )
    if high is None:
        return low_tower
    side = vision["image_size"] // vision["patch_size"]
    high_tower = sam_hybrid.build(
        sam_hybrid.SamHybridConfig(vision_config=high, grid_hw=(side, side), pixel_spec=high_spec)
    )
    neck = paired.SameGridNeck(high_tower.dim)
    return paired.PairedTokenizer(high_tower, low_tower, low_from="high", high_neck=neck)


def _compose(tokenizer: ImageTokenizer, text_config: PreTrainedConfig) -> DecoderOnly:
    width = text_config.hidden_size
    if isinstance(tokenizer, paired.PairedTokenizer):
        bridge = {
            "kind": "split_mlp",
            "high_width": tokenizer.high_neck.dim,
            "low_width": tokenizer.low.dim,
        }
    else:
        bridge = {"kind": "mlp", "in_width": tokenizer.dim, "depth": 2}
    adaptor = adaptors.build(bridge | {"hidden_width": width, "out_width": width})
    return DecoderOnly(tokenizer, adaptor, AutoModelForCausalLM.from_config(text_config))


def _has_own_head(state: dict[str, Tensor]) -> bool:
    """Whether the language model's head differs from its embeddings. Class defaults say that they
    are tied, and published folders, which are not, may leave the default out."""
    head, embeddings = state.get(HEAD), state.get(EMBEDDINGS)
    if head is None or embeddings is None:
        return False
    return head.shape != embeddings.shape or not torch.equal(head, embeddings)


HEAD = "lm_head.weight"
EMBEDDINGS = "model.language_model.embed_tokens.weight"

UNUSED = ("model.vision_model.vision_model.head.", "model.vision_model.head.")
"""SigLIP's pooling head, in older and newer names."""

_SHARED: KeyMap = [
    ("model.language_model.", "text.model."),
    ("lm_head.", "text.lm_head."),
]

KEY_MAPS: dict[str, KeyMap] = {
    "deepseek_vl": [
        ("model.vision_model.vision_model.", "tokenizer.backbone."),
        ("model.vision_model.", "tokenizer.backbone."),  # as transformers 5 writes it
        ("model.aligner.linear1.", "adaptor.layers.0."),
        ("model.aligner.linear2.", "adaptor.layers.2."),
        *_SHARED,
    ],
    "deepseek_vl_hybrid": [
        ("model.vision_model.vision_model.", "tokenizer.low.backbone."),
        ("model.vision_model.", "tokenizer.low.backbone."),
        ("model.high_res_vision_model.", "tokenizer.high.backbone."),
        ("model.high_res_vision_neck.", "tokenizer.high.global_neck."),
        ("model.high_res_vision_proj.conv1.", "tokenizer.high.shrink.0."),
        ("model.high_res_vision_proj.conv2.", "tokenizer.high.shrink.1."),
        ("model.high_res_vision_alpha", "tokenizer.high.alpha"),
        ("model.aligner.high_res_vision_proj.", "adaptor.high."),
        ("model.aligner.vision_proj.", "adaptor.low."),
        ("model.aligner.proj.", "adaptor.out."),
        *_SHARED,
    ],
}
"""`model_type` -> (published prefix, our prefix), read in both directions."""
