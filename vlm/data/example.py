"""The one schema of a training or evaluation example, whatever source it comes from.

An example is a conversation: turns of text with images in their places. A caption is a
conversation of two turns. Images are references until they are needed: decoding happens in the
loader's workers, through `vlm.pixels.open_image`, which refuses unsafe input.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROLES = ("system", "user", "assistant")


class BadRow(ValueError):
    """A row that cannot be used; the message names file, row, what was expected and found."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was left out, and why; the trainer counts these and reports them."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A picture not yet decoded.

    data: encoded bytes (PNG, JPEG, ...), or the path of a file.
    name: where it comes from, for messages, such as "train.tar: 1f600.png".
    """

    data: bytes | Path
    name: str


@dataclass(frozen=True, slots=True)
class Box:
    """A box on one image of the example, in that image's own pixels after EXIF rotation:
    x0, y0, x1, y1, origin top left, end exclusive."""

    image: int
    xyxy_px: tuple[float, float, float, float]
    label: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says: `content` is text, with None at the place of each image."""

    role: str
    content: tuple[str | None, ...]

    @property
    def text(self) -> str:
        """The text alone, image places left out."""
        return "".join(part for part in self.content if part is not None)

    @property
    def slots(self) -> int:
        """The number of image places."""
        return sum(part is None for part in self.content)


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation.

    name: the row's own name, unique within its source, such as "train.jsonl:12"; used in
        messages and in the record of which rows a batch held.
    turns: at least one; roles are "system" (first only), then "user" and "assistant" in turn.
    images: in the order of their places in the turns, all turns counted through.
    boxes: what is drawn where, for grounding; may be empty.
    """

    name: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...] = ()
    boxes: tuple[Box, ...] = ()

    def __post_init__(self) -> None:
        slots = sum(turn.slots for turn in self.turns)
        if slots != len(self.images):
            raise BadRow(
                f"{self.name}: the turns have {slots} image places, the row has "
                f"{len(self.images)} images"
            )
        for turn in self.turns:
            if turn.role not in ROLES:
                raise BadRow(f"{self.name}: role {turn.role!r} is not one of {', '.join(ROLES)}")
        for box in self.boxes:
            if not 0 <= box.image < len(self.images):
                raise BadRow(
                    f"{self.name}: a box names image {box.image}, the row has {len(self.images)}"
                )

    def question(self) -> Example:
        """The example without its last answer and what follows it, to be answered."""
        last = max(i for i, turn in enumerate(self.turns) if turn.role == "assistant")
        turns = self.turns[:last]
        return Example(self.name, turns, self.images[: sum(turn.slots for turn in turns)])

    @property
    def answer(self) -> str:
        """The text of the last assistant turn, or "" where there is none."""
        answers = [turn.text for turn in self.turns if turn.role == "assistant"]
        return answers[-1] if answers else ""


def caption_example(name: str, image: ImageRef, caption: str, prompt: str) -> Example:
    """An image with its caption, as the user's `prompt` after the image and the answer to it.

    >>> caption_example("a.tar:cat", ImageRef(b"", "cat.png"), "a cat", "What is this?").answer
    'a cat'
    """
    if not caption.strip():
        raise BadRow(f"{name}: expected a caption, found an empty text")
    user = Turn("user", (None, prompt) if prompt else (None,))
    return Example(name, (user, Turn("assistant", (caption.strip(),))), (image,))
