"""Rates that fall from layer to layer."""

import dataclasses

import pytest
import torch

from tests import tiny, towers, training
from vlm.text.encoders import TextEncoder, build_backbone
from vlm.training.layer_decay import layer_rates
from vlm.training.stages import StageError, assign_rates, optimizer_for, prepare


def clip_text():
    return TextEncoder(
        build_backbone(
            dict(model_type="clip_text_model", vocab_size=60, max_position_embeddings=8,
                 hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                 bos_token_id=0, eos_token_id=1)
        ),
        "end", masked=False, end_id=1,
    )  # fmt: skip


def bert():
    return TextEncoder(
        build_backbone(
            dict(model_type="bert", vocab_size=60, max_position_embeddings=8, hidden_size=16,
                 intermediate_size=16, num_hidden_layers=12, num_attention_heads=2)
        ),
        "class", masked=True,
    )  # fmt: skip


LAYERS = {
    "siglip": (lambda: towers.transformers_tower("siglip_vision_model"), 2, "encoder.layers"),
    "clip": (lambda: towers.transformers_tower("clip_vision_model"), 2, "encoder.layers"),
    "timm": (lambda: towers.timm_vit(depth=11), 11, "blocks"),
    "clip text": (clip_text, 3, "encoder.layers"),
    "bert": (bert, 12, "encoder.layer"),
    "convnext": (lambda: towers.timm_net("convnext_atto"), 4, "stages"),
}
FIRST = ("embed", "cls_token", "pos_embed", "pre_layrnorm", "patch", "stem")


@pytest.mark.parametrize("kind", LAYERS)
def test_rates_fall_from_layer_to_layer(kind):
    """Of every parameter, read back from the live optimizer; each matched by one pattern."""
    build, depth, path = LAYERS[kind]
    module = torch.nn.Module()
    module.tower = build()
    rates = tuple(layer_rates(module, "tower", 1.0, 0.5))
    stage = dataclasses.replace(training.CONTRAST, rates=rates)
    prepare(module, stage, torch.float32)
    live = {id(p): g["lr"] for g in optimizer_for(module, stage).param_groups for p in g["params"]}
    chosen = assign_rates(module, rates)
    assert {pattern for pattern, _ in chosen.values()} == {pattern for pattern, _ in rates}
    seen = set()
    for name, parameter in module.named_parameters():
        inner = name.removeprefix("tower.backbone.")
        if inner.startswith(f"{path}."):
            expected = 0.5 ** (depth - 1 - int(inner.removeprefix(f"{path}.").split(".")[0]))
        elif any(word in inner for word in FIRST):
            expected = 0.5**depth
        else:
            expected = 1.0
        assert live[id(parameter)] == expected, name
        seen.add(expected)
    assert seen == {0.5**i for i in range(depth + 1)}


def test_rates_follow_computation_not_registration():
    """A projection after the layers that open_clip registers before them."""
    from vlm.tokenizers import open_clip

    cfg = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
    module = torch.nn.Module()
    module.tokenizer = open_clip.build(
        open_clip.OpenClipConfig(
            vision_cfg=cfg, embed_dim=16, quick_gelu=False, layer=-1, prefix="drop", norm=True,
            pooled=True, pixel_spec=towers.timm_vit(size_hw=(32, 32)).pixel_spec,
        )
    )  # fmt: skip
    chosen = assign_rates(module, tuple(layer_rates(module, "tokenizer", 1.0, 0.5)))
    assert chosen["tokenizer.visual.proj"][1] == 1.0
    assert chosen["tokenizer.visual.positional_embedding"][1] == 0.25


def test_rates_that_cannot_fall_are_named():
    module = torch.nn.Module()
    module.tower = tiny.Patches()
    assert layer_rates(module, "tower", 0.1, 1.0) == [("tower.*", 0.1)]
    with pytest.raises(StageError, match=r"layer_decay 0.5: expected a row .* in tower"):
        layer_rates(module, "tower", 0.1, 0.5)
    module.tower = towers.timm_net("resnet10t")
    with pytest.raises(StageError, match=r"expected one row of layers in tower, found \['tower\."):
        layer_rates(module, "tower", 0.1, 0.5)
    for decay in (0.0, 1.5):
        with pytest.raises(StageError, match="above 0 and at most 1, found"):
            layer_rates(module, "tower", 0.1, decay)
