"""Scenes of coloured shapes whose captions, answers and boxes are true by construction.

For trying out training and for tests: endless, free of licences, and every claim can be checked
against the scene that made it. A scene follows from (seed, row) alone.
"""

from __future__ import annotations

import io

from vlm.data.dice import Dice
from vlm.data.example import BadSource, Box, Example, Turn, caption_example
from vlm.data.grounding import ground
from vlm.data.sources.base import Source
from vlm.data.synthetic.options import Options, read_options
from vlm.data.synthetic.scene import (
    BACKGROUNDS,
    HELD_BACK,
    Scene,
    compose,
    draw,
    exact_box,
)
from vlm.data.synthetic.scene_text import ask, caption
from vlm.pixels.image_ref import ImageRef

TASKS = ("caption", "question", "mixed", "ground")


class Scenes(Source):
    """Drawn scenes as examples, with boxes of every shape.

    count: the number of rows. seed: any integer.
    task: "caption" (the user's `prompt` after the image), "question", "mixed", where even rows are
        captions and odd rows questions, or "ground", which asks where each kind of shape is.
    size_hw: pixels; None gives each row its own, from 128 to 320 a side.
    shapes: the fewest and the most shapes of a scene, 1 to 9; where little space is left, fewer.
    background: a kind of BACKGROUNDS or HELD_BACK for all; None gives each row one of BACKGROUNDS.
    Images are PNG bytes, drawn when a row is read. Rows are named NAME[ROW].
    """

    drawn = True

    def __init__(
        self,
        count: int,
        seed: int = 0,
        task: str = "caption",
        size_hw: tuple[int, int] | None = (224, 224),
        shapes: tuple[int, int] = (1, 4),
        background: str | None = None,
        prompt: str = "",
        name: str | None = None,
    ) -> None:
        if task not in TASKS:
            raise BadSource(f"scenes: expected a task of {', '.join(TASKS)}, found {task!r}")
        if not 1 <= shapes[0] <= shapes[1] <= 9:
            raise BadSource(f"scenes: expected 1 <= fewest <= most <= 9 shapes, found {shapes}")
        if size_hw is not None and min(size_hw) < 32:
            raise BadSource(f"scenes: expected at least 32 pixels a side, found {size_hw}")
        if background not in (None, *BACKGROUNDS, *HELD_BACK):
            kinds = ", ".join(BACKGROUNDS + HELD_BACK)
            raise BadSource(f"scenes: expected a background of {kinds}, found {background!r}")
        self._background = background
        self.name = name or f"scenes:{count}:seed={seed}"
        self._count, self._seed, self._task = count, seed, task
        self._size_hw, self._shapes, self._prompt = size_hw, shapes, prompt
        self.require_rows()

    @classmethod
    def from_text(cls, text: str, prompt: str = "") -> Scenes:
        """Scenes of "COUNT:KEY=VALUE:..."; keys are seed, task, size (HxW, or "mixed"), shapes
        (FEWEST-MOST) and background. Raises BadSource naming the part that does not fit."""
        usage = (
            f":seed=3 :task={'|'.join(TASKS)} :size=HxW or :size=mixed :shapes=1-4 :background=KIND"
        )
        count, given = read_options(text, _OPTIONS, "scenes", usage)
        return cls(count, **given, prompt=prompt, name=f"scenes:{text}")

    def __len__(self) -> int:
        return self._count

    def row_name(self, row: int) -> str:
        return f"{self.name}[{row}]"

    def scene(self, row: int) -> Scene:
        """What a row shows."""
        return compose(self._seed, row, self._size_hw, self._shapes, self._background)

    def read(self, row: int) -> Example:
        scene, name = self.scene(row), self.row_name(row)
        packed = io.BytesIO()
        draw(scene).save(packed, "PNG", compress_level=1)
        image = ImageRef(packed.getvalue(), name)
        boxes = tuple(Box(0, exact_box(shape), shape.label) for shape in scene.shapes)
        if self._task == "ground":
            return ground(Example(name, (Turn("user", (None,)),), (image,), boxes))
        if self._task == "caption" or (self._task == "mixed" and row % 2 == 0):
            example = caption_example(name, image, caption(scene), self._prompt)
            return Example(name, example.turns, (image,), boxes)
        question = ask(scene, Dice(self._seed, row, "question"))
        turns = Turn("user", (None, question.text)), Turn("assistant", (question.answer,))
        return Example(name, turns, (image,), boxes)


def _size(text: str) -> tuple[int, int] | None:
    if text == "mixed":
        return None
    height, width = text.split("x")
    return int(height), int(width)


def _range(text: str) -> tuple[int, int]:
    fewest, most = text.split("-")
    return int(fewest), int(most)


_OPTIONS: Options = {
    "seed": ("seed", int),
    "task": ("task", str),
    "size": ("size_hw", _size),
    "shapes": ("shapes", _range),
    "background": ("background", str),
}
