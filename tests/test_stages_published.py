"""The three stages on a published system's folder, from its own adaptor on."""

import json

import pytest
import torch

import vlm
from tests.reference import tiny_llava, tiny_mllama, tiny_qwen2_vl, tiny_smolvlm
from tests.reference.images_in_text import reopened
from tests.runs import stage_of, weights
from vlm.training.runs import decoder_only as recipe

SCENES = "scenes:12:seed=1:size=48x64:task=mixed"
SHORT = dict(batch=2, steps=2, held_out_rows=0, workers=0, eval_every=0, save_every=0, threads=1,
             precision="fp32", train=(SCENES,))  # fmt: skip


def run(name, out, **values):
    module = stage_of(name)
    settings = module.Settings(**{**SHORT, "out": out, **values})
    recipe.run(settings, module.stage, module.objective)
    return weights(out)


def moved(before, after):
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiny", "kind", "prompt"),
    [
        (tiny_smolvlm, "smolvlm", "Can you describe this image?"),
        (tiny_llava, "llava", "Describe the picture."),
        (tiny_qwen2_vl, "qwen2_5_vl", "Describe this image."),
        (tiny_mllama, "mllama", None),
    ],
    ids=["smolvlm", "llava", "qwen2_5_vl", "mllama"],
)
def test_three_stages_train_a_published_system(tmp_path, tiny, kind, prompt):
    """Each trains what it says, cross-attention blocks with the adaptor, keeps the system's prompt,
    and the end opens in transformers."""
    folder = tmp_path / "published"
    tiny.write_folder(folder, kind)
    text = dict(text_train=("python:train",), text_share=0.5, text_held_out_rows=2)
    start = weights(folder)
    adaptor = {"adaptor"} | ({name.split(".")[0] for name in start} & {"cross"})
    prompt = prompt or vlm.load(folder, "cpu").caption_prompt
    first = run("stage1_adaptor", tmp_path / "s1", start=str(folder))
    assert moved(start, first) == adaptor
    second = run("stage2_joint", tmp_path / "s2", previous=str(tmp_path / "s1"), **text)
    assert moved(first, second) == adaptor | {"text"}
    third = run("stage3_sft", tmp_path / "s3", previous=str(tmp_path / "s2"), **text)
    assert moved(second, third) == adaptor | {"tokenizer", "text"}
    model = vlm.load(tmp_path / "s3", "cpu")
    assert model.caption_prompt == prompt
    model.save(tmp_path / "reference", layout="reference")
    reopened(tmp_path / "reference")
    alone = run("stage3_sft", tmp_path / "alone", previous=str(folder), **text)
    assert moved(start, alone) == adaptor | {"tokenizer", "text"}
    assert json.loads((tmp_path / "alone/result.json").read_text())["unscored"] == 0


def test_first_stage_asks_with_a_published_systems_own_prompt(tmp_path):
    tiny_smolvlm.write_folder(tmp_path, "smolvlm")
    settings = stage_of("stage1_adaptor").Settings
    own = settings(start=str(tmp_path))
    assert own.caption_prompt == own.build().caption_prompt == "Can you describe this image?"
    asked = settings(start=str(tmp_path), prompt="Say it.")
    assert asked.caption_prompt == asked.build().caption_prompt == "Say it."
