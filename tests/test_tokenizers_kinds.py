import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tokenizer_laws import check_laws, spec
from tests.transformers_tokenizers import tiny
from vlm import tokenizers
from vlm.tokenizers import timm as timm_kind
from vlm.tokenizers.paired import AverageNeck, PairedTokenizer
from vlm.tokenizers.parts import LooseParts, named_parts
from vlm.tokenizers.tiles import TilesTokenizer
from vlm.tokenizers.transformers import build


def test_kinds_name_every_file_that_builds_a_tokenizer():
    folder = Path(tokenizers.__file__).parent
    files = {file.stem for file in folder.glob("*.py") if "\ndef build(" in file.read_text()}
    assert files - {"__init__"} == set(tokenizers.KINDS)


@pytest.mark.slow
def test_kinds_import_nothing_before_they_are_asked_for():
    code = (
        "import sys, vlm.tokenizers; "
        "print(sorted({'timm', 'transformers', 'open_clip', 'torch'} & set(sys.modules)))"
    )
    folder = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert run.stdout.strip() == "[]", run.stderr


def test_unknown_kind_raises_with_the_known_ones():
    known = "known kinds are columns, edge_tiles, naflex, native_vit, open_clip, paired"
    with pytest.raises(ValueError, match=f"'vgg'; {known}"):
        tokenizers.build({"kind": "vgg"})
    with pytest.raises(ValueError, match=known):
        tokenizers.build({"max_tiles": 2})
    with pytest.raises(ValueError, match=known):
        tokenizers.load("vgg:16")


def test_build_refuses_unknown_and_missing_keys_by_name():
    with pytest.raises(ValueError, match=r"unknown keys \['tiles'\], missing keys \['inner'"):
        tokenizers.build({"kind": "tiles", "tiles": 2})


@pytest.mark.parametrize(
    ("name", "words"),
    [("tiles:x", "has no library to load from"), ("timm:", "expected 'kind:id'")],
)
def test_load_refuses_what_no_library_can_give(name, words):
    with pytest.raises(ValueError, match=words):
        tokenizers.load(name)


def test_load_finds_the_kind_and_hands_its_options_on(tmp_path):
    with pytest.raises(OSError, match=r"transformers cannot load"):
        tokenizers.load(f"transformers:{tmp_path}", prefix="drop", norm=True, pooled=False)
    with pytest.raises(TypeError, match="prefix"):
        tokenizers.load(f"transformers:{tmp_path}")


def test_nested_tokenizers_keep_the_laws():
    """Tiles over a timm tower, and a pair of two libraries."""
    swin = timm_kind.TimmConfig(
        name="convnext_atto",
        model_args={"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
        level=-2,
        prefix="drop",
        norm=False,
        pooled=False,
        pixel_spec=spec(64, 96),
    )
    check_laws(TilesTokenizer(timm_kind.build(swin), max_tiles=4, thumbnail=True), (70, 200))
    high, low = timm_kind.build(swin), build(tiny("siglip_vision_model", (32, 48)))
    check_laws(PairedTokenizer(high, low, low_from="high", high_neck=AverageNeck(high.dim)))


@pytest.mark.parametrize("model_type", ["siglip_vision_model", "sam_vision_model"])
def test_bfloat16_tokenizer_tells_and_gives_the_same_shape(model_type):
    """The count is that of the tokenizer as it stands, in its own dtype."""
    tokenizer = build(tiny(model_type, (96, 64))).to(torch.bfloat16)
    tokens = tokenizer(torch.zeros(1, 3, 96, 64, dtype=torch.bfloat16))
    assert tokens.tokens.dtype == torch.bfloat16
    assert tokenizer.shapes_for((5, 5)) == (tokens.shape,)


def test_counting_leaves_the_tokenizer_as_it_was():
    tokenizer = build(tiny("siglip_vision_model", (64, 96))).train()
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    tokenizer.tokens_for((30, 30))
    after = tokenizer.state_dict()
    assert tokenizer.training
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    json.dumps(tokenizers.config_to_dict(tokenizer))


def test_named_parts_join_loose_parameters_and_name_what_is_left_out():
    root = torch.nn.Module()
    root.token = torch.nn.Parameter(torch.zeros(2))
    root.embed = torch.nn.Linear(2, 2)
    root.blocks = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    order = {"embed": ("token", "embed"), "blocks": ("blocks",), "norm": ("absent",)}
    parts = named_parts(root, order)
    assert list(parts) == ["embed", "blocks.0", "blocks.2"]
    assert isinstance(parts["embed"], LooseParts)
    assert parts["blocks.2"] is root.blocks[2]
    with pytest.raises(ValueError, match=r"\['token', 'embed.weight', 'embed.bias'\]"):
        named_parts(root, {"blocks": ("blocks",)})
