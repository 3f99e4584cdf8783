"""SigLIP, and SigLIP 2 at fixed sizes, beside transformers' classes: tiny random folders."""

import pickle

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
from tests.reference.images_in_text import folders
from tests.reference.tiny_siglip import TOKENIZERS, write_folder
from tests.tiny import image
from vlm.systems import siglip
from vlm.tokenizers import tiles
from vlm.weights import WeightsError

TEXTS = ["a cat", "A photo of  two DOGS!", "the tree is green and the sky is blue, too"]


folder = folders(TOKENIZERS, write_folder)


def reference_outputs(folder, texts=TEXTS, images=IMAGES):
    """Texts at full length, of which the model is told no padding."""
    outputs, given = outputs_of(folder, images, texts, "max_length")
    assert "attention_mask" not in given
    return outputs


def check_same(folder, theirs, texts=TEXTS, images=IMAGES):
    return check_vectors(folder, theirs, images, texts, atol_logits=1e-4)


@pytest.mark.filterwarnings("ignore:.*tokens were cut")
def test_siglip_vectors_match_reference(folder):
    """Texts of unequal length, all at the trained one. 30 / 8 uses 24."""
    check_same(folder, reference_outputs(folder))


@pytest.mark.filterwarnings("ignore:.*tokens were cut")
def test_siglip_at_another_published_geometry_matches_reference(tmp_path):
    """384 / 14 leaves out 6 pixels: 27 patches a side."""
    write_folder(tmp_path, image_size=384, patch_size=14)
    model = check_same(tmp_path, reference_outputs(tmp_path, TEXTS[:2]), TEXTS[:2])
    assert model.module.tokenizer.tokens_for((100, 300)) == 27 * 27


@pytest.mark.slow
def test_siglip_at_a_published_geometry_and_width_matches_reference(tmp_path):
    """B/16 at 224 pixels, 64 places for texts; four layers and two, few ids, to be quick."""
    size = siglip.SIZES["siglip-base-patch16-224"]
    text = size.text | {"num_hidden_layers": 2}
    vision = size.vision | {"num_hidden_layers": 4}
    write_folder(tmp_path, text=text, noise=0.02, **vision)
    images = [image(0, (300, 171)), image(1, (150, 400))]
    theirs = reference_outputs(tmp_path, images=images)
    assert theirs.image_embeds.shape == (2, 768)
    assert theirs.image_embeds.std(0).mean() > 1e-3  # images do matter
    model = check_same(tmp_path, theirs, images=images)
    assert model.processor.texts(TEXTS).ids.shape == (3, 64)


@pytest.mark.filterwarnings("ignore:.*tokens were cut")
def test_siglip_texts_always_have_the_trained_length(folder):
    """Alone or in a batch, a text is the same."""
    model = vlm.load(folder)
    for texts in (["a"], ["a", "a photo of two dogs and a cat and a tree"]):
        ids, valid, _ = model.processor.texts(texts)
        assert ids.shape == (len(texts), 16)
        assert valid[0].sum() == len(model.processor.rows(["a"])[0][0])
    alone = torch.cat([model.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(alone, model.embed_texts(TEXTS), atol=1e-6, rtol=0)


def test_siglip_attends_its_pads(folder):
    """What stands at a pad changes the text's vector, and no mask is given."""
    model = vlm.load(folder)
    ids, valid, _ = model.processor.texts(["a cat"])
    other = ids.clone()
    other[~valid] = 5
    with torch.no_grad():
        before, after = model.module.embed_texts(ids, valid), model.module.embed_texts(other, valid)
        masked = model.module.embed_texts(ids, torch.ones_like(valid))
    assert (before - after).abs().max() > 1e-3
    assert torch.equal(before, masked)


def test_siglip_text_is_cut_with_its_end_token_and_counted(folder):
    processor = vlm.load(folder).processor
    theirs = transformers.AutoProcessor.from_pretrained(folder).tokenizer
    long = "the tree is green and the sky is blue and the cat is not a dog"
    ids, valid, cut = processor.texts([long])
    assert ids[0].tolist() == theirs(long, truncation=True, max_length=16)["input_ids"]
    assert ids[0, -1] == theirs.eos_token_id
    assert bool(valid.all())
    assert cut == (len(theirs(long)["input_ids"]) - 16,)


def test_siglip_2_texts_keep_their_capitals_unless_told(tmp_path):
    """The fixed-size folders' tokenizer does; the model was trained on lower case."""
    write_folder(tmp_path, "siglip2")
    model = vlm.load(tmp_path)
    capital, small = model.embed_texts(["A Cat", "a cat"])
    assert (capital - small).abs().max() > 1e-3
    model.processor.lower_case = True
    model.save(tmp_path / "native")
    again = vlm.load(tmp_path / "native").embed_texts(["A Cat"])
    torch.testing.assert_close(again[0], small, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"processor\.lower_case: expected False, found True$"):
        model.save(tmp_path / "out", layout="reference")
    assert not (tmp_path / "out").exists()


def test_siglip_tiles_keep_the_preprocessing_of_their_parts(folder, tmp_path):
    model = vlm.load(folder)
    tiled = tiles.TilesTokenizer(model.module.tokenizer, max_tiles=4, thumbnail=True)
    model.module.tokenizer, model.processor.pixel_spec = tiled, tiled.pixel_spec
    model.save(tmp_path / "native")
    assert vlm.load(tmp_path / "native").processor.pixel_spec == tiled.pixel_spec
    model.processor.pixel_spec = tiled.pixel_spec.tile
    with pytest.raises(ValueError, match=r"processor\.pixel_spec: a tiles tokenizer has that of"):
        model.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore:.*tokens were cut")
@pytest.mark.parametrize("through", ["native", "reference"])
def test_siglip_saved_as_reference_opens_in_transformers(folder, tmp_path, through):
    state = check_saved_as_reference(folder, tmp_path, through, reference_outputs, check_same)
    assert state["logit_bias"].shape == (1,)


def test_siglip_names_every_wrong_weight_at_once(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    del state["vision_model.head.probe"]
    state["logit_bias"] = torch.zeros(2)
    state["surplus"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"(?s)head\.probe.*surplus.*logit_bias"):
        vlm.load(tmp_path)


def test_siglip_in_bf16_keeps_scale_and_bias_in_fp32(tmp_path):
    write_folder(tmp_path, dtype=torch.bfloat16)
    model = vlm.load(tmp_path, dtype="bfloat16")
    assert model.module.log_scale.dtype == model.module.bias.dtype == torch.float32
    assert next(model.module.text.parameters()).dtype == torch.bfloat16
    theirs = reference_outputs(tmp_path, TEXTS[:1])
    assert (model.embed_texts(TEXTS[:1]) * theirs.text_embeds).sum(1).min() > 0.99


def test_siglip_processor_travels_to_workers(folder):
    processor = vlm.load(folder).processor
    again = pickle.loads(pickle.dumps(processor))
    assert torch.equal(again.texts(TEXTS[:2]).ids, processor.texts(TEXTS[:2]).ids)
    assert len(pickle.dumps(processor)) < 1e6


PUBLISHED_MILLIONS = {
    "siglip-base-patch16-224": 203.2,
    "siglip-large-patch16-256": 652.2,
    "siglip-large-patch16-384": 652.5,
    "siglip-so400m-patch14-224": 877.4,
    "siglip-so400m-patch14-384": 878.0,
    "siglip2-base-patch16-224": 375.2,
    "siglip2-large-patch16-256": 881.5,
    "siglip2-so400m-patch14-384": 1136.0,
}


@pytest.mark.slow
@pytest.mark.parametrize("size", siglip.SIZES)
def test_siglip_sizes_have_the_published_parameter_counts(size):
    """Millions as the hub states them for the files of google/{size}."""
    sizes = siglip.SIZES[size]
    with torch.device("meta"):
        ours = siglip.build(size)
        theirs = transformers.SiglipModel(
            transformers.SiglipConfig(vision_config=sizes.vision, text_config=sizes.text)
        )
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    if size in PUBLISHED_MILLIONS:
        assert round(count / 1e6, 1) == PUBLISHED_MILLIONS[size]


def test_siglip_refuses_an_unknown_size():
    with pytest.raises(ValueError, match="'huge' is not one of siglip-base-patch16-224"):
        siglip.build("huge")
