"""SigLIP, and SigLIP 2 at fixed sizes: two towers trained by the sigmoid loss, in the layout of
transformers' `SiglipModel`.

Images are stretched to a square; a learned probe reads the patches (384 / 14 uses 378 pixels,
27 x 27 patches). Texts always have the length that the model was trained with, 64 tokens (16 for
So400m/14 at 224), and no attention mask: the state at the last position, mostly a pad, stands for
the text. SigLIP's text tokenizer lower-cases texts and strips their punctuation. That of SigLIP 2's
fixed-size folders (Gemma's) leaves capitals as they are, though the model saw lower case alone:
texts are handed to it as they come, as transformers does; `model.processor.lower_case = True`
makes them what the model was trained on. SigLIP 2 at native resolution is another layout
(`model_type` siglip2).

Source: arXiv 2303.15343 and 2502.14786; google-research/big_vision; transformers, `siglip`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vlm.families.contrastive.model import ContrastiveModel
from vlm.families.contrastive.module import SIGMOID_BIAS, SIGMOID_SCALE, Contrastive
from vlm.pixels import HALF, PixelSpec, from_transformers
from vlm.pooling import OwnPool
from vlm.systems.published import KeyMap
from vlm.systems.published_contrastive import load_published, save_published
from vlm.text.encoders import TextEncoder, build_backbone, plain_config
from vlm.tokenizers import transformers as encoders

SOURCE = "arXiv 2303.15343 and 2502.14786; google/siglip-* and google/siglip2-* on the hub"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A published size, in the words of transformers' configurations.

    vision, text: of the towers. resample: the filter that images are resized with.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    resample: str


_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_LARGE = _BASE | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
_SO400M = _BASE | {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
_GIANT = _BASE | {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
}
TOWERS = {"base": _BASE, "large": _LARGE, "so400m": _SO400M, "giant": _GIANT}
"""Shape-optimised "so400m": arXiv 2305.13035; the others are ViT-B, ViT-L, and ViT-g of
arXiv 2502.14786. Source: config.json of google/siglip*."""

VOCABULARY, VOCABULARY_2 = 32_000, 256_000
"""Of SigLIP's English SentencePiece and of Gemma's, which SigLIP 2 uses."""


def _size(tower: str, patch: int, side: int, *, second: bool, length: int = 64) -> Size:
    text = TOWERS["so400m" if tower == "giant" else tower]
    vision = TOWERS[tower]
    return Size(
        vision={
            "model_type": "siglip_vision_model",
            **vision,
            "image_size": side,
            "patch_size": patch,
        },
        text={
            "model_type": "siglip_text_model",
            **text,
            "vocab_size": VOCABULARY_2 if second else VOCABULARY,
            "max_position_embeddings": length,
            "projection_size": vision["hidden_size"],
        },
        resample="bilinear" if second else "bicubic",
    )


SIZES = {
    "siglip-base-patch16-224": _size("base", 16, 224, second=False),
    "siglip-base-patch16-256": _size("base", 16, 256, second=False),
    "siglip-base-patch16-384": _size("base", 16, 384, second=False),
    "siglip-base-patch16-512": _size("base", 16, 512, second=False),
    "siglip-large-patch16-256": _size("large", 16, 256, second=False),
    "siglip-large-patch16-384": _size("large", 16, 384, second=False),
    "siglip-so400m-patch14-224": _size("so400m", 14, 224, second=False, length=16),
    "siglip-so400m-patch14-384": _size("so400m", 14, 384, second=False),
    "siglip2-base-patch32-256": _size("base", 32, 256, second=True),
    "siglip2-base-patch16-224": _size("base", 16, 224, second=True),
    "siglip2-base-patch16-256": _size("base", 16, 256, second=True),
    "siglip2-base-patch16-384": _size("base", 16, 384, second=True),
    "siglip2-base-patch16-512": _size("base", 16, 512, second=True),
    "siglip2-large-patch16-256": _size("large", 16, 256, second=True),
    "siglip2-large-patch16-384": _size("large", 16, 384, second=True),
    "siglip2-large-patch16-512": _size("large", 16, 512, second=True),
    "siglip2-so400m-patch14-224": _size("so400m", 14, 224, second=True),
    "siglip2-so400m-patch14-384": _size("so400m", 14, 384, second=True),
    "siglip2-so400m-patch16-256": _size("so400m", 16, 256, second=True),
    "siglip2-so400m-patch16-384": _size("so400m", 16, 384, second=True),
    "siglip2-so400m-patch16-512": _size("so400m", 16, 512, second=True),
    "siglip2-giant-opt-patch16-256": _size("giant", 16, 256, second=True),
    "siglip2-giant-opt-patch16-384": _size("giant", 16, 384, second=True),
}
"""Published sizes, named as on the hub. Source: config.json of google/{name}."""


def build(size: str) -> Contrastive:
    """A published size with random weights; under `torch.device("meta")`, shapes alone.

    Raises ValueError naming the sizes.
    """
    if size not in SIZES:
        raise ValueError(f"SigLIP size {size!r} is not one of {', '.join(SIZES)}")
    sizes = SIZES[size]
    side = sizes.vision["image_size"]
    spec = PixelSpec(
        size_hw=(side, side), fit="stretch", resample=sizes.resample, mean=HALF.mean, std=HALF.std
    )
    return compose(sizes.vision, sizes.text, spec).eval()


def compose(vision: dict[str, Any], text: dict[str, Any], pixel_spec: PixelSpec) -> Contrastive:
    """SigLIP's architecture with random weights.

    vision, text: configurations of transformers' two towers, which end in one width.
    """
    tokenizer = encoders.build(
        encoders.TransformersConfig(
            vision_config=vision,
            layer=-1,
            prefix="drop",
            norm=True,
            pooled=True,
            pixel_spec=pixel_spec,
        )
    )
    return Contrastive(
        tokenizer,
        OwnPool(),
        nn.Identity(),
        TextEncoder(build_backbone(text), "own", masked=False),
        nn.Identity(),
        scale=SIGMOID_SCALE,
        bias=SIGMOID_BIAS,
    )


def load(folder: Path, values: dict[str, Any]) -> ContrastiveModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    return load_published(
        folder,
        "siglip",
        KEY_MAP,
        UNUSED,
        lambda config, reader: compose(
            plain_config(config.vision_config),
            plain_config(config.text_config),
            from_transformers(reader.image_processor),
        ),
        pad_to_length=True,
    )


def save(model: ContrastiveModel, folder: Path) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with the
    weights as they are now.

    Raises ValueError for weights that the layout cannot represent.
    """
    save_published(model, folder, KEY_MAP, scalar_shape=(1,))


UNUSED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""0, 1, 2, ..., which older folders may hold."""

KEY_MAP: KeyMap = [
    ("vision_model.", "tokenizer.backbone."),
    ("vision_model.vision_model.", "tokenizer.backbone."),  # of a tower saved by itself
    ("text_model.", "text.backbone."),
    ("text_model.text_model.", "text.backbone."),
    ("logit_scale", "log_scale"),
    ("logit_bias", "bias"),
]
"""(published prefix, our prefix), read in both directions."""
