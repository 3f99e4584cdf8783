"""Tiny contrastive runs of the recipe, and what compares them."""

import json

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

from tests import tiny, towers
from tests.runs import stage_of
from vlm.training.runs import contrastive
from vlm.training.runs.contrastive import Settings

TINY = dict(image_px=16, patch_px=8, width=64, depth=1, text_width=64, text_depth=1, embed_width=16,
            length=12)  # fmt: skip
SHORT = dict(batch=4, steps=2, workers=0, eval_every=1, save_every=0, threads=1, precision="fp32",
             held_out_rows=6)  # fmt: skip


def run(out, **settings):
    """The recipe, as its command runs it; what it gives."""
    values = {**SHORT, "out": out, **settings}
    recipe = stage_of("contrastive")
    return contrastive.run(Settings(**values), recipe.stage, recipe.objective)


def run_from_scratch(out):
    """A tiny run for a whole test file, before the fixtures of its tests: its folder and what it
    gave."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return out, run(out, **TINY)


def assert_follows(found, expected):
    """Lines of metrics.jsonl of the same run, computed in another way."""
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert [b[key] for key in ("batch", "scored", "samples")] == [
            a[key] for key in ("batch", "scored", "samples")
        ]


def assert_close(found, expected):
    """Weights, but for the biases of attention's keys: these change nothing, so that their gradient
    is rounding alone, of which Adam makes whole steps."""
    keys = ("k_proj.bias", "qkv.bias", "key_value.bias", ".key.bias")
    for name, weight in expected.items():
        if not name.endswith(keys):
            torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=1e-3, msg=name)


def write_decoder(folder):
    towers.model(towers.composed(towers.timm_vit())).save(folder)


def write_bert(folder):
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tiny.text_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(folder, **changed):
    """Rows of drawings with captions in a JSON file, some of them changed."""
    rows = []
    for i in range(8):
        tiny.image(i).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"cat {i}"} | changed.get(f"row{i}", {}))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
