"""Every published system opened and written back: its class finds each weight that it had."""

from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import vlm
from tests.reference import (
    tiny_clip,
    tiny_deepseek_vl,
    tiny_donut,
    tiny_idefics,
    tiny_idefics2,
    tiny_kosmos2,
    tiny_llava,
    tiny_mllama,
    tiny_paligemma,
    tiny_qwen2_vl,
    tiny_siglip,
    tiny_siglip2,
    tiny_smolvlm,
    tiny_trocr,
)
from vlm.systems import SYSTEMS
from vlm.weights import same_bits

HEAD = {"vision_use_head": True}
"""SigLIP's pooling head, which no language model reads."""


def trocr(kind):
    return lambda folder: tiny_trocr.write_folder(folder, kind)


def paligemma(kind, **more):
    return lambda folder: tiny_paligemma.write_folder(folder, kind, **more)


def idefics(kind):
    return lambda folder: tiny_idefics.write_folder(folder, kind)


def deepseek_vl(kind, **more):
    return lambda folder: tiny_deepseek_vl.write_folder(folder, kind, **more)


SYSTEM_FOLDERS = {
    **{f"trocr {kind}": trocr(kind) for kind in tiny_trocr.KINDS},
    "donut": tiny_donut.write_folder,
    "clip": tiny_clip.write_folder,
    "siglip": tiny_siglip.write_folder,
    "siglip2": tiny_siglip2.saved,
    "paligemma 1": paligemma("gemma"),
    "paligemma 1 with a head": paligemma("gemma", vision=HEAD),
    "paligemma 2 with a head": paligemma("gemma2", vision=HEAD),
    **{kind: partial(tiny_llava.write_folder, kind=kind) for kind in tiny_llava.KINDS},
    "kosmos-2": tiny_kosmos2.write_folder,
    **{kind: partial(tiny_smolvlm.write_folder, kind=kind) for kind in tiny_smolvlm.KINDS},
    **{kind: partial(tiny_qwen2_vl.write_folder, kind=kind) for kind in tiny_qwen2_vl.KINDS},
    "mllama": tiny_mllama.write_folder,
    **{f"idefics {kind}": idefics(kind) for kind in tiny_idefics.KINDS},
    "idefics2": tiny_idefics2.write_folder,
    "idefics2 split": partial(tiny_idefics2.write_folder, kind="split"),
    "deepseek_vl": deepseek_vl("deepseek_vl"),
    "deepseek_vl with a head": deepseek_vl("deepseek_vl", vision=HEAD),
    "deepseek_vl_hybrid with a head": deepseek_vl("deepseek_vl_hybrid", vision=HEAD),
}
WRITERS = {"paligemma 1", "llava", "llava_next", "idefics2", "idefics3",
           "idefics instruct", "idefics base", "smolvlm", "deepseek_vl"}  # fmt: skip
"""Folders of models whose images stand in the stream that they write."""
UNUSED = {"trocr", "idefics", "llava", "llava_next",
          "paligemma 1 with a head", "paligemma 2 with a head",
          "deepseek_vl with a head", "deepseek_vl_hybrid with a head"}  # fmt: skip
"""Folders that hold more than the model uses; of TrOCR every one, of LLaVA CLIP's last layer
and norm, of Idefics CLIP's norm."""


def opened(folder):
    """The state of the class that the folder names, which finds all that it asks for, and no more
    than that."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model, report = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, output_loading_info=True
    )
    found = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(found.values()), found
    return model.state_dict()


def test_every_published_system_that_transformers_has_is_tried():
    """Others have nobody to open what is written but us; open_clip's own class does so in
    test_open_clip_layout."""
    tried = {name.split()[0] for name in SYSTEM_FOLDERS}
    assert tried <= SYSTEMS.keys()
    assert SYSTEMS.keys() & transformers.CONFIG_MAPPING.keys() <= tried


@pytest.mark.parametrize("through", ["reference", "native"])
@pytest.mark.parametrize("name", SYSTEM_FOLDERS)
def test_reference_layout_holds_every_weight_of_the_folder_that_was_opened(name, through, tmp_path):
    folder = tmp_path / "published"
    SYSTEM_FOLDERS[name](folder)
    model = vlm.load(folder, "cpu", "stored")
    if through == "native":
        model.save(tmp_path / "native")
        model = vlm.load(tmp_path / "native", "cpu", "stored")
    kept = bool(model.reference.unused)
    assert kept == (name in UNUSED or name.split()[0] in UNUSED)
    model.save(tmp_path / "out", layout="reference")
    before, after = opened(folder), opened(tmp_path / "out")
    assert same_bits(before, after)


@pytest.mark.parametrize("name", ["trocr base", "paligemma 1 with a head"])
def test_weights_that_are_not_used_stay_while_others_are_trained(name, tmp_path):
    SYSTEM_FOLDERS[name](tmp_path / "published")
    model = vlm.load(tmp_path / "published", "cpu", "stored")
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(1)
    model.save(tmp_path / "out", layout="reference")
    before, after = opened(tmp_path / "published"), opened(tmp_path / "out")
    unused = [key for key in before if "pooler" in key or ".head." in key]
    assert unused
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor if key in unused else tensor + 1), key


def test_weights_that_are_not_used_go_by_the_names_of_those_around_them(tmp_path):
    """A head in transformers 5's names beside a tower that is written in the authors'."""
    paligemma("gemma", vision=HEAD)(tmp_path / "published")
    path = tmp_path / "published" / "model.safetensors"
    state = load_file(path)
    newer = {k.replace("vision_tower.vision_model.", "vision_tower."): t for k, t in state.items()}
    save_file(newer, path, {"format": "pt"})
    model = vlm.load(tmp_path / "published", "cpu", "stored")
    model.save(tmp_path / "out", layout="reference")
    out = load_file(tmp_path / "out" / "model.safetensors")
    towers = [key for key in out if "vision_tower." in key]
    assert any(".head." in key for key in towers)
    assert len({key.partition("vision_tower.")[2].split(".")[0] for key in towers}) == 1
    assert same_bits(opened(tmp_path / "out"), opened(tmp_path / "published"))


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_no_model_writes_the_mark_of_an_image(name, tmp_path):
    """Where it is a token of the vocabulary; in our own layout too."""
    SYSTEM_FOLDERS[name](tmp_path / "published")
    model = vlm.load(tmp_path / "published", "cpu", "stored")
    mark = model.processor.text_tokenizer.get_added_vocab()[model.processor.image_mark]
    assert mark in model.banned_ids
    assert not {*model.banned_ids} & {*model.stop_ids}
    model.save(tmp_path / "native")
    assert vlm.load(tmp_path / "native", "cpu", "stored").banned_ids == model.banned_ids
