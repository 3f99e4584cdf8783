"""Rows of TSV files: what is in the file is what is read, and what is wrong is named."""

import pickle

import pytest
from PIL import Image

from vlm.data.example import BadRow, Turn
from vlm.data.sources import BadSource, TsvSource, open_source
from vlm.pixels.image_ref import ImageRef


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (5, 3)).save(tmp_path / name)
    return tmp_path


def write(folder, text, name="rows.tsv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_row_is_a_image_and_its_text(folder):
    source = open_source(str(write(folder, "image\ttext\na.png\tHello\nsub/b.png\tto you\n")))
    assert (len(source), source.name) == (2, "rows.tsv")
    assert [source.row_name(row) for row in (0, 1)] == ["rows.tsv:2", "rows.tsv:3"]
    example = source[1]
    assert example.turns == (Turn("user", (None,)), Turn("assistant", ("to you",)))
    assert example.images == (ImageRef(folder / "sub/b.png", "rows.tsv:3: sub/b.png"),)
    assert example.boxes == ()


@pytest.mark.parametrize(
    "text", ['"', '"quoted"', 'half "open', "it's", r"back\slash \n", "a,b;c", " ", "é “x” ё"]
)
def test_text_is_taken_literally(folder, text):
    path = write(folder, f"image\ttext\na.png\tx{text}x\na.png\tnext\n")
    source = TsvSource(path)
    assert source[0].answer == f"x{text}x"
    assert source[1].answer == "next"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_marks_and_line_ends_of_other_systems_are_no_text(folder, end, mark, last):
    lines = ["image\ttext", "", "a.png\tone", "", "a.png\ttwo"]
    data = mark + (end.join(lines) + (end if last else "")).encode()
    source = TsvSource(write(folder, data))
    assert [source[row].answer for row in range(len(source))] == ["one", "two"]
    assert source.row_name(1) == "rows.tsv:5"


def test_columns_are_found_by_name_in_any_order(folder):
    path = write(folder, "id\tcaption\tfile\timage\ttruth\n1\ta cap\tsub/b.png\ta.png\tyes\n")
    assert open_source(str(path))[0].answer == "a cap"
    example = open_source(f"{path}?image=file&caption=truth&prompt=Read.")[0]
    assert example.answer == "yes"
    assert example.images[0].data == folder / "sub/b.png"
    assert example.turns[0].content == (None, "Read.")


def test_images_lie_under_the_root(folder, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("other"), "image\ttext\nb.png\tx\n")
    with pytest.raises(BadRow, match=r"rows.tsv:2: image file 'b.png' is not under"):
        open_source(str(path))[0]
    found = open_source(f"{path}?root={folder}/sub")[0]
    assert found.images[0].data == folder / "sub/b.png"


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("a.png", r"expected 2 tab-separated fields \(image, text\), found 1: 'a.png'"),
        ("a.png  x", "found 1: 'a.png  x'"),
        ("a.png\tx\ty", "found 3: 'a.png⇥x⇥y'"),
        ("a.png\t ", "expected a text in the column text, found none"),
        ("\tx", "expected an image path, found ''"),
        ("none.png\tx", "image file 'none.png' is not under"),
        ("../out.png\tx", "which leaves it"),
        ("http://a.b/c.png\tx", "expected a local image path, found the address"),
        (b"a.png\t\xff", "expected UTF-8, found byte 6 of the row not to be"),
    ],
)
def test_row_that_cannot_be_used_is_named_with_what_was_found(folder, row, found):
    row = row if isinstance(row, bytes) else row.encode()
    source = TsvSource(write(folder, b"image\ttext\na.png\tgood\n" + row + b"\n"))
    assert source[0].answer == "good"
    with pytest.raises(BadRow, match=f"^rows.tsv:3: .*{found}"):
        source[1]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.png\tHello\nsub/b.png\tyou\n",
         r"tab-separated columns, one of them image, found \['a.png', 'Hello'\]"),
        ("image\tlabel\na.png\tx\n", r"one of them caption or text, found \['image', 'label'\]"),
        ("image,text\na.png,x\n", r"one of them image, found \['image,text'\]"),
        ("image\timage\ttext\na.png\ta.png\tx\n", "expected one column image, found 2"),
        ("image\ttext\n", "expected at least one row, found none"),
        ("", "expected a header and rows, found an empty file"),
        ("image\ttext\na.png\tx\n".encode("utf-16"), "expected UTF-8, found byte 0 of line 1"),
    ],
)  # fmt: skip
def test_file_that_cannot_be_read_is_named(folder, text, found):
    with pytest.raises(BadSource, match=f"^rows.tsv: .*{found}"):
        TsvSource(write(folder, text))


def test_missing_file_and_column_given_are_named(folder):
    with pytest.raises(BadSource, match=r"none.tsv: expected a file of rows, found none"):
        open_source(str(folder / "none.tsv"))
    path = write(folder, "image\ttext\na.png\tx\n")
    with pytest.raises(BadSource, match="one of them file, found"):
        open_source(f"{path}?image=file")
    with pytest.raises(BadSource, match="list takes the options"):
        open_source(f"{path}?task=ground")


def test_rows_stay_on_disk_and_the_source_is_picklable(folder):
    path = write(folder, "image\ttext\n" + "a.png\tsome text\n" * 5000)
    source = TsvSource(path)
    packed = pickle.dumps(source)
    assert len(packed) < 5000 * 24 + 4000
    assert pickle.loads(packed)[4999].answer == "some text"
    path.write_text("image\ttext\n")
    with pytest.raises(BadRow, match="has changed since it was opened"):
        source[4999]
