"""Files of weights that other tools write: opened as the tool's own model, or refused in a line."""

import argparse
import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vlm
from tests.reference.tiny_open_clip import CLIP, changed
from tests.tiny import image as one_image
from vlm.found_weights import WeightsError, read_file, without_prefix
from vlm.systems import pretrained

NAME = "tiny-clip-for-files"
CFG = changed(CLIP, text={"vocab_size": 49408})
IMAGES = [one_image(0, (71, 40)), one_image(1, (33, 90))]
TEXTS = ["a photo of a CAT", "two dogs"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A tiny model that open_clip built under a name, and its preprocessing."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{NAME}.json").write_text(json.dumps(CFG))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(
        NAME, image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.2, 0.3)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval(), transform


def params(**more):
    """params.txt as open_clip's training writes it: one setting a line."""
    values = {"force_image_size": None, "force_quick_gelu": False, "image_mean": [0.5, 0.4, 0.3],
              "image_std": [0.2, 0.2, 0.3], "lr": 0.0005, "model": NAME, "name": "2026-run",
              "pretrained": "", "siglip": False}  # fmt: skip
    return "".join(f"{key}: {value}\n" for key, value in (values | more).items())


def trained(model, **more):
    """A checkpoint as open_clip's training writes it, from a model wrapped by DDP."""
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    return {"epoch": 3, "name": "2026-run", "state_dict": state,
            "optimizer": optimizer.state_dict(), "scaler": {}} | more  # fmt: skip


def check_same(ours, theirs):
    """One image's and one text's vectors of ours are those of the tool's own model."""
    model, transform = theirs
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=12)
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(p) for p in IMAGES]), normalize=True)
        texts = model.encode_text(tokenizer(TEXTS), normalize=True)
    assert torch.allclose(ours.embed_images(IMAGES), images, atol=1e-4)
    assert torch.allclose(ours.embed_texts(TEXTS), texts, atol=1e-4)
    assert (images[0] - images[1]).abs().max() > 1e-2  # else nothing is told


@pytest.mark.filterwarnings("ignore:.*names are read without")
def test_checkpoint_of_open_clips_training_opens_with_its_params(theirs, tmp_path):
    folder = tmp_path / "logs" / "2026-run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "params.txt").write_text(params())
    torch.save(trained(theirs[0]), folder / "checkpoints" / "epoch_3.pt")
    older = {key: torch.zeros_like(t) for key, t in theirs[0].state_dict().items()}
    torch.save({"state_dict": older}, folder / "checkpoints" / "epoch_2.pt")
    check_same(vlm.load(folder / "checkpoints" / "epoch_3.pt"), theirs)
    check_same(vlm.load(folder), theirs)  # its newest
    vision = pretrained.load_vision(str(folder / "checkpoints" / "epoch_3.pt"))
    own = vlm.load(folder).module.tokenizer
    pixels = torch.rand(1, 3, 24, 24)
    assert torch.equal(vision(pixels).tokens, own(pixels).tokens)


def test_checkpoint_without_its_params_says_what_to_do(theirs, tmp_path):
    path = tmp_path / "epoch_3.pt"
    torch.save(trained(theirs[0]), path)
    with pytest.raises(WeightsError, match=r"open_clip's training, and no params.txt.*\?model="):
        vlm.load(path)
    with pytest.raises(ValueError, match="'ViT-Z' is no architecture of open_clip's"):
        vlm.load(f"{path}?model=ViT-Z")
    with pytest.raises(ValueError, match=r"expected \?model=NAME, \?state=KEY or both"):
        vlm.load(f"{path}?arch=ViT-B-32")
    with pytest.warns(UserWarning, match="without the prefix 'module.'"):
        model = vlm.load(f"{path}?model={NAME}")
    assert model.processor.pixel_spec.mean == open_clip.OPENAI_DATASET_MEAN
    spec = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}
    config = {"model_cfg": CFG, "preprocess_cfg": spec}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "other.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="without the prefix"):
        check_same(vlm.load(path), theirs)


@pytest.mark.filterwarnings("ignore:.*names are read without")
def test_averaged_weights_are_taken_where_they_are_asked_for(theirs, tmp_path):
    model, _ = theirs
    other = {key: t * 0.5 for key, t in model.state_dict().items()}
    path = tmp_path / "epoch_3.pt"
    (tmp_path / "params.txt").write_text(params())
    averaged = {f"module.{key}": t for key, t in model.state_dict().items()}
    torch.save(trained(model) | {"state_dict": other, "state_dict_ema": averaged}, path)
    with pytest.warns(UserWarning, match=r"averaged ones are there too.*\?state=state_dict_ema"):
        plain = vlm.load(path)
    assert torch.equal(plain.module.log_scale, other["logit_scale"])
    check_same(vlm.load(f"{path}?state=state_dict_ema"), theirs)
    with pytest.raises(WeightsError, match="expected weights under 'swa', found"):
        vlm.load(f"{path}?state=swa")


def test_training_from_openai_asks_which_gelu(theirs, tmp_path):
    (tmp_path / "params.txt").write_text(params(model="ViT-B-32", pretrained="openai"))
    torch.save(trained(theirs[0]), tmp_path / "epoch_1.pt")
    with pytest.raises(ValueError, match=r"open_clip before 3.0 took QuickGELU.*-quickgelu or"):
        vlm.load(tmp_path / "epoch_1.pt")


class Lightning(nn.Module):
    """What a module of Lightning's is to its checkpoint: a model beside a metric's weights."""

    def __init__(self, model):
        super().__init__()
        self.net = model
        self.metric = nn.Linear(1, 1)


@pytest.mark.parametrize("parameters", [{"lr": 1e-3}, argparse.Namespace(lr=1e-3)])
def test_lightnings_checkpoint_opens_without_its_prefix(theirs, tmp_path, parameters):
    path = tmp_path / "last.ckpt"
    torch.save(
        {
            "epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.5.0",
            "state_dict": Lightning(theirs[0]).state_dict(), "hyper_parameters": parameters,
            "optimizer_states": [], "callbacks": {}, "loops": {},
        },
        path,
    )  # fmt: skip
    (tmp_path / "params.txt").write_text(params())
    if isinstance(parameters, argparse.Namespace):
        with pytest.raises(WeightsError, match=r"objects \(argparse.Namespace\).*torch.save"):
            vlm.load(path)
        return
    with pytest.warns(UserWarning, match=r"without the prefix 'net.'; 2 others skipped.*metric"):
        check_same(vlm.load(path), theirs)


@pytest.mark.parametrize("prefix", ["model.", "module.", "base_model.model.", "clip."])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_folder_of_transformers_opens_with_a_prefix(tmp_path, prefix, suffix):
    from tests.reference import tiny_clip

    tiny_clip.write_folder(tmp_path)
    before = vlm.load(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = {f"{prefix}{key}": t for key, t in load_file(weights).items()}
    weights.unlink()
    path = tmp_path / f"model{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    for source in (tmp_path, path):
        with pytest.warns(UserWarning, match=f"without the prefix '{prefix}'"):
            model = vlm.load(source)
        assert torch.equal(model.embed_images(IMAGES), before.embed_images(IMAGES))
    torch.save({}, tmp_path / "another.pt")
    if suffix == ".safetensors":  # which is read whatever lies beside it
        return
    with pytest.raises(ValueError, match="expected the only weights beside config"):
        vlm.load(path)


@pytest.fixture(scope="module")
def openai():
    """OpenAI's widths, one layer deep, in its precisions."""
    cfg = {
        "embed_dim": 512, "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 768, "patch_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 512, "heads": 8,
                     "layers": 1},
    }  # fmt: skip
    torch.manual_seed(0)
    model = open_clip.CLIP(**cfg).eval()
    return model, open_clip.image_transform(32, is_train=False)


def test_openais_state_opens_by_its_shapes(openai, tmp_path):
    torch.save(openai[0].state_dict(), tmp_path / "ViT.pth")
    with pytest.warns(UserWarning, match="opened as OpenAI's CLIP, with QuickGELU"):
        check_same(vlm.load(tmp_path / "ViT.pth"), openai)


def test_openais_archive_opens_without_being_run(openai, tmp_path, monkeypatch, recwarn):
    model, _ = openai

    class Pair(nn.Module):
        def forward(self, image, text):
            return model.encode_image(image), model.encode_text(text)

    pair = Pair()
    for name, child in model.named_children():
        setattr(pair, name, child)
    for name in ("positional_embedding", "text_projection", "logit_scale"):
        setattr(pair, name, getattr(model, name))
    pair.register_buffer("input_resolution", torch.tensor(32))
    pair.register_buffer("attn_mask", model.attn_mask)
    inputs = torch.rand(1, 3, 32, 32), torch.zeros(1, 12, dtype=torch.long)
    with torch.no_grad():
        torch.jit.trace(pair, inputs, check_trace=False).save(str(tmp_path / "ViT-B-32.pt"))
    recwarn.clear()
    monkeypatch.setattr(torch.jit, "load", None)
    check_same(vlm.load(tmp_path / "ViT-B-32.pt"), openai)
    assert not [w for w in recwarn if "GELU" in str(w.message)]


class Evil:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(2, 2), r"holds Python objects .*torch\.nn.*weights_only=False"),
        ({"state_dict": {"a": torch.ones(1)}, "x": Evil()}, "holds Python objects"),
        ({"epoch": 3}, r"expected weights by name, found \['epoch'\]"),
        ({"some.weight": torch.ones(2)}, r"without a configuration, named \['some.weight'\]"),
        ({"student.a": torch.ones(2), "state": 1}, "without a configuration"),
        ({"one": {"a": torch.ones(1)}, "two": {"a": torch.ones(1)}}, "several sets of weights"),
    ],
)
def test_file_that_is_no_known_model_is_refused_in_one_line(tmp_path, content, message, capsys):
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        vlm.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert "ran" not in capsys.readouterr().out


def test_broken_file_is_named(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(WeightsError, match=r"model.ckpt: broken or cut"):
        read_file(path)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("model.ckpt", "model.safetensors"):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(WeightsError, match=rf"{name}: .*pointer of Git LFS; `git lfs pull`"):
            read_file(tmp_path / name)
        (tmp_path / name).write_text("<!doctype html>\n<html>")
        with pytest.raises(WeightsError, match=rf"{name}: expected weights, found text: '<!doct"):
            read_file(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes.txt: expected weights in \.safetensors"):
        vlm.load(tmp_path / "notes.txt")


def test_prefix_is_ambiguous_where_two_models_lie_in_a_file():
    state = {f"{who}.{key}": torch.ones(1) for who in ("student", "teacher") for key in "ab"}
    with pytest.raises(WeightsError, match=r"2 models.*state=student or \?state=teacher"):
        without_prefix(state, "ab".__contains__, "x.pt")
    state = {f"{who}{key}": torch.ones(1) for who in ("net.", "ema.") for key in "ab"}
    with pytest.warns(UserWarning, match="without the prefix 'net.'; 2 others skipped"):
        assert set(without_prefix(state, "ab".__contains__, "x.pt")) == {"a", "b"}
