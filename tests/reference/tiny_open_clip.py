"""Tiny models and folders of open_clip, made by its own code, and what compares them with ours."""

from copy import deepcopy
from dataclasses import asdict

import open_clip
import torch
from accelerate import init_empty_weights
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.transform import PreprocessCfg
from timm.models import VisionTransformer, register_model
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    T5Tokenizer,
)

from vlm.systems.open_clip import config as open_clip_config
from vlm.systems.open_clip import layout

TRUNK = dict(
    img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, mlp_ratio=1.5,
    class_token=False,
)  # fmt: skip


def _trunk(more, num_classes, global_pool, **idle):
    return VisionTransformer(**TRUNK | more, num_classes=num_classes, global_pool=global_pool)


@register_model
def vit_tiny_patch4_siglip_16(**options):
    return _trunk({}, **options)


@register_model
def vit_tinytanh_patch4_siglip_16(**options):
    return _trunk({"act_layer": "gelu_tanh", "num_heads": 3}, **options)


@register_model
def vit_tinyregisters_patch4_siglip_20(**options):
    return _trunk({"reg_tokens": 2, "img_size": 20}, **options)


CLIP = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 24, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 60, "width": 24, "heads": 3, "layers": 3},
}
SIGLIP = {
    "embed_dim": 24,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 16,
        "timm_model_name": "vit_tiny_patch4_siglip_16",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        **{"context_length": 9, "vocab_size": 60, "width": 20, "heads": 2, "layers": 2},
        "mlp_ratio": 1.73,
        "hf_tokenizer_name": "some/tokenizer",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}


def changed(cfg, vision=None, text=None, **top):
    cfg = deepcopy(cfg) | top
    cfg["vision_cfg"] |= vision or {}
    cfg["text_cfg"] |= text or {}
    return cfg


CASES = {
    "clip": CLIP,
    "clip quick gelu": changed(CLIP, quick_gelu=True),
    "clip tanh gelu, own eps": changed(
        CLIP,
        vision={"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}},
        text={"norm_kwargs": {"eps": 1e-2}, "mlp_ratio": 2.7},
    ),
    "clip custom text": changed(
        CLIP, custom_text=True, nonscalar_logit_scale=True, init_logit_bias=-10.0
    ),
    "clip pooled at an id": changed(CLIP, text={"pool_type": "eos", "eos_id": 7}),
    "clip pooled, then normed": changed(CLIP, vision={"final_ln_after_pool": True}),
    "siglip": SIGLIP,
    "siglip tanh gelu": changed(
        SIGLIP,
        vision={"timm_model_name": "vit_tinytanh_patch4_siglip_16"},
        text={"act_kwargs": {"approximate": "tanh"}},
    ),
    "siglip text at the root": changed(SIGLIP, custom_text=False),
}
PIXELS = {
    "clip": {"resize_mode": "shortest"},
    "siglip": {"resize_mode": "squash", "mean": (0.5,) * 3, "std": (0.5,) * 3},
}
PUBLISHED = ("ViT-B-32", "ViT-L-14-336-quickgelu", "ViT-H-14", "ViT-B-16-SigLIP",
             "ViT-SO400M-14-SigLIP-384", "ViT-gopt-16-SigLIP2-256")  # fmt: skip


def their_model(cfg, seed=0, noise=0.2):
    """open_clip's model, every weight random: norms, biases and probes too."""
    model = empty_model(cfg)
    generator = torch.Generator().manual_seed(seed)
    state = {
        key: torch.randn(like.shape, generator=generator) * noise
        + (1 if key.endswith("weight") and like.ndim == 1 else 0)  # of a norm
        for key, like in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def empty_model(cfg):
    """open_clip's model without values."""
    cfg = deepcopy(cfg)
    custom = cfg.pop("custom_text", False)
    with init_empty_weights(include_buffers=False):
        return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**cfg)


def reference_config(cfg):
    config_class = SiglipConfig if layout.system_of(cfg) == "siglip" else CLIPConfig
    return config_class(**open_clip_config.reference_config(cfg))


def random_ids(cfg, rows=5, seed=1):
    """Ids as tokenizers give them: an end, here the largest id (or the one that is named), and
    padding after."""
    text = cfg["text_cfg"]
    length, end = text["context_length"], text.get("eos_id", text["vocab_size"] - 1)
    torch.manual_seed(seed)
    ids = torch.randint(8, text["vocab_size"] - 1, (rows, length))
    for i, row in enumerate(ids):
        row[2 + i :] = 0
        row[2 + i] = end
    return ids


@torch.no_grad()
def embeddings(model, pixels, ids):
    """Unit vectors of images and texts by either library's model."""
    if isinstance(model, CLIPModel | SiglipModel):
        output = model(pixel_values=pixels, input_ids=ids)
        return output.image_embeds, output.text_embeds
    return model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)


def check_equal(theirs, ours):
    for a, b in zip(theirs, ours):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=0)
    assert all(vectors.std(0).mean() > 1e-3 for vectors in theirs)  # inputs do matter


def sentence_pieces():
    """A tiny T5 tokenizer, in the class that open_clip's SigLIP folders name."""
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz'.,_&é"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, ("▁cat", -2.0)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def write_folder(folder, cfg, model=None, preprocess=None, tokenizer=None):
    """A folder as open_clip's push-to-hub code writes it, by its own function."""
    model = model or their_model(cfg)
    defaults = PreprocessCfg(size=cfg["vision_cfg"]["image_size"], **(preprocess or {}))
    open_clip.model.set_model_preprocess_cfg(model, asdict(defaults))
    save_for_hf(model, tokenizer or sentence_pieces(), cfg, folder, safe_serialization=True)
    return model
