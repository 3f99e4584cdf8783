"""Boxes as conversations: what to ask for, and the answer in which boxes stand."""

from __future__ import annotations

from dataclasses import replace

from vlm.data.example import BadRow, Example, Turn

GROUND_PROMPT = "Where is {phrase}?"
"""What asks for the boxes of a phrase; `{phrase}` is its place."""


def ground(example: Example, prompt: str = GROUND_PROMPT, at_most: int | None = None) -> Example:
    """The example with its turns replaced by one question for each different label of its boxes,
    in the order in which they first stand, the answer being all boxes of that label, those further
    up first, then those further left. The image comes before the first question.

    at_most: how many labels are asked for; None asks for all.
    Raises BadRow where there is no box, one without a label, or more than one image.

    >>> from vlm.data.example import Box, ImageRef
    >>> boxes = (Box(0, (5, 9, 7, 11), "cup"), Box(0, (1, 2, 3, 4), "cup"))
    >>> seen = ground(Example("r", (Turn("user", (None,)),), (ImageRef(b"", "r.png"),), boxes))
    >>> [turn.content for turn in seen.turns]
    [(None, 'Where is cup?'), (1, 0)]
    """
    if not example.boxes:
        raise BadRow(f"{example.name}: expected boxes to ask for, found none")
    if len(example.images) != 1:
        raise BadRow(
            f"{example.name}: expected one image, so that an answer says where its boxes are, "
            f"found {len(example.images)}"
        )
    if not all(box.label for box in example.boxes):
        raise BadRow(f"{example.name}: expected boxes with labels to ask for, found one without")
    turns = []
    for label in list(dict.fromkeys(box.label for box in example.boxes))[:at_most]:
        numbers = [i for i, box in enumerate(example.boxes) if box.label == label]
        numbers.sort(key=lambda i: example.boxes[i].xyxy_px[1::-1])
        image = () if turns else (None,)
        turns.append(Turn("user", (*image, prompt.format(phrase=label))))
        turns.append(Turn("assistant", tuple(numbers)))
    return replace(example, turns=tuple(turns))
