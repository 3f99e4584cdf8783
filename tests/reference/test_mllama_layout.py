"""Folders of Mllama beside transformers' class: opened, written, refused; and its full sizes."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import vlm
from tests.reference import images_in_text as law
from tests.reference.images_in_text import close, our_logits, reopened
from tests.reference.tiny_mllama import (
    BEGINS,
    MARK,
    ROWS,
    TURN_ENDS,
    examples,
    our_batch,
    their_inputs,
    write_folder,
)
from vlm import vocabulary
from vlm.systems import mllama
from vlm.systems.published import first_names, published_name
from vlm.training.stages import assign_rates
from vlm.weights import same_bits

folder = law.folders(("mllama",), write_folder)


@pytest.mark.parametrize("through_native", [False, True])
@torch.no_grad()
def test_mllama_reference_layout_opens_in_transformers(folder, tmp_path, through_native):
    law.check_layout_opens_in_transformers(
        folder, tmp_path, through_native, their_inputs,
        {"processor_config.json", "tokenizer.json", "chat_template.jinja"},
    )  # fmt: skip
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert same_bits(before, after)


@pytest.mark.parametrize("reference_mask", [False, True])
@torch.no_grad()
def test_mllama_native_layout_returns_the_same_model(folder, tmp_path, reference_mask):
    model = vlm.load(folder, "cpu")
    if reference_mask:
        mllama.use_reference_mask(model)
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    assert again.module.cross.config == model.module.cross.config
    assert again.module.tokenizer.config == model.module.tokenizer.config
    for key in ("stop_ids", "caption_prompt"):
        assert getattr(again, key) == getattr(model, key)
    assert again.processor.template == model.processor.template
    assert again.processor.pixel_spec == model.processor.pixel_spec
    ours, its = (our_batch(m) for m in (model, again))
    assert torch.equal(ours.ids, its.ids)
    assert torch.equal(our_logits(model, ours), our_logits(again, its))


def published_style(folder, out):
    """The folder as the authors published it, by transformers 4: the images' processor and the
    template apart, rotary scaling under its older names."""
    shutil.copytree(folder, out)
    settings = json.loads((out / "processor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    (out / "processor_config.json").unlink()
    template = (out / "chat_template.jinja").read_text()
    (out / "chat_template.jinja").unlink()
    (out / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    values = json.loads((out / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    text = values["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    (out / "config.json").write_text(json.dumps(values))
    return out


@torch.no_grad()
def test_mllama_opens_published_folders_and_those_of_transformers_5(folder, tmp_path):
    old = vlm.load(published_style(folder, tmp_path / "old"), "cpu")
    new = vlm.load(folder, "cpu")
    assert same_bits(old.module.state_dict(), new.module.state_dict())
    ours, its = our_batch(old), our_batch(new)
    assert torch.equal(ours.ids, its.ids)
    close(our_logits(old, ours)[ours.valid], our_logits(new, its)[its.valid], 0)


def test_mllama_opens_the_names_of_transformers_class(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    peer, _ = reopened(folder)
    state = {name: tensor.contiguous() for name, tensor in peer.state_dict().items()}
    assert set(state).isdisjoint(load_file(folder / "model.safetensors"))
    save_file(state, out / "model.safetensors", {"format": "pt"})
    found, expected = vlm.load(out, "cpu"), vlm.load(folder, "cpu")
    assert same_bits(found.module.state_dict(), expected.module.state_dict())


def test_mllama_reference_layout_says_the_dtype_it_holds(folder, tmp_path):
    vlm.load(folder, "cpu", "bfloat16").save(tmp_path / "out", layout="reference")
    peer, _ = reopened(tmp_path / "out")
    assert {p.dtype for p in peer.parameters()} == {torch.bfloat16}


def test_mllama_names_all_wrong_keys_at_once(folder, tmp_path):
    law.check_all_wrong_keys_are_named(
        folder, tmp_path, "language_model.model.layers.1.cross_attn.q_norm.weight"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("image_processor", "max_image_tiles"), 6, "max_image_tiles: expected 4, .* found 6"),
        (("image_processor", "max_image_tiles"), 2, "max_image_tiles: expected 4, .* found 2"),
        (
            ("image_processor", "size"),
            {"height": 56, "width": 56},
            r"image processor's size: expected \(28, 28\), .* found \(56, 56\)",
        ),
    ],
)
def test_mllama_raises_where_processor_and_weights_differ(folder, tmp_path, field, value, message):
    refused(folder, tmp_path, "processor_config.json", field, value, message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("vision_config", "hidden_act"), "relu", "hidden_act: expected 'gelu'"),
        (("vision_config", "vision_output_dim"), 32, "vision_output_dim: expected 48"),
        (("text_config", "hidden_act"), "gelu", "hidden_act: expected 'silu'"),
        (("text_config", "cross_attention_layers"), [1, 4], "after each, found .1, 4. of 5"),
        (("text_config", "cross_attention_layers"), [1, 2], "after each, found .1, 2. of 5"),
        (("image_token_index",), 7, "the id of .* in the text tokenizer: expected 7"),
    ],
)
def test_mllama_raises_for_what_is_not_of_the_published_kind(
    folder, tmp_path, field, value, message
):
    refused(folder, tmp_path, "config.json", field, value, message)


def refused(folder, tmp_path, file, field, value, message):
    """A folder in which a field of a file is changed."""
    out = shutil.copytree(folder, tmp_path / "out")
    values = json.loads((out / file).read_text())
    *path, last = field
    part = values
    for key in path:
        part = part[key]
    part[last] = value
    (out / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        vlm.load(out, "cpu")


def test_mllama_of_a_base_model_has_a_plain_template(tmp_path):
    """Folders of base models have no chat template."""
    write_folder(tmp_path, template=None)
    model = vlm.load(tmp_path, "cpu")
    processor = model.processor
    row = processor.encode(examples(True, ROWS)[0])
    ids = torch.where(row.ids < 0, processor.text_tokenizer.convert_tokens_to_ids(MARK), row.ids)
    assert processor.text_tokenizer.decode(ids) == f"{MARK}{BEGINS}what is it?a cat{TURN_ENDS}"
    assert int(row.scored.sum()) == len(processor.text_tokenizer("a cat")["input_ids"]) + 1
    (prompt,) = (processor.encode_prompt(example) for example in examples(False, ROWS[:1]))
    assert torch.equal(row.ids[: len(prompt.ids)], prompt.ids)
    model.save(tmp_path / "native")
    again = vlm.load(tmp_path / "native", "cpu").processor.encode(examples(True, ROWS)[0])
    assert torch.equal(again.ids, row.ids)


def test_mllama_refuses_new_tokens_which_its_head_could_not_write(folder):
    model = vlm.load(folder, "cpu")
    with pytest.raises(ValueError, match="rows in the head as in the input table"):
        vocabulary.grow(model.module.text, model.processor.text_tokenizer, ["<new>"])


@pytest.mark.parametrize(("size", "millions"), [("11b", 10670.2), ("90b", None)])
def test_mllama_full_sizes_hold_the_published_parameters(size, millions):
    sizes = mllama.SIZES[size]
    config = transformers.MllamaConfig(vision_config=sizes.vision, text_config=sizes.text)
    with torch.device("meta"):
        module = mllama.build(size)
        peer = transformers.MllamaForConditionalGeneration(config)
    count = sum(p.numel() for p in module.parameters())
    assert count == sum(p.numel() for p in peer.parameters())
    if millions is not None:
        assert round(count / 1e6, 1) == millions
        parts = {name: sum(p.numel() for p in m.parameters()) for name, m in module.parts().items()}
        assert round(parts["tokenizer"] / 1e6, 1) == 863.6
        assert round(parts["adaptor"] / 1e6, 1) == 31.5
    layers = sizes.text["cross_attention_layers"]
    key_map = mllama.key_map_of(layers, sizes.text["num_hidden_layers"])
    expected = {published_name(key, key_map) for key in module.state_dict()}
    theirs, _ = first_names(peer.state_dict(), key_map, (), "peer")
    assert set(theirs) == expected
    assert module.tokenizer.tokens_for((300, 900)) == 2 * 1601
    assert module.tokenizer.dim == 7680
    rates = [(f"{part}.*", 1e-5) for part in ("tokenizer", "adaptor", "cross", "text")]
    assign_rates(module, tuple(rates))


def test_mllama_sizes_are_told_by_name():
    with pytest.raises(ValueError, match="'7b' is not one of 11b, 90b"):
        mllama.build("7b")
