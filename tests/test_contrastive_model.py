import json
import pickle

import numpy as np
import pytest
import torch
import transformers

import vlm
from tests import tiny
from tests.contrastive_models import IMAGES
from tests.folders import public
from tests.reference import tiny_clip, tiny_siglip
from vlm.families.contrastive.model import ContrastiveModel, same_labels
from vlm.lora import Lora, add_lora
from vlm.pixels import BadImage
from vlm.systems import compose_contrastive
from vlm.systems.pretrained import load_vision
from vlm.weights import WeightsError, same_bits

IMAGE_LIST = [tiny.image(i, size) for i, size in enumerate([(40, 71), (90, 33), (20, 21)])]
LABELS = ["cat", "dog", "tree", "green sky"]
TEMPLATES = ["{}", "a photo of {}", "many {}"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.write_folder(folder)
    return vlm.load(folder)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    tiny_siglip.write_folder(folder)
    return vlm.load(folder)


def test_vectors_are_unit_norm_in_order_whatever_the_batch():
    given = public()
    images, texts = given.embed_images(IMAGE_LIST), given.embed_texts(LABELS)
    assert images.shape == (3, 10)
    assert images.dtype == texts.dtype == torch.float32
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)
    for batch_size in (1, 2):
        torch.testing.assert_close(given.embed_images(IMAGE_LIST, batch_size), images)
        torch.testing.assert_close(given.embed_texts(LABELS, batch_size), texts)
    alone = torch.cat([given.embed_texts([label]) for label in LABELS])
    torch.testing.assert_close(texts, alone, atol=1e-6, rtol=1e-5)
    assert given.embed_images([]).shape == given.embed_texts([]).shape == (0, 10)


def test_images_may_be_paths_bytes_images_and_arrays(tmp_path):
    given, image = public(), IMAGE_LIST[0]
    image.save(tmp_path / "a.png")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(),
             image, np.asarray(image)]  # fmt: skip
    vectors = given.embed_images(forms)
    torch.testing.assert_close(vectors, vectors[:1].expand_as(vectors), atol=1e-6, rtol=0)


def test_embedding_leaves_the_mode_and_draws_no_dropout():
    given = public()
    given.module.train()
    vectors = given.embed_texts(LABELS)
    assert given.module.training
    assert torch.equal(vectors, given.embed_texts(LABELS))
    assert not vectors.requires_grad


def test_long_texts_are_cut_with_one_warning_that_counts_them():
    given = public()
    with pytest.warns(UserWarning, match="2 of 3 texts .* 12 tokens: 8 tokens were cut") as caught:
        given.embed_texts(["many words and", "a", "many words 12345"], batch_size=1)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_clip_scores_become_probabilities_by_softmax(clip):
    """The numbers are transformers' zero-shot ones."""
    scores = clip.classify(IMAGE_LIST, LABELS)
    assert scores.shape == (3, 4)
    assert scores.dtype == torch.float32
    expected = clip.module.logits(clip.embed_images(IMAGE_LIST), clip.embed_texts(LABELS))
    torch.testing.assert_close(scores, expected.detach())
    assert clip.module.log_scale.exp() > 10
    torch.testing.assert_close(scores.softmax(1).sum(1), torch.ones(3))


def test_siglip_scores_include_the_bias(siglip):
    scores = siglip.classify(IMAGE_LIST, LABELS)
    cosines = siglip.embed_images(IMAGE_LIST) @ siglip.embed_texts(LABELS).T
    expected = cosines * siglip.module.log_scale.exp() + siglip.module.bias
    torch.testing.assert_close(scores, expected.detach())


def test_templates_are_averaged_after_and_before_normalising(clip):
    """Source: CLIP's notebooks, `zeroshot_classifier`."""
    labelled = clip.embed_labels(LABELS, TEMPLATES)
    for row, label in zip(labelled, LABELS):
        mean = clip.embed_texts([template.replace("{}", label) for template in TEMPLATES]).mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-6, rtol=1e-5)
    bare = clip.classify(IMAGE_LIST, LABELS)
    torch.testing.assert_close(clip.classify(IMAGE_LIST, LABELS, ["{}"]), bare)
    assert (clip.classify(IMAGE_LIST, LABELS, TEMPLATES) - bare).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ([], None, r"labels is a list of at least one text, found \[\]"),
        ("cat", None, "labels is a list of at least one text, found 'cat'"),
        (["cat", " ", ""], None, r"not empty, found labels\[1\]: ' ', labels\[2\]: ''"),
        (["cat", "dog", "cat"], None, r"each label once, .* \{'cat': \[0, 2\]\}"),
        (["cat", 3], None, r"labels\[1\]: expected a text, found 3"),
        (["cat"], [], r"templates is a list of at least one text, found \[\]"),
        (["cat"], "a {}", "templates is a list of at least one text, found 'a {}'"),
        (["cat"], ["a {}", "a photo"], r"templates with {} at the label's position, .*'a photo'"),
    ],
)
def test_bad_labels_and_templates_are_named(clip, labels, templates, message):
    with pytest.raises(ValueError, match=message):
        clip.classify(IMAGE_LIST, labels, templates)


def test_labels_that_are_one_text_to_the_model_are_named(clip, siglip):
    """CLIP reads no capitals, SigLIP no punctuation."""
    with pytest.raises(ValueError, match=r"it reads as one text: \[\['Cat', 'cat'\]\]$"):
        clip.classify(IMAGE_LIST, ["Cat", "dog", "cat"])
    with pytest.raises(ValueError, match=r"leaves something, found \['!\?', '\.'\]$"):
        siglip.classify(IMAGE_LIST, ["cat", "!?", "."])
    with pytest.raises(ValueError, match=r"it reads as one text: \[\['dog', 'Dog!'\]\]$"):
        siglip.classify(IMAGE_LIST, ["cat", "dog", "Dog!"], ["a {}", "{}"])


def test_labels_are_the_same_only_where_they_are_in_every_template():
    """Behind a template as long as the context every label is cut off."""
    processor = public().processor
    labels = ["cat", "dog", "Cat"]
    assert same_labels(processor, labels, ["a photograph of {}"]) == [[0, 1, 2]]
    assert same_labels(processor, labels, ["a photograph of {}", "a {}"]) == []
    processor.lower_case = True
    assert same_labels(processor, labels, ["a photograph of {}", "a {}"]) == [[0, 2]]


def test_bad_images_and_texts_are_named(clip, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"x\.png: expected an image"):
        clip.embed_images([IMAGE_LIST[0], tmp_path / "x.png"])
    with pytest.raises(BadImage, match=r"images\[1\]: .* expected"):
        clip.embed_images([IMAGE_LIST[0], b"no image"])
    with pytest.raises(ValueError, match=r"images\[0\]: expected one image, found a list"):
        clip.embed_images([[IMAGE_LIST[0]]])
    with pytest.raises(ValueError, match="images is a list"):
        clip.embed_images("x.png")
    with pytest.raises(ValueError, match="texts is a list"):
        clip.embed_texts("a cat")
    with pytest.raises(ValueError, match=r"texts\[1\]: expected a text, found NoneType"):
        clip.embed_texts(["a", None])
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        clip.embed_texts(["a"], batch_size=0)


def test_vectors_without_a_direction_are_named():
    given = public()
    with torch.no_grad():
        given.module.image_head.weight.fill_(float("nan"))
        given.module.text_head.weight.zero_()
        given.module.text_head.bias.zero_()
    with pytest.raises(ValueError, match=r"zero or not finite for \['images\[0\]'"):
        given.embed_images(IMAGE_LIST)
    with pytest.raises(ValueError, match=r"zero or not finite for \['texts\[0\]'"):
        given.embed_texts(["a"])


def test_tasks_of_other_families_are_named(clip):
    with pytest.raises(AttributeError, match="caption: a contrastive model cannot do this; it is"):
        clip.caption(IMAGE_LIST)
    with pytest.raises(AttributeError, match="has no attribute 'captions'"):
        _ = clip.captions


@pytest.mark.slow
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("bias", [None, -10.0])
def test_composed_model_is_saved_and_loaded_whole(tmp_path, image, bias):
    given = public(image, bias=bias)
    given.save(tmp_path)
    again = vlm.load(tmp_path)
    assert isinstance(again, ContrastiveModel)
    assert same_bits(again.module.state_dict(), given.module.state_dict())
    for ours, first in (
        (again.embed_images(IMAGE_LIST), given.embed_images(IMAGE_LIST)),
        (again.embed_texts(LABELS), given.embed_texts(LABELS)),
    ):
        torch.testing.assert_close(ours, first, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="came from no published system"):
        again.save(tmp_path / "x", layout="reference")


@pytest.mark.parametrize("text", ["llama, last", "clip, largest"])
def test_text_towers_are_saved_and_loaded_whole(tmp_path, text):
    given = public(text=text)
    given.save(tmp_path)
    again = vlm.load(tmp_path, dtype="stored")
    assert same_bits(again.module.state_dict(), given.module.state_dict())
    torch.testing.assert_close(
        again.embed_texts(LABELS), given.embed_texts(LABELS), atol=1e-6, rtol=0
    )


@pytest.mark.slow
def test_lora_is_saved_merged_or_as_layers(tmp_path):
    given = public()
    add_lora(given.module, {"text": Lora(rank=2)})
    with torch.no_grad():
        for name, parameter in given.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    vectors = given.embed_texts(LABELS)
    for merge in (True, False):
        given.save(tmp_path / str(merge), merge=merge)
        again = vlm.load(tmp_path / str(merge))
        torch.testing.assert_close(again.embed_texts(LABELS), vectors, atol=1e-5, rtol=1e-4)
        kept = any("lora_" in name for name, _ in again.module.named_parameters())
        assert kept is not merge


def test_model_in_bf16_keeps_scale_and_bias_in_fp32(tmp_path):
    public(bias=-10.0).save(tmp_path)
    again = vlm.load(tmp_path, dtype="bfloat16")
    assert again.module.log_scale.dtype == again.module.bias.dtype == torch.float32
    assert again.module.image_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(again.embed_images(IMAGE_LIST).norm(dim=1), torch.ones(3))


def test_bad_folders_are_named(tmp_path):
    public().save(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for change, message in (
        (
            {"family": "other"},
            "config.json: family 'other' is not one of decoder_only",
        ),
        ({"version": 9}, "config.json: written as version 9, this vlm reads 1"),
        ({"surplus": 1}, r"config.json: unknown keys \['surplus'\]"),
        ({"pool": {"kind": "max"}}, "pool kind 'max' is not one of"),
    ):
        path.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            vlm.load(tmp_path)
    path.write_text(json.dumps(values | {"bias": True}))
    with pytest.raises(WeightsError, match=r"missing \(1\): \['bias'\]"):
        vlm.load(tmp_path)


def test_a_folder_of_one_tower_is_told_from_a_model(tmp_path, towers):
    whole = towers[0].partition(":")[2]
    transformers.SiglipVisionModel.from_pretrained(whole).save_pretrained(tmp_path)
    transformers.AutoImageProcessor.from_pretrained(whole).save_pretrained(tmp_path)
    message = "found 'siglip_vision_model', a tower for images alone, without one for texts"
    with pytest.raises(ValueError, match=message) as caught:
        vlm.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: expected a whole model, ")
    named = str(caught.value).rpartition("as an image tokenizer: ")[2]
    assert named == f"transformers:{tmp_path}"
    assert load_vision(named).dim == 24
    for kind, message in (
        ("siglip2_vision_model", "images alone, .* as an image tokenizer: naflex:"),
        ("clip_text_model", "'clip_text_model', a tower for texts alone, without one for images"),
        ("t5", "model type 't5' is not one of vlm, "),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=message):
            vlm.load(tmp_path)


def text_folder(folder, kind="llama"):
    """A tiny causal language model with its tokenizer, as a hub folder has them."""
    tiny.text_model(kind).save_pretrained(folder)
    tiny.text_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Folders of a SigLIP, whose image's tower is taken, and of a causal language model."""
    folder = tmp_path_factory.mktemp("towers")
    tiny_siglip.write_folder(folder / "vision")
    return f"transformers:{folder / 'vision'}", text_folder(folder / "text")


@pytest.mark.parametrize(("loss", "bias"), [("softmax", None), ("sigmoid", -10.0)])
@pytest.mark.parametrize("pool", ["own", "mean", "attention"])
def test_build_joins_pretrained_towers(tmp_path, towers, pool, loss, bias):
    vision, text = towers
    settings = dict(vision=vision, text=text, pool=pool, loss=loss, width=8, length=9)
    given = compose_contrastive.build(**settings, seed=3)
    assert given.module.dim == 8
    assert (None if given.module.bias is None else given.module.bias.item()) == bias
    ids, _, _ = given.processor.texts(["a cat"])
    assert ids[0, -1] == given.processor.text_tokenizer.eos_token_id
    assert given.processor.length == 9
    vectors = given.embed_texts(LABELS[:3])
    given.save(tmp_path)
    again = vlm.load(tmp_path).embed_texts(LABELS[:3])
    torch.testing.assert_close(again, vectors, atol=1e-6, rtol=0)
    state = torch.get_rng_state()
    again = compose_contrastive.build(**settings, seed=3).module
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(again.state_dict(), given.module.state_dict())


def test_build_leaves_a_locked_tower_without_a_head(towers):
    """LiT."""
    vision, text = towers
    given = compose_contrastive.build(
        vision=vision, text=text, pool="own", image_head=False, width=99
    )
    assert given.module.dim == given.module.tokenizer.pooled_dim
    assert [n for n, _ in given.module.named_parameters() if n.startswith("image_head")] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(loss="hinge"), "loss is one of softmax, sigmoid, found 'hinge'"),
        (dict(pool="max"), "pool is one of own, class, mean, attention, found 'max'"),
        (dict(text_pooling="end"), "text_pooling 'end' belongs to CLIP"),
        (dict(text_pooling="first"), "pooling 'first' is not one of"),
        (dict(pool="class"), "pool 'class' reads a class token"),
        (dict(vision="nothing"), "vision 'nothing': expected 'demo'"),
    ],
)
def test_build_refuses_settings_that_do_not_fit(towers, settings, message):
    vision, text = towers
    with pytest.raises(ValueError, match=message):
        compose_contrastive.build(**dict(vision=vision, text=text) | settings)


def test_build_refuses_the_text_tower_of_a_two_tower_model(towers):
    vision = towers[0]
    with pytest.raises(ValueError, match="found siglip_text_model, whose texts are pooled"):
        compose_contrastive.build(vision=vision, text=vision.partition(":")[2], text_pooling="own")


def test_processor_travels_to_workers_without_weights(clip):
    size = len(pickle.dumps(clip.processor))
    weights = sum(p.numel() * p.element_size() for p in clip.module.parameters())
    assert size < weights
    assert not any(isinstance(v, torch.nn.Module) for v in vars(clip.processor).values())
