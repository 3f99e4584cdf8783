"""Every published image encoder that a library has keeps the same laws as an image tokenizer.

A row is an encoder of one library, at a tiny size where the library allows it, on pixels that are
not square where it allows that (torchvision's ViT and timm's MViT do not). Encoders that are
missing here, and why:

- Conformer (Peng et al.) and Mobile-Former: in none of timm, transformers, torchvision, open_clip.
- MViT v1 (torchvision's `mvit_v1_b`): made for 16 frames of video; version 2 is here.
- Perceiver IO (transformers' `PerceiverModel`): its latents have no place in the image, and its
  three front ends for images differ by class, not by configuration.
- DINO, iBOT and BYOL are ways to train: their backbones, a plain ViT and a ResNet-50, are here.
"""

import pytest
import torch

from tests.tokenizer_laws import check_laws, spec
from vlm import tokenizers
from vlm.config import to_dict

VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": [64, 96]}
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "img_size": [128, 192]}
HF_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
}
HF_CVT = {"embed_dim": [8, 8, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}
OPEN_CLIP_VIT = {
    "width": 32,
    "layers": 2,
    "head_width": 16,
    "patch_size": 16,
    "image_size": [64, 96],
}


def timm(name, size_hw=(64, 96), **model_args):
    values = {"level": -1, "norm": True, "pooled": False}
    return {"kind": "timm", "name": name, "model_args": model_args} | values, size_hw


def transformers(model_type, size_hw=(64, 96), **vision_config):
    values = {"layer": -1, "norm": True, "pooled": False}
    vision_config["model_type"] = model_type
    return {"kind": "transformers", "vision_config": vision_config} | values, size_hw


def torchvision(name, size_hw=(64, 96), **model_args):
    return {"kind": "torchvision", "name": name, "model_args": model_args}, size_hw


def open_clip(vision_cfg, size_hw=(64, 96)):
    values = {"embed_dim": 8, "quick_gelu": False, "layer": -1, "norm": True, "pooled": False}
    return {"kind": "open_clip", "vision_cfg": vision_cfg} | values, size_hw


ENCODERS = {
    # encoder, library: (configuration, pixels), prefix tokens, grid
    "ViT, timm": (timm("vit_tiny_patch16_224", **VIT), 1, (4, 6)),
    "ViT, transformers": (transformers("vit", **HF_VIT), 1, (4, 6)),
    "ViT, torchvision": (torchvision("vit_b_32", (64, 64), image_size=64), 1, (2, 2)),
    "ViT, open_clip": (open_clip(OPEN_CLIP_VIT), 1, (4, 6)),
    "DeiT, timm": (timm("deit_tiny_distilled_patch16_224", **VIT), 2, (4, 6)),
    "DeiT, transformers": (transformers("deit", **HF_VIT), 2, (4, 6)),
    "CaiT, timm": (timm("cait_xxs24_224", **VIT), 1, (4, 6)),
    "Swin, timm": (
        timm("swin_tiny_patch4_window7_224", (128, 192), window_size=4, **SWIN),
        0,
        (4, 6),
    ),
    "Swin, torchvision": (torchvision("swin_t"), 0, (2, 3)),
    "SwinV2, timm": (timm("swinv2_tiny_window8_256", (128, 192), window_size=4, **SWIN), 0, (4, 6)),
    "MViT v2, timm": (timm("mvitv2_tiny", (64, 64), img_size=64), 0, (2, 2)),
    "CvT, transformers": (transformers("cvt", **HF_CVT), 1, (4, 6)),
    "CoAtNet, timm": (timm("coatnet_pico_rw_224", img_size=[64, 96]), 0, (2, 3)),
    "LeViT, timm": (timm("levit_128s", (128, 192), img_size=[128, 192]), 0, (2, 3)),
    "MLP-Mixer, timm": (
        timm("mixer_s16_224", img_size=[64, 96]),
        0,
        (4, 6),
    ),
    "TimeSformer, transformers": (transformers("timesformer", num_frames=8, **HF_VIT), 1, (4, 6)),
    "DINO, timm": (timm("vit_small_patch16_224.dino", **VIT), 1, (4, 6)),
    "DINOv2, timm": (
        timm("vit_small_patch14_reg4_dinov2", (56, 84), **VIT | {"img_size": [56, 84]}),
        5,
        (4, 6),
    ),
    "DINOv2, transformers": (transformers("dinov2", **HF_VIT), 1, (4, 6)),
    "DINOv2 with registers, transformers": (
        transformers("dinov2_with_registers", **HF_VIT),
        5,
        (4, 6),
    ),
    "BYOL's ResNet-50, torchvision": (torchvision("resnet50"), 0, (2, 3)),
    "ResNet-50, timm": (timm("resnet50"), 0, (2, 3)),
    "VOLO, timm": (timm("volo_d1_224", img_size=[64, 96]), 1, (4, 6)),
    "AlexNet, torchvision": (torchvision("alexnet", (96, 160)), 0, (2, 4)),
    "GoogLeNet, torchvision": (torchvision("googlenet", init_weights=False), 0, (2, 3)),
}


SPREAD = (
    "MViT v2, timm",
    "CvT, transformers",
    "LeViT, timm",
    "MLP-Mixer, timm",
    "BYOL's ResNet-50, torchvision",
    "GoogLeNet, torchvision",
)
"""Encoders of which, at random weights, a token may be moved the most by pixels of another place:
the order of their grid is compared with the library's own map."""


def library_map(tokenizer, pixels):
    """The final map float[V, D, h, w] that the library's own backbone gives."""
    kind = tokenizers.config_to_dict(tokenizer)["kind"]
    if kind == "timm":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        options = {"indices": [tokenizer.level], "norm": True, "intermediates_only": True}
        return tokenizer.backbone.forward_intermediates(pixels, **options)[0]
    output = tokenizer.backbone(pixels)
    return output.last_hidden_state if kind == "transformers" else output


SLOW = (
    "ViT, torchvision",
    "Swin, torchvision",
    "BYOL's ResNet-50, torchvision",
    "MViT v2, timm",
    "ResNet-50, timm",
    "VOLO, timm",
    "LeViT, timm",
    "MLP-Mixer, timm",
    "CoAtNet, timm",
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ENCODERS
    ],
)
def case(request):
    (values, size_hw), prefix, grid_hw = ENCODERS[request.param]
    torch.manual_seed(0)
    values = values | {"prefix": "keep", "pixel_spec": to_dict(spec(*size_hw))}
    return request.param, tokenizers.build(values), prefix, grid_hw


def test_encoder_keeps_the_laws_of_image_tokenizers(case):
    """Shapes told equal shapes given, saved and reopened gives equal tokens, parts hold every
    parameter once, and every parameter gets a gradient."""
    _, tokenizer, prefix, grid_hw = case
    (shape,) = tokenizer.shapes_for((48, 80))
    assert (shape.prefix, shape.grid_hw) == (prefix, grid_hw)
    check_laws(tokenizer)


def test_encoder_tokens_follow_rows_then_columns(case):
    """A bright patch in one of two opposite corners moves the token of that corner the most."""
    name, tokenizer, prefix, (h, w) = case
    H, W = tokenizer.pixel_spec.size_hw
    pixels = torch.randn(1, 3, H, W, generator=torch.Generator().manual_seed(0)) * 0.1
    for row, column in [(0, w - 1), (h - 1, 0)]:
        y, x = row * H // h, column * W // w
        bright = pixels.clone()
        bright[:, :, y : y + H // h, x : x + W // w] += 2
        with torch.no_grad():
            before, after = (tokenizer.eval()(x).tokens[0, prefix:] for x in (pixels, bright))
            if name in SPREAD:
                own = library_map(tokenizer, bright)[0, :, row, column]
                torch.testing.assert_close(after[row * w + column], own)
            else:
                assert int((after - before).norm(dim=-1).argmax()) == row * w + column
