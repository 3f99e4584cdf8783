"""SigLIP 2 at native resolution equals transformers' Siglip2Model with the same weights, through
the real processor, for images of different shapes in one batch and texts of different lengths."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers

import vlm
from tests.reference.tiny_naflex import IMAGES
from tests.reference.tiny_siglip2 import LENGTH, saved
from vlm.systems import siglip2
from vlm.systems.published import published_name
from vlm.weights import WeightsError, read_weights, same_bits

TEXTS = ["A cup of coffee.", "The Cat", "a", "a cat on a mat " * 8]


def load(folder):
    return vlm.load(folder, device="cpu", dtype="float32")


def embed(model):
    """Our vectors of IMAGES and of TEXTS, the longest of which is cut."""
    with pytest.warns(UserWarning, match="1 of 4 texts were longer than 64 tokens"):
        texts = model.embed_texts(TEXTS)
    return model.embed_images(list(IMAGES.values())), texts


close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_side": "left"},
        {"model_input_names": ["input_ids", "attention_mask"]},
        {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]},
    ],
    ids=["published", "left", "masked", "class_defaults"],
)
def test_siglip2_embeddings_match_reference_through_the_real_processor(options, tmp_path):
    """Pads are attended, unless the tokenizer masks them; images are tall, wide, square,
    tiny and large images in one batch of transformers, padded and masked there."""
    reference = saved(tmp_path, **options)
    model = load(tmp_path)
    reader = transformers.AutoProcessor.from_pretrained(tmp_path)
    inputs = reader(text=TEXTS, images=list(IMAGES.values()), return_tensors="pt")
    with torch.no_grad():
        theirs = reference(**inputs)
    images, texts = embed(model)
    assert inputs.input_ids.shape[1] == LENGTH
    assert torch.equal(model.processor.texts(TEXTS).ids, inputs.input_ids)
    close(images, theirs.image_embeds)
    close(texts, theirs.text_embeds)
    with torch.no_grad():
        close(model.module.logits(images, texts), theirs.logits_per_image, atol=1e-4)


def test_siglip2_takes_the_folders_budget_of_patches(tmp_path):
    """transformers' processor is told the folder's number, which it would not read itself."""
    reference = saved(tmp_path, max_num_patches=100)
    model = load(tmp_path)
    assert model.processor.pixel_spec.max_patches == 100
    reader = transformers.AutoProcessor.from_pretrained(tmp_path)
    inputs = reader(images=list(IMAGES.values()), max_num_patches=100, return_tensors="pt")
    with torch.no_grad():
        theirs = reference.get_image_features(**inputs).pooler_output
    close(embed(model)[0], torch.nn.functional.normalize(theirs, dim=-1))


def test_siglip2_texts_are_lower_cased_whatever_class_the_folder_names(tmp_path):
    """Published folders name Gemma's tokenizer, which leaves capitals as they are; so do folders in
    our own layout that come from them."""
    saved(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"tokenizer_class": "GemmaTokenizer"}
    path.write_text(json.dumps(values))
    model = load(tmp_path)
    model.save(tmp_path / "own")
    for opened in (model, load(tmp_path / "own")):
        ids, valid, cut = opened.processor.texts(["THE CAT", "the cat"])
        assert torch.equal(ids[0], ids[1])
        assert ids.shape == (2, LENGTH)
        assert int(ids[0, valid[0]][-1]) == 1  # <eos>
        assert cut == (0, 0)


def test_siglip2_saved_as_reference_opens_in_transformers_with_the_same_outputs(tmp_path):
    reference = saved(tmp_path / "published")
    model = load(tmp_path / "published")
    model.save(tmp_path / "written", layout="reference")
    assert same_bits(read_weights(tmp_path / "written"), read_weights(tmp_path / "published"))
    reopened = transformers.AutoModel.from_pretrained(tmp_path / "written").eval()
    reader = transformers.AutoProcessor.from_pretrained(tmp_path / "written")
    inputs = reader(text=TEXTS, images=list(IMAGES.values()), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(
            reopened(**inputs).logits_per_image, reference(**inputs).logits_per_image
        )


def test_siglip2_saved_after_training_keeps_what_changed(tmp_path):
    saved(tmp_path / "published")
    model = load(tmp_path / "published")
    for parameter in model.module.parameters():
        parameter.data.mul_(1.01)
    model.save(tmp_path / "written", layout="reference")
    reopened = transformers.AutoModel.from_pretrained(tmp_path / "written").eval()
    reader = transformers.AutoProcessor.from_pretrained(tmp_path / "written")
    inputs = reader(text=TEXTS, images=list(IMAGES.values()), return_tensors="pt")
    with torch.no_grad():
        theirs = reopened(**inputs)
    images, texts = embed(model)
    close(images, theirs.image_embeds)
    close(texts, theirs.text_embeds)


def test_siglip2_in_our_own_layout_keeps_its_outputs_and_where_it_came_from(tmp_path):
    saved(tmp_path / "published", max_num_patches=100)
    model = load(tmp_path / "published")
    model.save(tmp_path / "own")
    again = load(tmp_path / "own")
    assert again.processor.pixel_spec == model.processor.pixel_spec
    for ours, theirs in zip(embed(again), embed(model), strict=True):
        close(ours, theirs, atol=1e-6)
    again.save(tmp_path / "written", layout="reference")
    assert same_bits(read_weights(tmp_path / "written"), read_weights(tmp_path / "published"))


@pytest.mark.parametrize("layout", ["native", "reference"])
def test_siglip2_saves_the_budget_of_patches_that_its_processor_was_given(layout, tmp_path):
    saved(tmp_path / "published")
    model = load(tmp_path / "published")
    model.processor.pixel_spec = model.processor.pixel_spec.with_size((128, 48))
    for _ in range(2):  # and what was saved in our own layout in the published one
        model.save(tmp_path / layout, layout=layout)
        model, given = load(tmp_path / layout), model
        assert model.processor.pixel_spec.max_patches == 24
        close(embed(model)[0], embed(given)[0], atol=1e-6)
        layout = "reference"
    reader = transformers.AutoImageProcessor.from_pretrained(tmp_path / "reference")
    assert reader.max_num_patches == 24


def test_siglip2_preprocessing_that_the_layout_has_not_is_named(tmp_path):
    saved(tmp_path / "published")
    model = load(tmp_path / "published")
    spec = replace(model.processor.pixel_spec, fit="stretch", patch_px=None)
    model.processor.pixel_spec = spec
    with pytest.raises(ValueError, match=r"pixel_spec\.fit: expected 'patches', found 'stretch'"):
        model.save(tmp_path / "written", layout="reference")
    assert not (tmp_path / "written").exists()
    model.save(tmp_path / "own")
    assert load(tmp_path / "own").processor.pixel_spec == spec
    model.processor.pixel_spec = spec.with_size((250, 250))
    with pytest.raises(ValueError, match=r"whole patches of 16, found \(250, 250\)"):
        model.save(tmp_path / "torn")


def test_siglip2_weights_are_refused_with_every_wrong_key(tmp_path):
    saved(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=r"unused \(16\): \['text_model.encoder.layers.2"):
        load(tmp_path)


PARAMETERS = {
    "siglip2-base-patch16-naflex": 375_234_050,
    "siglip2-so400m-patch16-naflex": 1_135_670_962,
}
"""Source: the counts that the hub shows for google/siglip2-{base,so400m}-patch16-256, which have
the same towers and as many positions."""


@pytest.mark.parametrize("size", siglip2.SIZES)
def test_siglip2_published_sizes_have_the_published_parameters_and_names(size):
    with torch.device("meta"):
        module = siglip2.build(size)
        sizes = siglip2.SIZES[size]
        config = transformers.Siglip2Config(vision_config=sizes.vision, text_config=sizes.text)
        reference = transformers.Siglip2Model(config)
    assert sum(parameter.numel() for parameter in module.parameters()) == PARAMETERS[size]
    ours = {published_name(key, siglip2.KEY_MAP): t for key, t in module.state_dict().items()}
    theirs = reference.state_dict()
    scalars = {"logit_scale", "logit_bias"}
    assert {key: t.shape for key, t in ours.items() if key not in scalars} == {
        key: t.shape for key, t in theirs.items() if key not in scalars
    }
    assert ours.keys() == theirs.keys()
    processor = transformers.Siglip2ImageProcessor()  # class defaults are the published values
    assert module.tokenizer.pixel_spec.max_patches == processor.max_num_patches


def test_siglip2_build_names_the_sizes():
    with pytest.raises(ValueError, match="'large' is not one of siglip2-base-patch16-naflex"):
        siglip2.build("large")
