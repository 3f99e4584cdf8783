"""CLIP beside transformers' classes: tiny random folders, in and out."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import vlm
from tests.reference.images_and_texts import (
    IMAGES,
    check_saved_as_reference,
    check_vectors,
    outputs_of,
)
from tests.reference.tiny_clip import write_folder
from tests.tiny import image
from vlm.pixels import OPENAI
from vlm.systems import clip
from vlm.weights import WeightsError, same_bits

TEXTS = ["a cat", "A photo of  two DOGS's", "é, x!", "a rather long caption of many a letter"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    write_folder(path)
    return path


def reference_outputs(folder, images=IMAGES, texts=TEXTS, padding=True):
    outputs, _ = outputs_of(folder, images, texts, padding)
    return outputs


def check_same(folder, theirs, images=IMAGES):
    """Our vectors and logits of TEXTS and of the images are theirs; returns our model."""
    return check_vectors(folder, theirs, images, TEXTS, atol_logits=2e-4)


@pytest.mark.filterwarnings("ignore:.*tokens were cut")
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_vectors_match_reference(tmp_path, act):
    """Unequal texts in one batch; plain GELU is LAION's."""
    write_folder(tmp_path, act=act)
    check_same(tmp_path, reference_outputs(tmp_path))


@pytest.mark.filterwarnings("ignore:.*tokens were cut")
def test_clip_of_an_old_folder_reads_the_largest_id(tmp_path):
    write_folder(tmp_path, old_end=True)
    model = check_same(tmp_path, reference_outputs(tmp_path))
    assert model.module.text.pooling == "largest"


@pytest.mark.filterwarnings("ignore:.*tokens were cut")
def test_clip_with_a_ragged_patch_grid_matches_reference(tmp_path):
    """Pixels beyond the last whole patch are skipped."""
    write_folder(tmp_path, image_size=34)
    check_same(tmp_path, reference_outputs(tmp_path))


def test_clip_at_a_published_geometry_matches_reference(tmp_path):
    """ViT-B/32 at 224 pixels; the text's tower has two layers, and few ids, to be quick."""
    size = clip.SIZES["clip-vit-base-patch32"]
    text = size.text | {"num_hidden_layers": 2}
    write_folder(tmp_path, text=text, width=size.width, noise=0.02, **size.vision)
    images = [image(0, (300, 171)), image(1, (150, 400))]
    theirs = reference_outputs(tmp_path, images)
    assert theirs.image_embeds.shape == (2, 512)
    assert theirs.image_embeds.std(0).mean() > 1e-3  # images do matter
    check_same(tmp_path, theirs, images)


@pytest.mark.filterwarnings("ignore:.*tokens were cut")
def test_clip_folder_of_transformers_4_matches_reference(folder, tmp_path):
    """Image settings in a file of their own, sizes as lone numbers, `torch_dtype`."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "processor_config.json").unlink()
    settings = {
        "crop_size": 32, "size": 32, "do_center_crop": True, "do_normalize": True,
        "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3,
        "image_mean": list(OPENAI.mean), "image_std": list(OPENAI.std),
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    values = json.loads((tmp_path / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    values["text_config_dict"] = values["vision_config_dict"] = None
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = check_same(tmp_path, reference_outputs(tmp_path))
    model.save(tmp_path / "out", layout="reference")
    check_same(tmp_path / "out", reference_outputs(folder))


def test_clip_text_is_cut_with_its_end_token_and_counted(folder):
    model = vlm.load(folder)
    long = "many many words " * 4
    ids, valid, cut = model.processor.texts([long, "a"])
    theirs = transformers.AutoProcessor.from_pretrained(folder).tokenizer
    assert ids[0].tolist() == theirs(long, truncation=True)["input_ids"]
    assert ids[0, -1] == theirs.eos_token_id
    assert cut == (len(theirs(long)["input_ids"]) - 20, 0)
    assert valid.sum(1).tolist() == [20, 3]
    with pytest.warns(UserWarning, match=f"1 of 2 texts .* 20 tokens: {cut[0]} tokens were cut"):
        model.embed_texts([long, "a"])


@pytest.mark.filterwarnings("ignore:.*tokens were cut")
@pytest.mark.parametrize("through", ["native", "reference"])
def test_clip_saved_as_reference_opens_in_transformers(folder, tmp_path, through):
    check_saved_as_reference(folder, tmp_path, through, reference_outputs, check_same)


def test_clip_saved_as_reference_holds_what_was_trained(folder, tmp_path):
    model = vlm.load(folder)
    with torch.no_grad():
        model.module.log_scale.add_(0.5)
        model.module.text_head.weight.mul_(2.0)
    model.save(tmp_path, layout="reference")
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert {key for key in old if not torch.equal(old[key], new[key])} == {
        "logit_scale",
        "text_projection.weight",
    }
    assert new["logit_scale"].shape == ()


def test_clip_preprocessing_that_was_changed_is_kept_or_named(folder, tmp_path):
    model = vlm.load(folder)
    spec = replace(model.processor.pixel_spec.with_size((48, 48)), mean=(0.4, 0.5, 0.6))
    model.processor.pixel_spec, model.processor.length = spec, 9
    wrong = (
        r"processor.pixel_spec.size_hw: expected \(32, 32\), found \(48, 48\); .*"
        r"processor.pixel_spec.mean: .*processor.length: expected 20, found 9$"
    )
    with pytest.raises(ValueError, match=wrong):
        model.save(tmp_path / "out", layout="reference")
    model.save(tmp_path / "native")
    again = vlm.load(tmp_path / "native")
    assert again.processor.pixel_spec == again.module.tokenizer.pixel_spec == spec
    assert again.processor.length == 9
    assert torch.equal(again.embed_images(IMAGES), model.embed_images(IMAGES))
    with pytest.raises(ValueError, match=wrong):
        again.save(tmp_path / "out", layout="reference")
    assert not (tmp_path / "out").exists()


def test_clip_takes_names_of_towers_saved_by_themselves_and_old_position_ids(folder, tmp_path):
    """An inner `vision_model.` is dropped by transformers 5 in some towers."""
    model = vlm.load(folder)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    nested = {
        key.replace("vision_model.", "vision_model.vision_model."): tensor
        for key, tensor in state.items()
    }
    nested["text_model.embeddings.position_ids"] = torch.arange(20)[None]
    nested["logit_scale"] = nested["logit_scale"].reshape(1)
    save_file(nested, tmp_path / "model.safetensors")
    assert same_bits(vlm.load(tmp_path).module.state_dict(), model.module.state_dict())


def test_clip_names_every_wrong_weight_at_once(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    state["text_projection.weight"] = torch.zeros(3, 3)
    state["surplus"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"(?s)visual_projection.*surplus.*text_projection"):
        vlm.load(tmp_path)


def test_clip_refuses_an_end_id_that_its_tokenizer_never_writes(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["eos_token_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"end id 7 .*ends texts with 513"):
        vlm.load(tmp_path)


def test_clip_without_processor_files_is_named(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match=f"{tmp_path}.*AutoProcessor"):
        vlm.load(tmp_path)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "float32"), ("stored", "bfloat16")])
def test_clip_in_bf16_keeps_its_scale_in_fp32(tmp_path, dtype, stored):
    write_folder(tmp_path, dtype=getattr(torch, stored))
    model = vlm.load(tmp_path, dtype=dtype)
    assert model.module.log_scale.dtype == torch.float32
    assert model.module.text_head.weight.dtype == torch.bfloat16
    vectors = model.embed_images(IMAGES)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    cosines = (vectors * reference_outputs(tmp_path).image_embeds).sum(1)
    assert cosines.min() > 0.995


PUBLISHED = {
    "clip-vit-base-patch32": 151_277_313,
    "clip-vit-base-patch16": 149_620_737,
    "clip-vit-large-patch14": 427_616_513,
    "clip-vit-large-patch14-336": 427_944_193,
}


@pytest.mark.parametrize("size", clip.SIZES)
def test_clip_sizes_have_the_published_parameter_counts(size):
    """The numbers are those of openai/CLIP's state dicts."""
    with torch.device("meta"):
        ours = clip.build(size)
        sizes = clip.SIZES[size]
        theirs = transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config=sizes.vision, text_config=sizes.text, projection_dim=sizes.width
            )
        )
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == PUBLISHED[size]


def test_clip_refuses_an_unknown_size():
    with pytest.raises(ValueError, match="'huge' is not one of clip-vit-base-patch32"):
        clip.build("huge")
