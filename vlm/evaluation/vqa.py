"""Answers to questions about images: VQA accuracy, and ANLS for text read off documents.

    vlm eval vqa runs/stage3 --data scenes:200:seed=77:task=question
    vlm eval vqa runs/stage3 --data vqa.jsonl
    vlm eval vqa runs/stage3 --data docvqa.jsonl --prompt "{question}\\nAnswer with a short phrase."

A row is a question, {"image": PATH, "question": TEXT, "answers": [TEXT, ...]}, or a conversation,
whose last answer is asked for and is the one reference; "answers" beside it are the references
then. What is put into a prompt is the last question alone; earlier turns and a system message stay
before it as they are, and a row that the model's chat template refuses is a bad one (PaliGemma's
takes one question). Answers are greedy. Both metrics are given for all data: VQA accuracy (the ten
answers of VQA v2 are votes; of fewer each is right) and ANLS; see `vlm.metrics.vqa`.

In --out: result.json, answers.jsonl (every answer) and answers.png (some, with their images).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from vlm.config import to_dict
from vlm.data.example import BadRow, Example, Skipped
from vlm.data.sources import BadSource
from vlm.data.sources.transfer import put_into, require_fields
from vlm.evaluation import base
from vlm.families.decoder_only.generate import GREEDY
from vlm.families.decoder_only.model import ANSWER_PROMPT
from vlm.metrics.vqa import anls, vqa_accuracies, vqa_metrics
from vlm.pixels import BadImage, open_image
from vlm.training.run_folder import draw_captions

IMAGES = 16
"""Images on the page of answers."""


@dataclass(frozen=True, kw_only=True)
class Settings(base.Settings):
    """What is evaluated."""

    data: str
    """Questions about images: any source that the recipes take, such as vqa.jsonl."""
    prompt: str | None = None
    """What the last question is put into, with {question} in it; None: what the model was trained
    on."""
    out: Path = Path("runs/eval-vqa")
    """Where results go; earlier ones there are replaced."""
    batch: int = 16
    """Questions answered at once."""
    max_new_tokens: int = 32
    """Longest answer."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """Rows that cannot be read or are longer than the context: stop and name the row, or skip and
    count them. Rows without an image or an answer are always skipped and counted."""


@dataclass(slots=True)
class Answered:
    """A question of a row, its references, and what the model answered."""

    row: int
    name: str
    question: str
    references: tuple[str, ...]
    answer: str

    @property
    def pair(self) -> tuple[str, tuple[str, ...]]:
        return self.answer, self.references


class VqaEvaluation(base.Evaluation[Settings]):
    """VQA accuracy and ANLS of greedy answers."""

    task = "vqa"
    settings_type = Settings
    ability = "answer"
    least: ClassVar = {"batch": 1, "max_new_tokens": 1}
    files = ("answers.jsonl", "answers.png")

    def check(self) -> None:
        super().check()
        prompt = self.settings.prompt
        if prompt is None:
            return
        try:
            if require_fields(prompt, ("question",)) != {"question"}:
                raise BadSource(f"expected {{question}} where it goes, found {prompt!r}")
        except BadSource as error:
            raise BadSource(f"--prompt: {error}") from error

    def predict_all(self, model: Any, accelerator: Accelerator) -> list[Answered]:
        prompt = self.settings.prompt
        self.prompt = model.answer_prompt if prompt is None else prompt
        found = super().predict_all(model, accelerator)
        self.require_some(found)
        return found

    def predict(self, model: Any, places: range) -> list[tuple[int, Answered | Skipped]]:
        found: list[tuple[int, Answered | Skipped]] = []
        kept, encoded = [], []
        for place in places:
            name = self.source.row_name(self.rows[place])
            try:
                example = self.source[self.rows[place]]
                if (missing := _missing(example)) is not None:
                    found.append((place, Skipped(name, missing)))
                    continue
                question = self._asked(example)
                encoded.append(model.processor.encode_prompt(question))
                kept.append((place, example, question.turns[-1].text.strip()))
            except (BadRow, BadImage) as error:
                found.append((place, self.skip(name, error)))
        options = {"max_new_tokens": self.settings.max_new_tokens}
        written = model.write_after(encoded, self.batch, **options)
        for (place, example, asked), generation in zip(kept, written):
            references = example.references or (example.answer,)
            row, answer = self.rows[place], generation.text.strip()
            found.append((place, Answered(row, example.name, asked, references, answer)))
        return found

    def _asked(self, example: Example) -> Example:
        """What is asked of a row: its conversation without the last answer, the last question in
        the prompt."""
        question = example.question()
        if self.prompt == ANSWER_PROMPT:  # images stay where they stand in it
            return question
        *before, last = question.turns
        return replace(question, turns=(*before, put_into(last, self.prompt)))

    def score(
        self, model: Any, predictions: list[Answered], accelerator: Accelerator
    ) -> dict[str, Any]:
        return vqa_metrics([item.pair for item in predictions])

    def details(self, model: Any) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "system": model.processor.system,
            "preprocessing": to_dict(model.processor.pixel_spec),
            "decoding": {**GREEDY, "max_new_tokens": self.settings.max_new_tokens},
        }

    def show(self, result: dict[str, Any], console: Console) -> None:
        metrics = result["metrics"]
        title = f"{metrics['n']} questions of {base.data_of(result)}"
        table = Table("metric", "value", title=title)
        for name, key in (("VQA accuracy", "vqa_accuracy"), ("ANLS", "anls")):
            table.add_row(name, base.percent_with_ci(metrics, key))
        table.add_row("of ten references", str(metrics["n_ten_references"]))
        console.print(table)

    def write(self, predictions: list[Answered]) -> None:
        pairs = [item.pair for item in predictions]
        right, near = vqa_accuracies(pairs).tolist(), anls(pairs).tolist()
        with (self.out / "answers.jsonl").open("w", encoding="utf-8") as file:
            for item, accuracy, similarity in zip(predictions, right, near):
                line = {"row": item.name, "question": item.question, "answer": item.answer,
                        "references": item.references, "vqa_accuracy": accuracy,
                        "anls": similarity}  # fmt: skip
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        shown = predictions[:: max(1, len(predictions) // IMAGES)][:IMAGES]
        draw_captions(
            [open_image(self.source[item.row].images[0]) for item in shown],
            [f"{item.question} {' / '.join(dict.fromkeys(item.references))}" for item in shown],
            [item.answer for item in shown],
            self.out / "answers.png",
        )


def _missing(example: Example) -> str | None:
    """Why a row cannot be asked; None where it can."""
    if not example.answer.strip():
        return "no answer"
    return None if example.question().images else "no image"
