"""Folders of Idefics3 and SmolVLM beside transformers' classes: opened, written, refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import vlm
from tests.reference import images_in_text as law
from tests.reference.images_in_text import close, our_logits, reopened
from tests.reference.tiny_smolvlm import KINDS, our_batch, their_inputs, write_folder
from vlm.systems import smolvlm
from vlm.weights import same_bits

folder = law.folders(KINDS, write_folder)


@pytest.mark.parametrize("through_native", [False, True])
@torch.no_grad()
def test_smolvlm_reference_layout_opens_in_transformers(folder, tmp_path, through_native):
    law.check_layout_opens_in_transformers(
        folder, tmp_path, through_native, their_inputs,
        {"processor_config.json", "tokenizer.json", "chat_template.jinja"},
    )  # fmt: skip
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert same_bits(before, after)


@torch.no_grad()
def test_smolvlm_native_layout_returns_the_same_model(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    for key in ("stop_ids", "caption_prompt"):
        assert getattr(again, key) == getattr(model, key)
    assert again.processor.layout_for.views == model.processor.layout_for.views
    assert again.processor.pixel_spec == model.processor.pixel_spec
    ours, its = (our_batch(m) for m in (model, again))
    assert torch.equal(ours.ids, its.ids)
    assert torch.equal(our_logits(model, ours), our_logits(again, its))


def published_style(folder, out):
    """The folder as the authors published it, by transformers 4: the images' processor and the
    template apart, and a SigLIP configuration that says less and more."""
    shutil.copytree(folder, out)
    settings = json.loads((out / "processor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    kept = {
        "image_seq_len": settings["image_seq_len"],
        "processor_class": settings["processor_class"],
    }
    (out / "processor_config.json").write_text(json.dumps(kept))
    template = (out / "chat_template.jinja").read_text()
    (out / "chat_template.jinja").unlink()
    (out / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    values = json.loads((out / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    values["vision_config"] |= {"size": {"longest_edge": 96}, "use_base_siglip": False}
    del values["vision_config"]["hidden_act"]
    (out / "config.json").write_text(json.dumps(values))
    return out


@torch.no_grad()
def test_smolvlm_opens_published_folders_and_those_of_transformers_5(folder, tmp_path):
    old = vlm.load(published_style(folder, tmp_path / "old"), "cpu")
    new = vlm.load(folder, "cpu")
    assert same_bits(old.module.state_dict(), new.module.state_dict())
    ours, its = our_batch(old), our_batch(new)
    assert torch.equal(ours.ids, its.ids)
    close(our_logits(old, ours)[ours.valid], our_logits(new, its)[its.valid], 0)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_smolvlm_reference_layout_says_the_dtype_and_the_head_it_holds(tied, tmp_path):
    write_folder(tmp_path / "in", "smolvlm", tied=tied)
    vlm.load(tmp_path / "in", "cpu", "bfloat16").save(tmp_path / "out", layout="reference")
    peer, _ = reopened(tmp_path / "out")
    assert {p.dtype for p in peer.parameters()} == {torch.bfloat16}
    assert ("lm_head.weight" in load_file(tmp_path / "out/model.safetensors")) != tied
    assert peer.config.tie_word_embeddings == tied


def test_smolvlm_names_all_wrong_keys_at_once(folder, tmp_path):
    law.check_all_wrong_keys_are_named(
        folder, tmp_path, "model.connector.modality_projection.proj.weight"
    )


REFUSED = {
    "writes 5 image tokens for a view, the model gives 4": {"image_seq_len": 5},
    "expected tiles of 32 pixels": {"image_processor": {"max_image_size": {"longest_edge": 40}}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_smolvlm_raises_where_processor_and_model_differ(folder, tmp_path, message):
    out = shutil.copytree(folder, tmp_path / "out")
    path = out / "processor_config.json"
    values, change = json.loads(path.read_text()), REFUSED[message]
    values |= change | {
        "image_processor": values["image_processor"] | change.get("image_processor", {})
    }
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        vlm.load(out, "cpu")


def test_smolvlm_raises_without_a_template_that_marks_images(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    (out / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="a chat template that writes <image> for an image"):
        vlm.load(out, "cpu")


def test_smolvlm_raises_where_the_reference_confuses_positions():
    for side in (24, 26, 27, 32):
        smolvlm._require_own_positions(side, "folder")
    with pytest.raises(ValueError, match="found 25 x 25 patches"):
        smolvlm._require_own_positions(25, "folder")
