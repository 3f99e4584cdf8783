"""open_clip's configurations beside transformers': there, back, and what neither can say."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
from open_clip.transformer import QuickGELU
from timm.layers import GELUTanh
from transformers import (
    SiglipConfig,
)

from tests.reference.tiny_open_clip import CASES, CLIP, PUBLISHED, SIGLIP, changed, reference_config
from vlm.pixels import from_open_clip
from vlm.systems.open_clip import config as open_clip_config
from vlm.systems.open_clip import layout
from vlm.training.runs.contrastive import Settings


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *PUBLISHED])
def test_configuration_survives_the_way_back(name):
    cfg = CASES.get(name) or open_clip.get_model_config(name)
    config = reference_config(cfg)
    back = (
        open_clip_config.siglip_model_cfg
        if config.model_type == "siglip"
        else open_clip_config.clip_model_cfg
    )
    again = back(config.to_dict())
    assert reference_config(again).to_dict() == config.to_dict()
    # What only open_clip's classes know, where weights lie and what the scale starts at, is put in.
    kept = {k: cfg[k] for k in open_clip_config.TOP - {"vision_cfg", "text_cfg"} if k in cfg}
    for key in ("custom_text", "init_logit_bias"):
        again.pop(key, None)
    assert layout.published_shapes(again | kept) == layout.published_shapes(cfg)


def test_published_clip_settings_are_transformers_own():
    config = open_clip_config.clip_config(open_clip.get_model_config("ViT-L-14-336-quickgelu"))
    vision, text = config["vision_config"], config["text_config"]
    assert (vision["hidden_act"], text["hidden_act"]) == ("quick_gelu", "quick_gelu")
    assert (vision["num_attention_heads"], vision["image_size"], vision["patch_size"]) == (
        16,
        336,
        14,
    )
    assert (text["num_attention_heads"], text["eos_token_id"]) == (12, 2)
    config = open_clip_config.siglip_config(open_clip.get_model_config("ViT-SO400M-14-SigLIP-384"))
    vision, text = config["vision_config"], config["text_config"]
    assert (vision["intermediate_size"], text["intermediate_size"]) == (4304, 4304)
    assert (vision["layer_norm_eps"], text["layer_norm_eps"]) == (1e-6, 1e-6)
    # Not the tanh form of transformers' folders: open_clip's modules say so.
    assert (vision["hidden_act"], text["hidden_act"]) == ("gelu", "gelu")


REFUSED = {
    "vision_cfg.layers": changed(CLIP, vision={"layers": [1, 1, 1, 1]}),
    "vision_cfg.head_width": changed(CLIP, vision={"head_width": 10}),
    "vision_cfg.image_size": changed(CLIP, vision={"image_size": [24, 32]}),
    "vision_cfg.patch_size": changed(CLIP, vision={"patch_size": [8, 4]}),
    "vision_cfg.no_ln_pre": changed(CLIP, vision={"no_ln_pre": True}),
    "vision_cfg.ls_init_value": changed(CLIP, vision={"ls_init_value": 1e-4}),
    "vision_cfg.attentional_pool": changed(CLIP, vision={"attentional_pool": True}),
    "vision_cfg.pool_type": changed(CLIP, vision={"pool_type": "avg"}),
    "vision_cfg.block_type": changed(CLIP, vision={"block_type": "custom"}),
    "vision_cfg.norm_kwargs": changed(CLIP, vision={"norm_kwargs": {"bias": False}}),
    "vision_cfg.act_kwargs": changed(
        CLIP, quick_gelu=True, vision={"act_kwargs": {"approximate": "tanh"}}
    ),
    "vision_cfg": changed(CLIP, vision={"depth": 3}),
    "text_cfg.hf_model_name": changed(CLIP, text={"hf_model_name": "roberta-base"}),
    "text_cfg.no_causal_mask": changed(CLIP, text={"no_causal_mask": True}),
    "text_cfg.embed_cls": changed(CLIP, text={"embed_cls": True}),
    "text_cfg.eos_id": changed(CLIP, text={"pool_type": "eos", "eos_id": 2}),
    "model_cfg": CLIP | {"multimodal_cfg": {}},
    "model_cfg.embed_dim": {key: CLIP[key] for key in ("vision_cfg", "text_cfg")},
    "vision_cfg.timm_pool": changed(SIGLIP, vision={"timm_pool": "avg"}),
    "vision_cfg.timm_proj": changed(SIGLIP, vision={"timm_proj": "linear"}),
    "vision_cfg.timm_model_name": changed(SIGLIP, vision={"timm_model_name": "vit_of_nobody"}),
    "vision_cfg.timm_model_name: expected SigLIP's": changed(
        SIGLIP, vision={"timm_model_name": "vit_tinyregisters_patch4_siglip_20"}
    ),
    "vision_cfg.timm_model_name: expected a vision": changed(
        SIGLIP, vision={"timm_model_name": "convnext_tiny"}
    ),
    "vision_cfg.image_size: expected 16": changed(SIGLIP, vision={"image_size": 20}),
    "embed_dim": changed(SIGLIP, embed_dim=32),
    "text_cfg.proj_bias": changed(SIGLIP, text={"proj_bias": False}),
    "text_cfg.pool_type": changed(SIGLIP, text={"pool_type": "argmax"}),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_transformers_cannot_represent_is_refused_by_its_key(key):
    cfg = REFUSED[key]
    with pytest.raises(ValueError, match=r"expected .* found") as error:
        open_clip_config.reference_config(cfg)
    assert str(error.value).startswith(key)


def test_what_open_clip_cannot_represent_is_refused_by_its_key():
    def back(cfg, part, **values):
        config = reference_config(cfg).to_dict()
        config[part] |= values
        siglip = config["model_type"] == "siglip"
        return (open_clip_config.siglip_model_cfg if siglip else open_clip_config.clip_model_cfg)(
            config
        )

    with pytest.raises(ValueError, match=r"^vision_config.hidden_act: .* found 'relu'"):
        back(CLIP, "vision_config", hidden_act="relu")
    with pytest.raises(ValueError, match=r"^text_config.hidden_act: expected gelu, found 'quick"):
        back(CLIP, "text_config", hidden_act="quick_gelu")
    with pytest.raises(ValueError, match=r"^text_config.eos_token_id: expected one id, found \["):
        back(CLIP, "text_config", eos_token_id=[2, 3])
    with pytest.raises(ValueError, match=r"patch_size: expected .*vit_\*_patch4_siglip_64.* found"):
        back(SIGLIP, "vision_config", image_size=64)
    # The authors' SigLIP: open_clip's classes compute the exact form, and would give other vectors.
    published = SiglipConfig().to_dict()
    with pytest.raises(ValueError, match="hidden_act: 'gelu', as timm's vit_base_patch16_siglip"):
        open_clip_config.siglip_model_cfg(published)


@pytest.mark.slow
def test_the_timed_model_of_open_clip_is_of_our_recipes_size(tmp_path, monkeypatch):
    """That of eval/contrastive_beside_open_clip.py."""
    path = Path(__file__).parents[2] / "eval/contrastive_beside_open_clip.py"
    monkeypatch.syspath_prepend(path.parent)  # as for a script, whose neighbours it finds
    spec = importlib.util.spec_from_file_location("eval_beside_open_clip", path)
    beside = importlib.util.module_from_spec(spec)
    sys.modules["eval_beside_open_clip"] = beside  # where timm looks up who registers a model
    spec.loader.exec_module(beside)
    ours = Settings().build().module
    (tmp_path / "beside.json").write_text(json.dumps(beside.peer_config()))
    open_clip.add_model_config(tmp_path)
    theirs = open_clip.create_model("beside")

    def count(*parts):
        return sum(p.numel() for part in parts for p in part.parameters())

    assert count(ours) == count(theirs)
    assert count(ours.tokenizer, ours.pool, ours.image_head) == count(theirs.visual)
    assert ours.tokenizer.backbone.config.hidden_act == "gelu_pytorch_tanh"
    assert isinstance(theirs.visual.trunk.blocks[0].mlp.act, GELUTanh)
    assert ours.text.backbone.config.hidden_act == "quick_gelu"
    assert isinstance(theirs.transformer.resblocks[0].mlp.gelu, QuickGELU)
    assert theirs.logit_scale.item() == pytest.approx(ours.log_scale.item())
    assert theirs.logit_bias.item() == ours.bias.item()
    assert [beside.whole_epochs(200, 128, rows) for rows in (1720, 128, 40_000)] == [15, 200, 1]


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(24, 24), (24, 32)])
def test_preprocessing_survives_the_way_back(mode, size):
    spec = from_open_clip({"size": size, "resize_mode": mode, "fill_color": 9})
    assert from_open_clip(layout.open_clip_preprocessing(spec)) == spec


def test_preprocessing_that_open_clip_lacks_is_refused():
    spec = from_open_clip({"size": (24, 24), "resize_mode": "longest"})
    for field, value in {
        "anchor": "top_left",
        "resize_hw": (30, 30),
        "pad_rgb": (1, 2, 3),
    }.items():
        with pytest.raises(ValueError, match=rf"^pixel_spec.{field}: expected .* found"):
            layout.open_clip_preprocessing(replace(spec, **{field: value}))
