"""The default recipe on its real inputs, in a few steps."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import vlm
from vlm import assets

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.demo, pytest.mark.slow]


@pytest.fixture(scope="module")
def demo():
    try:
        for name in assets.GROUPS["demo"]:
            assets.fetch(name)
    except assets.FetchError as error:
        pytest.skip(f"the demo weights cannot be had: {error}")


@pytest.fixture
def threads():
    """Recipes share out the cores; the next test gets back what it had."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def stage1(*arguments):
    return subprocess.run(
        [sys.executable, "recipes/stage1_adaptor.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_demo_backbone_knows_a_cat(demo):
    """The packaged weights, through our preprocessing, classify a photograph as ImageNet does. In
    fp64: layouts of memory differ, and with them fp32's last digits."""
    skimage = pytest.importorskip("skimage")
    import timm
    import torch
    from safetensors.torch import load_file

    from vlm.systems.pretrained import load_vision

    tokenizer = load_vision("demo", (192, 192))
    weights = load_file(assets.fetch("efficientnet-lite0") / "model.safetensors")
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(weights, strict=False)
    (pixels,) = tokenizer.pixel_spec(Image.fromarray(skimage.data.chelsea()))
    pixels = pixels[None].double()
    with torch.no_grad():
        probabilities = whole.double()(pixels).softmax(-1)[0]
        tokens = tokenizer.double()(pixels)
        features = whole.forward_features(pixels)
    assert probabilities[281:286].sum() > 0.7  # tabby, tiger cat, Persian, Siamese, Egyptian
    expected = features.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens.tokens, expected, atol=1e-10, rtol=1e-8)
    assert tokens.grid_hw == (6, 6)
    assert load_vision("demo").tokens_for((128, 128)) == 16


def test_demo_language_model_answers(demo):
    model = vlm.build()
    assert model.answer([[]], ["What is the capital of France?"]) == [
        "The capital of France is Paris."
    ]


def test_stage1_trains_reports_and_captions(demo, tmp_path):
    out = tmp_path / "run"
    done = stage1("--out", out, "--steps", 2, "--batch", 2, "--held-out-rows", 4, "--workers", 0,
                  "--threads", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "image gain on sample:transfer" in done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["step"] == 2
    assert result["captions"] == 4
    for name in ("loss.png", "samples.png"):
        assert Image.open(out / name).size[0] > 300
    settings = json.loads((out / "settings.json").read_text())
    assert settings["steps"] == 2
    assert "torch" in json.loads((out / "versions.json").read_text())
    assert list((out / "tensorboard").iterdir())
    image = next((out / "images").iterdir())
    assert len(vlm.load(out, device="cpu").caption([image], max_new_tokens=4)) == 1
    again = stage1("--out", out, "--steps", 2, "--batch", 2)
    assert again.returncode == 1
    assert again.stderr.count("error: ") == 1
    assert "already holds a run" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "gone.jsonl"], "gone.jsonl"),
        (
            ["--vision", "siglip"],
            "vision 'siglip': expected 'demo', the folder of a model or run, or 'kind:id'",
        ),
        (["--vision", "transformers:no/such"], "no/such"),
        (["--text", "no/such"], "text 'no/such'"),
        (
            ["--batch", "6", "--micro-batch", "4"],
            "share of 6 examples is no whole number",
        ),
        (["--image-px", "224", "224"], "pixel shuffle by 2 does not divide the grid 7 x 7"),
        (["--save-every", "-1"], "save_every must be at least 0, found -1"),
        (["--threads", "0"], "threads must be at least 1, found 0"),
        (["--clip", "0"], "clip must be above 0 (inf clips nothing), found 0.0"),
        (["--weight-decay", "nan"], "weight_decay must be at least 0, found nan"),
        (["--warmup-ratio", "2"], "warmup_ratio is a share of the steps, 0 to 1, found 2.0"),
    ],
)
def test_bad_settings_end_with_one_line_before_training(
    demo, tmp_path, threads, monkeypatch, capsys, arguments, message
):
    path = str(ROOT / "recipes/stage1_adaptor.py")
    monkeypatch.setattr(sys, "argv", [path, "--out", f"{tmp_path}/run", "--steps", "2", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert ended.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "run").exists()


def test_processes_share_the_cores(threads, monkeypatch):
    """`accelerate launch` sets OMP_NUM_THREADS=1 on CPUs; a lone process still uses all cores."""
    import torch
    from accelerate import Accelerator

    from vlm.training.runs.launch import share_cores

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for neighbours, asked, expected in (("1", None, 6), ("4", None, 1), ("2", 5, 5)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", neighbours)
        share_cores(Accelerator(cpu=True), asked)
        assert torch.get_num_threads() == expected


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.stem)
def test_every_recipe_says_what_its_settings_mean(path, monkeypatch, capsys):
    settings = runpy.run_path(str(path))["Settings"]
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    assert not ended.value.code
    for field in dataclasses.fields(settings):
        assert f"--{field.name.replace('_', '-')}" in said
