"""A contrastive model of any image tokenizer and any text encoder, from pretrained towers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm import assets, pooling
from vlm.families.contrastive.model import ContrastiveModel
from vlm.families.contrastive.module import SIGMOID_BIAS, SIGMOID_SCALE, SOFTMAX_SCALE, Contrastive
from vlm.families.contrastive.processor import PairProcessor
from vlm.systems.pretrained import DEMO, load_vision
from vlm.text import encoders as text_encoders

LOSSES = {"softmax": (SOFTMAX_SCALE, None), "sigmoid": (SIGMOID_SCALE, SIGMOID_BIAS)}
"""Loss -> the scale and bias that training begins with."""


def build(
    *,
    vision: str = DEMO,
    text: str = DEMO,
    pool: str = "mean",
    text_pooling: str = "last",
    width: int = 512,
    length: int = 64,
    loss: str = "softmax",
    image_head: bool = True,
    size_hw: tuple[int, int] | None = None,
    seed: int = 0,
) -> ContrastiveModel:
    """A contrastive model from pretrained towers and fresh heads.

    vision: "demo", "kind:id", or the folder of a model or run, as `load_vision` takes.
    text: "demo", or the hub id or folder of a text encoder (BERT and its like) or of a causal
        language model, whose decoder is taken. Padding is masked, as in their own training.
    pool: "own", "class", "mean" or "attention". text_pooling: "class", "mean", "last" or "own".
    width: of the shared space. length: the most tokens of a text. loss: "softmax" or "sigmoid".
    image_head: False leaves the image's vector as it is, which then has the shared width (LiT
        with a locked tower).
    seed: of fresh weights; the global generator is left as it is.
    Raises OSError where weights cannot be had, ValueError where parts do not fit.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is one of {', '.join(LOSSES)}, found {loss!r}")
    if pool not in pooling.KINDS:
        raise ValueError(f"pool is one of {', '.join(pooling.KINDS)}, found {pool!r}")
    if text_pooling in ("end", "largest"):
        raise ValueError(f"text_pooling {text_pooling!r} belongs to CLIP: take a CLIP folder")
    prefix = "keep" if pool == "class" else "drop"
    tokenizer = load_vision(vision, size_hw, prefix=prefix, pooled=pool == "own")
    source = assets.fetch("smollm2-135m-instruct") if text == DEMO else text
    encoder = text_encoders.load(source, text_pooling, masked=True)
    kind = encoder.backbone.config.model_type
    if kind in text_encoders.TOWERS:
        raise ValueError(
            f"text {text!r}: expected a text encoder or a causal language model, found {kind}, "
            "whose texts are pooled and padded in its own way; open its whole model and go on "
            "from that"
        )
    text_tokenizer = text_encoders.load_tokenizer(source)
    scale, bias = LOSSES[loss]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings: dict[str, Any] = {"kind": pool}
        if pool == "attention":
            heads = max(1, tokenizer.dim // 64)
            settings |= {"in_width": tokenizer.dim, "heads": heads, "mlp_width": 4 * tokenizer.dim}
        pooler = pooling.build(settings)
        pooled = pooler.width(tokenizer)
        module = Contrastive(
            tokenizer,
            pooler,
            nn.Linear(pooled, width, bias=False) if image_head else nn.Identity(),
            encoder,
            nn.Linear(encoder.dim, width if image_head else pooled, bias=False),
            scale=scale,
            bias=bias,
        )
    positions = getattr(encoder.backbone.config, "max_position_embeddings", None)
    processor = PairProcessor(
        text_tokenizer,
        tokenizer.pixel_spec,
        length=length if positions is None else min(length, positions),
        pad_to_length=False,
        end_id=_missing_end(text_tokenizer) if text_pooling == "last" else None,
    )
    return ContrastiveModel(module=module.eval(), processor=processor)


def _missing_end(text_tokenizer) -> int | None:
    """The end id that a text tokenizer has and does not put after a text."""
    ids = text_tokenizer("a")["input_ids"]
    special = text_tokenizer.all_special_ids
    return None if ids[-1] in special else text_tokenizer.eos_token_id
