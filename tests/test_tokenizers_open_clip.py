import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tests.tokenizer_laws import check_laws, encode, one_image, spec
from vlm import tokenizers
from vlm.tokenizers.open_clip import OpenClipConfig, build, load, resize_tower

VIT = {"width": 32, "layers": 3, "head_width": 16, "patch_size": 16, "image_size": 64}
TOWERS = {
    # name: (vision_cfg, whether tokens can be normed)
    "class token": (VIT, True),
    "average": (VIT | {"pool_type": "avg", "final_ln_after_pool": True}, True),
    "attention": (
        VIT | {"attentional_pool": True, "attn_pooler_queries": 6, "attn_pooler_heads": 2},
        False,
    ),
    "resnet": ({"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 64}, False),
    "timm": (
        {
            "timm_model_name": "convnext_atto",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 224,
        },
        True,
    ),
}


def tiny(vision_cfg, size_hw=(64, 96), *, layer=-1, prefix="keep", norm=False, pooled=True):
    return OpenClipConfig(
        vision_cfg=vision_cfg,
        embed_dim=24,
        quick_gelu=True,
        layer=layer,
        prefix=prefix,
        norm=norm,
        pooled=pooled,
        pixel_spec=spec(*size_hw),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("pooled", [True, False])
def test_open_clip_tokenizer_keeps_the_laws_on_non_square_pixels(name, pooled):
    """Counts, parts, rebuilding and gradients, where rows and columns differ."""
    vision_cfg, norms = TOWERS[name]
    check_laws(build(tiny(vision_cfg, norm=norms, pooled=pooled)))


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("layer", [-2, 0])
def test_open_clip_earlier_layers_keep_the_laws(name, layer):
    """What follows the layer is gone."""
    check_laws(build(tiny(TOWERS[name][0], layer=layer, pooled=False)))


@pytest.mark.parametrize(
    ("more", "size_hw", "length"),
    [
        ({"image_size": 224, "patch_size": 16}, (224, 224), 197),
        ({"image_size": 224, "patch_size": 32}, (224, 224), 50),
        ({"image_size": 384, "patch_size": 14}, (384, 196), 379),
        ({"image_size": 224, "patch_size": 16}, (96, 800), 301),
    ],
)
def test_open_clip_count_equals_output_at_published_geometries(more, size_hw, length):
    tokenizer = build(tiny(VIT | {"layers": 1} | more, size_hw))
    (tokens,) = encode(tokenizer, one_image(30, 50))
    assert tokenizer.tokens_for((30, 50)) == tokens.tokens.shape[1] == length
    assert tokens.shape.prefix == 1


def test_open_clip_dropped_prefix_leaves_the_kept_grid():
    keep, drop = (build(tiny(VIT, prefix=prefix)) for prefix in ("keep", "drop"))
    drop.load_state_dict(keep.state_dict())
    ((kept,), (dropped,)) = (encode(tokenizer, one_image(60, 90)) for tokenizer in (keep, drop))
    assert (kept.shape.prefix, dropped.shape.prefix) == (1, 0)
    assert torch.equal(kept.tokens[:, 1:], dropped.tokens)
    assert torch.equal(kept.pooled, dropped.pooled)


def test_open_clip_tower_refuses_other_pixels():
    """A grid of 6 × 4 has the positions of 4 × 6, in other places."""
    with pytest.raises(ValueError, match=r"expected pixels of \(64, 96\), found \(96, 64\)"):
        build(tiny(VIT))(torch.zeros(1, 3, 96, 64))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("class token", {"layer": 3}, "layer 3 asked of a tower with 3"),
        ("class token", {"layer": 0, "pooled": True}, "pooled needs all 3 layers"),
        ("attention", {"norm": True}, "take norm=False"),
        ("resnet", {"norm": True}, "no final norm"),
        ("timm", {"norm": False}, "needs norm=True"),
        ("class token", {"prefix": "auto"}, "found 'auto'"),
    ],
)
def test_open_clip_tokenizer_raises_when_the_tower_cannot(name, change, words):
    with pytest.raises(ValueError, match=words):
        build(tiny(TOWERS[name][0], **change))


def test_open_clip_config_refuses_unknown_keys():
    with pytest.raises(ValueError, match=r"does not know: \['depth'\]"):
        tiny(VIT | {"depth": 3})


@pytest.mark.parametrize("size_hw", [None, (96, 64)])
@pytest.mark.parametrize("name", ["class token", "resnet"])
def test_open_clip_load_reads_a_saved_folder(name, size_hw, tmp_path):
    """Weights made for a square are resized for a non-square image."""
    vision_cfg = TOWERS[name][0]
    text_cfg = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
    model_cfg = {"embed_dim": 24, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    reference = open_clip.CLIP(**model_cfg).eval()
    preprocess_cfg = {"interpolation": "bicubic", "resize_mode": "shortest"}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    )
    weights = {key: value.contiguous() for key, value in reference.state_dict().items()}
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    tokenizer = load(
        f"local-dir:{tmp_path}", prefix="keep", norm=False, pooled=True, size_hw=size_hw
    )
    (tokens,) = encode(tokenizer, one_image(40, 70))
    if size_hw is None:
        pixels = tokenizer.pixel_spec(one_image(40, 70))[0][None]
        with torch.no_grad():
            torch.testing.assert_close(tokens.pooled, reference.encode_image(pixels))
    assert tokenizer.shapes_for((9, 9))[0].grid_hw == tokens.grid_hw
    values = tokenizers.config_to_dict(tokenizer)
    tokenizers.build(values).load_state_dict(tokenizer.state_dict(), strict=True)


def test_open_clip_positions_resize_as_open_clip_resizes_them():
    native, wide = build(tiny(VIT, (64, 64))), build(tiny(VIT, (64, 96)))
    source = {"visual.positional_embedding": native.visual.positional_embedding.detach().clone()}
    open_clip.model.resize_pos_embed(source, wide)
    resize_tower(native.visual, (64, 96))
    ours = native.visual.positional_embedding
    torch.testing.assert_close(ours.detach(), source["visual.positional_embedding"])


@pytest.mark.parametrize(
    ("id", "error", "words"),
    [
        ("ViT-B-32", ValueError, "expected 'architecture:weights'"),
        ("ViT-Z-9:openai", ValueError, "no architecture 'ViT-Z-9'"),
        ("ViT-B-32:openai", ValueError, "trained with quick_gelu=True"),
        ("ViT-B-32:laion2b_s34b_b79k", OSError, "cannot load 'ViT-B-32:laion2b_s34b_b79k'"),
    ],
)
def test_open_clip_load_without_weights_says_what_to_do(id, error, words):
    with pytest.raises(error, match=words):
        load(id, prefix="drop", norm=True, pooled=False)
