"""Evaluation of trained models: how well a model does a task on rows that it was not trained on.

A task is a file here with a subclass of `vlm.evaluation.base.Evaluation`, and a row of TASKS. What
all have in common (rows, ranks, result.json) is in `vlm.evaluation.base`, metrics themselves are
in `vlm.metrics`. Modules are named, not imported, so that looking at the table loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vlm.families.registry import named

if TYPE_CHECKING:
    from vlm.evaluation.base import Evaluation


class Task(NamedTuple):
    """MODULE:CLASS of the evaluation of a task, and what it measures."""

    evaluation: str
    said: str


TASKS = {
    "caption": Task(
        "vlm.evaluation.caption:CaptionEvaluation", "captions: exact match, CIDEr-D, BLEU-4"
    ),
    "vqa": Task("vlm.evaluation.vqa:VqaEvaluation", "answers to questions: VQA accuracy, ANLS"),
    "grounding": Task(
        "vlm.evaluation.grounding:GroundingEvaluation", "boxes of phrases: IoU 0.5, COCO's AP"
    ),
    "ocr": Task("vlm.evaluation.ocr:OcrEvaluation", "text read: CER, WER, exact match, speed"),
    "retrieval": Task(
        "vlm.evaluation.retrieval:RetrievalEvaluation", "images and captions: recall, mAP"
    ),
    "zero-shot": Task(
        "vlm.evaluation.zero_shot:ZeroShotEvaluation", "zero-shot classification: accuracy, ECE"
    ),
}
"""Name of a task on the command line -> its evaluation."""


def evaluation_class(task: str) -> type[Evaluation]:
    """The evaluation of a task. Raises ValueError for a name that TASKS does not have."""
    if task not in TASKS:
        raise ValueError(f"expected a task of {', '.join(TASKS)}, found {task!r}")
    return named(TASKS[task].evaluation)


def main(task: str, arguments: Sequence[str] | None = None) -> None:
    """Evaluates as the command line says (None), or `arguments`; a fault of the input ends the
    program with one line and exit code 1."""
    from vlm.evaluation.base import start

    start(evaluation_class(task), arguments)
