"""Folders of Qwen2-VL and Qwen2.5-VL beside transformers' classes: opened, written, refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import vlm
from tests.reference import images_in_text as law
from tests.reference.images_in_text import close, our_logits, reopened
from tests.reference.tiny_qwen2_vl import (
    KINDS,
    examples,
    older_name,
    our_batch,
    published_style,
    their_inputs,
    write_folder,
)
from vlm import vocabulary
from vlm.lora import Lora, add_lora
from vlm.weights import same_bits

folder = law.folders(KINDS, write_folder)


@pytest.mark.parametrize("style", ["authors", "transformers 5"])
@pytest.mark.parametrize("through_native", [False, True])
@torch.no_grad()
def test_qwen2_vl_reference_layout_opens_in_transformers(folder, tmp_path, style, through_native):
    kept = {"tokenizer.json", "generation_config.json"}
    if style == "authors":
        folder = published_style(folder, tmp_path / "published")
        kept |= {"preprocessor_config.json", "chat_template.json"}
    else:
        kept |= {"processor_config.json", "chat_template.jinja"}
    law.check_layout_opens_in_transformers(folder, tmp_path, through_native, their_inputs, kept)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    before = {older_name(name): tensor for name, tensor in before.items()}
    assert same_bits(before, after)
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert ("text_config" in values) == (style == "transformers 5")


@torch.no_grad()
def test_qwen2_vl_native_layout_returns_the_same_model(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    for key in ("stop_ids", "caption_prompt"):
        assert getattr(again, key) == getattr(model, key)
    for key in ("pixel_spec", "position_numbers", "image_mark", "max_tokens"):
        assert getattr(again.processor, key) == getattr(model.processor, key)
    ours, its = (our_batch(m) for m in (model, again))
    assert torch.equal(ours.ids, its.ids)
    assert torch.equal(our_logits(model, ours), our_logits(again, its))
    rows = [model.processor.encode_prompt(example.question()) for example in examples()]
    written = again.write_after(rows, max_new_tokens=6)
    assert written == model.write_after(rows, max_new_tokens=6)
    assert len(written) == len(rows)


@torch.no_grad()
def test_qwen2_vl_opens_published_folders_and_those_of_transformers_5(folder, tmp_path):
    old = vlm.load(published_style(folder, tmp_path / "old"), "cpu")
    new = vlm.load(folder, "cpu")
    assert same_bits(old.module.state_dict(), new.module.state_dict())
    assert old.processor.pixel_spec == new.processor.pixel_spec
    ours, its = our_batch(old), our_batch(new)
    assert torch.equal(ours.ids, its.ids)
    close(our_logits(old, ours)[ours.valid], our_logits(new, its)[its.valid], 0)


@pytest.mark.parametrize("style", ["authors", "transformers 5"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_qwen2_vl_reference_layout_says_the_dtype_and_the_head_it_holds(tied, style, tmp_path):
    source = tmp_path / "in"
    write_folder(source, "qwen2_5_vl", tied=tied)
    if style == "authors":
        source = published_style(source, tmp_path / "published")
    vlm.load(source, "cpu", "bfloat16").save(tmp_path / "out", layout="reference")
    peer, _ = reopened(tmp_path / "out")
    assert {p.dtype for p in peer.parameters()} == {torch.bfloat16}
    assert ("lm_head.weight" in load_file(tmp_path / "out/model.safetensors")) != tied
    assert peer.config.tie_word_embeddings == tied


@pytest.mark.parametrize("style", ["authors", "transformers 5"])
@torch.no_grad()
def test_qwen2_vl_with_new_tokens_opens_in_transformers(folder, tmp_path, style):
    if style == "authors":
        folder = published_style(folder, tmp_path / "published")
    model = vlm.load(folder, "cpu")
    tokens = [f"<loc{number}>" for number in range(9)]
    ids = vocabulary.grow(model.module.text, model.processor.text_tokenizer, tokens)
    model.save(tmp_path / "out", layout="reference")
    peer, processor = reopened(tmp_path / "out")
    assert tuple(processor.tokenizer.convert_tokens_to_ids(tokens)) == ids
    assert len(peer.get_input_embeddings().weight) == max(ids) + 1
    inputs = their_inputs(processor)
    batch = our_batch(model)
    close(our_logits(model, batch)[batch.valid], peer(**inputs).logits[batch.valid])


def test_qwen2_vl_names_all_wrong_keys_at_once(folder, tmp_path):
    published = published_style(folder, tmp_path / "published")
    law.check_all_wrong_keys_are_named(published, tmp_path, "visual.merger.ln_q.weight")


REFUSED = {
    "merge_size: expected 2, found 3": (
        "processor_config.json", "image_processor", "merge_size", 3,
    ),
    "patch_size: expected 14, found 16": (
        "processor_config.json", "image_processor", "patch_size", 16,
    ),
    "rope_type: expected 'axial', found 'linear'": (
        "config.json", "vision_config", "rope_parameters",
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_qwen2_vl_raises_where_processor_and_model_differ(folder, tmp_path, message):
    out = shutil.copytree(folder, tmp_path / "out")
    file, part, key, value = REFUSED[message]
    values = json.loads((out / file).read_text())
    values[part][key] = value
    (out / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        vlm.load(out, "cpu")


def test_qwen2_vl_raises_where_its_encoder_has_another_width_than_its_text(tmp_path):
    write_folder(tmp_path, "qwen2_vl")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["vision_config"]["hidden_size"] = 40
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"vision_config\.hidden_size: expected 32, found 40"):
        vlm.load(tmp_path, "cpu")


def test_qwen2_vl_with_lora_is_kept_and_merged(folder, tmp_path):
    """Kept beside the weights in our own layout, merged in that of transformers."""
    model = vlm.load(folder, "cpu")
    add_lora(model.module, {part: Lora(rank=2, alpha=4) for part in ("tokenizer", "text")})
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save(tmp_path / "kept", merge=False)
    model.save(tmp_path / "merged", layout="reference")
    again, (peer, processor) = vlm.load(tmp_path / "kept", "cpu"), reopened(tmp_path / "merged")
    batch = our_batch(model)
    with torch.no_grad():
        logits = our_logits(model, batch)[batch.valid]
        close(our_logits(again, batch)[batch.valid], logits, 0)
        close(peer(**their_inputs(processor)).logits[batch.valid], logits)
        plain = our_logits(vlm.load(folder, "cpu"), batch)[batch.valid]
    assert (plain - logits).abs().max() > 1e-2
