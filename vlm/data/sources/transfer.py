"""Any source as rows of one task in PaliGemma's form: an image, one prompt, one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from string import Formatter

from vlm.data.dice import Dice
from vlm.data.example import BadRow, BadSource, Example, Turn
from vlm.data.sources.base import Derived, Source

SEPARATOR = " ; "
"""Stands between the things that are asked for at once, and between the boxes of an answer."""


class Prompted(Derived):
    """Another source's questions put as a prompt.

    prompt: `{question}` is the place of what the user says beside the images, which come first;
        without one, all of the user's text is replaced ("caption en").
    Raises BadSource for a prompt with other braces. Reading a row raises BadRow where it is no one
    question with its answer.
    """

    def __init__(self, source: Source, prompt: str) -> None:
        require_fields(prompt, ("question",))
        super().__init__(source)
        self.prompt = prompt

    def read(self, row: int) -> Example:
        example = self.source.read(row)
        roles = [turn.role for turn in example.turns]
        if roles != ["user", "assistant"]:
            raise BadRow(
                f"{example.name}: expected one question and its answer, found turns of "
                f"{', '.join(roles)}"
            )
        asked, answer = example.turns
        return replace(example, turns=(put_into(asked, self.prompt), answer))


def put_into(asked: Turn, prompt: str) -> Turn:
    """A question put into a prompt as `Prompted` does it, its images first.

    >>> put_into(Turn("user", ("who", None)), "answer en {question}").content
    (None, 'answer en who')
    """
    return Turn("user", (*[None] * asked.slots, prompt.format(question=asked.text.strip())))


class Detect(Derived):
    """Another source's images and boxes, some labels of each image asked for at once; what its
    rows say is ignored.

    prompt: `{phrase}` is the place of the labels. seed: of how many labels a row asks for, which,
        and in what order; all that are asked for are on the image.
    Raises BadSource for a prompt without `{phrase}` or with other braces. Reading a row raises
    BadRow where it has no box, or more than one image.
    """

    def __init__(self, source: Source, prompt: str, seed: int = 0) -> None:
        if require_fields(prompt, ("phrase",)) != {"phrase"}:
            raise BadSource(f"prompt: expected {{phrase}} where labels go, found {prompt!r}")
        super().__init__(source)
        self.prompt, self.seed = prompt, seed

    def read(self, row: int) -> Example:
        example = self.source.read(row)
        left = list(dict.fromkeys(box.label for box in example.boxes))
        dice = Dice(self.seed, row, "labels")
        count = dice.between(1, len(left)) if left else 0
        asked = [left.pop(dice.between(0, len(left) - 1)) for _ in range(count)]
        return detection(example, asked, self.prompt)


def detection(example: Example, labels: Sequence[str], prompt: str) -> Example:
    """The example with its turns replaced: the image with `prompt`, whose `{phrase}` are these
    labels, and as the answer each box of them with its label after it. Boxes of one label stand
    together, those further up first, then those further left.

    Raises BadRow where a label has no box, none is given, or there is more than one image.

    >>> from vlm.data.example import Box, ImageRef
    >>> boxes = (Box(0, (5, 9, 7, 11), "cup"), Box(0, (1, 2, 3, 4), "cat"))
    >>> row = Example("r", (Turn("user", (None,)),), (ImageRef(b"", "r.png"),), boxes)
    >>> asked, answer = detection(row, ["cat", "cup"], "detect {phrase}").turns
    >>> asked.content, answer.content
    ((None, 'detect cat ; cup'), (1, ' cat', ' ; ', 0, ' cup'))
    """
    if len(example.images) != 1:
        raise BadRow(
            f"{example.name}: expected one image, so that an answer says where its boxes are, "
            f"found {len(example.images)}"
        )
    if "" in labels:
        raise BadRow(f"{example.name}: expected boxes with labels to ask for, found one without")
    answer: list[str | int] = []
    for label in labels:
        numbers = [i for i, box in enumerate(example.boxes) if box.label == label]
        if not numbers:
            raise BadRow(f"{example.name}: expected a box of {label!r}, found none")
        for i in sorted(numbers, key=lambda i: example.boxes[i].xyxy_px[1::-1]):
            answer += [SEPARATOR] * bool(answer) + [i, f" {label}"]
    if not answer:
        raise BadRow(f"{example.name}: expected boxes to ask for, found none")
    asks = prompt.format(phrase=SEPARATOR.join(labels))
    turns = Turn("user", (None, asks)), Turn("assistant", tuple(answer))
    return replace(example, turns=turns)


def require_fields(prompt: str, known: Sequence[str]) -> set[str]:
    """The fields of a prompt. Raises BadSource for one that is not known, and for lone braces."""
    try:
        fields = {field for _, field, _, _ in Formatter().parse(prompt) if field is not None}
    except ValueError as error:
        raise BadSource(f"prompt {prompt!r}: expected fields in braces ({error})") from error
    if not fields <= set(known):
        raise BadSource(
            f"prompt: expected no fields but {' and '.join(f'{{{name}}}' for name in known)}, "
            f"found {prompt!r}"
        )
    return fields
