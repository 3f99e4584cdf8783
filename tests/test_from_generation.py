"""Text that a model wrote, as lines and words with confidences."""

import math

import pytest

from tests import tiny
from vlm.ocr.from_generation import reading_of, tokens_of
from vlm.text.generation import Generation


def generation(text, probabilities=None, end=True):
    """A text as a model would write it, byte by byte; each id has its probability."""
    tokenizer = tiny.text_tokenizer()
    ids = tokenizer(text + "<|im_end|>" * end)["input_ids"]
    given = probabilities or [0.5] * len(ids)
    assert len(given) == len(ids)
    return Generation(text, tuple(ids), tuple(map(math.log, given))), tokenizer


def test_tokens_join_to_the_text_and_whole_characters():
    made, tokenizer = generation("né €")
    tokens = tokens_of(made, tokenizer)
    assert [token.text for token in tokens] == ["n", "", "é", " ", "", "", "€", ""]
    assert all(token.confidence == pytest.approx(0.5) for token in tokens)


def test_confidences_of_lines_cover_their_breaks_and_those_of_words_do_not():
    made, tokenizer = generation("ab c\nd", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    reading = reading_of(made, tokenizer, (40, 60))
    assert [line.text for line in reading.lines] == ["ab c", "d"]
    first, last = reading.lines
    assert first.confidence == pytest.approx(0.9 * 0.8 * 0.7 * 0.6 * 0.5)
    assert last.confidence == pytest.approx(0.4 * 0.3)
    assert [(w.text, w.confidence) for w in reading.words] == [
        ("ab", pytest.approx(0.72)), ("c", pytest.approx(0.6)), ("d", pytest.approx(0.4)),
    ]  # fmt: skip
    assert first.xyxy_px == last.xyxy_px == (0, 0, 60, 40)
    assert all(word.xyxy_px is None for word in reading.words)


@pytest.mark.parametrize("end", [True, False])
def test_blank_lines_are_none(end):
    made, tokenizer = generation("\n\na\n \n", end=end)
    reading = reading_of(made, tokenizer, (4, 6))
    assert reading.text == "a"
    assert reading.lines[0].confidence == pytest.approx(0.25)
    nothing, tokenizer = generation("")
    assert reading_of(nothing, tokenizer, (4, 6)).lines == ()
