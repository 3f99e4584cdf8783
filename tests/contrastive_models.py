"""Tiny contrastive models, their text encoders and text tokenizers."""

import torch
from tokenizers import processors
from torch import nn

from tests import tiny
from tests.towers import SPEC, timm_net
from vlm import pooling
from vlm.families.contrastive.module import Contrastive
from vlm.text.encoders import TextEncoder, build_backbone
from vlm.tokenizers import timm

SMALL = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def backbone(kind, seed=0, **more):
    """A tiny random text model of any of the kinds."""
    torch.manual_seed(seed)
    values = dict(model_type=kind, vocab_size=300, max_position_embeddings=16, **SMALL, **IDS)
    model = build_backbone(values | more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


END = tiny.SPECIAL.index("<|im_end|>") + 256


def text_tokenizer(padding_side="right"):
    """Bytes, each text with one end token after it."""
    tokenizer = tiny.text_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", END)]
    )
    tokenizer.padding_side = padding_side
    return tokenizer


ATTENTION = dict(kind="attention", in_width=24, heads=2, mlp_width=32)
TEXTS = {
    "bert, class": lambda: TextEncoder(backbone("bert"), "class", masked=True),
    "llama, last": lambda: TextEncoder(backbone("llama"), "last", masked=True),
    "clip, largest": lambda: TextEncoder(backbone("clip_text_model"), "largest", masked=False),
}


def tower(prefix="drop", pooled=False):
    return timm.build(
        timm.TimmConfig(
            name="vit_tiny_patch16_224", level=-1, prefix=prefix, norm=True, pooled=pooled,
            model_args=dict(img_size=(32, 48), depth=2, embed_dim=24, num_heads=2),
            pixel_spec=SPEC,
        )
    )  # fmt: skip


IMAGES = {
    "mean": lambda: (tower(), dict(kind="mean")),
    "class": lambda: (tower("keep"), dict(kind="class")),
    "attention": lambda: (tower(), ATTENTION),
    "own": lambda: (tower(pooled=True), dict(kind="own")),
    "net, mean": lambda: (timm_net("tf_efficientnet_lite0"), dict(kind="mean")),
}


def model(image="mean", text="bert, class", seed=0, bias=None, width=10):
    """A tiny two-tower model in fp32 and evaluation mode."""
    torch.manual_seed(seed)
    tokenizer, pool = IMAGES[image]()
    pool = pooling.build(pool)
    encoder = TEXTS[text]()
    return Contrastive(
        tokenizer,
        pool,
        nn.Linear(pool.width(tokenizer), width, bias=False),
        encoder,
        nn.Linear(encoder.dim, width),
        scale=10.0,
        bias=bias,
    ).eval()
