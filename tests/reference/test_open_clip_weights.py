"""open_clip's weights in our modules and in transformers' classes: tiny ones and those of
published sizes."""

import open_clip
import pytest
import torch
from accelerate import init_empty_weights
from open_clip.transform import PreprocessCfg, image_transform_v2
from transformers import (
    CLIPModel,
    SiglipModel,
)

from tests.reference.tiny_open_clip import (
    CASES,
    CLIP,
    PIXELS,
    PUBLISHED,
    SIGLIP,
    check_equal,
    embeddings,
    empty_model,
    random_ids,
    reference_config,
    their_model,
)
from tests.tiny import image
from vlm.pixels import from_open_clip
from vlm.systems.open_clip import layout
from vlm.weights import WeightsError, same_bits

NAMES = {
    "tokenizer.backbone.": "vision_model.",
    "text.backbone.": "text_model.",
    "image_head.": "visual_projection.",
    "text_head.": "text_projection.",
    "log_scale": "logit_scale",
    "bias": "logit_bias",
}
"""Our names -> those of transformers' CLIPModel and SiglipModel."""


def reference_names(state):
    def name(key):
        ours = next(prefix for prefix in NAMES if key.startswith(prefix))
        return NAMES[ours] + key.removeprefix(ours)

    return {name(key): tensor for key, tensor in state.items()}


def reference_model(cfg, state):
    """transformers' model with our weights, strictly."""
    config = reference_config(cfg)
    with init_empty_weights(include_buffers=False):
        model = (SiglipModel if config.model_type == "siglip" else CLIPModel)(config).eval()
    named = reference_names(state)
    own = model.state_dict()
    if "logit_bias" not in own:
        named.pop("logit_bias", None)
    scalars = {k: t.reshape(own[k].shape) for k, t in named.items() if t.ndim == 0}
    model.load_state_dict(named | scalars, assign=True)
    return model


@pytest.mark.parametrize("case", CASES)
def test_embeddings_equal_through_the_converted_towers(case):
    cfg = CASES[case]
    theirs = their_model(cfg)
    ours = reference_model(cfg, layout.to_ours(theirs.state_dict(), cfg))
    pixels = torch.randn(5, 3, *[cfg["vision_cfg"]["image_size"]] * 2)
    ids = random_ids(cfg)
    check_equal(embeddings(theirs, pixels, ids), embeddings(ours, pixels, ids))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP"])
def test_embeddings_equal_at_published_sizes(name):
    """The text towers are cut, to be quick: six layers, a thousand ids."""
    cfg = open_clip.get_model_config(name)
    cfg["text_cfg"] |= {"vocab_size": 1000, "layers": 6}
    theirs = their_model(cfg, noise=0.02)
    ours = reference_model(cfg, layout.to_ours(theirs.state_dict(), cfg))
    preprocess = PIXELS[layout.system_of(cfg)] | {"size": 224}
    transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    spec = from_open_clip(preprocess)
    images = [image(0, (300, 171)), image(1, (150, 400))]
    ids = random_ids(cfg)
    a = embeddings(theirs, torch.stack([transform(p) for p in images]), ids)
    b = embeddings(ours, torch.stack([spec(p)[0] for p in images]), ids)
    check_equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_weights_round_trip_bit_for_bit(case):
    """The scale and bias are among them: shapes () and (1,)."""
    cfg = CASES[case]
    state = their_model(cfg).state_dict()
    ours = layout.to_ours(state, cfg)
    assert ours["log_scale"].shape == ()
    assert ("bias" in ours) == (cfg.get("init_logit_bias") is not None)
    back = layout.to_open_clip(ours, cfg)
    assert same_bits(back, state)
    assert all(back[key].shape == tensor.shape for key, tensor in state.items())
    assert same_bits(layout.to_ours(back, cfg), ours)
    storages = [tensor.untyped_storage().nbytes() for tensor in ours.values()]
    assert storages == [t.numel() * t.element_size() for t in ours.values()]  # no shared rows


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_fit_transformers_at_published_sizes(name):
    cfg = open_clip.get_model_config(name)
    config = reference_config(cfg)
    with torch.device("meta"):
        theirs = (SiglipModel if config.model_type == "siglip" else CLIPModel)(config)
    state = empty_model(cfg).state_dict()
    ours = layout.to_ours(state, cfg)
    named = {key: tensor.numel() for key, tensor in reference_names(ours).items()}
    assert named == {key: tensor.numel() for key, tensor in theirs.state_dict().items()}
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items() if tensor.ndim > 1}
    assert shapes.items() <= {k: t.shape for k, t in reference_names(ours).items()}.items()
    back = layout.to_open_clip(ours, cfg)
    assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in state.items()}
    assert layout.published_shapes(cfg) == {k: t.shape for k, t in state.items()}


def test_weights_that_do_not_fit_are_all_named_at_once():
    state = their_model(CLIP).state_dict()
    state["visual.extra"] = state.pop("visual.ln_pre.weight")
    state["visual.transformer.resblocks.1.attn.in_proj_weight"] = torch.zeros(95, 32)
    with pytest.raises(WeightsError) as error:
        layout.to_ours(state, CLIP)
    for line in (
        "missing (1): ['visual.ln_pre.weight']",
        "unused (1): ['visual.extra']",
        "resblocks.1.attn.in_proj_weight: expected (96, 32), found (95, 32)",
    ):
        assert line in str(error.value)
    ours = layout.to_ours(their_model(SIGLIP).state_dict(), SIGLIP)
    ours["tokenizer.backbone.lora"] = ours.pop("bias")
    with pytest.raises(WeightsError, match=r"missing \(1\): \['bias'\]\nunused \(1\): .*lora"):
        layout.to_open_clip(ours, SIGLIP)


@pytest.mark.parametrize(
    ("case", "preprocess"),
    [
        ("clip", {"resize_mode": "shortest"}),
        ("clip", {"resize_mode": "longest", "fill_color": 90, "interpolation": "bilinear"}),
        ("siglip", {"resize_mode": "squash", "mean": (0.5,) * 3, "std": (0.5,) * 3}),
    ],
)
@pytest.mark.parametrize("size", [(71, 40), (33, 90), (24, 25)])
def test_images_that_are_not_square_give_equal_embeddings(case, preprocess, size):
    """Each side with its own preprocessing."""
    cfg = CASES[case]
    preprocess = {"size": cfg["vision_cfg"]["image_size"], **preprocess}
    transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    spec = from_open_clip(preprocess)
    images = [image(seed, size) for seed in range(4)]
    theirs = their_model(cfg)
    ours = reference_model(cfg, layout.to_ours(theirs.state_dict(), cfg))
    ids = random_ids(cfg)
    a = embeddings(theirs, torch.stack([transform(p) for p in images]), ids)
    b = embeddings(ours, torch.stack([spec(p)[0] for p in images]), ids)
    check_equal(a, b)
