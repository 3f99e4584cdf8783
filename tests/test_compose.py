"""`vlm.build` from pretrained parts in local folders, as the hub would give them."""

import pytest
import torch
import transformers

import vlm
from tests import tiny
from tests.folders import ENCODERS, write_parts
from vlm.weights import same_bits


@pytest.fixture
def folders(tmp_path):
    return lambda encoder, text: write_parts(tmp_path, encoder, text)


@pytest.mark.parametrize(
    ("encoder", "text", "layer"),
    [("siglip", "qwen2", -1), ("dinov2", "llama", -1), ("clip", "gemma2", -2)],
)
def test_any_pairing_composes_saves_and_reopens(folders, tmp_path, encoder, text, layer):
    """Towers with and without a class token; non-square images; the layout says how many tokens."""
    vision, language = folders(encoder, text)
    model = vlm.build(vision=vision, text=language, vision_layer=layer, system="")
    patches = ENCODERS[encoder][3]
    assert model.processor.layout_for((30, 71)).length == patches // 4
    assert model.processor.max_tokens == 512  # the language model's context
    images = [tiny.image(1, (30, 71)), tiny.image(2, (90, 20))]
    captions = model.caption(images, max_new_tokens=6)
    model.save(tmp_path / "saved")
    again = vlm.load(tmp_path / "saved", device="cpu")
    assert same_bits(model.module.state_dict(), again.module.state_dict())
    assert again.caption(images, max_new_tokens=6) == captions


@pytest.mark.parametrize("adaptor", ["linear", "mlp", "resampler"])
def test_adaptors_are_chosen_by_name_and_seeded(folders, adaptor):
    vision, language = folders("siglip", "llama")
    torch.manual_seed(7)
    before = torch.rand(3)
    torch.manual_seed(7)
    a, b, c = (
        vlm.build(vision=vision, text=language, adaptor=adaptor, queries=5, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(3), before)  # the global generator is left alone
    assert same_bits(a.module.adaptor.state_dict(), b.module.adaptor.state_dict())
    assert not same_bits(a.module.adaptor.state_dict(), c.module.adaptor.state_dict())
    assert a.processor.layout_for((9, 9)).length == (5 if adaptor == "resampler" else 16)


def test_other_image_size_is_taken_over_by_positions(folders):
    """A square encoder takes a wide image by resized positions."""
    vision, language = folders("siglip", "llama")
    model = vlm.build(vision=vision, text=language, size_hw=(32, 128))
    assert model.processor.layout_for((10, 10)).length == (32 // 16) * (128 // 16) // 4
    assert len(model.caption([tiny.image()], max_new_tokens=2)) == 1


def test_parts_that_do_not_fit_are_refused_before_any_work(folders):
    vision, language = folders("siglip", "llama")
    with pytest.raises(ValueError, match="pixel shuffle by 2 does not divide the grid 3 x 4"):
        vlm.build(vision=vision, text=language, size_hw=(48, 64))
    with pytest.raises(ValueError, match="adaptor 'abstractor' is not one of linear"):
        vlm.build(vision=vision, text=language, adaptor="abstractor")
    with pytest.raises(OSError, match="text 'no/where': AutoModelForCausalLM finds no"):
        vlm.build(vision=vision, text="no/where")
    with pytest.raises(OSError, match="no/where"):
        vlm.build(vision="transformers:no/where", text=language)


def test_generation_is_plain_before_and_after_saving(folders, tmp_path):
    """A language model's own habits (a repetition penalty) neither apply nor get lost on saving."""
    vision, language = folders("siglip", "llama")
    expected = vlm.build(vision=vision, text=language).caption([tiny.image()], max_new_tokens=8)
    habits = transformers.GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1)
    habits.save_pretrained(language)
    model = vlm.build(vision=vision, text=language)
    assert model.caption([tiny.image()], max_new_tokens=8) == expected
    model.save(tmp_path / "saved")
    again = vlm.load(tmp_path / "saved", device="cpu")
    assert again.caption([tiny.image()], max_new_tokens=8) == expected


def test_16_bit_models_keep_buffers_whose_meaning_16_bits_would_lose(folders, tmp_path):
    vision, language = folders("siglip", "llama")
    vlm.build(vision=vision, text=language).save(tmp_path / "saved")
    model = vlm.load(tmp_path / "saved", device="cpu", dtype="bfloat16")
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    assert model.module.text.model.rotary_emb.inv_freq.dtype == torch.float32
    assert len(model.caption([tiny.image()], max_new_tokens=2)) == 1
