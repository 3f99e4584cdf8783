"""Folders of Kosmos-2 beside transformers' classes: opened, written, refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import vlm
from tests.reference import images_in_text as law
from tests.reference.images_in_text import close, our_logits, reopened
from tests.reference.tiny_kosmos2 import KINDS, our_batch, their_inputs, write_folder
from vlm import vocabulary
from vlm.weights import same_bits

folder = law.folders(KINDS, write_folder)


@pytest.mark.parametrize("through_native", [False, True])
@torch.no_grad()
def test_kosmos2_reference_layout_opens_in_transformers(folder, tmp_path, through_native):
    law.check_layout_opens_in_transformers(
        folder, tmp_path, through_native, their_inputs, {"processor_config.json", "tokenizer.json"}
    )
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert same_bits(before, after)


@torch.no_grad()
def test_kosmos2_native_layout_returns_the_same_model(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    for key in ("stop_ids", "caption_prompt", "answer_prompt", "ground_prompt"):
        assert getattr(again, key) == getattr(model, key)
    assert again.processor.pixel_spec == model.processor.pixel_spec
    ours, its = (our_batch(m) for m in (model, again))
    assert torch.equal(ours.ids, its.ids)
    assert torch.equal(our_logits(model, ours), our_logits(again, its))


def published_style(folder, out):
    """The folder as the authors published it, by transformers 4: the images' processor in a file of
    its own, the dtype by its older name."""
    shutil.copytree(folder, out)
    settings = json.loads((out / "processor_config.json").read_text())
    (out / "processor_config.json").unlink()
    images = settings["image_processor"] | {"processor_class": "Kosmos2Processor"}
    (out / "preprocessor_config.json").write_text(json.dumps(images))
    values = json.loads((out / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    for part in ("text_config", "vision_config"):
        values[part]["torch_dtype"] = values[part].pop("dtype", "float32")
    (out / "config.json").write_text(json.dumps(values))
    return out


@torch.no_grad()
def test_kosmos2_opens_published_folders_and_those_of_transformers_5(folder, tmp_path):
    old = vlm.load(published_style(folder, tmp_path / "old"), "cpu")
    new = vlm.load(folder, "cpu")
    assert same_bits(old.module.state_dict(), new.module.state_dict())
    ours, its = our_batch(old), our_batch(new)
    assert torch.equal(ours.ids, its.ids)
    close(our_logits(old, ours)[ours.valid], our_logits(new, its)[its.valid], 0)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_kosmos2_reference_layout_says_the_dtype_and_the_head_it_holds(tied, tmp_path):
    write_folder(tmp_path / "in", tied=tied)
    vlm.load(tmp_path / "in", "cpu", "bfloat16").save(tmp_path / "out", layout="reference")
    peer, _ = reopened(tmp_path / "out")
    assert {p.dtype for p in peer.parameters()} == {torch.bfloat16}
    names = load_file(tmp_path / "out/model.safetensors")
    assert ("text_model.lm_head.weight" in names) != tied
    assert peer.config.tie_word_embeddings == tied


def test_kosmos2_with_new_tokens_is_written_and_opened_again(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    tokens = [f"<new{n}>" for n in range(5)]
    ids = vocabulary.grow(model.module.text, model.processor.text_tokenizer, tokens)
    model.save(tmp_path, layout="reference")
    again, (peer, processor) = vlm.load(tmp_path, "cpu"), reopened(tmp_path)
    assert processor.tokenizer.convert_tokens_to_ids(tokens) == list(ids)
    assert peer.config.text_config.vocab_size == max(ids) + 1
    assert same_bits(again.module.state_dict(), model.module.state_dict())


def test_kosmos2_names_all_wrong_keys_at_once(folder, tmp_path):
    law.check_all_wrong_keys_are_named(folder, tmp_path, "image_to_text_projection.latent_query")


def test_kosmos2_raises_where_processor_and_model_differ(tmp_path):
    write_folder(tmp_path / "wide", side=24)
    with pytest.raises(ValueError, match=r"expected images of 16 x 16 pixels, .* found 24 x 24"):
        vlm.load(tmp_path / "wide", "cpu")
    write_folder(tmp_path / "short", more_rows=-2)
    with pytest.raises(ValueError, match=r"found 2 tokens beyond, such as <patch_index_1023>"):
        vlm.load(tmp_path / "short", "cpu")


def test_kosmos2_refuses_a_decoder_that_skips_layers(tmp_path):
    write_folder(tmp_path, layerdrop=0.5)
    with pytest.raises(ValueError, match=r"layers all run, found .* layerdrop=0\.5"):
        vlm.load(tmp_path, "cpu")
