"""Tokens equal what the source library's own forward gives with the same weights."""

import copy

import open_clip
import pytest
import timm
import torch
import transformers

from tests.tokenizer_laws import spec
from tests.transformers_tokenizers import TINY
from vlm.tokenizers.open_clip import OpenClipTokenizer
from vlm.tokenizers.timm import TimmTokenizer
from vlm.tokenizers.transformers import TransformersTokenizer

SIZES = [(64, 64), (64, 96), (96, 32)]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def ours_and_theirs(name, size_hw, *, layer, norm, pooled):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name.removesuffix('Model')}Config")(**TINY)
    reference = getattr(transformers, name)._from_config(config, attn_implementation="sdpa").eval()
    for parameter in reference.parameters():  # biases and norms start at 0 and 1: move them
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    options = {"layer": layer, "norm": norm, "pooled": pooled, "prefix": "keep"}
    tokenizer = TransformersTokenizer(copy.deepcopy(reference), spec(*size_hw), **options)
    pixels = torch.randn(2, 3, *size_hw)
    resize = {} if "Dinov2" in name else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        theirs = reference(pixels, output_hidden_states=True, **resize)
        return tokenizer.eval()(pixels), theirs


@pytest.mark.parametrize("size_hw", SIZES)
@pytest.mark.parametrize(
    "name",
    ["SiglipVisionModel", "ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel"],
)
def test_transformers_tokens_equal_last_hidden_state(name, size_hw):
    ours, theirs = ours_and_theirs(name, size_hw, layer=-1, norm=True, pooled=True)
    close(ours.tokens, theirs.last_hidden_state)
    close(ours.pooled, theirs.pooler_output)


@pytest.mark.parametrize("size_hw", SIZES)
def test_clip_tokens_equal_last_hidden_state_before_the_norm(size_hw):
    ours, theirs = ours_and_theirs("CLIPVisionModel", size_hw, layer=-1, norm=False, pooled=True)
    close(ours.tokens, theirs.last_hidden_state)
    close(ours.pooled, theirs.pooler_output)


@pytest.mark.parametrize("layer", [-1, -2, -3, -4, 0, 1, 3])
@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel", "Dinov2Model"])
def test_transformers_layers_equal_hidden_states(name, layer):
    """LLaVA reads CLIP's hidden_states[-2]."""
    ours, theirs = ours_and_theirs(name, (64, 96), layer=layer, norm=False, pooled=False)
    close(ours.tokens, theirs.hidden_states[layer])


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_sam_tokens_equal_its_neck_and_hidden_states(layer):
    torch.manual_seed(0)
    more = {"output_channels": 8, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 32}
    config = transformers.SamVisionConfig(**TINY, **more)
    model_class = transformers.SamVisionModel
    reference = model_class._from_config(config, attn_implementation="sdpa").eval()
    for parameter in reference.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    options = {"layer": layer, "norm": layer == -1, "pooled": False, "prefix": "drop"}
    tokenizer = TransformersTokenizer(copy.deepcopy(reference), spec(64, 64), **options)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs = reference(pixels, output_hidden_states=True)
        ours = tokenizer.eval()(pixels)
    if layer == -1:
        close(ours.tokens, theirs.last_hidden_state.flatten(2).transpose(1, 2))
    else:
        close(ours.tokens, theirs.hidden_states[layer].flatten(1, 2))


CVT = {"embed_dim": [8, 8, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}


def moved(model):
    """A model whose biases, norms and positions, which start at 0 and 1, are moved from there."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("prefix", ["keep", "drop"])
def test_cvt_tokens_equal_its_maps_and_class_token(layer, prefix):
    torch.manual_seed(0)
    reference = moved(transformers.CvtModel(transformers.CvtConfig(**CVT)))
    options = {"layer": layer, "norm": False, "pooled": False, "prefix": prefix}
    tokenizer = TransformersTokenizer(copy.deepcopy(reference), spec(64, 96), **options)
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        theirs = reference(pixels, output_hidden_states=True)
        ours = tokenizer.eval()(pixels)
    stage = layer - 1 if layer > 0 else layer
    map_VDhw = theirs.hidden_states[stage]
    before = [theirs.cls_token_value] if layer == -1 and prefix == "keep" else []
    assert ours.grid_hw == tuple(map_VDhw.shape[-2:])
    assert torch.equal(ours.tokens, torch.cat([*before, map_VDhw.flatten(2).transpose(1, 2)], 1))


def timesformer(attention_type, num_frames):
    torch.manual_seed(0)
    config = transformers.TimesformerConfig(
        **TINY, num_frames=num_frames, attention_type=attention_type
    )
    return moved(transformers.TimesformerModel(config))


@pytest.mark.parametrize("size_hw", SIZES)
@pytest.mark.parametrize("attention_type", ["divided_space_time", "space_only", "joint_space_time"])
def test_timesformer_tokens_equal_a_video_of_one_frame(attention_type, size_hw):
    """Of eight time embeddings transformers takes the first for one frame, and so do ours."""
    reference = timesformer(attention_type, 8)
    options = {"layer": -1, "norm": True, "pooled": False, "prefix": "keep"}
    tokenizer = TransformersTokenizer(copy.deepcopy(reference), spec(*size_hw), **options)
    reference.config.num_frames = 1  # its layers divide the tokens by this
    pixels = torch.randn(2, 3, *size_hw)
    with torch.no_grad():
        theirs = reference(pixels[:, None]).last_hidden_state
        ours = tokenizer.eval()(pixels)
    assert ours.grid_hw == (size_hw[0] // 16, size_hw[1] // 16)
    assert torch.equal(ours.tokens, theirs)


@pytest.mark.parametrize("size_hw", [(32, 128), (48, 80), (128, 16)])
def test_timesformer_refuses_grids_on_which_it_would_misplace_positions(size_hw):
    """As many patches as its own grid of 4 × 4; no multiple of 4; one column."""
    options = {"layer": -1, "norm": True, "pooled": False, "prefix": "drop"}
    reference = timesformer("divided_space_time", 8)
    tokenizer = TransformersTokenizer(reference, spec(*size_hw), **options)
    rows, columns = size_hw[0] // 16, size_hw[1] // 16
    with pytest.raises(ValueError, match=f"4 × 4 patches .* found {rows} × {columns}"):
        tokenizer.tokens_for((30, 50))


def test_timesformer_refuses_videos():
    options = {"layer": -1, "norm": True, "pooled": False, "prefix": "drop"}
    reference = timesformer("divided_space_time", 2)
    tokenizer = TransformersTokenizer(reference, spec(64, 64), **options)
    with pytest.raises(ValueError, match=r"takes images, float\[V, 3, H, W\], found \(1, 2, 3"):
        tokenizer(torch.zeros(1, 2, 3, 64, 64))


VIT = {"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": (64, 96)}
SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}


@pytest.mark.parametrize(
    ("name", "arguments", "as_tokens"),
    [
        ("vit_tiny_patch16_224", VIT, lambda x: x),
        ("vit_base_patch16_siglip_224", VIT, lambda x: x),
        ("deit_tiny_distilled_patch16_224", VIT, lambda x: x),
        ("swin_tiny_patch4_window7_224", SWIN | {"img_size": (64, 96)}, lambda x: x.flatten(1, 2)),
        ("volo_d1_224", {"img_size": (64, 96)}, lambda x: x),
        ("convnext_atto", {}, lambda x: x.flatten(2).transpose(1, 2)),
        ("efficientnet_lite0", {}, lambda x: x.flatten(2).transpose(1, 2)),
    ],
)
@pytest.mark.parametrize("pooled", [True, False])
def test_timm_tokens_equal_forward_features(name, arguments, as_tokens, pooled):
    """NLC, NHWC and NCHW backbones; pooled is the headless model's output."""
    torch.manual_seed(0)
    reference = timm.create_model(name, num_classes=0, **arguments).eval()
    tokenizer = TimmTokenizer(
        copy.deepcopy(reference),
        spec(64, 96),
        name=name,
        model_args=arguments,
        level=-1,
        prefix="keep",
        norm=True,
        pooled=pooled,
    ).eval()
    pixels = torch.randn(2, 3, 64, 96)
    # The order in memory that ours takes: other kernels round otherwise.
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        ours = tokenizer(pixels)
        close(ours.tokens, as_tokens(reference.forward_features(pixels)))
        if pooled:
            close(ours.pooled, reference(pixels))


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 1, 2, -2])
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "efficientnet_lite0"])
def test_timm_levels_equal_features_only(name, level):
    torch.manual_seed(0)
    arguments = SWIN | {"img_size": (64, 96)} if "swin" in name else {}
    reference = timm.create_model(name, num_classes=0, **arguments).eval()
    levels = timm.create_model(name, features_only=True, out_indices=(level,), **arguments).eval()
    levels.load_state_dict(
        {key: value for key, value in reference.state_dict().items() if key in levels.state_dict()}
        if "swin" not in name
        else {key.replace("layers.", "layers_"): v for key, v in reference.state_dict().items()},
        strict=False,
    )
    tokenizer = TimmTokenizer(
        copy.deepcopy(reference),
        spec(64, 96),
        name=name,
        model_args=arguments,
        level=level,
        prefix="drop",
        norm=False,
        pooled=False,
    ).eval()
    pixels = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        (theirs,) = levels(pixels)
        ours = tokenizer(pixels)
    if "swin" in name:
        theirs = theirs.permute(0, 3, 1, 2)
    assert ours.grid_hw == tuple(theirs.shape[-2:])
    close(ours.tokens, theirs.flatten(2).transpose(1, 2))


OPEN_CLIP = {
    "vit": {"width": 32, "layers": 3, "head_width": 16, "patch_size": 16},
    "attention": {
        "width": 32,
        "layers": 3,
        "head_width": 16,
        "patch_size": 16,
        "attentional_pool": True,
        "attn_pooler_queries": 6,
        "attn_pooler_heads": 2,
    },
    "resnet": {"layers": (1, 1, 1, 1), "width": 8, "head_width": 8},
    "timm": {"timm_model_name": "convnext_atto", "timm_pool": "avg", "timm_proj": "mlp"},
}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_pooled_equals_encode_image(name):
    """Where the tower can be built non-square."""
    torch.manual_seed(0)
    size_hw = (64, 64) if name == "resnet" else (64, 96)
    vision_cfg = OPEN_CLIP[name] | {"image_size": 64 if name == "resnet" else size_hw}
    text_cfg = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
    model = open_clip.CLIP(24, vision_cfg, text_cfg, quick_gelu=True).eval()
    tokenizer = OpenClipTokenizer(
        copy.deepcopy(model.visual),
        spec(*size_hw),
        vision_cfg=vision_cfg,
        embed_dim=24,
        quick_gelu=True,
        layer=-1,
        prefix="drop",
        norm=name in ("vit", "timm"),
        pooled=True,
    ).eval()
    pixels = torch.randn(2, 3, *size_hw)
    with torch.no_grad():
        ours = tokenizer(pixels)
        close(ours.pooled, model.encode_image(pixels))
        if name == "vit":
            model.visual.output_tokens = True
            close(ours.tokens, model.visual(pixels)[1])
