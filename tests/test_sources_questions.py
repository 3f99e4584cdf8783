"""Rows of questions with several right answers, in every place that rows come from."""

import json

import pytest

from tests import tiny
from vlm.data.example import BadRow, Turn
from vlm.data.sources import RowFormat, RowsSource, open_source

QUESTION = {"image": "a.png", "question": "How many?"}


@pytest.fixture
def read(tmp_path):
    """The source of one row, in a file beside two images."""
    for i, name in enumerate(("a.png", "b.png")):
        tiny.image(i, (5, 3)).save(tmp_path / name)

    def read(row, **options):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        return RowsSource(tmp_path / "rows.jsonl", RowFormat(**options))

    return read


def test_question_learns_what_most_annotators_said_and_keeps_all(read):
    source = read(QUESTION | {"answers": ["two", "2", " 2 ", "three"], "question_id": 7})
    example = source[0]
    assert example.turns == (Turn("user", (None, "How many?")), Turn("assistant", ("2",)))
    assert example.references == ("two", "2", "2", "three")
    assert not source.unread.found
    assert example.question().references == ()


def test_answers_may_be_objects_as_in_vqas_annotations(read):
    answers = [{"answer": "yes", "answer_id": 1}, {"answer": "no", "answer_id": 2}]
    example = read(QUESTION | {"image": ["a.png", "b.png"], "answers": answers})[0]
    assert example.references == ("yes", "no")
    assert example.turns[0].content == (None, None, "How many?")


def test_answers_beside_a_conversation_are_those_of_its_last_question(read):
    talk = [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "a cat"}]
    row = {"image": "a.png", "messages": talk, "answers": ["a cat", "cat"]}
    example = read(row)[0]
    assert (example.answer, example.references) == ("a cat", ("a cat", "cat"))
    left_out = read(row, ignore=frozenset(["answers"]))
    assert left_out[0].references == ()
    other = read(row | {"answers": {"text": ["cat"], "answer_start": [0]}})
    assert other[0].references == ()
    assert list(other.unread.found) == ["answers"]


@pytest.mark.parametrize("answers", [None, [], ["yes", " "], "yes", [{"text": "yes"}], [3]])
def test_question_without_a_list_of_texts_is_refused(read, answers):
    row = QUESTION if answers is None else QUESTION | {"answers": answers}
    with pytest.raises(BadRow, match=r"rows\.jsonl:1: expected answers to be a list of texts"):
        read(row)[0]


def test_question_that_is_no_text_is_refused(read):
    with pytest.raises(BadRow, match=r"rows\.jsonl:1: expected question to be text, found '  '"):
        read({"image": "a.png", "question": "  ", "answers": ["yes"]})[0]


def test_tables_may_have_columns_of_questions_and_answers(tmp_path):
    from datasets import Dataset

    tiny.image(0, (5, 3)).save(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    table = {"image": [image], "question": ["How many?"], "answers": [["two", "2"]]}
    Dataset.from_dict(table).save_to_disk(tmp_path / "table")
    source = open_source(str(tmp_path / "table"))
    assert source[0].references == ("two", "2")
    assert not source.unread.found
