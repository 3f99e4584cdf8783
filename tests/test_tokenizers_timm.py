import pytest
import timm
import torch

from tests.tokenizer_laws import check_laws, encode, one_image, spec
from vlm import tokenizers
from vlm.tokenizers.timm import TimmConfig, build, load

VIT = {"embed_dim": 16, "depth": 3, "num_heads": 2}
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
CONVNEXT = {"dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}

BACKBONES = {
    # name: (arguments, pixels, prefix tokens, grid of the final features)
    "vit_tiny_patch16_224": (VIT | {"img_size": [64, 96]}, (64, 96), 1, (4, 6)),
    "vit_base_patch16_siglip_224": (VIT | {"img_size": [64, 96]}, (64, 96), 0, (4, 6)),
    "vit_small_patch14_reg4_dinov2": (VIT | {"img_size": [70, 98]}, (70, 98), 5, (5, 7)),
    "deit_tiny_distilled_patch16_224": (VIT | {"img_size": [64, 96]}, (64, 96), 2, (4, 6)),
    "eva02_tiny_patch14_224": (VIT | {"img_size": [70, 98]}, (70, 98), 1, (5, 7)),
    "samvit_base_patch16": (VIT | {"img_size": [64, 96]}, (64, 96), 0, (4, 6)),
    "swin_tiny_patch4_window7_224": (
        SWIN | {"img_size": [256, 192], "window_size": 8},
        (256, 192),
        0,
        (8, 6),
    ),
    "swinv2_tiny_window8_256": (SWIN | {"img_size": [256, 192]}, (256, 192), 0, (8, 6)),
    "convnext_atto": (CONVNEXT, (96, 160), 0, (3, 5)),
    "resnet18": ({}, (64, 96), 0, (2, 3)),
    "mobilenetv3_small_050": ({}, (64, 96), 0, (2, 3)),
    "pvt_v2_b0": ({}, (64, 96), 0, (2, 3)),
    "levit_128s": ({"img_size": [224, 224]}, (224, 224), 0, (4, 4)),
}


SLOW = (
    "resnet18", "mobilenetv3_small_050", "pvt_v2_b0", "levit_128s", "swinv2_tiny_window8_256",
    "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224",
)  # fmt: skip
EACH = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in BACKBONES]


def tiny(name, *, level=-1, prefix="keep", norm=True, pooled=False):
    arguments, size_hw, _, _ = BACKBONES[name]
    return TimmConfig(
        name=name,
        model_args=arguments,
        level=level,
        prefix=prefix,
        norm=norm,
        pooled=pooled,
        pixel_spec=spec(*size_hw),
    )


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("pooled", [True, False])
def test_timm_tokenizer_keeps_the_laws_on_non_square_pixels(name, pooled):
    """Counts, parts, rebuilding and gradients, where rows and columns differ."""
    tokenizer = build(tiny(name, pooled=pooled))
    check_laws(tokenizer)
    (shape,) = tokenizer.shapes_for((48, 80))
    assert (shape.prefix, shape.grid_hw) == BACKBONES[name][2:]


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("level", [-1, -2, 0])
def test_timm_levels_keep_the_laws(name, level):
    """Blocks or stages after the level are gone."""
    check_laws(build(tiny(name, level=level, norm=False)))


@pytest.mark.parametrize(
    ("name", "arguments", "size_hw", "length"),
    [
        ("vit_tiny_patch16_224", {}, (224, 224), 197),
        ("vit_tiny_patch16_224", {"img_size": [96, 800]}, (96, 800), 301),
        ("vit_so400m_patch14_siglip_384", {}, (384, 384), 729),
        ("vit_so400m_patch14_siglip_384", {"img_size": [384, 196]}, (384, 196), 378),
        ("vit_small_patch14_reg4_dinov2", {}, (518, 518), 1374),
        ("swinv2_tiny_window8_256", {}, (256, 256), 64),
    ],
)
def test_timm_count_equals_output_at_published_geometries(name, arguments, size_hw, length):
    """Towers with and without a class token; non-square images."""
    narrow = SWIN if "swin" in name else VIT | {"depth": 1}
    config = TimmConfig(
        name=name,
        model_args=narrow | arguments,
        level=-1,
        prefix="keep",
        norm=True,
        pooled=False,
        pixel_spec=spec(*size_hw),
    )
    tokenizer = build(config)
    (tokens,) = encode(tokenizer, one_image(30, 50))
    assert tokenizer.tokens_for((30, 50)) == tokens.tokens.shape[1] == length


def test_timm_dynamic_backbone_takes_any_pixels():
    """One tokenizer, three pixel sizes, exact each time."""
    arguments = VIT | {"dynamic_img_size": True}
    for size_hw, length in [((64, 96), 25), ((96, 64), 25), ((224, 32), 29)]:
        config = TimmConfig(
            name="vit_tiny_patch16_224",
            model_args=arguments,
            level=-1,
            prefix="keep",
            norm=True,
            pooled=True,
            pixel_spec=spec(*size_hw),
        )
        tokenizer = build(config)
        check_laws(tokenizer)
        assert tokenizer.tokens_for((10, 10)) == length


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"]
)
@pytest.mark.parametrize("norm", [True, False])
def test_timm_dropped_prefix_leaves_the_kept_grid(name, norm):
    keep, drop = (build(tiny(name, norm=norm, prefix=prefix)) for prefix in ("keep", "drop"))
    drop.load_state_dict(keep.state_dict())
    ((kept,), (dropped,)) = (encode(tokenizer, one_image(60, 90)) for tokenizer in (keep, drop))
    assert kept.shape.prefix == BACKBONES[name][2]
    assert dropped.shape.prefix == 0
    assert torch.equal(kept.tokens[:, kept.shape.prefix :], dropped.tokens)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet18"])
def test_timm_map_becomes_rows_then_columns(name):
    """Tokens are the cells of timm's channels-first map, row by row, in either layout."""
    tokenizer = build(tiny(name)).eval()
    (pixels,) = tokenizer.pixel_spec(one_image(50, 90))
    with torch.no_grad():
        tokens = tokenizer(pixels[None])
        (cells,) = tokenizer.backbone.forward_intermediates(
            pixels[None], indices=[tokenizer.level], norm=True, intermediates_only=True
        )
    h, w = tokens.grid_hw
    for row, column in [(0, 0), (0, w - 1), (h - 1, 0), (h - 1, 1)]:
        torch.testing.assert_close(tokens.tokens[0, row * w + column], cells[0, :, row, column])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("resnet18", {"level": 5, "norm": False}, "level 5 asked of a backbone with 5 levels"),
        ("resnet18", {"level": 1}, "needs the last of 5 levels, found level 1"),
        ("resnet18", {"norm": False, "pooled": True}, "needs norm=True"),
        ("resnet18", {"prefix": "auto"}, "'drop' or 'keep', found 'auto'"),
    ],
)
def test_timm_tokenizer_raises_when_the_backbone_cannot(name, change, words):
    with pytest.raises(ValueError, match=words):
        build(tiny(name, **change))


def test_timm_final_features_without_patches_raise():
    backbone = timm.create_model("pit_ti_224", num_classes=0)
    config = TimmConfig(
        name="pit_ti_224",
        model_args={},
        level=-1,
        prefix="drop",
        norm=True,
        pooled=True,
        pixel_spec=spec(224, 224),
    )
    tokenizer = build(config)
    assert type(tokenizer.backbone) is type(backbone)
    with pytest.raises(ValueError, match=r"have 1 tokens, expected 0 before a grid of \(7, 7\)"):
        tokenizer.tokens_for((224, 224))


@pytest.mark.parametrize("size_hw", [None, (64, 96)])
def test_timm_load_reads_a_saved_folder(size_hw, tmp_path):
    """Weights made for 64 × 64 give non-square tokens, equal to timm's own resizing."""
    name, arguments = "vit_tiny_patch16_224", VIT | {"img_size": 64}
    reference = timm.create_model(name, num_classes=0, **arguments).eval()
    reference.pretrained_cfg["input_size"] = (3, 64, 64)
    timm.models.save_for_hf(reference, tmp_path, model_args=arguments, safe_serialization=True)
    tokenizer = load(f"local-dir:{tmp_path}", prefix="keep", pooled=True, size_hw=size_hw)
    if size_hw:
        reference.set_input_size(size_hw)
    (tokens,) = encode(tokenizer, one_image(40, 70))
    pixels = tokenizer.pixel_spec(one_image(40, 70))[0][None]
    with torch.no_grad():
        torch.testing.assert_close(tokens.tokens, reference.forward_features(pixels))
        torch.testing.assert_close(tokens.pooled, reference(pixels))
    rebuilt = tokenizers.build(tokenizers.config_to_dict(tokenizer))
    rebuilt.load_state_dict(tokenizer.state_dict(), strict=True)


def test_timm_load_without_weights_says_how_to_go_offline():
    with pytest.raises(
        OSError, match=r"timm cannot load 'vit_tiny_patch16_224'.*Without a network"
    ):
        load("vit_tiny_patch16_224", prefix="drop", pooled=False)
