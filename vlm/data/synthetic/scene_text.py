"""What can truly be said of a scene: a caption, and questions with their one right answer."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from vlm.data.dice import Dice
from vlm.data.synthetic.scene import KINDS, Scene, Shape

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Question(NamedTuple):
    """A question on a scene with its one right answer.

    kind: "count", "colour", "shape", "where" or "yes-no".
    """

    kind: str
    text: str
    answer: str


def caption(scene: Scene) -> str:
    """What a scene shows: one shape and its place, two and how they lie, or more, counted.

    >>> from vlm.data.synthetic.scene import Background
    >>> one = Shape("circle", "red", (0, 0, 9, 9))
    >>> two = Shape("star", "blue", (20, 2, 30, 12))
    >>> caption(Scene((40, 40), Background("plain", (0, 0, 0), (0, 0, 0), 0), (one, two)))
    'a red circle left of a blue star'
    """
    shapes = scene.shapes
    if len(shapes) == 1:
        return f"{_a(shapes[0].label)} at the {place(scene, shapes[0])}"
    if len(shapes) == 2 and shapes[0].label != shapes[1].label:
        return f"{_a(shapes[0].label)} {relation(*shapes)} {_a(shapes[1].label)}"
    labels = [shape.label for shape in shapes]
    groups = [
        _a(label) if labels.count(label) == 1 else _many(labels.count(label), label)
        for label in dict.fromkeys(labels)
    ]
    return " and ".join([", ".join(groups[:-1]), groups[-1]] if len(groups) > 1 else groups)


def questions(scene: Scene) -> list[Question]:
    """Every question that the scene settles; yes-no questions come in pairs, yes and no."""
    shapes = scene.shapes
    asked = [Question("count", "How many shapes are there?", str(len(shapes)))]
    labels = [shape.label for shape in shapes]
    kinds = [shape.kind for shape in shapes]
    colours = [shape.colour for shape in shapes]
    for kind in dict.fromkeys(kinds):
        asked.append(
            Question("count", f"How many {_plural(kind)} are there?", str(kinds.count(kind)))
        )
    for shape in shapes:
        if kinds.count(shape.kind) == 1:
            asked.append(Question("colour", f"What colour is the {shape.kind}?", shape.colour))
        if colours.count(shape.colour) == 1:
            asked.append(Question("shape", f"Which shape is {shape.colour}?", shape.kind))
        if labels.count(shape.label) == 1:
            asked.append(Question("where", f"Where is the {shape.label}?", place(scene, shape)))
    alone = [shape for shape in shapes if labels.count(shape.label) == 1]
    for first, second in pairwise(alone):
        true = relation(first, second)
        for said, answer in ((true, "yes"), (OPPOSITES[true], "no")):
            text = f"Is the {first.label} {said} the {second.label}?"
            asked.append(Question("yes-no", text, answer))
    absents: list[str] = []
    for label in dict.fromkeys(labels):
        absent = _absent(label, labels + absents)
        if absent is not None:
            absents.append(absent)
            asked.append(Question("yes-no", f"Is there {_a(label)}?", "yes"))
            asked.append(Question("yes-no", f"Is there {_a(absent)}?", "no"))
    return asked


def ask(scene: Scene, dice: Dice) -> Question:
    """One of the scene's questions: first a kind, then one of that kind."""
    asked = questions(scene)
    kind = dice.pick(list(dict.fromkeys(question.kind for question in asked)))
    return dice.pick([question for question in asked if question.kind == kind])


def relation(first: Shape, second: Shape) -> str:
    """How `first` lies to `second`, on the axis on which their middles are further apart."""
    (x0, y0), (x1, y1) = first.centre, second.centre
    if abs(x0 - x1) >= abs(y0 - y1):
        return "left of" if x0 <= x1 else "right of"
    return "above" if y0 < y1 else "below"


def place(scene: Scene, shape: Shape) -> str:
    """Which of the image's nine equal parts holds a shape's middle: "top left" to "centre"."""
    height, width = scene.size_hw
    x, y = shape.centre
    words = ("top", "", "bottom")[int(3 * y / height)], ("left", "", "right")[int(3 * x / width)]
    return " ".join(word for word in words if word) or "centre"


def _absent(label: str, labels: list[str]) -> str | None:
    """A shape of the same colour that is not among `labels`; None: all of them are."""
    colour, kind = label.split(" ")
    at = KINDS.index(kind)
    others = (f"{colour} {other}" for other in KINDS[at + 1 :] + KINDS[:at])
    return next((other for other in others if other not in labels), None)


def _a(label: str) -> str:
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def _plural(label: str) -> str:
    return f"{label}es" if label.endswith("s") else f"{label}s"


def _many(count: int, label: str) -> str:
    return f"{NUMBERS[count]} {_plural(label)}"
