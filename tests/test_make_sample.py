"""The packaged sample is what its README says, and its maker makes it again."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from PIL import Image

from vlm.data.make_sample import is_val, make_sample, pack_image
from vlm.data.sources import open_source
from vlm.data.sources.spec import SAMPLE_FOLDER

COUNTS = {"train": 1720, "val": 186, "transfer": 400}


def keys_of(split: str) -> list[str]:
    rows = (SAMPLE_FOLDER / f"{split}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(row)["image"].split(".")[0] for row in rows]


@pytest.mark.parametrize("split", COUNTS)
def test_sample_split_has_its_rows_and_every_image_decodes(split):
    source = open_source(f"sample:{split}", prompt="Name it.")
    assert len(source) == COUNTS[split] == len(set(keys_of(split)))
    for row in range(len(source)):
        example = source[row]
        with Image.open(io.BytesIO(example.images[0].data)) as image:
            image.load()
            assert (image.size, image.mode) == ((64, 64), "RGBA")
        assert example.answer
    assert example.turns[0].content == (None, "Name it.")


def test_sample_val_emoji_are_not_in_train_and_transfer_emoji_are():
    train, val, transfer = (set(keys_of(split)) for split in COUNTS)
    assert not val & train
    assert transfer < train
    assert all(map(is_val, val))
    assert not any(map(is_val, train))


def test_sample_is_small_and_carries_its_licences():
    assert sum(path.stat().st_size for path in SAMPLE_FOLDER.iterdir()) < 8_000_000
    readme = (SAMPLE_FOLDER / "README.md").read_text("utf-8")
    for owner in ("Noto Emoji", "Twemoji", "Apache License 2.0", "Attribution 4.0", "Unicode"):
        assert owner in readme


def test_sample_tar_and_rows_are_in_one_order():
    for split in COUNTS:
        with tarfile.open(SAMPLE_FOLDER / f"{split}.tar") as tar:
            assert [name.split(".")[0] for name in tar.getnames()] == keys_of(split)


def write_shard(path, keys):
    with tarfile.open(path, "w") as tar:
        for number, key in enumerate(keys):
            image = Image.new("RGBA", (8, 6), (number, 20, 30, number % 256))
            packed = io.BytesIO()
            image.save(packed, "PNG")
            row = {"caption": key, "keywords": ["k"], "group": "g", "subgroup": "s"}
            row |= {"source": "google", "captions": {"fr": "x"}}
            for name, data in (
                (f"{key}.png", packed.getvalue()),
                (f"{key}.json", json.dumps(row).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def some_keys(val: bool, count: int) -> list[str]:
    keys = (f"{number:04x}" for number in range(10_000))
    return [key for key in keys if is_val(key) == val][:count]


def test_make_sample_gives_the_same_bytes_twice(tmp_path):
    write_shard(tmp_path / "google-train-00000.tar", some_keys(False, 5))
    write_shard(tmp_path / "twitter-val-00000.tar", some_keys(True, 3))
    write_shard(tmp_path / "twitter-train-00000.tar", some_keys(False, 5))
    sizes = make_sample(tmp_path, tmp_path / "a", transfer_count=2)
    assert make_sample(tmp_path, tmp_path / "b", transfer_count=2) == sizes
    for name in sizes:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    rows = (tmp_path / "a" / "transfer.jsonl").read_text().splitlines()
    assert [json.loads(row)["caption"] for row in rows] == some_keys(False, 2)


def test_make_sample_refuses_a_key_of_the_other_split(tmp_path):
    write_shard(tmp_path / "google-train-00000.tar", some_keys(True, 1))
    with pytest.raises(ValueError, match="belongs to the other split"):
        make_sample(tmp_path, tmp_path / "out")


def test_pack_image_keeps_colours_under_full_transparency():
    image = Image.effect_noise((16, 12), 80).convert("RGBA")
    image.putalpha(0)
    packed = io.BytesIO()
    image.save(packed, "PNG")
    data, _ = pack_image(packed.getvalue(), "noise")
    assert Image.open(io.BytesIO(data)).convert("RGBA").tobytes() == image.tobytes()
