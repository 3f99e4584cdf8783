"""Folders of Qwen-VL: opened, written, refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import vlm
from tests.reference import images_in_text as law
from tests.reference.images_in_text import our_logits
from tests.reference.tiny_qwen_vl import CONFIG, KINDS, our_batch, random_state, write_folder
from vlm import vocabulary
from vlm.lora import Lora, add_lora
from vlm.losses.token import token_losses
from vlm.merge import Made
from vlm.systems import published_caption_prompt, qwen_vl
from vlm.training.activation_checkpointing import checkpoint_activations
from vlm.weights import WeightsError, cast_parameters, same_bits

folder = law.folders(KINDS, write_folder)


@pytest.mark.parametrize("through_native", [False, True])
def test_qwen_vl_layout_is_written_as_it_was_read(folder, tmp_path, through_native):
    """Weights bit for bit, queries, keys and values in one again; small files, and code that was
    never run, as they were."""
    model = vlm.load(folder, "cpu")
    if through_native:
        model.save(tmp_path / "native")
        model = vlm.load(tmp_path / "native", "cpu")
    out = tmp_path / "out"
    model.save(out, layout="reference")
    assert same_bits(load_file(out / "model.safetensors"), random_state())
    names = {path.name for path in folder.iterdir()} - {"config.json", "model.safetensors"}
    assert names >= {"qwen.tiktoken", "modeling_qwen.py", "generation_config.json", "LICENSE"}
    for name in names:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == CONFIG
    again = vlm.load(out, "cpu")
    with torch.no_grad():
        ours, its = (our_logits(m, our_batch(m)) for m in (model, again))
    assert torch.equal(ours, its)


def test_qwen_vl_native_layout_returns_the_same_model(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    for key in ("stop_ids", "caption_prompt", "answer_prompt"):
        assert getattr(again, key) == getattr(model, key)
    assert again.processor.max_tokens == model.processor.max_tokens == CONFIG["seq_length"]
    ours, its = (our_batch(m) for m in (model, again))
    assert torch.equal(ours.ids, its.ids)


def test_qwen_vl_in_pickled_shards_is_opened_as_on_the_hub(tmp_path):
    """Shards of torch's own files and their index; written again, they are safetensors alone."""
    write_folder(tmp_path / "a", "chatml", sharded=True)
    model = vlm.load(tmp_path / "a", "cpu")
    model.save(tmp_path / "b", layout="reference")
    assert same_bits(load_file(tmp_path / "b/model.safetensors"), random_state())
    assert not list((tmp_path / "b").glob("*.bin*"))
    (tmp_path / "a/pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(WeightsError, match=r"00002-of-00002\.bin: expected a file of weights"):
        vlm.load(tmp_path / "a", "cpu")


def test_qwen_vl_dtype_is_written_with_its_weights(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    cast_parameters(model.module, torch.bfloat16)
    model.save(tmp_path, layout="reference")
    saved, before = load_file(tmp_path / "model.safetensors"), random_state()
    table = "transformer.visual.attn_pool.pos_embed"
    for name, tensor in saved.items():
        expected = before[name] if name == table else before[name].bfloat16()
        assert torch.equal(tensor, expected), name
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_qwen_vl_saved_rotary_frequencies_are_kept(tmp_path):
    write_folder(tmp_path / "a", "raw")
    state = load_file(tmp_path / "a/model.safetensors")
    state["transformer.rotary_emb.inv_freq"] = torch.rand(32)
    law.save_file(state, tmp_path / "a/model.safetensors", {"format": "pt"})
    vlm.load(tmp_path / "a", "cpu").save(tmp_path / "b", layout="reference")
    assert same_bits(load_file(tmp_path / "b/model.safetensors"), state)


def test_qwen_vl_joins_what_is_made_when_it_is_written():
    """A merged LoRA beside plain weights."""
    parts = {part: torch.randn(2, 3) for part in "qkv"}
    state = {f"h.attn.c_attn[{part}].weight": tensor for part, tensor in parts.items()}
    made = Made(parts["k"], lambda: parts["k"] + 1)
    state["h.attn.c_attn[k].weight"] = made
    joined = qwen_vl.join_fused(state | {"other": parts["q"]})
    assert list(joined) == ["other", "h.attn.c_attn.weight"]
    assert joined["h.attn.c_attn.weight"].like.shape == (6, 3)
    whole = joined["h.attn.c_attn.weight"].make()
    assert torch.equal(whole, torch.cat([parts["q"], parts["k"] + 1, parts["v"]]))


def test_qwen_vl_caption_prompt_is_known_before_weights_are_read(folder):
    assert published_caption_prompt(folder) == "Describe the image in English:"


def test_qwen_vl_names_all_wrong_keys(folder, tmp_path):
    law.check_all_wrong_keys_are_named(folder, tmp_path, "transformer.h.1.mlp.w2.weight")


def test_qwen_vl_names_fused_weights_of_another_shape(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    state = load_file(out / "model.safetensors")
    state["transformer.h.0.attn.c_attn.bias"] = torch.zeros(5)
    law.save_file(state, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"c_attn\[q\]\.bias: expected \(256,\), found \(2,\)"):
        vlm.load(out, "cpu")


def test_text_only_qwen_is_refused_as_no_vision_language_model(folder, tmp_path):
    values = {key: value for key, value in CONFIG.items() if key != "visual"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json: expected Qwen-VL, found a text-only Qwen"):
        vlm.load(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_bias": False, "rotary_pct": 0.5},
         r"no_bias: expected True, found False; rotary_pct: expected 1\.0, found 0\.5"),
        ({"kv_channels": 32}, "kv_channels: expected 64, found 32"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config: expected None, found {'bits"),
        ({"visual": CONFIG["visual"] | {"output_dim": 128}},
         r"visual\.output_dim: expected hidden_size 256, a multiple of 128, found 128"),
        ({"visual": CONFIG["visual"] | {"n_queries": 8}}, "expected a square number, found 8"),
        ({"visual": {"width": 32}}, r"expected the keys visual\.heads, visual\.image_size, "),
        ({"visual": None}, "visual: expected the vision encoder's settings, found None"),
        ({"visual": CONFIG["visual"] | {"image_start_id": 7}},
         r"qwen\.tiktoken: expected <img> to be token 7 of 500 at most"),
        ({"vocab_size": 490}, r"found token \d+ of 495"),
    ],
)  # fmt: skip
def test_qwen_vl_raises_naming_settings_that_it_has_not(folder, tmp_path, changes, message):
    out = shutil.copytree(folder, tmp_path / "out")
    (out / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ValueError, match=message):
        vlm.load(out, "cpu")


def test_qwen_vl_raises_without_its_files(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    (out / "generation_config.json").write_text('{"chat_format": "alpaca"}')
    with pytest.raises(ValueError, match="chat_format: expected 'chatml' or 'raw', found 'alpaca'"):
        vlm.load(out, "cpu")
    (out / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="chat_format: expected 'chatml' or 'raw', found None"):
        vlm.load(out, "cpu")
    out = shutil.copytree(folder, tmp_path / "other")
    (out / "qwen.tiktoken").unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(str(out))}: expected qwen\.tiktoken"):
        vlm.load(out, "cpu")


def test_qwen_vl_with_new_tokens_is_written_in_our_own_layout_alone(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    vocabulary.grow(model.module.text, model.processor.text_tokenizer, ["<loc0>"])
    with pytest.raises(ValueError, match=r"1 new tokens, such as \['<loc0>'\]"):
        model.save(tmp_path / "reference", layout="reference")
    assert not (tmp_path / "reference").exists()
    model.save(tmp_path / "native")
    again = vlm.load(tmp_path / "native", "cpu")
    assert len(again.processor.text_tokenizer("<loc0>")["input_ids"]) == 1


def test_qwen_vl_lora_is_merged_into_the_fused_weights_that_are_written(folder, tmp_path):
    """LoRA in every part; the folder answers as the model with its layers does."""
    model = vlm.load(folder, "cpu")
    lora = Lora(rank=2)
    add_lora(model.module, {"tokenizer": lora, "adaptor": lora, "text": lora})
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save(tmp_path, layout="reference")
    saved, before = load_file(tmp_path / "model.safetensors"), random_state()
    assert {name: t.shape for name, t in saved.items()} == {n: t.shape for n, t in before.items()}
    fused = "transformer.h.0.attn.c_attn.weight"
    changed = (saved[fused] - before[fused]).tensor_split(3)
    assert all(0 < torch.linalg.matrix_rank(part, atol=1e-4) <= 2 for part in changed)
    again = vlm.load(tmp_path, "cpu")
    with torch.no_grad():
        ours, its = (our_logits(m, our_batch(m)) for m in (model, again))
    law.close(its, ours)


def test_qwen_vl_computes_activations_again_with_the_same_gradients(folder):
    model, checkpointed = vlm.load(folder, "cpu"), vlm.load(folder, "cpu")
    checkpoint_activations(checkpointed.module)
    gradients = []
    for one in (model, checkpointed):
        batch = our_batch(one, answers=True, padding="right")
        token_losses(one.module(batch), batch.targets).mean().backward()
        gradients.append({name: p.grad for name, p in one.module.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6)
