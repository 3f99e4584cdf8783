"""CLIP: two towers trained by the softmax loss, in the layout of transformers' `CLIPModel`.

Covers OpenAI's models and those of LAION and others that are published in this layout (LAION's
with plain GELU). The image's vector is the class token after the final layer norm, the text's
the state at its end token; each passes a linear layer without bias. Folders from before
transformers 4.31 say `eos_token_id` 2, which is no end token: there the largest id of a row is
taken, as the authors' code does.

Source: arXiv 2103.00020; github.com/openai/CLIP; transformers, `clip`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vlm.families.contrastive.model import ContrastiveModel
from vlm.families.contrastive.module import SOFTMAX_SCALE, Contrastive
from vlm.pixels import OPENAI, PixelSpec, from_transformers
from vlm.pooling import OwnPool
from vlm.systems.published import KeyMap
from vlm.systems.published_contrastive import load_published, save_published
from vlm.text.encoders import TextEncoder, build_backbone, plain_config
from vlm.tokenizers import transformers as encoders

SOURCE = "arXiv 2103.00020; openai/clip-vit-* and laion/CLIP-* on the hub"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A published size, in the words of transformers' configurations.

    vision, text: of the towers. width: of the shared space.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    width: int


VISION_B = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
VISION_L = VISION_B | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
TEXT_B = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
TEXT_L = TEXT_B | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
"""Source: arXiv 2103.00020, table 20; config.json of openai/clip-vit-*."""

SIZES = {
    "clip-vit-base-patch32": Size(vision=VISION_B | {"patch_size": 32}, text=TEXT_B, width=512),
    "clip-vit-base-patch16": Size(vision=VISION_B | {"patch_size": 16}, text=TEXT_B, width=512),
    "clip-vit-large-patch14": Size(vision=VISION_L, text=TEXT_L, width=768),
    "clip-vit-large-patch14-336": Size(
        vision=VISION_L | {"image_size": 336}, text=TEXT_L, width=768
    ),
}
"""Published sizes, named as on the hub. Source: config.json of openai/{name}."""


def build(size: str) -> Contrastive:
    """A published size with random weights; under `torch.device("meta")`, shapes alone.

    Raises ValueError naming the sizes.
    """
    if size not in SIZES:
        raise ValueError(f"CLIP size {size!r} is not one of {', '.join(SIZES)}")
    sizes = SIZES[size]
    side = sizes.vision["image_size"]
    spec = PixelSpec(
        size_hw=(side, side), fit="crop", resample="bicubic", mean=OPENAI.mean, std=OPENAI.std
    )
    return compose(sizes.vision, sizes.text, sizes.width, spec).eval()


def compose(
    vision: dict[str, Any], text: dict[str, Any], width: int, pixel_spec: PixelSpec
) -> Contrastive:
    """CLIP's architecture with random weights.

    vision, text: configurations of transformers' two towers. width: of the shared space.
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
    end_id = text["eos_token_id"]
    wrong_id = end_id == 2
    encoder = TextEncoder(
        build_backbone(text),
        "largest" if wrong_id else "end",
        masked=False,
        end_id=None if wrong_id else end_id,
    )
    return Contrastive(
        tokenizer,
        OwnPool(),
        nn.Linear(tokenizer.pooled_dim, width, bias=False),
        encoder,
        nn.Linear(encoder.dim, width, bias=False),
        scale=SOFTMAX_SCALE,
        bias=None,
    )


def load(folder: Path, values: dict[str, Any]) -> ContrastiveModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    return load_published(
        folder,
        "clip",
        KEY_MAP,
        UNUSED,
        lambda config, reader: compose(
            plain_config(config.vision_config),
            plain_config(config.text_config),
            config.projection_dim,
            from_transformers(reader.image_processor),
        ),
        pad_to_length=False,
    )


def save(model: ContrastiveModel, folder: Path) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with the
    weights as they are now.

    Raises ValueError for weights that the layout cannot represent, and for preprocessing that was
    changed since.
    """
    save_published(model, folder, KEY_MAP, scalar_shape=())


UNUSED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""0, 1, 2, ..., which older folders hold."""

KEY_MAP: KeyMap = [
    ("vision_model.", "tokenizer.backbone."),
    ("vision_model.vision_model.", "tokenizer.backbone."),  # of a tower saved by itself
    ("visual_projection.", "image_head."),
    ("text_model.", "text.backbone."),
    ("text_model.text_model.", "text.backbone."),
    ("text_projection.", "text_head."),
    ("logit_scale", "log_scale"),
]
"""(published prefix, our prefix), read in both directions."""
