"""What rows of other tools mean is read or refused; keys that are not read are told, once."""

import json

import pytest
from datasets import Dataset
from PIL import Image
from rich.console import Console

from tests import tiny, training
from tests.rows import write_tar
from vlm.commands.inspect_batch import show_rows
from vlm.data.check import check_start
from vlm.data.example import BadRow, Box, Turn
from vlm.data.grounding import ground
from vlm.data.sources import BadSource, TableSource, open_source
from vlm.data.sources.keys import MEANING
from vlm.data.sources.row import RowFormat

TALK = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "a cat"}]


@pytest.fixture
def write(tmp_path):
    """Writes rows beside a picture of 60 x 40 pixels, and gives the file's path."""
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return str(path)

    return write


def grounded(**objects):
    asked = {"role": "user", "content": "<image>Find <ref-object>."}
    said = {"role": "assistant", "content": "<bbox>, and a <bbox>"}
    return {"images": ["a.png"], "messages": [asked, said], "objects": objects}


def talk(*turns, **more):
    values = [{"from": role, "value": text, **keys} for role, text, keys in turns]
    return {"conversations": values, **more}


def test_objects_stand_at_their_marks_in_order(write):
    boxes = [[1, 2, 30, 20], [5, 5, 60, 40]]
    example = open_source(write(grounded(ref=["the cup"], bbox=boxes)))[0]
    assert example.turns == (
        Turn("user", (None, "Find the cup.")),
        Turn("assistant", (0, ", and a ", 1)),
    )
    assert example.boxes == (Box(0, (1, 2, 30, 20), "the cup"), Box(0, (5, 5, 60, 40), "the cup"))


def test_objects_of_as_many_texts_as_boxes_go_in_pairs(write):
    row = talk(
        ("human", "<image>What is there?", {}),
        ("gpt", "<ref-object><bbox> and <ref-object><bbox>", {}),
        image="a.png",
        objects={"ref": ["a dog", "a woman"], "bbox": [[0, 0, 9, 9], [9, 9, 20, 20]]},
    )
    example = open_source(write(row))[0]
    assert [box.label for box in example.boxes] == ["a dog", "a woman"]
    assert example.turns[1].content == ("a dog", 0, " and a woman", 1)


@pytest.mark.parametrize(
    ("kind", "box"), [("norm1000", [500, 250, 1000, 500]), ("norm1", [0.5, 0.25, 1, 0.5])]
)
def test_objects_in_shares_of_the_image_become_its_pixels(write, kind, box):
    row = grounded(ref=["x"], bbox=[box, box], bbox_type=kind)
    example = open_source(write(row))[0]
    assert example.boxes[0].xyxy_px == (30, 10, 60, 20)


def test_boxes_without_a_text_have_no_label_and_cannot_be_asked_for(write):
    row = grounded(ref=[], bbox=[[0, 0, 9, 9], [9, 9, 20, 20]])
    row["messages"][0]["content"] = "<image>Click both."
    example = open_source(write(row))[0]
    assert [box.label for box in example.boxes] == ["", ""]
    with pytest.raises(BadRow, match="boxes with labels to ask for"):
        ground(example)


@pytest.mark.parametrize(
    ("objects", "found"),
    [
        ({"ref": ["x"], "bbox": [[0, 0, 9, 9]]}, "<bbox> mark.*found 2 marks and 1 of bbox"),
        ({"ref": [], "bbox": [[0, 0, 9, 9]] * 2}, "<ref-object> mark.*1 marks and 0 of ref"),
        ({"ref": ["x"], "bbox": [[0, 0, 9, 9], [3, 4]]}, "bbox 1 .*four numbers"),
        ({"ref": ["x"], "bbox": [[0, 0, 9, 9]] * 2, "image_id": [0, 1]}, "names image 1"),
        ({"ref": ["x"], "bbox": [[0, 0, 9, 9]] * 2, "bbox_type": "cm"}, "bbox_type .*'cm'"),
        ({"ref": ["x"], "bbox": [[0, 0, 9, 1001]] * 2, "bbox_type": "norm1000"}, "0 to 1000"),
        ({"bbox": [[0, 0, 9, 9]], "category": [1]}, r"found \['bbox', 'category'\]; --ignore-keys"),
    ],
)
def test_objects_that_do_not_fit_are_named(write, objects, found):
    with pytest.raises(BadRow, match=f"^rows.jsonl:1: .*{found}"):
        open_source(write(grounded(**objects)))[0]


@pytest.mark.parametrize("caption", [True, False])
def test_system_key_is_the_system_message(write, caption):
    row = {"image": "a.png", "system": "Be brief."}
    row |= {"caption": "a cat"} if caption else {"conversations": TALK}
    example = open_source(write(row))[0]
    assert example.turns[0] == Turn("system", ("Be brief.",))
    assert [turn.role for turn in example.turns] == ["system", "user", "assistant"]
    text = tiny.processor(tiny.decoder_only()).chat_template.render(example.turns, "r")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_system_key_and_turn_say_the_same_or_are_refused(write):
    turns = [{"from": "system", "value": "Be brief."}, *TALK]
    row = {"image": "a.png", "conversations": turns}
    same, other, empty = ({**row, "system": said} for said in ("Be brief.", "Be long.", ""))
    source = open_source(write(same, other, empty))
    assert source[0].turns == source[2].turns
    assert source[0].turns[0].text == "Be brief."
    with pytest.raises(BadRow, match=r"one system message, found the turn 'Be brief.' and the key"):
        source[1]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"loss": 0}])
def test_turn_of_weight_0_is_read_and_not_scored(write, mark):
    row = talk(
        ("human", "<image>one?", {}),
        ("gpt", "bad", mark),
        ("human", "two?", {}),
        ("gpt", "good", {"weight": 1}),
        image="a.png",
    )
    example = open_source(write(row))[0]
    assert [turn.scored for turn in example.turns] == [True, False, True, True]
    processor = tiny.processor(tiny.decoder_only())
    encoded = processor.encode(example)
    decode = processor.text_tokenizer.decode
    assert decode(encoded.ids[encoded.scored]) == "good<|im_end|>"
    assert decode(encoded.ids[encoded.unscored]) == "bad"
    both = [Turn(turn.role, turn.content) for turn in example.turns]
    render = processor.chat_template.render
    as_context = render(both, "r").replace("\ue5c1", "\ue5c3")
    assert as_context == render(example.turns, "r").replace("\ue5c1", "\ue5c3")
    assert example.answer == "good"


def test_conversation_that_ends_unscored_is_answered_before(write):
    row = talk(
        ("human", "<image>one?", {}),
        ("gpt", "good", {}),
        ("human", "two?", {}),
        ("gpt", "bad", {"weight": 0}),
        image="a.png",
    )
    example = open_source(write(row))[0]
    assert example.answer == "good"
    assert [turn.text for turn in example.question().turns] == ["one?"]
    encoded = tiny.processor(tiny.decoder_only()).encode(example)
    assert encoded.scored[-1]  # nothing of the rest is read


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"weight": 0.5}, "turn 1: expected weight to be 0 .*found 0.5"),
        ({"loss": "no"}, "turn 1: expected loss to be 0 .*found 'no'"),
        ({"weight": 1, "loss": False}, "weight and loss to say the same"),
    ],
)
def test_other_weights_are_refused(write, keys, found):
    row = talk(("human", "<image>?", {}), ("gpt", "a", keys), image="a.png")
    with pytest.raises(BadRow, match=found):
        open_source(write(row))[0]


def test_question_cannot_be_scored(write):
    asked = talk(("human", "<image>?", {"weight": 1}), ("gpt", "a", {}), image="a.png")
    with pytest.raises(BadRow, match="on a user turn"):
        open_source(write(asked))[0]


@pytest.mark.parametrize("key", ["video", "videos", "audio", "audios"])
def test_videos_and_sound_are_refused_by_name(write, key):
    row = {"image": "a.png", "caption": "x"}
    path = write({**row, key: ["x.mp4"]}, {**row, key: []})
    source = open_source(path)
    with pytest.raises(BadRow, match=f"images and text alone, found {key} list"):
        source[0]
    assert source[1].answer == "x"
    assert open_source(path, ignore_keys=[key])[0].answer == "x"


@pytest.mark.parametrize("key", sorted(MEANING))
def test_key_that_changes_a_row_stops_unless_it_is_ignored(write, key):
    row = {"image": "a.png", "conversations": TALK}
    path = write({**row, key: None}, {**row, key: "y"})
    source = open_source(path)
    assert source[0].answer == "a cat"
    with pytest.raises(BadSource, match=f"^rows.jsonl:2: key '{key}' .*'y'; --ignore-keys {key}"):
        source[1]
    source = open_source(path, ignore_keys=[key])
    assert source[1].answer == "a cat"
    assert (source.unread.found[key].count, source.unread.found[key].name) == (1, "rows.jsonl:2")


def test_label_that_is_true_or_false_changes_a_row_and_a_class_does_not(write):
    row = {"image": "a.png", "conversations": TALK}
    source = open_source(write({**row, "label": 3}))
    assert source[0].answer == "a cat"
    with pytest.raises(BadSource, match="'label'"):
        open_source(write({**row, "label": False}))[0]


def test_key_of_a_turn_is_told_by_its_turn(write):
    row = talk(("human", "<image>?", {}), ("gpt", "a", {"tool_calls": [1]}), image="a.png")
    with pytest.raises(BadSource, match=r"^rows.jsonl:1: turn 1: key 'tool_calls'"):
        open_source(write(row))[0]


def test_conversation_without_a_scored_answer_is_refused(write):
    row = talk(("human", "<image>?", {}), ("gpt", "a", {"weight": 0}), image="a.png")
    with pytest.raises(BadRow, match=r"^rows.jsonl:1: expected an answer that is scored"):
        open_source(write(row))[0]


@pytest.mark.parametrize("mark", ["<bbox>", "<ref-object>", "<video>", "<audio>"])
def test_mark_that_nothing_stands_for_is_counted(write, mark):
    row = talk(("human", f"<image>What is {mark}?", {}), ("gpt", "a", {}), image="a.png")
    source = open_source(write(row, row))
    assert source[0].turns[0].text == f"What is {mark}?"
    source[1]
    assert list(source.unread.found) == [mark]
    assert source.unread.found[mark].count == 2


def test_key_in_whose_place_an_option_names_another_is_not_counted(write, tmp_path):
    row = {"image": "a.png", "photo": "a.png", "caption": "x", "kind": "pet", "mood": "glad"}
    source = open_source(f"{write(row)}?caption=kind&image=photo")
    assert source[0].answer == "pet"
    assert list(source.unread.found) == ["mood"]
    source = open_source(write(row))
    assert source[0].answer == "x"
    assert list(source.unread.found) == ["photo", "kind", "mood"]
    path = tmp_path / "rows.tsv"
    path.write_text("image\ttext\tkind\tmood\na.png\tx\tpet\tglad\n")
    assert list(open_source(f"{path}?caption=kind").unread.found) == ["mood"]
    image = {"bytes": b"x", "path": None}
    table = Dataset.from_dict({"image": [image], "caption": ["x"], "kind": ["pet"]})
    assert TableSource(table, "t", RowFormat(caption="kind")).unread.found == {}
    assert list(TableSource(table, "t").unread.found) == ["kind"]


def test_model_that_reads_no_prompts_says_that_rows_have_some(write):
    asked = talk(("human", "<image>What is it?", {}), ("gpt", "a", {}), image="a.png")
    source = open_source(write(asked, {"image": "a.png", "caption": "x"}))
    assert said([source]) == ["rows checked, without fault: 2 of rows.jsonl"]
    assert said([source], reads_prompts=False)[0] == (
        "rows.jsonl: 1 of 2 rows checked have a question or a system message, which this model "
        "does not read; answers are"
    )


def test_model_that_reads_no_system_message_says_that_rows_have_some(write):
    asked = talk(("system", "Be brief.", {}), ("human", "<image>?", {}), ("gpt", "a", {}))
    source = open_source(write({**asked, "image": "a.png"}, {"image": "a.png", "caption": "x"}))
    assert said([source], reads_system=False)[0] == (
        "rows.jsonl: 1 of 2 rows checked have a system message, which this model does not read; "
        "the rest is"
    )


def said(sources, **options):
    lines = []
    check_start(sources, "raise", lambda text, **_: lines.append(text), **options)
    return lines


@pytest.mark.slow
def test_key_in_every_row_is_told_once_with_its_count(write, capfd):
    rows = 20_000
    row = {"image": "a.png", "caption": "x", "id": 7, "mood": "glad"}
    source = open_source(write(*[row] * rows, {**row, "hue": 3}))
    assert said([source]) == [
        "rows.jsonl: key 'mood' is not read: 1,000 times in 1,000 rows checked, "
        "rows.jsonl:1: 'glad'"
    ]
    for number in range(len(source)):
        assert source[number].answer == "x"
    assert source.unread.found["mood"].count == rows + 1001
    err = capfd.readouterr().err
    assert err == "rows.jsonl:20001: key 'hue' is not read: 3\n"  # first met after the start


@pytest.mark.slow
def test_key_that_changes_rows_stops_a_run_at_its_start_or_where_it_is_met(write):
    row = {"image": "a.png", "caption": "x"}
    path = write(*[row] * 1000, {**row, "tools": "[1]"})
    source = open_source(path)
    said([source])
    with pytest.raises(BadSource, match=r"^rows.jsonl:1001: key 'tools'"):
        source[1000]
    with pytest.raises(BadSource, match=r"change what they mean: tools; rows.jsonl:1001 has"):
        said([open_source(path)], rows=2000)
    lines = said([open_source(path, ignore_keys=["tools"])], rows=2000)
    assert lines == [
        "rows.jsonl: key 'tools' is not read: 1 times in 1,001 rows checked, rows.jsonl:1001: '[1]'"
    ]


def test_columns_of_tables_that_are_not_read_are_counted_at_opening(tmp_path):
    image = {"bytes": b"x", "path": None}
    rows = {"image": [image] * 3, "caption": ["a", "b", "c"], "mood": ["m"] * 3}
    source = TableSource(Dataset.from_dict(rows), "t")
    held = source.unread.found["mood"]
    assert (held.count, held.name, held.value) == (3, "t[0]", "'m'")
    rows |= {"system": ["", "Be brief.", ""], "tools": ["", "", "[1]"]}
    source = TableSource(Dataset.from_dict(rows), "t")
    assert [turn.role for turn in source[0].turns] == ["user", "assistant"]
    assert source[1].turns[0] == Turn("system", ("Be brief.",))
    with pytest.raises(BadSource, match=r"^t\[2\]: key 'tools'"):
        source[2]


def test_columns_of_lists_that_are_not_read_are_counted_at_opening(write, tmp_path):
    write()
    path = tmp_path / "rows.tsv"
    path.write_text(
        "image\ttext\tmood\tsystem\ttools\tvideo\n"
        "a.png\tone\tglad\tBe brief.\t\t\na.png\ttwo\t\t\t[1]\t\na.png\tthree\t\t\t\tx.mp4\n"
    )
    source = open_source(str(path), prompt="?")
    held = source.unread.found["mood"]
    assert (held.count, held.name, held.value) == (3, "rows.tsv:2", "'glad'")
    assert source[0].turns == (
        Turn("system", ("Be brief.",)),
        Turn("user", (None, "?")),
        Turn("assistant", ("one",)),
    )
    with pytest.raises(BadSource, match=r"^rows.tsv:3: key 'tools'"):
        source[1]
    with pytest.raises(BadRow, match=r"^rows.tsv:4: .*found video"):
        source[2]


def test_keys_and_members_of_shards_that_are_not_read_are_counted(tmp_path):
    row = {"mood": "glad", "system": "Be brief.", "url": "http://x"}
    members = {"a.png": b"1", "a.json": json.dumps(row).encode(), "a.txt": b"one"}
    members |= {"a.npy": b"2", "b.png": b"1", "b.txt": b"two", "b.npy": b"2"}
    write_tar(tmp_path / "s.tar", members)
    source = open_source(str(tmp_path / "s.tar"))
    assert source[0].turns[0] == Turn("system", ("Be brief.",))
    assert source[0].answer == "one"
    assert {key: held.count for key, held in source.unread.found.items()} == {".npy": 2, "mood": 2}
    write_tar(tmp_path / "v.tar", members | {"b.mp4": b"3"})
    with pytest.raises(BadSource, match=r"v.tar:b: .*found 1 members .mp4; --ignore-keys .mp4"):
        open_source(str(tmp_path / "v.tar"))
    assert len(open_source(str(tmp_path / "v.tar"), ignore_keys=[".mp4"])) == 2


def test_inspected_rows_show_the_system_message_and_unscored_answers(write, capsys):
    row = talk(
        ("human", "<image>one?", {}),
        ("gpt", "bad", {"weight": 0}),
        ("human", "two?", {}),
        ("gpt", "good", {}),
        image="a.png",
        system="Be brief.",
    )
    model = training.model()
    console = Console(no_color=True, force_terminal=False, width=300)
    rows = [model.processor.encode(open_source(write(row))[0])]
    for pack in (None, 500):
        show_rows(rows, model, console, pack)
        out = capsys.readouterr().out
        assert "system message  'Be brief.'" in out
        assert "1 answer not scored" in out
        assert "[unscored: bad]<|im_end|>" in out
        assert "[[good<|im_end|>]]" in out
