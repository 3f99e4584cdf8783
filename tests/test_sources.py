"""Sources of JSON rows: every form of row becomes the same example, and what is wrong is named."""

from __future__ import annotations

import io
import json
import pickle
import random

import pytest
from PIL import Image

from vlm.data.example import BadRow, Box, Example, Turn
from vlm.data.sources import (
    BadSource,
    RowFormat,
    RowsSource,
    open_source,
)
from vlm.pixels import BadImage, image_size, open_image
from vlm.pixels.image_ref import ImageRef

ANSWER = {"from": "gpt", "value": "a cat"}


def png(colour: int = 0) -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", (5, 3), (colour, 0, 0)).save(packed, "PNG")
    return packed.getvalue()


def asked(value: str) -> list[dict]:
    return [{"from": "human", "value": value}, ANSWER]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def read_row(folder, row: dict, **options) -> Example:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    return RowsSource(folder / "rows.jsonl", RowFormat(**options))[0]


def test_llava_row_puts_images_in_their_places(folder):
    row = {"image": "a.png", "conversations": asked("<image>\nWhat is it?"), "id": 7}
    example = read_row(folder, row)
    assert example == Example(
        "rows.jsonl:1",
        (Turn("user", (None, "\nWhat is it?")), Turn("assistant", ("a cat",))),
        (ImageRef(folder / "a.png", "rows.jsonl:1: a.png"),),
    )


def test_images_are_in_the_order_of_their_marks_over_all_turns(folder):
    turns = [
        {"from": "system", "value": "Be brief."},
        *asked("<image> or <image>?"),
        *asked("And <image>?"),
    ]
    example = read_row(folder, {"image": ["a.png", "sub/c.png", "b.png"], "conversations": turns})
    assert [image.data.name for image in example.images] == ["a.png", "c.png", "b.png"]
    assert [turn.slots for turn in example.turns] == [0, 2, 0, 1, 0]


def test_path_string_is_one_image_and_not_its_letters(folder):
    """A path given as a string was counted letter by letter."""
    with pytest.raises(BadRow, match=r"rows.jsonl:1: .*found 2 marks and 1 images"):
        read_row(folder, {"image": "a.png", "conversations": asked("<image><image>")})


def test_image_without_a_mark_is_refused(folder):
    with pytest.raises(BadRow, match="found 0 marks and 1 images"):
        read_row(folder, {"image": "a.png", "conversations": asked("What?")})


def test_literal_mark_stays_text_in_parts_and_is_refused_elsewhere(folder):
    """Text that happens to contain the mark must not become an image's place."""
    said = "Write <image> for an image."
    with pytest.raises(BadRow, match="found 1 marks and 0 images; literal marks belong in text"):
        read_row(folder, {"conversations": asked(said)})
    parts = [{"type": "image"}, {"type": "text", "text": said}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "<image>"}]}
    row = {"images": ["a.png"], "messages": [{"role": "user", "content": parts}, answer]}
    example = read_row(folder, row)
    assert example.turns[0].content == (None, said)
    assert example.answer == "<image>"


def test_images_inside_their_parts_are_read(folder):
    content = [{"type": "text", "text": "x"}, {"type": "image", "image": "b.png"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "y"}]
    assert read_row(folder, {"messages": messages}).images[0].data == folder / "b.png"


def test_row_without_images_is_text_only(folder):
    example = read_row(folder, {"image": None, "conversations": asked("Hello")})
    assert (example.images, example.turns[0].content) == ((), ("Hello",))


def test_caption_row_takes_the_prompt(folder):
    row = {"image": "a.png", "caption": " a cat\n", "alt": "pet"}
    example = read_row(folder, row, prompt="Name it.")
    assert example.turns == (Turn("user", (None, "Name it.")), Turn("assistant", ("a cat",)))
    assert read_row(folder, row).turns[0].content == (None,)
    assert read_row(folder, row, caption="alt").answer == "pet"


def test_list_of_captions_is_taken_only_where_that_is_asked_for(folder):
    row = {"image": "a.png", "caption": ["a cat", "one cat"]}
    example = read_row(folder, row, prompt="What?", many=True)
    assert [turn.content for turn in example.turns] == [
        (None, "What?"), ("a cat",), ("What?",), ("one cat",),
    ]  # fmt: skip
    assert len(example.images) == 1
    assert read_row(folder, row | {"caption": "a cat"}, many=True).answer == "a cat"
    with pytest.raises(BadRow, match=r"expected caption to be text, found list"):
        read_row(folder, row)
    for captions in ([], ["a", 3], ["a", ["b"]]):
        with pytest.raises(BadRow, match="expected caption to be text or a list of texts, found"):
            read_row(folder, row | {"caption": captions}, many=True)
    with pytest.raises(BadRow, match="expected a caption, found an empty text"):
        read_row(folder, row | {"caption": ["a", " "]}, many=True)


def test_boxes_are_read_with_their_image(folder):
    boxes = [{"xyxy": [0, 1, 2.5, 3], "label": "cat"}]
    row = {"image": "a.png", "conversations": asked("<image>"), "boxes": boxes}
    assert read_row(folder, row).boxes == (Box(0, (0.0, 1.0, 2.5, 3.0), "cat"),)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ([1], "expected an object of keys and values, found list"),
        ({"image": "a.png"}, r"messages, caption, text, question, found \['image'\]"),
        ({"image": "a.png", "caption": ""}, "expected a caption, found an empty text"),
        ({"image": "a.png", "caption": ["a", "b"]}, "expected caption to be text, found list"),
        ({"image": ["a.png", "b.png"], "caption": "c"}, "one image for the caption, found 2"),
        ({"image": "a.png", "images": ["b.png"], "caption": "c"}, "image or images, found both"),
        ({"image": 3, "caption": "c"}, "expected an image path, found '3'"),
        ({"image": "", "caption": "c"}, "expected an image path, found ''"),
        ({"image": "none.png", "caption": "c"}, "image file 'none.png' is not under"),
        ({"image": "../a.png", "caption": "c"}, "which leaves it"),
        ({"image": "sub/../../a.png", "caption": "c"}, "which leaves it"),
        ({"image": "/etc/passwd", "caption": "c"}, "found '/etc/passwd', which leaves it"),
        ({"image": "http://10.0.0.1/a.png", "caption": "c"}, "found the address"),
        ({"image": "data:image/png;base64,AA", "caption": "c"}, "found the address"),
        ({"conversations": []}, r"expected a list of turns, found \[\]"),
        ({"conversations": "hello"}, "expected a list of turns, found str 'hello'"),
        ({"conversations": [{"from": "human"}]}, r"turn 0: .* from and value, found \['from'\]"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "turn 0: .*found 'bot'"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "no answer"),
        ({"conversations": [{"from": "human", "value": 3}, ANSWER]}, "turn 0: .*found int '3'"),
        ({"conversations": [{"from": "human", "value": ""}, ANSWER]}, "text or an image"),
        ({"conversations": [ANSWER]}, "turn 0: expected user, found assistant"),
        ({"conversations": [*asked("x"), ANSWER]}, "turn 2: expected user, found assistant"),
        ({"conversations": [*asked("x")[:1], {"from": "gpt", "value": " "}]}, "no answer"),
        ({"conversations": asked("x"), "messages": []}, "or messages, found both"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "found .*audio"),
        (
            {
                "image": "a.png",
                "conversations": [*asked("x")[:1], {"from": "gpt", "value": "<image>"}],
            },
            "turn 1: expected text as the answer, found an image mark",
        ),
    ],
)
def test_row_that_cannot_be_used_is_named_with_what_was_found(folder, row, found):
    with pytest.raises(BadRow, match=f"^rows.jsonl:1: .*{found}|^rows.jsonl:1: {found}"):
        read_row(folder, row)


@pytest.mark.parametrize(
    ("box", "found"),
    [
        ({"xyxy": [0, 0, 1], "label": "x"}, "four numbers, found"),
        ({"xyxy": [0, 0, 1, "2"], "label": "x"}, "four numbers"),
        ({"xyxy": [5, 0, 1, 2], "label": "x"}, "x0 < x1 and y0 < y1, found"),
        ({"xyxy": [0, 0, 1, 2], "label": ""}, "expected a label, found ''"),
        ({"xyxy": [0, 0, 1, 2], "label": "x", "image": 1}, "names image 1, the row has 1"),
        ({"bbox": [0, 0, 1, 2], "label": "x"}, "image, xyxy and label, found"),
    ],
)
def test_box_that_cannot_be_used_is_named(folder, box, found):
    row = {"image": "a.png", "conversations": asked("<image>"), "boxes": [box]}
    with pytest.raises(BadRow, match=found):
        read_row(folder, row)


def test_absolute_path_under_the_root_is_taken(folder):
    example = read_row(folder, {"image": str(folder / "sub/../a.png"), "caption": "x"})
    assert example.images[0].data == folder / "a.png"


# JSON and JSON Lines


def test_jsonl_and_json_hold_the_same_rows(folder):
    rows = [{"image": "a.png", "caption": f'a "]}}" {k} \\ é\u2028'} for k in range(50)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    lines = RowsSource(folder / "rows.jsonl")
    for text in (
        json.dumps(rows),
        json.dumps(rows, indent=2, ensure_ascii=False),
        "\ufeff " + json.dumps(rows) + "\n",
    ):
        (folder / "rows.json").write_text(text, "utf-8")
        listed = RowsSource(folder / "rows.json")
        assert len(listed) == len(lines) == 50
        assert [listed[k].answer for k in range(50)] == [lines[k].answer for k in range(50)]
    assert (listed.row_name(3), lines.row_name(3)) == ("rows.json[3]", "rows.jsonl:4")


def test_jsonl_rows_keep_their_line_numbers_over_empty_lines(folder):
    row = json.dumps({"image": "a.png", "caption": "x"})
    (folder / "rows.jsonl").write_bytes(f"\n{row}\r\n\r\n  \n{row}".encode())
    source = RowsSource(folder / "rows.jsonl")
    assert [source[k].name for k in range(2)] == ["rows.jsonl:2", "rows.jsonl:5"]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    with pytest.raises(IndexError, match="row 2 of 2"):
        source[2]


def test_jsonl_index_does_not_depend_on_the_chunk(folder, monkeypatch):
    rows = [json.dumps({"image": "a.png", "caption": "x" * (k % 5 + 1)}) for k in range(30)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    whole = [RowsSource(folder / "rows.jsonl")[k] for k in range(30)]
    monkeypatch.setattr("vlm.data.sources.json_rows.CHUNK_BYTES", 7)
    assert [RowsSource(folder / "rows.jsonl")[k] for k in range(30)] == whole


def test_malformed_line_names_file_and_line(folder):
    row = json.dumps({"image": "a.png", "caption": "x"})
    (folder / "rows.jsonl").write_bytes(f'{row}\n{{"image": }}\n'.encode() + b'{"a": "\xff"}\n')
    source = RowsSource(folder / "rows.jsonl")
    with pytest.raises(BadRow, match=r"^rows.jsonl:2: expected JSON, .*column 11"):
        source[1]
    with pytest.raises(BadRow, match=r"^rows.jsonl:3: expected UTF-8"):
        source[2]
    assert source[0].answer == "x"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": [1]}', "expected one list of objects, found .* at line 1"),
        ('[{"a": 1}\n, 5, {"a": 1}]', "found .* at line 2"),
        ('[{"a": 1}\n["a"]]', "at line 2"),
        ('[{"a": 1},\n]', "at line 2"),
        ('[{"a": 1}] [', "found '\\['"),
        ('["a"]', "found '\"a\"\\]'"),
        ('[{"a": 1}, {"a": "b', "found"),
        ('[{"a": 1}, {"a": 2}', "row 2 without its end"),
        ("", "an empty file"),
        ("12", "without its end"),
        ("[]", "expected at least one row, found none"),
    ],
)
def test_json_that_is_no_list_of_objects_is_refused(folder, text, found):
    (folder / "rows.json").write_text(text)
    with pytest.raises(BadSource, match=found):
        RowsSource(folder / "rows.json")


def test_json_rows_of_any_depth_are_found(folder):
    dice = random.Random(0)

    def value(depth: int):
        kind = dice.randrange(6 if depth else 3)
        if kind < 3:
            return dice.choice(["", '"', "\\", "}]", '{"a": [', "é", 1.5, None, True])
        parts = [value(depth - 1) for _ in range(dice.randrange(4))]
        return parts if kind < 5 else {f"k{k}": part for k, part in enumerate(parts)}

    for _ in range(200):
        rows = [{"caption": f"{k}", "extra": value(9)} for k in range(dice.randint(1, 6))]
        (folder / "rows.json").write_text(json.dumps(rows, indent=dice.choice([None, 1])))
        source = RowsSource(folder / "rows.json")
        found = [json.loads(read_bytes(source, row)) for row in range(len(source))]
        assert found == rows


def read_bytes(source: RowsSource, row: int) -> bytes:
    data = source._path.read_bytes()
    return data[source._starts[row] : source._ends[row]]


def test_rows_hold_no_row_in_memory(folder):
    lines = [json.dumps({"image": "a.png", "caption": "x" * 2000})] * 2000
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "rows.json").write_text(f"[{','.join(lines)}]")
    for name in ("rows.jsonl", "rows.json"):
        assert len(pickle.dumps(RowsSource(folder / name))) < 60_000


def test_file_changed_since_it_was_opened_is_named(folder):
    read_row(folder, {"image": "a.png", "caption": "x"})
    source = RowsSource(folder / "rows.jsonl")
    (folder / "rows.jsonl").write_text("{")
    with pytest.raises(BadRow, match=r"rows.jsonl:1: .*has changed since it was opened"):
        source[0]


# One line of text


def test_open_source_takes_options_behind_the_text(folder):
    (folder / "d").mkdir()
    row = {"photo": "a.png", "alt": "x", "caption": "y"}
    (folder / "d/rows.jsonl").write_text(json.dumps(row))
    spec = f"{folder}/d/rows.jsonl?image=photo&caption=alt&root={folder}&prompt=a%26b?"
    example = open_source(spec, prompt="unused")[0]
    assert (example.answer, example.turns[0].content) == ("x", (None, "a&b?"))
    assert open_source(f"{folder}/d/rows.jsonl", image="photo", root=folder)[0].answer == "y"


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("nothing", "Accepted are:\n.*sample:SPLIT"),
        ("rows.csv", "Accepted are"),
        ("sample:test", "expected one of train, val, transfer"),
        ("datasets:", "Accepted are"),
        ("rows.jsonl", "expected a file of rows, found none"),
        ("scenes:9?root=/x&image=y", r"scenes takes the options prompt, found \['image', 'root'\]"),
        ("s.tar?root=/x", r"shards takes .*found \['root'\]"),
        ("rows.jsonl?colour=red", "expected options of prompt, .*found 'colour=red'"),
    ],
)
def test_open_source_says_what_it_accepts(spec, found):
    with pytest.raises(BadSource, match=found):
        open_source(spec)


def test_boxes_of_any_rows_become_questions(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    row = {"image": "a.png", "caption": "two cups", "boxes": [
        {"image": 0, "xyxy": [1, 2, 9, 8], "label": "cup"},
        {"image": 0, "xyxy": [20, 1, 30, 9], "label": "cup"},
    ]}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | {'boxes': []})}\n")
    source = open_source(f"{tmp_path / 'rows.jsonl'}?task=ground", prompt="Describe.")
    assert [turn.content for turn in source[0].turns] == [(None, "Where is cup?"), (1, 0)]
    with pytest.raises(BadRow, match=r"rows\.jsonl:2: expected boxes"):
        source[1]
    with pytest.raises(BadSource, match="expected the task ground, found 'find'"):
        open_source(f"{tmp_path / 'rows.jsonl'}?task=find")


def test_errors_of_rows_and_images_say_where_their_files_are(tmp_path, monkeypatch):
    """Names of rows, which runs are known by, keep the file's name alone."""
    (tmp_path / "a.png").write_text("no image")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": "a.png", "text": "a"}\n{"image": "gone.png", "text": "b"}\n{}\n')
    monkeypatch.chdir(tmp_path)
    source = open_source("rows.jsonl")
    assert source.row_name(2) == "rows.jsonl:3"
    with pytest.raises(BadRow, match=rf"^rows\.jsonl:3: .* \(in {path}\)$"):
        source[2]
    with pytest.raises(BadRow, match=rf"^rows\.jsonl:2: .*gone\.png.* \(in {path}\)$"):
        source[1]
    (ref,) = source[0].images
    for read in (open_image, image_size):
        with pytest.raises(BadImage, match=rf"^rows\.jsonl:1: .* \(in {tmp_path}/a\.png\)$"):
            read(ref)
