"""open_clip's layout beside open_clip itself: weights, configurations, pixels and text, tiny and at
published sizes."""

import importlib.util
import json
import shutil
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from accelerate import init_empty_weights
from huggingface_hub.utils import EntryNotFoundError
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file, save_file
from timm.layers import GELUTanh
from timm.models import VisionTransformer, register_model
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    GemmaTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    T5Tokenizer,
)

import vlm
from tests import tiny, towers
from tests.reference import test_clip
from tests.tiny import picture
from vlm import pooling
from vlm.pixels import from_open_clip
from vlm.systems import open_clip_config
from vlm.systems import open_clip_layout as layout
from vlm.training.contrastive import Settings
from vlm.weights import WeightsError, same_bits

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
NAMES = {
    "tokenizer.backbone.": "vision_model.",
    "text.backbone.": "text_model.",
    "image_head.": "visual_projection.",
    "text_head.": "text_projection.",
    "log_scale": "logit_scale",
    "bias": "logit_bias",
}
"""Our names -> those of transformers' CLIPModel and SiglipModel."""


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


def random_ids(cfg, rows=5, seed=1):
    """Ids as tokenizers give them: an end, here the largest id (or the one that is named), and
    padding behind."""
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
    """T18. The text towers are cut, to be quick: six layers, a thousand ids."""
    cfg = open_clip.get_model_config(name)
    cfg["text_cfg"] |= {"vocab_size": 1000, "layers": 6}
    theirs = their_model(cfg, noise=0.02)
    ours = reference_model(cfg, layout.to_ours(theirs.state_dict(), cfg))
    preprocess = PIXELS[layout.system_of(cfg)] | {"size": 224}
    transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    spec = from_open_clip(preprocess)
    pictures = [picture(0, (300, 171)), picture(1, (150, 400))]
    ids = random_ids(cfg)
    a = embeddings(theirs, torch.stack([transform(p) for p in pictures]), ids)
    b = embeddings(ours, torch.stack([spec(p)[0] for p in pictures]), ids)
    check_equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_weights_round_trip_bit_for_bit(case):
    """T11's scale and bias are among them: shapes () and (1,)."""
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
def test_pictures_that_are_not_square_give_equal_embeddings(case, preprocess, size):
    """T18, each side with its own preprocessing."""
    cfg = CASES[case]
    preprocess = {"size": cfg["vision_cfg"]["image_size"], **preprocess}
    transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    spec = from_open_clip(preprocess)
    pictures = [picture(seed, size) for seed in range(4)]
    theirs = their_model(cfg)
    ours = reference_model(cfg, layout.to_ours(theirs.state_dict(), cfg))
    ids = random_ids(cfg)
    a = embeddings(theirs, torch.stack([transform(p) for p in pictures]), ids)
    b = embeddings(ours, torch.stack([spec(p)[0] for p in pictures]), ids)
    check_equal(a, b)


SAME = [
    "A photo of a CAT.",
    "don't you'll we've I'd it's HE'S THEY'RE I'm",
    "naïve café über Straße, Здравствуй, МИР! İstanbul",
    "cafe\u0301 in two code points, a\u00a0space and\u2003another, zero\u200bwidth",
    "日本語 テキスト 😀👍🏽 한국어 العربية",
    "3.14 12345 items!!! (50%) #tag @me ?!'s ''s",
    "  many   spaces\tand\nlines  ",
    "__init__ a_b-c [x] {y} ~`^\\|",
    "!",
    "",
]
OTHER = {
    "repair of broken text": "donâ€™t",
    "curly quotes": "“curly” ‘quotes’",
    "ligatures and full width": "ﬁne ＡＢＣ",
    "HTML": "salt &amp; pepper",
    "a capital sigma at a word's end": "ΟΔΟΣ",
    "what a special token is called": "<start_of_text>",
}
"""Where open_clip's text tokenizer and transformers' CLIP tokenizer part."""


def test_clip_tokenizer_gives_open_clips_ids():
    theirs, ours = SimpleTokenizer(), layout.clip_tokenizer()
    assert len(ours) == theirs.vocab_size == 49408
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.sot_token_id, theirs.eot_token_id)

    def their_ids(text):
        return [theirs.sot_token_id, *theirs.encode(text), theirs.eot_token_id]

    for text in SAME:
        assert ours(text)["input_ids"] == their_ids(text), text
    for difference, text in OTHER.items():
        assert ours(text)["input_ids"] != their_ids(text), difference
    # Cut to the context, both keep the end; what stands behind it differs and is never seen.
    (row,) = theirs(" ".join(["cat"] * 90)).tolist()
    assert ours(" ".join(["cat"] * 90), truncation=True)["input_ids"] == row
    (row,) = theirs("a cat").tolist()
    assert row[:4] == ours("a cat")["input_ids"]
    assert set(row[4:]) == {0}
    padded = ours("a cat", padding="max_length")["input_ids"]
    assert set(padded[4:]) == {theirs.eot_token_id}


def test_clip_tokenizer_survives_saving(tmp_path):
    ours = layout.clip_tokenizer()
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again(text)["input_ids"] for text in SAME] == [ours(text)["input_ids"] for text in SAME]


def sentence_pieces():
    """A tiny T5 tokenizer, in the class that open_clip's SigLIP folders name."""
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz'.,_&é"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, ("▁cat", -2.0)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def gemma_pieces():
    """A tiny Gemma tokenizer as SigLIP 2's folders set it: texts end and do not begin."""
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁abcdefghijklmnopqrstuvwxyzAC'.,_&é"]
    pieces = {piece: id for id, piece in enumerate([*letters, "ca", "cat"])}
    merges = [("c", "a"), ("ca", "t")]
    ends = {"add_bos_token": False, "add_eos_token": True}
    return GemmaTokenizer(vocab=pieces, merges=merges, padding_side="right", **ends)


def write_folder(folder, cfg, model=None, preprocess=None, tokenizer=None):
    """A folder as open_clip's push-to-hub code writes it, by its own function."""
    model = model or their_model(cfg)
    defaults = PreprocessCfg(size=cfg["vision_cfg"]["image_size"], **(preprocess or {}))
    open_clip.model.set_model_preprocess_cfg(model, asdict(defaults))
    save_for_hf(model, tokenizer or sentence_pieces(), cfg, folder, safe_serialization=True)
    return model


@pytest.mark.parametrize("tokenizer", [sentence_pieces, gemma_pieces])
@pytest.mark.parametrize("clean", ["canonicalize", "lower", "whitespace", None])
def test_folder_tokenizer_gives_open_clips_ids(tmp_path, clean, tokenizer):
    """Cleaning is done by the tokenizer itself, and stays when it is saved anew."""
    cfg = changed(SIGLIP, text={"tokenizer_kwargs": {"clean": clean} if clean else {}})
    write_folder(tmp_path / "a", cfg, tokenizer=tokenizer())
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'a'}")
    ours = layout.folder_tokenizer(tmp_path / "a", cfg)
    ours.save_pretrained(tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    length = cfg["text_cfg"]["context_length"]
    for text in ("A  Cat", "a_cat, don't!", "é\n dog", "cat " * 20, ""):
        (expected,) = theirs(text).tolist()
        for opened in (ours, again):
            row = opened(text, padding="max_length", truncation=True, max_length=length)
            assert row["input_ids"] == expected, text


def test_folder_without_its_tokenizer_is_refused(tmp_path):
    write_folder(tmp_path, SIGLIP)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    with pytest.raises(
        OSError, match="'some/tokenizer': expected the files of this tokenizer here"
    ):
        layout.folder_tokenizer(tmp_path, SIGLIP)


def test_tokenizer_options_that_cannot_be_done_are_refused(tmp_path):
    write_folder(tmp_path, SIGLIP)
    for cfg, key in (
        (changed(SIGLIP, text={"tokenizer_kwargs": {"strip_sep_token": True}}), "tokenizer_kwargs"),
        (changed(SIGLIP, text={"tokenizer_mode": "clips"}), "tokenizer_mode"),
        (changed(SIGLIP, text={"vocab_size": 20}), "vocab_size"),
        (
            changed(CLIP, text={"tokenizer_kwargs": {"reduction_mask": "random"}}),
            "tokenizer_kwargs",
        ),
        (CLIP, "vocab_size"),
        (changed(SIGLIP, text={"hf_tokenizer_name": None}), "hf_tokenizer_name"),
    ):
        with pytest.raises(ValueError, match=rf"^text_cfg.{key}: expected .* found"):
            layout.folder_tokenizer(tmp_path, cfg)


PICTURES = [picture(0, (71, 40)), picture(1, (33, 90)), picture(2, (24, 25))]
TEXTS = ["a photo of a CAT", "two  dogs, and a tree's shade!", "!", "cat " * 30]


def folder_case(name):
    """A tiny model_cfg with real text settings: CLIP's own vocabulary, or the folder's."""
    cfg = CASES[name]
    return changed(cfg, text={"vocab_size": 49408}) if name.startswith("clip") else cfg


def open_clip_embeddings(folder, texts=TEXTS):
    """Of PICTURES and texts, by open_clip alone: its model, preprocessing and text tokenizer."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels = torch.stack([transform(image) for image in PICTURES])
    return embeddings(model.eval(), pixels, tokenizer(texts))


@pytest.fixture(params=["clip", "clip custom text", "clip quick gelu", "siglip",
                        "siglip tanh gelu"])  # fmt: skip
def folder(request, tmp_path):
    """A folder as open_clip writes it."""
    cfg = folder_case(request.param)
    write_folder(tmp_path / "published", cfg, preprocess=PIXELS[layout.system_of(cfg)])
    return tmp_path / "published"


@pytest.mark.filterwarnings("ignore:.* texts were longer")
def test_folder_gives_open_clips_embeddings_and_is_written_back(folder, tmp_path):
    """T18, and T3's exception for SigLIP's texts."""
    model = vlm.load(folder)
    theirs = open_clip_embeddings(folder)
    check_equal(theirs, (model.embed_images(PICTURES), model.embed_texts(TEXTS)))
    for name in ("reference", "open_clip"):
        model.save(tmp_path / name, layout=name)
        assert same_bits(read(tmp_path / name), read(folder))
        check_equal(theirs, open_clip_embeddings(tmp_path / name))
    model.save(tmp_path / "native")
    again = vlm.load(tmp_path / "native")
    check_equal(theirs, (again.embed_images(PICTURES), again.embed_texts(TEXTS)))
    again.save(tmp_path / "last", layout="open_clip")
    assert same_bits(read(tmp_path / "last"), read(folder))
    assert small_files(tmp_path / "last") == small_files(folder)


def small_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


def read(folder):
    return load_file(folder / "open_clip_model.safetensors")


@pytest.mark.filterwarnings("ignore:.* texts were longer")
@pytest.mark.parametrize("kind", ["clip", "clip at its end", "clip of other bytes", "siglip"])
def test_transformers_folder_is_written_for_open_clip(tmp_path, kind):
    name = kind.partition(" ")[0]
    cfg = folder_case(name)
    config = reference_config(cfg)
    config.text_config.hidden_act = "gelu_pytorch_tanh"
    if name == "clip":
        tokenizer = layout.clip_tokenizer()
        if kind == "clip of other bytes":
            tokenizer = test_clip.text_tokenizer()
        config.text_config.vocab_size = len(tokenizer)
        tokenizer.model_max_length = config.text_config.max_position_embeddings
        if kind == "clip at its end":
            config.text_config.eos_token_id = tokenizer.eos_token_id
        processor = CLIPProcessor(
            CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
            tokenizer,
        )
    else:
        tokenizer = layout.folder_tokenizer(*siglip_tokenizer_folder(tmp_path))
        processor = SiglipProcessor(
            SiglipImageProcessor(size={"height": 16, "width": 16}), tokenizer
        )
    torch.manual_seed(0)
    model = (CLIPModel if name == "clip" else SiglipModel)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(tmp_path / "published")
    processor.save_pretrained(tmp_path / "published")

    ours = vlm.load(tmp_path / "published")
    # Who resizes is all that open_clip cannot be told: Pillow does.
    spec = replace(ours.processor.pixel_spec, backend="pil", half_px="half_even")
    ours.processor.pixel_spec = spec
    ours.save(tmp_path / "written", layout="open_clip")
    theirs = open_clip_embeddings(tmp_path / "written")
    check_equal(theirs, (ours.embed_images(PICTURES), ours.embed_texts(TEXTS)))
    again = vlm.load(tmp_path / "written")
    check_equal(theirs, (again.embed_images(PICTURES), again.embed_texts(TEXTS)))
    scale = again.module.log_scale.detach()
    torch.testing.assert_close(scale, model.logit_scale.detach().reshape(()))


def siglip_tokenizer_folder(tmp_path):
    write_folder(tmp_path / "tokenizer", SIGLIP)
    return tmp_path / "tokenizer", SIGLIP


def test_half_precision_stays_and_old_weight_files_are_read(tmp_path):
    cfg = folder_case("clip")
    theirs = write_folder(tmp_path / "new", cfg).bfloat16()
    save_file(theirs.state_dict(), tmp_path / "new" / layout.WEIGHTS)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    (tmp_path / "old" / layout.WEIGHTS).unlink()
    torch.save(theirs.state_dict(), tmp_path / "old" / layout.OLD_WEIGHTS)
    new, old = (vlm.load(tmp_path / name) for name in ("new", "old"))
    assert same_bits(new.module.state_dict(), old.module.state_dict())
    assert new.module.text_head.weight.dtype == torch.bfloat16
    assert new.module.log_scale.dtype == torch.float32
    new.save(tmp_path / "again", layout="open_clip")
    again = read(tmp_path / "again")
    again["logit_scale"] = again["logit_scale"].bfloat16()
    assert same_bits(again, read(tmp_path / "new"))


def test_folder_that_cannot_be_opened_says_why(tmp_path):
    cfg = folder_case("clip")
    write_folder(tmp_path, cfg)
    config, weights = tmp_path / layout.CONFIG, tmp_path / layout.WEIGHTS
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"model_cfg": changed(cfg, vision={"no_ln_pre": True})}))
    with pytest.raises(ValueError, match=r"open_clip_config.json: vision_cfg.no_ln_pre: expected"):
        vlm.load(tmp_path)
    config.write_text(json.dumps(values | {"preprocess_cfg": {"resize_mode": "odd"}}))
    with pytest.raises(ValueError, match=r"open_clip_config.json: .*resize_mode must be"):
        vlm.load(tmp_path)
    config.write_text(json.dumps({"embed_dim": 3}))
    with pytest.raises(ValueError, match=r"model type None is not one of .*open_clip"):
        vlm.load(tmp_path)
    config.write_text(json.dumps(values))
    state = load_file(weights)
    save_file({k: t for k, t in state.items() if k != "ln_final.bias"}, weights)
    with pytest.raises(WeightsError, match=r"missing \(1\): \['ln_final.bias'\]"):
        vlm.load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(WeightsError, match=r"open_clip_model.safetensors: broken or cut"):
        vlm.load(tmp_path)
    weights.unlink()
    with pytest.raises(WeightsError, match="expected a safetensors file, found"):
        vlm.load(tmp_path)
    (tmp_path / layout.OLD_WEIGHTS).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(WeightsError, match=r"open_clip_pytorch_model.bin: broken or cut"):
        vlm.load(tmp_path)


@pytest.mark.filterwarnings("ignore:.* texts were longer")
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_preprocessing_that_was_changed_is_written_for_open_clip(tmp_path, name):
    cfg = folder_case(name)
    if name == "siglip":
        cfg = changed(cfg, text={"tokenizer_kwargs": {"clean": "whitespace"}})
    write_folder(tmp_path / "a", cfg)
    model = vlm.load(tmp_path / "a")

    def vectors(model):
        return model.embed_images(PICTURES), model.embed_texts(texts)

    texts = ["CAT", *TEXTS]
    before = vectors(model)
    spec = replace(model.processor.pixel_spec, fit="stretch", resample="bilinear", mean=(0.4,) * 3)
    model.processor.pixel_spec, model.processor.lower_case = spec, True
    after = vectors(model)
    moved = [bool((b - a).abs().max() > 1e-3) for b, a in zip(before, after)]
    assert moved == [True, name == "siglip"]  # CLIP's texts were lower case already
    model.save(tmp_path / "b", layout="open_clip")
    again = vlm.load(tmp_path / "b")
    assert again.processor.pixel_spec == spec
    check_equal(after, vectors(again))
    check_equal(after, open_clip_embeddings(tmp_path / "b", texts))


@pytest.mark.parametrize("kept", [True, False])
def test_preprocessing_that_open_clip_cannot_be_told_is_named(tmp_path, kept):
    write_folder(tmp_path / "a", folder_case("clip"))
    model = vlm.load(tmp_path / "a")
    if not kept:
        model.parts.reference = None
    processor, spec = model.processor, model.processor.pixel_spec
    for name, value, message in (
        ("pixel_spec", spec.with_size((48, 48)), r"^pixel_spec.size_hw: expected \(24, 24\), the"),
        ("pixel_spec", replace(spec, anchor="top_left"), "^pixel_spec.anchor: expected 'centre'"),
        ("length", 5, "^processor.length: expected 12, the text tower's, found 5"),
        ("end_id", 7, "^processor.end_id: expected None, .* found 7"),
    ):
        own = getattr(processor, name)
        setattr(processor, name, value)
        with pytest.raises(ValueError, match=message):
            model.save(tmp_path / "b", layout="open_clip")
        setattr(processor, name, own)
    assert not (tmp_path / "b").exists()


def test_the_timed_model_of_open_clip_is_of_our_recipes_size(tmp_path):
    """That of eval/contrastive_beside_open_clip.py."""
    path = Path(__file__).parents[2] / "eval/contrastive_beside_open_clip.py"
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


def test_models_that_open_clip_has_not_are_not_written(tmp_path):
    write_folder(tmp_path / "a", folder_case("clip"))
    model = vlm.load(tmp_path / "a")
    model.parts.reference = None
    model.module.pool = pooling.MeanPool()
    with pytest.raises(ValueError, match=r"^pool: expected own, found 'MeanPool'"):
        model.save(tmp_path / "b", layout="open_clip")
    model.module.pool = pooling.OwnPool()
    model.processor.length = 5
    with pytest.raises(ValueError, match=r"^processor.length: expected 12, .* found 5"):
        model.save(tmp_path / "b", layout="open_clip")
    model.processor.length = 12
    model.module.image_head.bias = torch.nn.Parameter(torch.zeros(20))
    with pytest.raises(WeightsError, match=r"unused \(1\): \['image_head.bias'\]"):
        model.save(tmp_path / "b", layout="open_clip")
    with pytest.raises(ValueError, match=r"expected a contrastive model, found decoder_only"):
        towers.model(tiny.decoder_only()).save(tmp_path / "b", layout="open_clip")
    assert not (tmp_path / "b").exists()


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


@pytest.mark.filterwarnings("ignore:.* texts were longer")
def test_hub_id_of_an_open_clip_repository_is_opened(tmp_path, monkeypatch):
    write_folder(tmp_path, folder_case("siglip"))

    def download(id, name):
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(f"404: {name}")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda id, **options: str(tmp_path))
    model = vlm.load("somebody/a-siglip")
    texts = open_clip_embeddings(tmp_path)[1]
    torch.testing.assert_close(model.embed_texts(TEXTS[:3]), texts[:3], atol=1e-5, rtol=0)
