"""Contrastive models with fresh weights, of any size, to train from scratch.

The image's tower is SigLIP's (a plain vision transformer with an attention pooling), the text's
CLIP's (causal, read at the end token), so that a batch's texts are only as long as its longest.
Texts are CLIP's byte pairs, which come with open_clip: nothing is fetched.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn

from vlm.families.contrastive.layout import ContrastiveModel
from vlm.families.contrastive.module import Contrastive
from vlm.families.contrastive.processor import PairProcessor
from vlm.pixels import PixelSpec
from vlm.pixels.spec import HALF
from vlm.pooling import OwnPool
from vlm.systems.compose_contrastive import LOSSES
from vlm.systems.open_clip.layout import clip_tokenizer
from vlm.text.encoders import TextEncoder, build_backbone
from vlm.tokenizers import transformers as encoders

HEAD_WIDTH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ScratchConfig:
    """Sizes of both towers.

    image_px, patch_px: sides of the square image and its patches, in pixels.
    width, depth: of the image's tower; text_width, text_depth: of the text's. Heads are 64 wide,
    and perceptrons four times the width.
    length: the most tokens of a text. embed_width: of the shared space.
    Raises ValueError for sizes below 1, and for those that do not divide.
    """

    image_px: int
    patch_px: int
    width: int
    depth: int
    text_width: int
    text_depth: int
    length: int
    embed_width: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name} must be at least 1, found {getattr(self, field.name)}"
                )
        if self.image_px % self.patch_px:
            raise ValueError(
                f"image_px must be a multiple of patch_px, found {self.image_px} and "
                f"{self.patch_px}"
            )
        for name in ("width", "text_width"):
            if getattr(self, name) % HEAD_WIDTH:
                raise ValueError(
                    f"{name} must be a multiple of {HEAD_WIDTH}, found {getattr(self, name)}"
                )


def build(config: ScratchConfig, loss: str, seed: int) -> ContrastiveModel:
    """A contrastive model of these sizes.

    loss: "softmax" or "sigmoid", which decides the scale and bias that training begins with.
    seed: of all weights; the global generator stays as it is.
    Raises ValueError for another loss, and where texts of `length` leave no token for the text.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is one of {', '.join(LOSSES)}, found {loss!r}")
    text_tokenizer = clip_tokenizer()
    end_id = text_tokenizer.eos_token_id
    spec = PixelSpec(
        size_hw=(config.image_px, config.image_px),
        fit="stretch",
        resample="bicubic",
        mean=HALF.mean,
        std=HALF.std,
    )
    scale, bias = LOSSES[loss]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = encoders.build(
            encoders.TransformersConfig(
                vision_config={
                    "model_type": "siglip_vision_model",
                    "hidden_size": config.width,
                    "intermediate_size": 4 * config.width,
                    "num_hidden_layers": config.depth,
                    "num_attention_heads": config.width // HEAD_WIDTH,
                    "image_size": config.image_px,
                    "patch_size": config.patch_px,
                },
                layer=-1,
                prefix="drop",
                norm=True,
                pooled=True,
                pixel_spec=spec,
            )
        )
        backbone = build_backbone(
            {
                "model_type": "clip_text_model",
                "vocab_size": len(text_tokenizer),
                "hidden_size": config.text_width,
                "intermediate_size": 4 * config.text_width,
                "num_hidden_layers": config.text_depth,
                "num_attention_heads": config.text_width // HEAD_WIDTH,
                "max_position_embeddings": config.length,
                "bos_token_id": text_tokenizer.bos_token_id,
                "eos_token_id": end_id,
            }
        )
        module = Contrastive(
            tokenizer,
            OwnPool(),
            nn.Linear(config.width, config.embed_width, bias=False),
            TextEncoder(backbone, "end", masked=False, end_id=end_id),
            nn.Linear(config.text_width, config.embed_width, bias=False),
            scale=scale,
            bias=bias,
        )
    processor = PairProcessor(text_tokenizer, spec, length=config.length, pad_to_length=False)
    return ContrastiveModel(module=module.eval(), processor=processor)
