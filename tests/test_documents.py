"""Text without images: where it comes from, and that all of it is learned."""

import pytest

from tests import tiny
from vlm.data.example import BadRow, Example, Turn
from vlm.data.sources import BadSource, open_source
from vlm.data.sources.documents import Documents, TextOnly, sized
from vlm.families.decoder_only.batch import collate


def test_manual_splits_share_no_paragraph():
    texts = {
        s: " ".join(r.turns[0].text for r in open_source(f"python:{s}")) for s in ("train", "val")
    }
    paragraphs = {s: set(text.split("\n\n")) for s, text in texts.items()}
    assert not paragraphs["train"] & paragraphs["val"]
    assert len(texts["train"]) > 8 * len(texts["val"]) > 80_000


def test_every_word_of_a_file_is_in_one_document(tmp_path):
    path = tmp_path / "book.txt"
    words = [f"word{i}" for i in range(900)]
    text = ""
    for i, word in enumerate(words):
        text += word + ("\n\n\n" if i % 37 == 0 else "\n" if i % 11 == 0 else " ")
    path.write_text(text)
    source = open_source(str(path), prompt="Describe.")
    read = [source[i].turns[0].text for i in range(len(source))]
    assert " ".join(read).split() == words
    assert max(map(len, read)) <= 400
    assert source.row_name(1) == f"{path}[1]"


def test_word_longer_than_a_document_is_cut_and_kept():
    assert "".join(sized(["x" * 25], characters=10)) == "x" * 25


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("python:test", "expected one of train, val"),
        ("missing.txt", r"missing\.txt: expected a text file in UTF-8"),
        ("python:train?caption=a", r"takes the options .*, found \['caption'\]"),
    ],
)
def test_bad_spec_is_named(spec, message):
    with pytest.raises(BadSource, match=message):
        open_source(spec)


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(BadSource, match=r"empty\.txt: expected at least one row"):
        Documents.from_file(tmp_path / "empty.txt")


def test_whole_document_and_its_end_are_scored():
    """All but the first token, which nothing predicts; no chat template is written."""
    model = tiny.decoder_only()
    processor = tiny.processor(model)
    row = processor.encode(Example("d", (Turn("text", ("two words",)),)))
    assert processor.text_tokenizer.decode(row.ids) == "two words<|im_end|>"
    batch = collate([row], processor.pad_id)
    assert batch.scored[0].tolist() == [False] + [True] * (len(row.ids) - 1)


def test_document_has_no_answer_to_leave_out():
    with pytest.raises(BadRow, match="d: expected an answer to leave out, found none"):
        Example("d", (Turn("text", ("two words",)),)).question()


def test_document_that_is_too_long_is_left_out_or_cut():
    model = tiny.decoder_only()
    document = Example("d", (Turn("text", ("abcdefghij",)),))
    assert "11 tokens" in tiny.processor(model, max_tokens=5).encode(document).reason
    cut = tiny.processor(model, max_tokens=5, overflow="shrink").encode(document)
    assert (len(cut.ids), cut.cut) == (5, 6)


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        ((Turn("text", ("a",)), Turn("user", ("b",))), (), "found 2 turns and 0 images"),
        ((Turn("text", (None, "a")),), (tiny.image(),), "found 1 turns and 1 images"),
    ],
)
def test_document_is_one_turn_without_images(turns, images, message):
    with pytest.raises(BadRow, match=message):
        Example("d", turns, images)


def test_rows_with_images_are_refused_where_text_alone_is_expected():
    with pytest.raises(BadRow, match=r"scenes:3\[1\]: expected text alone, found 1 images"):
        TextOnly(open_source("scenes:3"))[1]
    assert TextOnly(open_source("python:val"))[0].is_document
