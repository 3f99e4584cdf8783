"""PaliGemma's folders beside transformers' class: opened, written, refused."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import vlm
from tests.reference import images_in_text as law
from tests.reference.images_in_text import close, our_logits, reopened
from tests.reference.tiny_paligemma import TEXTS, our_batch, their_inputs, write_folder
from tests.tiny import image
from vlm.systems import paligemma
from vlm.systems.published import first_names, published_name
from vlm.training.stages import assign_rates
from vlm.weights import WeightsError, same_bits

folder = law.folders(TEXTS, write_folder)


@pytest.mark.parametrize("through_native", [False, True])
@torch.no_grad()
def test_paligemma_reference_layout_opens_in_transformers(folder, tmp_path, through_native):
    law.check_layout_opens_in_transformers(
        folder, tmp_path, through_native, their_inputs,
        {"processor_config.json", "tokenizer.json", "generation_config.json"},
    )  # fmt: skip


@torch.no_grad()
def test_paligemma_native_layout_returns_the_same_model(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    for key in ("stop_ids", "caption_prompt", "answer_prompt", "ground_prompt", "ocr_prompt"):
        assert getattr(again, key) == getattr(model, key)
    assert again.processor.box_codec == model.processor.box_codec
    ours, its = (our_batch(m) for m in (model, again))
    assert torch.equal(ours.ids, its.ids)
    assert torch.equal(our_logits(model, ours), our_logits(again, its))
    asked = [[image()], ["<image>caption en"]]
    assert again.generate(*asked)[0].ids == model.generate(*asked)[0].ids


def published_style(folder, out):
    """The folder as the authors published it, by transformers 4: their names of weights, and the
    image's processor apart."""
    shutil.copytree(folder, out)
    state = {
        published_name(key, paligemma.KEY_MAP): tensor
        for key, tensor in vlm.load(folder, "cpu", "stored").module.state_dict().items()
        if key != "text.lm_head.weight"
    }
    assert {key.split(".")[0] for key in state} == {
        "vision_tower", "multi_modal_projector", "language_model",
    }  # fmt: skip
    save_file(state, out / "model.safetensors", {"format": "pt"})
    settings = json.loads((out / "processor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    (out / "processor_config.json").unlink()
    values = json.loads((out / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    for part in ("vision_config", "text_config"):
        for key in ("dtype", "use_bidirectional_attention"):
            values[part].pop(key, None)
    (out / "config.json").write_text(json.dumps(values))
    return out


@torch.no_grad()
def test_paligemma_opens_published_folders_and_those_of_transformers_5(folder, tmp_path):
    old = published_style(folder, tmp_path / "old")
    model, new = vlm.load(old, "cpu"), vlm.load(folder, "cpu")
    assert same_bits(model.module.state_dict(), new.module.state_dict())
    peer, processor = reopened(old)
    inputs = their_inputs(processor)
    inputs.pop("labels")
    batch = our_batch(model)
    close(our_logits(model, batch)[batch.valid], peer(**inputs).logits[batch.valid])
    model.save(tmp_path / "out", layout="reference")
    state, out = (load_file(path / "model.safetensors") for path in (old, tmp_path / "out"))
    assert same_bits(state, out)


def test_paligemma_reference_layout_says_the_dtype_it_holds(folder, tmp_path):
    vlm.load(folder, "cpu", "bfloat16").save(tmp_path, layout="reference")
    peer, _ = reopened(tmp_path)
    assert {p.dtype for p in peer.parameters()} == {torch.bfloat16}


def test_paligemma_names_all_wrong_keys_at_once(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    renamed, _ = first_names(state, paligemma.KEY_MAP, paligemma.UNUSED, "")
    del renamed["multi_modal_projector.linear.bias"]
    renamed["extra.weight"] = torch.zeros(1)
    save_file(renamed, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError) as error:
        vlm.load(broken, "cpu")
    assert "missing (1): ['multi_modal_projector.linear.bias']" in str(error.value)
    assert "unused (1): ['extra.weight']" in str(error.value)


def test_paligemma_raises_when_the_processor_counts_other_image_tokens(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "miscounted")
    path = out / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"]["image_seq_length"] = 15
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="writes 15 image tokens for an image, the model gives 16"):
        vlm.load(out, "cpu")


def test_paligemma_raises_when_tokens_lie_beyond_the_table(tmp_path):
    """transformers' processor adds <loc> and <seg> tokens that a folder lacks, table or no."""
    write_folder(tmp_path, "gemma", spare=-20)
    with pytest.raises(
        ValueError,
        match=r"the rows of the embedding table, found 20 tokens beyond, such as <seg127> \(",
    ):
        vlm.load(tmp_path, "cpu")


PUBLISHED = {
    "paligemma-3b-224": ("gemma", 2.92),
    "paligemma-3b-896": ("gemma", 2.93),
    "paligemma2-3b-224": ("gemma2", 3.03),
    "paligemma2-10b-448": ("gemma2", 9.66),
    "paligemma2-28b-224": ("gemma2", 27.65),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_paligemma_full_sizes_hold_the_published_parameters(size):
    kind, billions = PUBLISHED[size]
    sizes = paligemma.SIZES[size]
    config = transformers.PaliGemmaConfig(
        text_config=sizes.text,
        vision_config=sizes.vision,
        projection_dim=sizes.text["hidden_size"],
    )
    with torch.device("meta"):
        module = paligemma.build(size)
        peer = transformers.PaliGemmaForConditionalGeneration(config)
    assert module.text.config.model_type == kind
    count = sum(p.numel() for p in module.parameters())
    assert count == sum(p.numel() for p in peer.parameters())
    assert round(count / 1e9, 2) == billions
    side = sizes.vision["image_size"] // 14
    assert module.tokenizer.tokens_for((300, 700)) == side**2
    expected = {published_name(key, paligemma.KEY_MAP) for key in module.state_dict()}
    theirs, _ = first_names(peer.state_dict(), paligemma.KEY_MAP, paligemma.UNUSED, "peer")
    assert set(theirs) == expected
    assign_rates(module, (("tokenizer.*", 1e-5), ("adaptor.*", 1e-5), ("text.*", 1e-5)))


def test_paligemma_sizes_are_told_by_name():
    assert len(paligemma.SIZES) == 12
    with pytest.raises(ValueError, match="'2b' is not one of paligemma-3b-224, "):
        paligemma.build("2b")
