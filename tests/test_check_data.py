"""Data are checked before they are trained on: every kind of source, by a command and by runs."""

import json
import re

import pytest
from datasets import Dataset
from PIL import Image

from tests.rows import annotation, png, records, sample, write_tar
from vlm import cli
from vlm.data.check import check_source, check_start, say_on
from vlm.data.example import BadRow
from vlm.data.sources import TableSource, open_source

GOOD = {"image": "a.png", "caption": "x"}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def check(*arguments):
    """The exit code of `vlm check-data`."""
    try:
        cli.main(["check-data", *map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


def kinds(report):
    return {kind: count for kind, (count, _) in report.kinds.items()}


def test_faults_of_rows_are_counted_by_kind_with_the_first_named(folder):
    faults = [
        {"image": "gone.png", "caption": "x"},
        {"image": "broken.png", "caption": "x"},
        {"image": "away.png", "caption": "x"},
        {"image": "a.png", "caption": " "},
        {**GOOD, "boxes": [{"xyxy": [0, 0, 99, 9], "label": "cat"}]},
    ]
    source = open_source(write(folder, *[GOOD] * 600, *faults, *[GOOD] * 600))
    for workers in (1, 2):
        report = check_source(source, workers=workers)
        assert (report.rows, report.bad, report.clean) == (1205, 5, False)
        missing = [kind for kind in kinds(report) if kind.startswith("image file")]
        assert [kinds(report)[kind] for kind in missing] == [2]
        first = report.kinds[missing[0]][1]
        assert [message.partition(": ")[0] for message in first] == [
            "rows.jsonl:601",
            "rows.jsonl:603",
        ]
        assert sorted(kinds(report).values()) == [1, 1, 1, 2]


def test_keys_are_counted_over_all_processes(folder):
    rows = [{**GOOD, "mood": "glad", **({"tools": "[]x"} if i == 700 else {})} for i in range(1000)]
    for workers in (1, 2):
        report = check_source(open_source(write(folder, *rows)), workers=workers)
        assert {key: held.count for key, held in report.unread.items()} == {
            "mood": 1000,
            "tools": 1,
        }
        assert report.unread["tools"].name == "rows.jsonl:701"
        assert (report.changing, report.bad, report.clean) == (("tools",), 0, False)


def test_command_ends_by_what_it_found(folder, capsys):
    path = write(folder, GOOD, {**GOOD, "mood": "glad"})
    assert check(path) == 0
    out = capsys.readouterr().out
    assert re.search(r"rows.jsonl: 2 rows checked in .* s \(.* rows/s\), without fault", out)
    assert re.search(r"mood +│ +1 │ rows.jsonl:2 │ 'glad'", out)
    path = write(folder, GOOD, {**GOOD, "image": "b.png"}, {**GOOD, "tools": "x"})
    assert check(path, "--workers", 2) == 1
    out = capsys.readouterr().out
    assert "3 rows checked" in out
    assert "1 cannot be used" in out
    assert "tools (changes the row)" in out
    assert check(path, "--rows", 1) == 0
    assert "1 of 3 rows checked" in capsys.readouterr().out
    path = write(folder, {**GOOD, "tools": "x"})
    assert check(path) == 1
    assert check(path, "--ignore-keys", "tools") == 0


def test_command_checks_the_others_where_a_source_does_not_open(folder, capsys):
    path = write(folder, GOOD)
    assert check(folder / "gone.jsonl", path) == 1
    out = capsys.readouterr().out
    assert "gone.jsonl: cannot be read" in out
    assert "1 rows checked" in out


def test_command_tells_bad_boxes_as_faults_or_as_what_is_skipped(folder, capsys):
    values = records()
    values["annotations"].append(annotation(9, 70, 2, [50, 5, 20, 10]))
    for image in values["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(folder / image["file_name"])
    (folder / "boxes.json").write_text(json.dumps(values))
    assert check(f"coco:{folder}/boxes.json") == 1
    assert "annotation 9 of image 70" in " ".join(capsys.readouterr().out.split())
    assert check(f"coco:{folder}/boxes.json", "--bad-boxes", "skip") == 0
    assert check(f"coco:{folder}/boxes.json?bad_boxes=skip") == 0
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    assert check(f"coco:{folder}/boxes.json", "--bad-boxes", "skip") == 1  # not the file's size
    assert "1 cannot be used" in capsys.readouterr().out


def test_every_kind_of_rows_is_checked_alike(folder):
    (folder / "rows.tsv").write_text("image\ttext\na.png\tone\ngone.png\ttwo\na.png\t \n")
    assert check_source(open_source(str(folder / "rows.tsv"))).bad == 2
    (folder / "rows.json").write_text(json.dumps([GOOD, {**GOOD, "image": "broken.png"}]))
    assert check_source(open_source(str(folder / "rows.json"))).bad == 1
    write_tar(folder / "s.tar", sample("a") | {"b.png": b"no image", "b.txt": b"x"})
    assert check_source(open_source(str(folder / "s.tar"))).bad == 1
    images = [{"bytes": data, "path": None} for data in (png(), b"no image", png())]
    table = Dataset.from_dict({"image": images, "caption": ["x", "y", ""]})
    assert check_source(TableSource(table, "t")).bad == 2


def test_samples_that_merge_are_told_when_shards_are_checked(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    members = {"p.1.png": png(), "p.1.txt": b"one", "p.2.png": png(), "p.2.txt": b"two"}
    write_tar(folder / "s.tar", members)
    assert check(folder / "s.tar") == 1
    assert "s.tar:p (1.png, 1.txt, 2.png, 2.txt)" in capsys.readouterr().out


def start(sources, bad_rows="raise", rows=1000):
    lines = []
    check_start(sources, bad_rows, lambda text, **_: lines.append(text), rows)
    return lines


def test_run_starts_with_one_line_where_all_is_well(folder):
    source, drawn = open_source(write(folder, *[GOOD] * 30)), open_source("scenes:1000000000")
    assert start([source, drawn], rows=20) == ["rows checked, without fault: 20 of rows.jsonl"]
    assert start([drawn]) == []


def test_run_stops_before_its_first_step_or_counts_bad_rows(folder):
    bad = {"image": "gone.png", "caption": "x"}
    with pytest.raises(BadRow, match=r"^rows.jsonl:2: image file 'gone.png' is not under \S+"):
        start([open_source(write(folder, GOOD, bad))])
    source = open_source(write(folder, GOOD, bad, bad))
    with pytest.raises(BadRow, match=r"rows.jsonl:2: .*one of 2 such among the first 3 rows of"):
        start([source])
    (line,) = start([source], "skip")
    assert line.startswith("rows.jsonl: 2 of the first 3 rows skipped, such as rows.jsonl:2: ")
    assert start([source], None) == []  # whoever reads them says it


def test_names_of_data_are_printed_as_they_are(folder, capsys):
    """rich would take :cat: for an emoji, and [b] for its markup."""
    write(folder, {**GOOD, "mood [b] :cat:": "glad"})
    named = folder / "a:cat:[b].jsonl"
    (folder / "rows.jsonl").rename(named)
    assert check(named) == 0
    assert "a:cat:[b].jsonl: 1 rows checked" in (out := capsys.readouterr().out)
    assert "mood [b] :cat:" in out
    check_start([open_source("sample:train")], "raise", say_on(True), rows=2)
    assert capsys.readouterr().err == "rows checked, without fault: 2 of sample:train\n"


def test_image_that_cannot_be_read_is_named_with_its_row_once(tmp_path):
    (tmp_path / "empty.png").touch()
    row = {"image": "empty.png", "caption": "nothing"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    ((_, (first,)),) = check_source(open_source(str(tmp_path / "rows.jsonl"))).kinds.values()
    assert first.count("rows.jsonl") == 1


def test_command_refuses_an_empty_name_in_one_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["check-data", ""])
    assert capsys.readouterr().err.endswith("such as rows.jsonl, found an empty name\n")
