"""CLIP_benchmark's folders: written by webdataset, as its converter does, and read as they are."""

import pytest
import webdataset

from tests.rows import CAPTIONS, NAMES, classification_folder, packed, retrieval_folder, write
from vlm.data.example import BadRow
from vlm.data.sources import BadSource, ClipBenchmark, open_source
from vlm.pixels import open_image


def test_each_caption_is_a_row_with_its_image(tmp_path):
    source = open_source(f"clip_benchmark:{retrieval_folder(tmp_path)}:test")
    assert len(source) == 6
    assert source.classes is source.templates is None
    rows = [source[row] for row in range(6)]
    assert [row.answer for row in rows] == [text for said in CAPTIONS for text in said]
    assert [row.name for row in rows] == [
        "0.tar:s0000000:1", "0.tar:s0000000:2", "0.tar:s0000001:1",
        "1.tar:s0000002:1", "1.tar:s0000002:2", "1.tar:s0000002:3",
    ]  # fmt: skip
    assert [row.images[0].data for row in rows] == [packed(i, "jpeg") for i in (0, 0, 1, 2, 2, 2)]
    assert [row.name for row in rows] == [source.row_name(row) for row in range(6)]


def test_rows_are_those_that_clip_benchmark_reads(tmp_path):
    """Its own pipeline, `build_wds_dataset`."""
    retrieval_folder(tmp_path / "r")
    pipeline = webdataset.WebDataset(f"{tmp_path}/r/test/{{0..1}}.tar", shardshuffle=False)
    theirs = pipeline.decode().to_tuple(["webp", "png", "jpg", "jpeg"], "txt")
    theirs = [line for _, text in theirs for line in text.splitlines()]
    ours = open_source(f"clip_benchmark:{tmp_path / 'r'}")
    assert [ours[row].answer for row in range(len(ours))] == theirs
    classification_folder(tmp_path / "c")
    pipeline = webdataset.WebDataset(f"{tmp_path}/c/test/{{0..1}}.tar", shardshuffle=False)
    theirs = [NAMES[number] for (number,) in pipeline.decode().to_tuple("cls")]
    ours = open_source(f"clip_benchmark:{tmp_path / 'c'}")
    assert [ours[row].answer for row in range(len(ours))] == theirs


def test_class_names_are_captions_and_templates_are_kept(tmp_path):
    folder = classification_folder(
        tmp_path,
        dataset_type="classification",
        zeroshot_classification_templates="a photo of a {c}.\na bad {c}\n",
    )
    source = ClipBenchmark(folder)
    assert source.classes == tuple(NAMES)
    assert source.templates == ("a photo of a {}.", "a bad {}")
    assert [source[row].answer for row in range(4)] == ["red fox", "cat", "dog", "red fox"]
    assert source[3].name == "1.tar:s0000003"
    assert open_image(source[3].images[0]).size == (6, 4)
    assert open_source(f"clip_benchmark:{folder}:test?prompt=What")[0].turns[0].content[1] == "What"


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    folder = classification_folder(tmp_path, classes=[i % 3 for i in range(22)])
    source = ClipBenchmark(folder)
    assert [source[row].answer for row in range(22)] == [NAMES[i % 3] for i in range(22)]


def test_images_without_captions_are_named_when_they_are_read(tmp_path):
    samples = [
        {"png": packed(0), "txt": ""},
        {"png": packed(1)},
        {"txt": "no image"},
        {"png": packed(2), "txt": "a\n\nb"},
        {"png": packed(3), "txt": b"\xff"},
    ]
    source = ClipBenchmark(write(tmp_path, samples, dataset_type="retrieval"))
    assert len(source) == 7
    for row, message in (
        (0, "0.tar:s0000000:1: expected a caption, found an empty text"),
        (1, "0.tar:s0000001:1: expected s0000001.txt beside the image, found none"),
        (2, "1.tar:s0000002:1: expected one image, found 0"),
        (4, "1.tar:s0000003:2: expected a caption, found an empty text"),
        (6, "2.tar:s0000004:1: expected UTF-8 in the text, found other bytes"),
    ):
        with pytest.raises(BadRow) as refused:
            source[row]
        said, _, place = str(refused.value).partition(" (in ")
        assert said == message
        assert place == f"{tmp_path}/test/{message.partition(':')[0]})"
    assert source[5].answer == "b"


@pytest.mark.parametrize("label", ["3", "-1", "cat", ""])
def test_classes_without_a_name_are_refused(tmp_path, label):
    source = ClipBenchmark(write(tmp_path, [{"png": packed(0), "cls": label.encode()}],
                                 classnames="a\nb\nc"))  # fmt: skip
    with pytest.raises(
        BadRow, match=rf"0.tar:s0000000: .* one of 3 classes, 0 to 2, found '{label}"
    ):
        source[0]


def test_other_layouts_are_refused_by_the_name_of_the_file(tmp_path):
    folder = classification_folder(tmp_path / "c")
    for name, text, message in (
        ("dataset_type.txt", "multilabel", "expected retrieval or classification, found 'multi"),
        ("classnames.txt", "a\n\nb\n", "classnames.txt:2: expected a text, found an empty line"),
        ("classnames.txt", "\n", "classnames.txt: expected at least one line, found none"),
        ("classnames.txt", None, "classnames.txt: expected names, one a line, found no such file"),
        (
            "zeroshot_classification_templates.txt",
            "a {c}\nb {}",
            "templates.txt:2: expected {c} at",
        ),
        ("test/nshards.txt", "two", "nshards.txt: expected the number of shards, found 'two'"),
        ("test/nshards.txt", "3", "2.tar: expected a tar file, found none"),
        ("test/nshards.txt", None, "no such file; splits are []"),
    ):
        path = folder / name
        before = path.read_text() if path.exists() else None
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(BadSource) as refused:
            ClipBenchmark(folder)
        assert message in str(refused.value)
        assert str(folder) in str(refused.value)
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_text(before)
    with pytest.raises(BadSource, match=r"val/nshards.txt: .* splits are \['test'\]"):
        ClipBenchmark(folder, "val")
    with pytest.raises(BadSource, match="expected a folder in CLIP_benchmark's layout, found none"):
        open_source(f"clip_benchmark:{tmp_path}/nothing:test")
    with pytest.raises(BadSource, match=r"clip_benchmark takes the options prompt"):
        open_source(f"clip_benchmark:{folder}:test?caption=x")
