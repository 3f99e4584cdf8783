"""PaliGemma and PaliGemma 2: SigLIP's tokens through one linear map, read by Gemma as a prefix.

Images are stretched to a square of 224, 448 or 896 pixels, 14 to a patch: 256, 1024 or 4096
image tokens. Image and prompt see each other, the answer is causal (`vlm.families.
prefix_decoder`). Text vectors are multiplied by the square root of their width, which Gemma's own
embedding does; image tokens are not.

Parameters by pattern, for stages: "tokenizer.*" (SigLIP), "adaptor.*", "text.*" (Gemma). The
authors freeze nothing.

Folders are those that transformers writes or the authors published; their names of weights differ,
and the authors' are written. SigLIP's pooling head is no part of the system; where
a folder has one it is kept and written back.

Source: arXiv 2407.07726 (PaliGemma), 2412.03555 (PaliGemma 2); github.com/google-research/
big_vision, `configs/proj/paligemma`; transformers, `paligemma`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
)

from vlm import adaptors
from vlm.box_codecs import LocTokens
from vlm.families.decoder_only.chat_template import SLOT
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.module import ImageLayouts
from vlm.families.decoder_only.processor import Processor
from vlm.families.prefix_decoder.model import PrefixDecoderModel
from vlm.families.prefix_decoder.module import PrefixDecoder
from vlm.families.published_files import open_part, read_reference
from vlm.image_tokens import ImageTokenizer
from vlm.merge import plain_state
from vlm.pixels import PixelSpec, from_transformers
from vlm.pixels.spec import HALF
from vlm.systems.compose import context_of
from vlm.systems.published import (
    KeyMap,
    architecture,
    first_names,
    listed_banned_ids,
    listed_stop_ids,
    published_name,
    require_rows,
    write_config,
    write_grown_tokenizer,
)
from vlm.tokenizers import transformers as encoders
from vlm.weights import load_weights, read_weights, save_weights

SOURCE = "arXiv 2407.07726 and 2412.03555; google/paligemma{,2}-* on the hub"

PROMPTS = {
    "caption": "caption en",
    "answer": "answer en {question}",
    "detect": "detect {phrase}",
    "segment": "segment {phrase}",
    "ocr": "ocr",
}
"""What the published models were trained on, in English. Several things are separated by " ; ". A
detected box is written as four <loc> tokens, a space and its phrase; a segment as these four, 16
<seg> tokens, and the same. Source: arXiv 2407.07726, section 3.2.5; big_vision,
`configs/proj/paligemma/README.md`."""
CAPTION_PROMPT = PROMPTS["caption"]

LOC = LocTokens(bins=1024, order="yxyx", frame="input")
SEG_TOKENS = tuple(f"<seg{number:03d}>" for number in range(128))
"""Codes of a mask's 16 tokens, one id each."""

CHAT_TEMPLATE = f"""\
{{%- if messages[0]['role'] != 'user' or messages | length > 2 -%}}
{{{{- raise_exception("expected one user's prompt and at most its answer") -}}}}
{{%- endif -%}}
{{%- set prompt = messages[0]['content'] -%}}
{{%- set start = prompt.rfind('{SLOT}') + 1 -%}}
{{{{- prompt[:start] + bos_token + prompt[start:] + '\\n' -}}}}
{{%- if messages | length == 2 -%}}{{{{- messages[1]['content'] + eos_token -}}}}{{%- endif -%}}"""
"""The published form, for contents that are plain text with marked images: what is up to the last
image, the token that begins texts, the prompt, a line break; then the answer and its end.
Source: transformers, `PaliGemmaProcessor`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A published size, in the words of transformers' configurations.

    vision: SigLIP's. text: the language model's.
    """

    vision: dict[str, Any]
    text: dict[str, Any]


SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}
"""SigLIP So400m/14. Source: big_vision, `configs/proj/paligemma`; google/paligemma-3b-pt-224,
config.json."""

VOCABULARY = 257_216
"""Rows of the embedding table: 256,000 of Gemma, 1024 <loc>, 128 <seg>, <image>, and spare ones."""

_GEMMA_2 = {"model_type": "gemma2", "vocab_size": VOCABULARY, "query_pre_attn_scalar": 256}

TEXTS = {
    "paligemma-3b": {
        "model_type": "gemma",
        "vocab_size": VOCABULARY,
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    },
    "paligemma2-3b": _GEMMA_2
    | {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "paligemma2-10b": _GEMMA_2
    | {
        "hidden_size": 3584,
        "intermediate_size": 14_336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "paligemma2-28b": _GEMMA_2
    | {
        "hidden_size": 4608,
        "intermediate_size": 36_864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
    },
}
"""Language models by size: Gemma 2B, and Gemma 2 of 2B, 9B and 27B, named as the whole systems are.
Source: config.json of google/paligemma-3b-pt-224 and google/paligemma2-{3b,10b,28b}-pt-224."""

PIXELS = (224, 448, 896)

SIZES = {
    f"{name}-{px}": Size(vision=SO400M | {"image_size": px}, text=text)
    for name, text in TEXTS.items()
    for px in PIXELS
}
"""Published sizes. In billions of parameters at 224 pixels 2.92, 3.03, 9.66 and 27.65."""


def spec(side_px: int) -> PixelSpec:
    """The published preprocessing: stretched to a square, bicubic, to -1 to 1."""
    return PixelSpec(
        size_hw=(side_px, side_px),
        fit="stretch",
        resample="bicubic",
        mean=HALF.mean,
        std=HALF.std,
    )


def build(size: str) -> PrefixDecoder:
    """A published size with random weights; under `torch.device("meta")`, shapes alone.

    Raises ValueError naming the sizes.
    """
    if size not in SIZES:
        raise ValueError(f"PaliGemma size {size!r} is not one of {', '.join(SIZES)}")
    sizes = SIZES[size]
    text_config = CONFIG_MAPPING[sizes.text["model_type"]](**sizes.text)
    tokenizer = _image_tokenizer(sizes.vision, spec(sizes.vision["image_size"]))
    return _compose(tokenizer, text_config).eval()


def load(folder: Path, values: dict[str, Any]) -> PrefixDecoderModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    where = str(folder)
    config, reader = open_part(AutoConfig, folder), open_part(AutoProcessor, folder)
    state, unused = first_names(read_weights(folder), KEY_MAP, UNUSED, where)
    text_config = config.text_config
    text_config.tie_word_embeddings = config.tie_word_embeddings
    with init_empty_weights(include_buffers=False):
        tokenizer = _image_tokenizer(
            architecture(config.vision_config), from_transformers(reader.image_processor)
        )
        module = _compose(tokenizer, text_config)
    module.text.tie_weights()  # making parameters empty unties them
    load_weights(module, state, where, lambda key: published_name(key, KEY_MAP))
    module.text.generation_config = GenerationConfig()
    text_tokenizer = reader.tokenizer
    require_rows(text_tokenizer, text_config.vocab_size, where)
    text_tokenizer.chat_template = CHAT_TEMPLATE
    processor = Processor(
        text_tokenizer,
        tokenizer.pixel_spec,
        ImageLayouts(module.tokenizer, module.adaptor),
        max_tokens=context_of(module.text),
        box_codec=LOC,
        image_mark=reader.image_token,
        prefix=True,
        framed=True,
    )
    count = processor.layout_for(tokenizer.pixel_spec.size_hw).length
    if count != reader.image_seq_length:
        raise ValueError(
            f"{where}: the processor writes {reader.image_seq_length} image tokens for an image, "
            f"the model gives {count}"
        )
    model = PrefixDecoderModel(
        module=module.eval(),
        processor=processor,
        stop_ids=listed_stop_ids(folder, processor),
        banned_ids=listed_banned_ids(folder, processor),
        reference=read_reference(folder, values["model_type"], unused),
    )
    ask_as_published(model)
    return model


def ask_as_published(model: DecoderOnlyModel) -> None:
    """Gives a model the published prompts and form of answers, in place."""
    model.caption_prompt = CAPTION_PROMPT
    model.answer_prompt = PROMPTS["answer"]
    model.ground_prompt, model.labelled_boxes = PROMPTS["detect"], True
    model.ocr_prompt = PROMPTS["ocr"]


def save(model: PrefixDecoderModel, folder: Path) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with what has
    changed since (weights, dtype, vocabulary).

    Raises ValueError for weights that the layout cannot represent.
    """
    module = model.module
    for key in plain_state(module):
        published_name(key, KEY_MAP)  # before anything is written
    model.reference.write(folder)
    config = model.reference.config
    config["text_config"]["vocab_size"] = module.text.config.vocab_size
    if not model.reference.unused:
        config["vision_config"]["vision_use_head"] = False
    write_config(config, next(module.text.parameters()).dtype, folder)
    write_grown_tokenizer(model.processor.text_tokenizer, folder)
    name = partial(published_name, key_map=KEY_MAP)
    save_weights(module, folder, name, beside=model.reference.unused)


def _image_tokenizer(vision: dict[str, Any], pixel_spec: PixelSpec) -> ImageTokenizer:
    return encoders.build(
        encoders.TransformersConfig(
            vision_config=vision,
            layer=-1,
            prefix="drop",
            norm=True,
            pooled=False,
            pixel_spec=pixel_spec,
        )
    )


def _compose(tokenizer: ImageTokenizer, text_config: PreTrainedConfig) -> PrefixDecoder:
    width = text_config.hidden_size
    bridge = {"kind": "mlp", "in_width": tokenizer.dim, "depth": 1}
    adaptor = adaptors.build(bridge | {"hidden_width": width, "out_width": width})
    return PrefixDecoder(tokenizer, adaptor, AutoModelForCausalLM.from_config(text_config))


UNUSED = (
    "vision_tower.vision_model.head.",
    "model.vision_tower.vision_model.head.",
    "vision_tower.head.",
    "model.vision_tower.head.",
)
"""SigLIP's pooling head, in older and newer names."""

KEY_MAP: KeyMap = [
    ("vision_tower.vision_model.", "tokenizer.backbone."),
    ("vision_tower.", "tokenizer.backbone."),
    ("model.vision_tower.vision_model.", "tokenizer.backbone."),
    ("model.vision_tower.", "tokenizer.backbone."),
    ("multi_modal_projector.linear.", "adaptor.layers.0."),
    ("model.multi_modal_projector.linear.", "adaptor.layers.0."),
    ("language_model.model.", "text.model."),
    ("language_model.", "text.model."),
    ("model.language_model.", "text.model."),
    ("language_model.lm_head.", "text.lm_head."),
    ("lm_head.", "text.lm_head."),
]
"""(published prefix, our prefix), read in both directions: the authors' folders, and those of
transformers 5."""
