"""DeepSeek-VL's folders beside transformers' classes: opened, written, refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlm
from tests.reference import images_in_text as law
from tests.reference.images_in_text import close, our_logits, reopened
from tests.reference.tiny_deepseek_vl import (
    CONVERSATIONS,
    KINDS,
    MARK,
    conversation,
    their_inputs,
    with_marks,
    write_folder,
)
from tests.tiny import image
from vlm.families.decoder_only.batch import collate
from vlm.lora import Lora, add_lora
from vlm.systems import deepseek_vl
from vlm.weights import WeightsError, same_bits

folder = law.folders(KINDS, write_folder)


def asked(processor):
    _, messages = conversation(CONVERSATIONS["two images"])
    return their_inputs(processor, messages, add_generation_prompt=True)


@pytest.mark.parametrize("through_native", [False, True])
@torch.no_grad()
def test_deepseek_vl_reference_layout_opens_in_transformers(folder, tmp_path, through_native):
    law.check_layout_opens_in_transformers(
        folder, tmp_path, through_native, asked,
        {"processor_config.json", "chat_template.jinja", "generation_config.json"},
    )  # fmt: skip


@torch.no_grad()
def test_deepseek_vl_native_layout_returns_the_same_model(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    assert again.stop_ids == model.stop_ids
    example, _ = conversation(CONVERSATIONS["three turns"])
    rows = [m.processor.encode_prompt(example) for m in (model, again)]
    assert torch.equal(rows[0].ids, rows[1].ids)
    ours, its = (our_logits(model, collate([row], 0, "right")) for row in rows)
    assert torch.equal(ours, its)
    question = [[[image()]], [f"{MARK}what?"]]
    assert again.generate(*question)[0].ids == model.generate(*question)[0].ids


def test_native_folders_from_before_published_systems_still_open(folder, tmp_path):
    vlm.load(folder, "cpu").save(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: values[k] for k in values.keys() - {"reference", "image_mark"}}))
    model = vlm.load(tmp_path, "cpu")
    assert model.reference is None
    assert model.processor.image_mark == "<image>"


def test_deepseek_vl_reference_layout_says_the_dtype_it_holds(folder, tmp_path):
    vlm.load(folder, "cpu", "bfloat16").save(tmp_path, layout="reference")
    state = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    peer, _ = reopened(tmp_path)
    assert {p.dtype for p in peer.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_deepseek_vl_with_more_tokens_opens_in_transformers(tmp_path):
    write_folder(tmp_path / "in", "deepseek_vl")
    model = vlm.load(tmp_path / "in", "cpu")
    tokenizer = model.processor.text_tokenizer
    tokenizer.add_tokens(["<loc0000>", "<loc0001>"])
    model.module.text.resize_token_embeddings(len(tokenizer))
    model.save(tmp_path / "out", layout="reference")
    peer, processor = reopened(tmp_path / "out")
    example, messages = conversation([("user", (None, "where is <loc0001>?"))])
    inputs = their_inputs(processor, messages, add_generation_prompt=True)
    row = model.processor.encode_prompt(example)
    assert torch.equal(with_marks(row.ids, model)[None], inputs["input_ids"])
    assert tokenizer.convert_tokens_to_ids("<loc0001>") in row.ids
    batch = collate([row], model.processor.pad_id, "right")
    close(our_logits(model, batch), peer(**inputs).logits)


@torch.no_grad()
def test_deepseek_vl_with_lora_opens_merged_in_transformers(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    add_lora(model.module, {"text": Lora(rank=2), "tokenizer": Lora(rank=2)})
    for name, parameter in model.module.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save(tmp_path, layout="reference")
    peer, processor = reopened(tmp_path)
    example, messages = conversation(CONVERSATIONS["one image"])
    inputs = their_inputs(processor, messages, add_generation_prompt=True)
    batch = collate([model.processor.encode_prompt(example)], 0, "right")
    close(our_logits(model, batch), peer(**inputs).logits)


def old_style(folder, tmp_path):
    """The folder as transformers 4 wrote it: nested names, files apart, an old dtype key."""
    out = shutil.copytree(folder, tmp_path / "old")
    nested, flat = "model.vision_model.vision_model.", "model.vision_model."
    state = {
        key.replace(flat, nested) if nested not in key else key: tensor
        for key, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(state, out / "model.safetensors", {"format": "pt"})
    values = json.loads((out / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    for part in ("vision_config", "text_config", "high_res_vision_config"):
        values.get(part, {}).pop("dtype", None)
    values["text_config"]["rope_theta"] = 10000.0
    values["text_config"].pop("rope_parameters", None)
    (out / "config.json").write_text(json.dumps(values))
    settings = json.loads((out / "processor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps(settings.pop("image_processor")))
    (out / "processor_config.json").write_text(json.dumps(settings))
    template = (out / "chat_template.jinja").read_text()
    (out / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (out / "chat_template.jinja").unlink()
    values = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(
        json.dumps(values | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True})
    )
    return out


@torch.no_grad()
def test_deepseek_vl_opens_folders_of_transformers_4(folder, tmp_path):
    """Published folders are of this style; their tokenizer says Llama but is byte-level."""
    old = old_style(folder, tmp_path)
    model, new = vlm.load(old, "cpu"), vlm.load(folder, "cpu")
    assert same_bits(model.module.state_dict(), new.module.state_dict())
    example, messages = conversation(CONVERSATIONS["three turns"])
    peer, processor = reopened(old)
    inputs = their_inputs(processor, messages, add_generation_prompt=True)
    row = model.processor.encode_prompt(example)
    assert torch.equal(with_marks(row.ids, model)[None], inputs["input_ids"])
    close(our_logits(model, collate([row], 0, "right")), peer(**inputs).logits)
    model.save(tmp_path / "out", layout="reference")
    state, out = (load_file(path / "model.safetensors") for path in (old, tmp_path / "out"))
    assert same_bits(state, out)


def test_deepseek_vl_names_all_wrong_keys_at_once(folder, tmp_path):
    """In the folder's own words."""
    broken = shutil.copytree(folder, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    del state["model.language_model.norm.weight"]
    state["model.extra.weight"] = torch.zeros(1)
    state["lm_head.weight"] = state["lm_head.weight"][:-1]
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError) as error:
        vlm.load(broken, "cpu")
    message = str(error.value)
    assert "missing (1): ['model.language_model.norm.weight']" in message
    assert "unused (1): ['model.extra.weight']" in message
    assert "wrong shape (1): ['lm_head.weight: expected" in message


def test_deepseek_vl_names_the_folder_whose_files_cannot_be_read(folder, tmp_path):
    cut = shutil.copytree(folder, tmp_path / "cut")
    (cut / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"cut: expected the files .* AutoProcessor cannot read"):
        vlm.load(cut, "cpu")


@torch.no_grad()
def test_deepseek_vl_head_is_tied_only_where_the_weights_are(tmp_path):
    """The class default says tied; published folders are not, whatever their config leaves out."""
    write_folder(tmp_path / "tied", "deepseek_vl", tied=True)
    untied = write_folder(tmp_path / "untied", "deepseek_vl")
    path = tmp_path / "untied" / "config.json"
    values = json.loads(path.read_text())
    del values["tie_word_embeddings"]
    path.write_text(json.dumps(values))
    for name in ("tied", "untied"):
        model = vlm.load(tmp_path / name, "cpu")
        text = model.module.text
        is_tied = text.get_output_embeddings().weight is text.get_input_embeddings().weight
        assert is_tied == (name == "tied")
        for layout in ("native", "reference"):
            model.save(tmp_path / f"{name}-{layout}", layout)
        saved = json.loads((tmp_path / f"{name}-reference" / "config.json").read_text())
        assert saved["tie_word_embeddings"] == is_tied
        peer, processor = reopened(tmp_path / f"{name}-reference")
        again = vlm.load(tmp_path / f"{name}-native", "cpu").module
        assert same_bits(again.state_dict(), model.module.state_dict())
        inputs = processor(text="what?", return_tensors="pt")
        row = model.processor.encode_literal([], "what?")
        close(our_logits(model, collate([row], 0, "right")), peer(**inputs).logits)
    assert not torch.equal(untied.lm_head.weight, untied.get_input_embeddings().weight)


@torch.no_grad()
def test_deepseek_vl_without_its_pooling_head_says_so(tmp_path):
    """A folder whose configuration has a head and whose weights have none."""
    write_folder(tmp_path / "in", "deepseek_vl", vision={"vision_use_head": True})
    peer, processor = reopened(tmp_path / "in")
    state = load_file(tmp_path / "in" / "model.safetensors")
    assert any(".head." in key for key in state)
    plain = {key: tensor for key, tensor in state.items() if ".head." not in key}
    save_file(plain, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    model = vlm.load(tmp_path / "in", "cpu")
    model.save(tmp_path / "out", layout="reference")
    again, _ = reopened(tmp_path / "out")
    assert again.config.vision_config.vision_use_head is False
    _, messages = conversation(CONVERSATIONS["one image"])
    inputs = their_inputs(processor, messages, add_generation_prompt=True)
    assert torch.equal(again(**inputs).logits, peer(**inputs).logits)


def test_deepseek_vl_reads_activation_and_eps_from_the_folder(folder):
    """A wrong eps moves logits too little to be seen in them."""
    tokenizer = vlm.load(folder, "cpu").module.tokenizer
    siglip = getattr(tokenizer, "low", tokenizer).backbone
    assert siglip.encoder.layers[0].layer_norm1.eps == siglip.post_layernorm.eps == 1e-3
    x = torch.linspace(-3, 3, 50)
    activation = siglip.encoder.layers[0].mlp.activation_fn
    assert torch.equal(activation(x), torch.nn.functional.gelu(x))
    with torch.device("meta"):
        published = deepseek_vl.build("1.3b").tokenizer.backbone
    assert published.encoder.layers[0].layer_norm1.eps == 1e-6
    assert torch.equal(published.encoder.layers[0].mlp.activation_fn(x), activation(x))


def test_deepseek_vl_ignores_leftover_stop_ids_that_are_plain_text(folder, tmp_path):
    """Classes write their default ids into generation_config.json; 2 is a plain token here."""
    out = shutil.copytree(folder, tmp_path / "leftover")
    path = out / "generation_config.json"
    tokenizer = vlm.load(folder, "cpu").processor.text_tokenizer
    plain, mark = (tokenizer.convert_tokens_to_ids(t) for t in ("a", MARK))
    path.write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [plain, mark]}))
    assert vlm.load(out, "cpu").stop_ids == (tokenizer.eos_token_id, mark)


def test_deepseek_vl_raises_when_the_processor_counts_other_image_tokens(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "miscounted")
    path = out / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_image_tokens": 15}))
    with pytest.raises(ValueError, match="writes 15 image tokens for an image, the model gives 16"):
        vlm.load(out, "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_deepseek_vl_key_map_round_trips(kind, tmp_path):
    """Both ways, on all names of the full size's module and of transformers' class."""
    with torch.device("meta"):
        module = deepseek_vl.build("1.3b" if kind == "deepseek_vl" else "7b")
    key_map = deepseek_vl.KEY_MAPS[kind]
    names = [deepseek_vl.published_name(key, key_map) for key in module.state_dict()]
    assert len(set(names)) == len(names)
    assert all(
        deepseek_vl.first_names({n: None}, key_map, (), "") == ({n: None}, {}) for n in names
    )
    theirs = set(write_folder(tmp_path, kind).state_dict())
    renamed, _ = deepseek_vl.first_names(dict.fromkeys(theirs), key_map, deepseek_vl.UNUSED, "")
    ours = vlm.load(tmp_path, "cpu").module.state_dict()
    assert set(renamed) == {deepseek_vl.published_name(key, key_map) for key in ours}
    twice = dict.fromkeys([names[0], names[0].replace("vision_model.vision_model", "vision_model")])
    if len(twice) == 2:
        with pytest.raises(WeightsError, match="are the same weight"):
            deepseek_vl.first_names(twice, key_map, (), "folder")


def test_saving_in_a_layout_that_a_model_lacks_raises(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    with pytest.raises(
        ValueError, match="layout is one of native, reference, open_clip, found 'onnx'"
    ):
        model.save(tmp_path, layout="onnx")
    model.reference = None
    with pytest.raises(ValueError, match="came from no published system"):
        model.save(tmp_path, layout="reference")
    assert not list(tmp_path.iterdir())
