"""Folders of LLaVA 1.5 and LLaVA-NeXT beside transformers' classes: opened, written, refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlm
from tests.reference import images_in_text as law
from tests.reference.images_in_text import close, our_logits, reopened
from tests.reference.tiny_llava import KINDS, our_batch, their_inputs, write_folder
from vlm.weights import same_bits

folder = law.folders(KINDS, write_folder)


@pytest.mark.parametrize("through_native", [False, True])
@torch.no_grad()
def test_llava_reference_layout_opens_in_transformers(folder, tmp_path, through_native):
    """CLIP's unread last block and norm too."""
    law.check_layout_opens_in_transformers(
        folder, tmp_path, through_native, their_inputs,
        {"processor_config.json", "tokenizer.json", "chat_template.jinja"},
    )  # fmt: skip


@torch.no_grad()
def test_llava_native_layout_returns_the_same_model(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    assert again.stop_ids == model.stop_ids
    assert again.processor.template == model.processor.template
    assert again.processor.layout_for.views == model.processor.layout_for.views
    assert again.processor.pixel_spec == model.processor.pixel_spec
    ours, its = (our_batch(m, answers=True) for m in (model, again))
    assert torch.equal(ours.ids, its.ids)
    assert torch.equal(ours.scored, its.scored)
    assert torch.equal(our_logits(model, ours), our_logits(again, its))


def published_style(folder, out):
    """The folder as llava-hf published it, by transformers 4: other names of CLIP's weights, and
    the images' processor and the template apart."""
    shutil.copytree(folder, out)
    state = load_file(folder / "model.safetensors")
    renamed = {
        key.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for key, tensor in state.items()
    }
    save_file(renamed, out / "model.safetensors", {"format": "pt"})
    settings = json.loads((out / "processor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps(settings.pop("image_processor")))
    (out / "processor_config.json").write_text(json.dumps(settings))
    template = (out / "chat_template.jinja").read_text()
    (out / "chat_template.jinja").unlink()
    (out / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    values = json.loads((out / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    (out / "config.json").write_text(json.dumps(values))
    return out


@torch.no_grad()
def test_llava_opens_published_folders_and_those_of_transformers_5(folder, tmp_path):
    path = published_style(folder, tmp_path / "old")
    old, new = vlm.load(path, "cpu"), vlm.load(folder, "cpu")
    assert same_bits(old.module.state_dict(), new.module.state_dict())
    ours, its = our_batch(old), our_batch(new)
    assert torch.equal(ours.ids, its.ids)
    close(our_logits(old, ours)[ours.valid], our_logits(new, its)[its.valid], 0)
    old.save(tmp_path / "out", layout="reference")
    before, after = (load_file(p / "model.safetensors") for p in (path, tmp_path / "out"))
    assert same_bits(before, after)


def test_llava_reference_layout_says_the_dtype_it_holds(folder, tmp_path):
    vlm.load(folder, "cpu", "bfloat16").save(tmp_path, layout="reference")
    peer, _ = reopened(tmp_path)
    text = {p.dtype for name, p in peer.named_parameters() if "vision_tower" not in name}
    assert text == {torch.bfloat16}


def test_llava_names_all_wrong_keys_at_once(folder, tmp_path):
    law.check_all_wrong_keys_are_named(folder, tmp_path, "multi_modal_projector.linear_2.bias")


REFUSED = {
    "vision_feature_layer: expected one layer": {"vision_feature_layer": [-2, -1]},
    "projector_hidden_act: expected 'gelu', found 'relu'": {"projector_hidden_act": "relu"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_llava_raises_for_settings_that_it_does_not_have(message, tmp_path):
    write_folder(tmp_path, "llava", **REFUSED[message])
    with pytest.raises(ValueError, match=message):
        vlm.load(tmp_path, "cpu")


def changed(folder, out, file, **change):
    """A copy of a folder, in which a file of settings says something else."""
    shutil.copytree(folder, out)
    values = json.loads((out / file).read_text())
    for path, value in change.items():
        *parts, last = path.split("__")
        inner = values
        for part in parts:
            inner = inner[part]
        inner[last] = value
    (out / file).write_text(json.dumps(values))
    return out


def test_llava_raises_where_processor_and_model_count_otherwise(folder, tmp_path):
    processor = "processor_config.json"
    out = changed(folder, tmp_path / "patch", processor, patch_size=16)
    with pytest.raises(ValueError, match="writes 4 image tokens for a view, the model gives 16"):
        vlm.load(out, "cpu")
    out = changed(folder, tmp_path / "select", processor, vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="the processor's vision_feature_select_strategy: expect"):
        vlm.load(out, "cpu")


def test_llava_next_raises_for_what_tiles_cannot_be(tmp_path):
    write_folder(tmp_path / "in", "llava_next")
    out = changed(
        tmp_path / "in", tmp_path / "grid", "config.json", image_grid_pinpoints=[[32, 64]]
    )
    with pytest.raises(ValueError, match=r"image_grid_pinpoints: expected \[\(32, 64\)\]"):
        vlm.load(out, "cpu")
    out = changed(
        tmp_path / "in", tmp_path / "crop", "processor_config.json",
        image_processor__crop_size={"height": 24, "width": 24},
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected views of 32 pixels"):
        vlm.load(out, "cpu")
    write_folder(tmp_path / "full", "llava_next", vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="vision_feature_select_strategy: expected 'default'"):
        vlm.load(tmp_path / "full", "cpu")
