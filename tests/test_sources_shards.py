"""Tar shards: samples by byte position, and a shard that is not whole is refused."""

from __future__ import annotations

import json
import pickle
import tarfile

import numpy as np
import pytest

from tests.rows import png, sample, write_tar
from vlm.data.example import BadRow
from vlm.data.sources import (
    BadSource,
    RowFormat,
    RowsSource,
    ShardSource,
    open_source,
    shards,
)
from vlm.data.sources.tar import TarImages, walk_members
from vlm.pixels.image_ref import ImageRef

ANSWER = {"from": "gpt", "value": "a cat"}


def asked(value: str) -> list[dict]:
    return [{"from": "human", "value": value}, ANSWER]


def test_index_of_many_samples_is_kept_until_a_shard_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "KEPT_FROM", 2)
    path = tmp_path / "s-0.tar"
    write_tar(path, sample("é", "one") | sample("y", "two"))
    walked = ShardSource(path)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "walk_members", None)
        kept = ShardSource(path)
    assert [kept[row] for row in range(2)] == [walked[row] for row in range(2)]
    assert [kept.row_name(row) for row in range(2)] == ["s-0.tar:é", "s-0.tar:y"]
    write_tar(path, sample("z", "three"))
    assert ShardSource(path).row_name(0) == "s-0.tar:z"
    assert len(list((tmp_path / "cache/shards").glob("*"))) == 1  # one sample is soon walked


def test_shards_give_images_with_captions(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"s-{shard}.tar", sample("x", f"{shard}") | sample("d/y", "yv"))
    source = ShardSource(tmp_path / "s-{0..1}.tar", RowFormat(prompt="?"))
    names = [source.row_name(row) for row in range(len(source))]
    assert names == ["s-0.tar:x", "s-0.tar:d/y", "s-1.tar:x", "s-1.tar:d/y"]
    example = source[2]
    assert (example.answer, example.turns[0].content) == ("1", (None, "?"))
    assert example.images == (ImageRef(png(), "s-1.tar:x.png"),)
    assert len(ShardSource([tmp_path / "s-0.tar"])) == 2
    assert pickle.loads(pickle.dumps(ShardSource(f"{tmp_path}/*.tar")))[3].name == "s-1.tar:d/y"


def test_shard_captions_come_from_json_or_else_from_text(tmp_path):
    write_tar(
        tmp_path / "s.tar",
        {"a.jpg": b"1", "a.txt": b" a dog\n", "b.JPEG": b"2", "b.json": b'{"caption": null}'}
        | {"b.txt": "é".encode(), "c.webp": b"3", "c.json": b'{"alt": "c"}', "c.txt": b"text"},
    )
    source = ShardSource(tmp_path / "s.tar")
    assert [source[row].answer for row in range(3)] == ["a dog", "é", "text"]
    assert ShardSource(tmp_path / "s.tar", RowFormat(caption="alt"))[2].answer == "c"


def test_shard_rows_may_be_conversations_with_many_images(tmp_path):
    row = {"image": "elsewhere.jpg", "conversations": asked("<image> or <image>?")}
    members = {"k.0.png": b"0", "k.1.png": b"1", "k.json": json.dumps(row).encode()}
    members |= {"t.json": json.dumps({"conversations": asked("Hello")}).encode()}
    write_tar(tmp_path / "s.tar", members)
    source = ShardSource(tmp_path / "s.tar")
    assert [image.data for image in source[0].images] == [b"0", b"1"]
    assert source[0].images[1].name == "s.tar:k.1.png"
    assert source[1].images == ()
    with pytest.raises(BadRow, match="found 2 marks and 1 images"):
        ShardSource(tmp_path / "s.tar", RowFormat(image="1.png"))[0]


def test_shard_member_without_its_partner_is_named(tmp_path):
    members = sample("a") | {"b.png": png(), "c.json": b'{"caption": "c"}', "d.cls": b"1"}
    write_tar(tmp_path / "s.tar", members | {"e.txt": b"e", "README": b"no sample"})
    source = ShardSource(tmp_path / "s.tar")
    assert len(source) == 5
    for row, found in (
        (1, "s.tar:b: expected b.json or .txt beside it"),
        (2, "s.tar:c: expected one image for the caption, found 0"),
        (3, "s.tar:d: .*found 0 images alone"),
        (4, "s.tar:e: expected one image for the text, found 0"),
    ):
        with pytest.raises(BadRow, match=found):
            source[row]


def test_names_with_dots_are_cut_at_the_first_and_merging_samples_are_told(tmp_path, monkeypatch):
    """WebDataset's rule."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "KEPT_FROM", 1)
    names = ("d.1/one.jpg", "d.1/one.txt", "photo.1.JPG", "photo.1.txt", "photo.2.jpg",
             "photo.2.txt", "two.left.png", "two.right.png", "two.json", "v.0.9.png",
             "v.0.9.txt")  # fmt: skip
    write_tar(tmp_path / "s.tar", dict.fromkeys(names, b"x"))
    for _ in range(2):  # walked, then from the kept index
        source = ShardSource(tmp_path / "s.tar")
        names = [source.row_name(row) for row in range(len(source))]
        assert names == ["s.tar:d.1/one", "s.tar:photo", "s.tar:two", "s.tar:v"]
        (fault,) = source.faults
        assert str(fault) == (
            "1 samples with members that differ after the first dot (they are one sample): "
            "s.tar:photo (1.jpg, 1.txt, 2.jpg, 2.txt)"
        )
        assert {key: held.count for key, held in source.unread.found.items()} == {".*.txt": 3}
        assert source[0].answer == "x"
        with pytest.raises(BadRow, match="found 2 images alone"):
            source[1]


def test_samples_with_two_members_of_one_extension_are_refused_together(tmp_path):
    members = {"a.jpg": b"1", "a.JPG": b"2", "b.x.png": b"1", "b.X.png": b"2", "c.jpg": b""}
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(BadSource, match=r"found 2 more: \S*s.tar: a.JPG, \S*s.tar: b.X.png"):
        ShardSource(tmp_path / "s.tar")


def test_shard_with_scattered_samples_is_refused(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.png": b"", "b.png": b"", "a.json": b"{}"})
    with pytest.raises(BadSource, match=r"s.tar: .*a.json away from the others of a"):
        ShardSource(tmp_path / "s.tar")


def test_shard_cut_anywhere_is_refused_when_opened(tmp_path):
    members = {}
    for key in "abc":
        members |= sample(key)
    write_tar(tmp_path / "whole.tar", members, format=tarfile.USTAR_FORMAT)
    data = (tmp_path / "whole.tar").read_bytes()
    end = max(np.flatnonzero(np.frombuffer(data, np.uint8))) // 512 * 512 + 512
    for cut in (1, 300, 512, 600, 1024, 1025, end // 2, end - 512, end):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        with pytest.raises(BadSource, match=r"cut\.tar: cut short: .*last whole member: "):
            ShardSource(tmp_path / "cut.tar")
    with pytest.raises(BadSource, match=f"byte {end}, .*last whole member: c.json"):
        ShardSource(tmp_path / "cut.tar")


def test_shard_that_is_no_plain_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(BadSource, match="gzip files must be unpacked"):
        ShardSource(tmp_path / "s.tar")
    (tmp_path / "e.tar").write_bytes(b"")
    for pattern, found in (
        ("e.tar", "an empty file"),
        ("none-{0..1}.tar", "found none at .*none-0.tar"),
        ("*.zip", "found none"),
    ):
        with pytest.raises(BadSource, match=found):
            ShardSource(tmp_path / pattern)
    with pytest.raises(BadSource, match="found an address"):
        ShardSource("https://host/s.tar")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_walk_reads_what_tarfile_reads(tmp_path, format):
    members = {"x" * 180 + "/é.png": b"1" * 700, "b.txt": b"", "c" * 101: b"3", "d.json": b"{}"}
    write_tar(tmp_path / "s.tar", members, format=format)
    with tarfile.open(tmp_path / "s.tar", "a", format=format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "y" * 150
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("last.txt"))
    data = (tmp_path / "s.tar").read_bytes()
    found = {m.name: data[m.offset : m.offset + m.size] for m in walk_members(tmp_path / "s.tar")}
    assert found == members | {"last.txt": b""}


def test_rows_find_their_images_in_a_tar(tmp_path):
    write_tar(tmp_path / "images.tar", {"./a.png": b"A", "d/b.png": b"B"})
    rows = [{"image": name, "caption": "x"} for name in ("d/b.png", "a.png", "c.png", "../a.png")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = RowsSource(tmp_path / "rows.jsonl", image_root=tmp_path / "images.tar")
    assert [source[row].images[0].data for row in range(2)] == [b"B", b"A"]
    for row in (2, 3):
        with pytest.raises(BadRow, match=r"is not in .*images.tar"):
            source[row]
    write_tar(tmp_path / "twice.tar", {"a.png": b"1", "./a.png": b"2"})
    with pytest.raises(BadSource, match="found a name twice"):
        TarImages(tmp_path / "twice.tar")


def test_open_source_takes_question_marks_as_wildcards(tmp_path):
    write_tar(tmp_path / "s-10.tar", sample("a"))
    assert len(open_source(f"{tmp_path}/s-??.tar")) == 1
    assert open_source(f"{tmp_path}/s-??.tar?prompt=Name it.")[0].turns[0].text == "Name it."
