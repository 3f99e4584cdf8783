"""Tables of `datasets`: images stay encoded, columns and splits are named."""

from __future__ import annotations

import io
import json
import pickle

import pytest
from PIL import Image

from vlm.data.example import BadRow
from vlm.data.sources import (
    BadSource,
    RowFormat,
    TableSource,
    open_source,
)


def png(colour: int = 0) -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", (5, 3), (colour, 0, 0)).save(packed, "PNG")
    return packed.getvalue()


def image_table(captions=("x", "y")):
    from datasets import Dataset, Features, Image, Value

    rows = {"image": [{"bytes": b"not an image", "path": None}] * len(captions)}
    features = Features({"image": Image(), "caption": Value("string"), "n": Value("int64")})
    return Dataset.from_dict(
        rows | {"caption": list(captions), "n": list(range(len(captions)))}, features=features
    )


def test_table_gives_images_undecoded():
    source = TableSource(image_table(), "t", RowFormat(prompt="?"))
    assert source[1].images[0].data == b"not an image"
    assert (source[1].answer, source[1].name) == ("y", "t[1]")
    assert pickle.loads(pickle.dumps(source))[0].answer == "x"


def test_table_of_messages_with_lists_of_images_is_read():
    from datasets import Dataset, Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part)}
    features = Features({"images": List(Image()), "messages": List(message)})
    content = [{"type": "image", "text": None}, {"type": "text", "text": "<image>?"}]
    answer = [{"type": "text", "text": "yes"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    images = [{"bytes": b"1", "path": None}]
    table = Dataset.from_dict({"images": [images], "messages": [messages]}, features=features)
    example = TableSource(table, "t")[0]
    assert example.turns[0].content == (None, "<image>?")
    assert example.images[0].data == b"1"


def test_table_column_that_is_not_there_is_named():
    with pytest.raises(BadSource, match=r"column 'alt', found \['caption', 'image', 'n'\]"):
        TableSource(image_table(), "t", RowFormat(caption="alt"))
    with pytest.raises(BadSource, match="expected one of the columns conversations"):
        TableSource(image_table().remove_columns("caption"), "t")


def test_table_path_needs_a_root(tmp_path):
    from datasets import Dataset

    (tmp_path / "a.png").write_bytes(png())
    table = Dataset.from_dict({"image": ["a.png", "../b.png"], "text": ["x", "y"]})
    with pytest.raises(BadRow, match=r"t\[0\]: .*found the path 'a.png'"):
        TableSource(table, "t")[0]
    source = TableSource(table, "t", image_root=tmp_path)
    assert source[0].images[0].data == tmp_path / "a.png"
    with pytest.raises(BadRow, match="which leaves it"):
        source[1]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of `datasets` in a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
def test_folder_saved_by_datasets_opens(tmp_path):
    from datasets import DatasetDict

    image_table().save_to_disk(str(tmp_path / "one"))
    assert open_source(str(tmp_path / "one"))[1].answer == "y"
    DatasetDict(train=image_table(), val=image_table(("z",))).save_to_disk(str(tmp_path / "two"))
    assert open_source(f"{tmp_path}/two:val")[0].answer == "z"
    with pytest.raises(BadSource, match=r"splits \['train', 'val'\], found None"):
        open_source(f"{tmp_path}/two")
    image_table().to_parquet(tmp_path / "t.parquet")
    assert open_source(f"{tmp_path}/t.parquet?image=image")[1].answer == "y"


@pytest.mark.usefixtures("cache")
def test_folder_of_images_opens_with_its_classes_as_captions(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        (tmp_path / "pets" / kind / "1.png").write_bytes(png())
    source = open_source(f"{tmp_path}/pets/")
    assert [source[row].answer for row in range(2)] == ["cat", "dog"]
    assert source[0].images[0].data == tmp_path / "pets/cat/1.png"


@pytest.mark.usefixtures("cache")
def test_folder_of_images_alone_says_what_a_source_needs(tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes(png())
    with pytest.raises(BadSource, match=r"beside images, found 2 images alone; .*metadata\.jsonl"):
        open_source(str(folder))
    rows = [{"file_name": name, "caption": "a cat"} for name in ("1.png", "2.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [open_source(str(folder))[row].answer for row in range(2)] == ["a cat"] * 2


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach the Hub"), OSError("offline")])
def test_hub_out_of_reach_names_the_set(monkeypatch, error):
    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(BadSource, match=f"'nobody/nothing' from the hub .*{error}"):
        open_source("datasets:nobody/nothing:train")


def test_hub_set_gets_its_split_and_configuration(monkeypatch):
    calls = []

    def load(*arguments, **_):
        calls.append(arguments)
        return {"train": image_table()}

    monkeypatch.setattr("datasets.load_dataset", load)
    source = open_source("datasets:org/name:train?config=en")
    assert (calls, source.row_name(0)) == ([("org/name", "en")], "org/name:train[0]")
