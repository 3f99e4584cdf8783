"""Folders of Idefics2 beside transformers' classes: opened, written, refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import vlm
from tests.reference import images_in_text as law
from tests.reference.images_in_text import close, our_logits, reopened
from tests.reference.tiny_idefics2 import FENCE, KINDS, our_batch, their_inputs, write_folder
from vlm.weights import same_bits

folder = law.folders(KINDS, write_folder)


@pytest.mark.parametrize("through_native", [False, True])
@torch.no_grad()
def test_idefics2_reference_layout_opens_in_transformers(folder, tmp_path, through_native):
    law.check_layout_opens_in_transformers(
        folder, tmp_path, through_native, their_inputs,
        {"processor_config.json", "tokenizer.json", "chat_template.jinja"},
    )  # fmt: skip
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert same_bits(before, after)


@torch.no_grad()
def test_idefics2_native_layout_returns_the_same_model(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    for key in ("stop_ids", "banned_ids", "caption_prompt"):
        assert getattr(again, key) == getattr(model, key)
    assert again.processor.layout_for.views == model.processor.layout_for.views
    assert again.processor.pixel_spec == model.processor.pixel_spec
    ours, its = (our_batch(m) for m in (model, again))
    assert torch.equal(ours.ids, its.ids)
    assert torch.equal(our_logits(model, ours), our_logits(again, its))


def published_style(folder, out):
    """The folder as the authors published it, by transformers 4: the images' processor and the
    template apart, and configurations that name their parts otherwise."""
    shutil.copytree(folder, out)
    settings = json.loads((out / "processor_config.json").read_text())
    images = settings["image_processor"] | {"processor_class": "Idefics2Processor"}
    (out / "preprocessor_config.json").write_text(json.dumps(images))
    kept = {key: settings[key] for key in ("image_seq_len", "processor_class")}
    (out / "processor_config.json").write_text(json.dumps(kept))
    template = (out / "chat_template.jinja").read_text()
    (out / "chat_template.jinja").unlink()
    (out / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    values = json.loads((out / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    for part in ("vision_config", "perceiver_config"):
        values[part]["model_type"] = "idefics2"
    del values["vision_config"]["hidden_act"]
    values["text_config"]["rope_theta"] = values["text_config"].pop("rope_parameters")["rope_theta"]
    (out / "config.json").write_text(json.dumps(values))
    return out


@pytest.mark.parametrize("folder", ["split"], indirect=True)
@torch.no_grad()
def test_idefics2_opens_published_folders_and_those_of_transformers_5(folder, tmp_path):
    old = vlm.load(published_style(folder, tmp_path / "old"), "cpu")
    new = vlm.load(folder, "cpu")
    assert same_bits(old.module.state_dict(), new.module.state_dict())
    assert old.processor.pixel_spec == new.processor.pixel_spec
    ours, its = our_batch(old), our_batch(new)
    assert torch.equal(ours.ids, its.ids)
    close(our_logits(old, ours)[ours.valid], our_logits(new, its)[its.valid], 0)
    old.save(tmp_path / "out", layout="reference")
    assert same_bits(
        load_file(tmp_path / "out/model.safetensors"), load_file(folder / "model.safetensors")
    )
    reopened(tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_idefics2_reference_layout_says_the_dtype_and_the_head_it_holds(tied, tmp_path):
    write_folder(tmp_path / "in", tied=tied)
    vlm.load(tmp_path / "in", "cpu", "bfloat16").save(tmp_path / "out", layout="reference")
    peer, _ = reopened(tmp_path / "out")
    assert {p.dtype for p in peer.parameters()} == {torch.bfloat16}
    assert ("lm_head.weight" in load_file(tmp_path / "out/model.safetensors")) != tied
    assert peer.config.tie_word_embeddings == tied


@pytest.mark.parametrize("folder", ["whole"], indirect=True)
def test_idefics2_names_all_wrong_keys_at_once(folder, tmp_path):
    law.check_all_wrong_keys_are_named(
        folder, tmp_path, "model.connector.perceiver_resampler.layers.1.self_attn.k_proj.weight"
    )


def test_idefics2_keeps_what_a_folder_bans(tmp_path):
    """One-id bad words and suppressed ids of generation_config.json, beside the marks."""
    write_folder(tmp_path)
    path = tmp_path / "generation_config.json"
    values = json.loads(path.read_text()) | {"bad_words_ids": [[70], [71, 72]]}
    path.write_text(json.dumps(values | {"suppress_tokens": [73]}))
    model = vlm.load(tmp_path, "cpu")
    tokens = model.processor.text_tokenizer
    marks = tokens.convert_tokens_to_ids(["<image>", FENCE])
    assert model.banned_ids == (*marks, 70, 73)


REFUSED = {
    "writes 7 image tokens for a view, the model gives 5": {
        "processor_config.json": {"image_seq_len": 7}
    },
    r"perceiver_config\.hidden_act: expected 'silu', found 'gelu'": {
        "config.json": {"perceiver_config": {"hidden_act": "gelu"}}
    },
    "min_side_px of pixel_spec must be at least a patch of 8": {
        "processor_config.json": {
            "image_processor": {"size": {"shortest_edge": 7, "longest_edge": 60}}
        }
    },
    "Idefics2ImageProcessor: size must be shortest_edge and longest_edge": {
        "processor_config.json": {"image_processor": {"size": {"height": 30, "width": 40}}}
    },
}


@pytest.mark.parametrize("folder", ["whole"], indirect=True)
@pytest.mark.parametrize("message", REFUSED)
def test_idefics2_raises_where_processor_and_model_differ(folder, tmp_path, message):
    out = shutil.copytree(folder, tmp_path / "out")
    for name, change in REFUSED[message].items():
        values = json.loads((out / name).read_text())
        for key, new in change.items():
            values[key] = values[key] | new if isinstance(new, dict) else new
        (out / name).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        vlm.load(out, "cpu")


@pytest.mark.parametrize("folder", ["whole"], indirect=True)
def test_idefics2_counts_64_tokens_where_a_processor_says_nothing(folder, tmp_path):
    """As transformers' processor writes then."""
    out = shutil.copytree(folder, tmp_path / "out")
    path = out / "processor_config.json"
    values = json.loads(path.read_text())
    del values["image_seq_len"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="writes 64 image tokens for a view, the model gives 5"):
        vlm.load(out, "cpu")


@pytest.mark.parametrize("folder", ["whole"], indirect=True)
def test_idefics2_raises_without_a_template_that_marks_images(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    (out / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="a chat template that writes <image> for an image"):
        vlm.load(out, "cpu")
