"""The one schema of a training or evaluation example, whatever source it comes from.

An example is a conversation: turns of text with images in their places. A caption is a
conversation of two turns. Images are references until they are needed: decoding happens in the
loader's workers, through `vlm.pixels.open_image`, which refuses unsafe input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from vlm.pixels.image_ref import ImageRef

ROLES = ("system", "user", "assistant", "text")


class BadRow(ValueError):
    """A row that cannot be used; the message names file, row, what was expected and found."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was skipped, and why; the trainer counts these and reports them."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Box:
    """A box on one image of the example, in that image's own pixels after EXIF rotation:
    x0, y0, x1, y1, origin top left, end exclusive. score: of a predicted box, in 0 to 1; None for
    a true one."""

    image: int
    xyxy_px: tuple[float, float, float, float]
    label: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Video:
    """Frames that were taken from a video, in the place of an image.

    frames: images, in the order of time. times_s: when each is shown, from the start of the video,
        in seconds. duration_s: of the video; None: the time of the last frame.
    Raises ValueError where frames and times differ in number, there are none, a time is not finite,
    before 0 or before the one before it, or the duration ends before the last frame.
    """

    frames: tuple[Any, ...]
    times_s: tuple[float, ...]
    duration_s: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", tuple(self.frames))
        object.__setattr__(self, "times_s", tuple(self.times_s))
        if len(self.frames) != len(self.times_s) or not self.frames:
            raise ValueError(
                f"a video: expected frames with a time each, found {len(self.frames)} frames and "
                f"{len(self.times_s)} times"
            )
        times = (0.0, *self.times_s)
        if not all(before <= time < math.inf for before, time in zip(times, self.times_s)):
            raise ValueError(
                f"times_s of a video: expected 0 or more, none before the one before it, found "
                f"{list(self.times_s)}"
            )
        if self.duration_s is not None and not times[-1] <= self.duration_s < math.inf:
            raise ValueError(
                f"duration_s of a video: expected {times[-1]} or more, the time of its last frame, "
                f"found {self.duration_s}"
            )


class NonCausal(str):
    """A text in a turn that a docked text encoder reads at once, in both directions: it is read and
    never scored."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"NonCausal({super().__repr__()})"


@dataclass(frozen=True, slots=True, repr=False)
class Turn:
    """What one side says: `content` is text, with None at the place of each image, and a number i
    at the place of the example's i-th box, which is written as the model writes boxes. A text may
    be `NonCausal`.

    scored: whether it is learned, where it is the assistant's; else it is context, as all other
        turns are whatever this says.
    """

    role: str
    content: tuple[str | int | None, ...]
    scored: bool = True

    def __repr__(self) -> str:
        """`scored` where it is not the default alone: fingerprints of data hold turns so."""
        more = "" if self.scored else ", scored=False"
        return f"Turn(role={self.role!r}, content={self.content!r}{more})"

    @property
    def text(self) -> str:
        """The text alone, without image marks and boxes."""
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def is_learned(self) -> bool:
        """Whether this is an answer that is scored."""
        return self.role == "assistant" and self.scored

    @property
    def box_numbers(self) -> tuple[int, ...]:
        """The boxes that the turn writes."""
        return tuple(part for part in self.content if isinstance(part, int))

    @property
    def slots(self) -> int:
        """The number of image marks."""
        return sum(part is None for part in self.content)


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation.

    name: the row's own name, unique within its source, such as "train.jsonl:12"; used in
        messages and in the record of which rows a batch held.
    turns: at least one; roles are "system" (first only), then "user" and "assistant" in turn; or
        one turn of role "text": a document without images, all of which is learned.
    images: in the order of their places in the turns, all turns counted through; a video may stand
        in place of one.
    boxes: what is drawn where, for grounding; may be empty.
    references: all right answers to the last question, for evaluation; empty where the row has
        none beside the answer itself.
    """

    name: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef | Video, ...] = ()
    boxes: tuple[Box, ...] = ()
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        slots = sum(turn.slots for turn in self.turns)
        if slots != len(self.images):
            raise BadRow(
                f"{self.name}: the turns have {slots} image marks, the row has "
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
        for number in (number for turn in self.turns for number in turn.box_numbers):
            if not 0 <= number < len(self.boxes):
                raise BadRow(
                    f"{self.name}: a turn names box {number}, the row has {len(self.boxes)}"
                )
        shown = 0
        for turn in self.turns:
            shown += turn.slots
            early = [n for n in turn.box_numbers if self.boxes[n].image >= shown]
            if early:
                raise BadRow(
                    f"{self.name}: a turn names box {early[0]} on image "
                    f"{self.boxes[early[0]].image}, which only a later turn shows"
                )
        if self.is_document and (len(self.turns) > 1 or self.images):
            raise BadRow(
                f"{self.name}: expected a document to be one turn without images, found "
                f"{len(self.turns)} turns and {len(self.images)} images"
            )

    @property
    def is_document(self) -> bool:
        """Whether this is plain text, not a conversation."""
        return any(turn.role == "text" for turn in self.turns)

    def question(self) -> Example:
        """The example without its last scored answer and what follows it, to be answered.

        Raises BadRow where there is no such answer, as in a document.
        """
        answers = [i for i, turn in enumerate(self.turns) if turn.is_learned]
        if not answers:
            raise BadRow(f"{self.name}: expected an answer to leave out, found none")
        turns = self.turns[: answers[-1]]
        images = self.images[: sum(turn.slots for turn in turns)]
        kept = [i for i, box in enumerate(self.boxes) if box.image < len(images)]
        turns = tuple(
            replace(t, content=tuple(kept.index(p) if isinstance(p, int) else p for p in t.content))
            for t in turns
        )
        return Example(self.name, turns, images, tuple(self.boxes[i] for i in kept))

    @property
    def answer(self) -> str:
        """The last scored assistant turn, boxes as (x0, y0, x1, y1) in whole pixels; "" where
        there is none."""
        answers = [turn for turn in self.turns if turn.is_learned]
        parts = answers[-1].content if answers else ()
        written = {n: tuple(map(round, self.boxes[n].xyxy_px)) for n in parts if type(n) is int}
        return "".join(str(written.get(part, part)) for part in parts if part is not None)


def caption_example(name: str, image: ImageRef, caption: str, prompt: str) -> Example:
    """An image with its caption, as the user's `prompt` after the image and the answer to it.

    >>> caption_example("a.tar:cat", ImageRef(b"", "cat.png"), "a cat", "What is this?").answer
    'a cat'
    """
    if not caption.strip():
        raise BadRow(f"{name}: expected a caption, found an empty text")
    user = Turn("user", (None, prompt) if prompt else (None,))
    return Example(name, (user, Turn("assistant", (caption.strip(),))), (image,))


class BadSource(ValueError):
    """A source that cannot be opened; the message names it, what was expected and found."""
