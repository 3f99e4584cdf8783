"""Folders of open_clip's layout beside open_clip itself: opened, written, refused."""

import json
import shutil
from dataclasses import replace

import huggingface_hub
import open_clip
import pytest
import torch
from huggingface_hub.utils import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

import vlm
from tests import tiny, towers
from tests.reference import tiny_clip
from tests.reference.tiny_open_clip import (
    CASES,
    PIXELS,
    SIGLIP,
    changed,
    check_equal,
    embeddings,
    reference_config,
    write_folder,
)
from tests.tiny import image as one_image
from vlm import pooling
from vlm.systems.open_clip import layout
from vlm.weights import WeightsError, same_bits

IMAGES = [one_image(0, (71, 40)), one_image(1, (33, 90)), one_image(2, (24, 25))]
TEXTS = ["a photo of a CAT", "two  dogs, and a tree's shade!", "!", "cat " * 30]


def folder_case(name):
    """A tiny model_cfg with real text settings: CLIP's own vocabulary, or the folder's."""
    cfg = CASES[name]
    return changed(cfg, text={"vocab_size": 49408}) if name.startswith("clip") else cfg


def open_clip_embeddings(folder, texts=TEXTS):
    """Of IMAGES and texts, by open_clip alone: its model, preprocessing and text tokenizer."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels = torch.stack([transform(image) for image in IMAGES])
    return embeddings(model.eval(), pixels, tokenizer(texts))


@pytest.fixture(params=["clip", "clip custom text", "clip quick gelu", "siglip",
                        "siglip tanh gelu"])  # fmt: skip
def folder(request, tmp_path):
    """A folder as open_clip writes it."""
    cfg = folder_case(request.param)
    write_folder(tmp_path / "published", cfg, preprocess=PIXELS[layout.system_of(cfg)])
    return tmp_path / "published"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* texts were longer")
def test_folder_gives_open_clips_embeddings_and_is_written_back(folder, tmp_path):
    """SigLIP's texts too, all of which have one length."""
    model = vlm.load(folder)
    theirs = open_clip_embeddings(folder)
    check_equal(theirs, (model.embed_images(IMAGES), model.embed_texts(TEXTS)))
    for name in ("reference", "open_clip"):
        model.save(tmp_path / name, layout=name)
        assert same_bits(read(tmp_path / name), read(folder))
        check_equal(theirs, open_clip_embeddings(tmp_path / name))
    model.save(tmp_path / "native")
    again = vlm.load(tmp_path / "native")
    check_equal(theirs, (again.embed_images(IMAGES), again.embed_texts(TEXTS)))
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
            tokenizer = tiny_clip.text_tokenizer()
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
    check_equal(theirs, (ours.embed_images(IMAGES), ours.embed_texts(TEXTS)))
    again = vlm.load(tmp_path / "written")
    check_equal(theirs, (again.embed_images(IMAGES), again.embed_texts(TEXTS)))
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
    new, old = (vlm.load(tmp_path / name, "cpu", "stored") for name in ("new", "old"))
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
    with pytest.raises(
        WeightsError,
        match=r"open_clip_pytorch_model.bin: (broken or cut|expected weights, found text)",
    ):
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
        return model.embed_images(IMAGES), model.embed_texts(texts)

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
        model.reference = None
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


def test_models_that_open_clip_has_not_are_not_written(tmp_path):
    write_folder(tmp_path / "a", folder_case("clip"))
    model = vlm.load(tmp_path / "a")
    model.reference = None
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
