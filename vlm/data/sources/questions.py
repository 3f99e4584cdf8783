"""Rows of questions with several right answers, as VQA and DocVQA have them.

    {"image": PATH or [PATH, ...], "question": TEXT, "answers": [TEXT, ...]}

The images come before the question. What is learned is the answer that most annotators gave (of
equally many the first); an evaluation compares with all. An answer may also be an object with its
text under "answer", as in VQA's own annotations. "answers" beside a conversation are those of its
last question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlm.data.example import BadRow, Turn
from vlm.pixels.image_ref import ImageRef

QUESTION_KEY, ANSWERS_KEY = "question", "answers"


def read_answers(value: Any) -> tuple[str, ...] | None:
    """The texts of a list of answers; None for a value that is no such list.

    >>> read_answers(["yes", {"answer": " no ", "answer_id": 2}]), read_answers({"text": ["yes"]})
    (('yes', 'no'), None)
    """
    if not isinstance(value, list | tuple) or not value:
        return None
    texts = [one.get("answer") if isinstance(one, Mapping) else one for one in value]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return None
    return tuple(text.strip() for text in texts)


def question_turns(
    row: Mapping, name: str, images: Sequence[ImageRef]
) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The turns of a row that is a question, and all its answers. Raises BadRow."""
    question = row[QUESTION_KEY]
    if not isinstance(question, str) or not question.strip():
        raise BadRow(f"{name}: expected {QUESTION_KEY} to be text, found {question!r}")
    answers = read_answers(row.get(ANSWERS_KEY))
    if answers is None:
        found = str(row.get(ANSWERS_KEY))[:60]
        raise BadRow(
            f"{name}: expected {ANSWERS_KEY} to be a list of texts, none empty, found {found!r}"
        )
    most_given = Counter(answers).most_common(1)[0][0]
    asked = Turn("user", (*[None] * len(images), question.strip()))
    return (asked, Turn("assistant", (most_given,))), answers
