"""What is said of a model that is none: a mistyped path, an unknown type, a hub id."""

import json

import huggingface_hub
import pytest

import vlm
from vlm.systems import published_caption_prompt


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that must not be asked."""

    def asked(*_, **__):
        pytest.fail("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)


@pytest.mark.parametrize(
    ("found", "nearest"),
    [("lava", "llava"), ("paligema", "paligemma"), ("idefics_3", "idefics3")],
)
def test_unknown_model_type_is_refused_with_the_nearest(tmp_path, found, nearest):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": found}))
    with pytest.raises(ValueError, match=f"'{found}' is not one of .*; the nearest is '{nearest}'"):
        vlm.load(tmp_path)


def test_model_type_that_is_like_none_is_refused_without_a_nearest(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wav2vec"}))
    with pytest.raises(ValueError, match=r"'wav2vec' is not one of .*`vlm systems`\)$"):
        vlm.load(tmp_path)


@pytest.mark.parametrize("load", [vlm.load, published_caption_prompt])
def test_mistyped_path_is_refused_without_the_hub(tmp_path, monkeypatch, no_hub, load):
    (tmp_path / "runs/stage1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source in ("runs/stge1", tmp_path / "runs/stge1"):
        with pytest.raises(OSError, match=r"stge1: no such folder .*and no hub id") as caught:
            load(source)
        assert "runs is a folder here; the nearest is" in str(caught.value)
        assert str(caught.value).endswith("runs/stage1")
    with pytest.raises(OSError, match=r"^clip\.pt: no such .*since it ends in \.pt$"):
        load("clip.pt")


@pytest.mark.parametrize("source", ["/no/such", "../no", "./no", "~/no", "a/b/c", "runs/", "a b"])
def test_path_that_can_be_no_hub_id_is_refused_at_once(tmp_path, monkeypatch, source):
    """By the hub's client itself, which asks for nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", pytest.fail)
    with pytest.raises(OSError, match="no such folder"):
        vlm.load(source)


def test_pickled_weights_are_fetched_where_the_hub_has_no_others(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    asked = []

    def snapshot(id, ignore_patterns):
        asked.append("*.bin" in ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda id, name: tmp_path / name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match="cannot read them"):
        vlm.load("somebody/llava")
    assert asked == [True, False]
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="cannot read them"):
        vlm.load("somebody/llava")
    assert asked == [True, False, True]
