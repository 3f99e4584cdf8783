"""From one row of keys and values, whatever file it lay in, to one Example.

Four forms of row are read, told apart by the keys that they have:

    {"image": PATH or [PATH, ...], "conversations": [{"from": "human", "value": TEXT}, ...]}
    {"images": [PATH, ...], "messages": [{"role": "user", "content": TEXT or [PART, ...]}, ...]}
    {"image": PATH, "caption": TEXT}
    {"image": PATH or [PATH, ...], "question": TEXT, "answers": [TEXT, ...]}

The first is LLaVA's, the second that of chat templates, the last that of VQA (see
`vlm.data.sources.questions`). `<image>` in a TEXT is an image's place.
A PART is {"type": "text", "text": TEXT}, where `<image>` is plain text, or {"type": "image"}.
Rows without images are text only. Each form may add
"boxes": [{"image": 0, "xyxy": [x0, y0, x1, y1], "label": TEXT}, ...] in the image's own pixels, as
`vlm.data.boxes` checks them. What other tools write is read as they mean it:

    "system": TEXT                  the system message (LLaMA-Factory, ms-swift)
    "weight": 0 or "loss": false    in a turn of the assistant: it is read and not scored (OpenAI,
                                    ms-swift)
    "objects": {"ref": [TEXT, ...], "bbox": [[x0, y0, x1, y1], ...]}
                                    what `<ref-object>` and `<bbox>` in the turns stand for, in
                                    their order (ms-swift), with "image_id": [0, ...] and
                                    "bbox_type" "real" (pixels), "norm1000" or "norm1" where given

Rows with videos or sound are refused. Other keys are counted, see `vlm.data.sources.keys`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.data.boxes import check_box
from vlm.data.example import BadRow, Box, Example, Turn, caption_example
from vlm.data.sources.keys import HARMLESS, MEDIA, TURN_MEANING, UnreadKeys, is_given
from vlm.data.sources.objects import BOX_MARK, REF_MARK, place_objects, read_objects
from vlm.data.sources.questions import ANSWERS_KEY, QUESTION_KEY, question_turns, read_answers
from vlm.pixels.image_ref import ImageRef

IMAGE_MARK = "<image>"
IMAGE_KEYS = ("image", "images")
CAPTION_KEYS = ("caption", "text")
TALK_KEYS = ("conversations", "messages")
EXTRA_KEYS = ("boxes", "objects", "system", *MEDIA)
"""Keys beside images and text that are read, or refused where they say anything."""
ROLE_NAMES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

FOREIGN_MARKS = (REF_MARK, BOX_MARK, "<video>", "<audio>")
"""What other formats put where a box, an object's name, a video or a sound belongs."""

SCORE_KEYS = ("weight", "loss")
"""Keys of a turn that say whether it is scored."""

FindImage = Callable[[Any, str], ImageRef]
"""From an image value of a row and the row's name to the image; raises BadRow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFormat:
    """Which keys of a row are read.

    prompt: the user's text after the image in rows that are captions; may be empty.
    image: the key of the image or list of images; None: "image" or "images". In tar shards,
        the extension of the image; None: any image's.
    caption: the key of the caption, which then makes every row a caption; None: rows may have
        any of the forms, captions under "caption" or else "text".
    many: whether a caption may be a list of texts, all true of the image; each is then an answer
        to the prompt, in turn. Otherwise such a row is refused.
    ignore: keys that are skipped, whatever they mean.
    """

    prompt: str = ""
    image: str | None = None
    caption: str | None = None
    many: bool = False
    ignore: frozenset[str] = frozenset()

    @property
    def chosen_away(self) -> frozenset[str]:
        """Keys that are usually read, in whose place `image` and `caption` name others."""
        texts = (*CAPTION_KEYS, *TALK_KEYS, QUESTION_KEY, ANSWERS_KEY)
        return frozenset((*(IMAGE_KEYS if self.image else ()), *(texts if self.caption else ())))


def example_from_row(
    row: Any,
    name: str,
    form: RowFormat,
    find_image: FindImage,
    images: Sequence[ImageRef] | None = None,
    unread: UnreadKeys | None = None,
) -> Example:
    """The example that a row describes.

    name: the row's name, which starts every message.
    find_image: how an image value becomes an image.
    images: the images, where they lie beside the row and not in it; None: the row names them.
    unread: counts the keys that are not read.
    Raises BadRow saying what was expected and what was found, BadSource for a key that is not read
    and changes what the row means.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"{name}: expected an object of keys and values, found {_kind(row)}")
    unread = UnreadKeys(form.ignore) if unread is None else unread
    talks = [key for key in TALK_KEYS if row.get(key) is not None]
    text_key = talks[0] if talks and form.caption is None else _caption_key(row, form)
    asks = text_key is None and form.caption is None and row.get(QUESTION_KEY) is not None
    text_key = QUESTION_KEY if asks else text_key
    references = None
    if text_key in TALK_KEYS and ANSWERS_KEY not in form.ignore:
        references = read_answers(row.get(ANSWERS_KEY))
    read = (text_key, ANSWERS_KEY) if asks or references else (text_key,)
    _note_keys(row, name, form, read, images is not None, unread)
    extra = {key: row[key] for key in EXTRA_KEYS if key in row and is_given(row[key])}
    for key in extra.keys() & form.ignore:
        del extra[key]
    _refuse_media(extra, name)
    if images is None:
        images = tuple(find_image(value, name) for value in _image_values(row, name, form))
    if asks:
        turns, references = question_turns(row, name, images)
    elif not talks or form.caption is not None:
        turns = _caption_turns(row, name, form, images, text_key)
    elif len(talks) > 1:
        raise BadRow(f"{name}: expected conversations or messages, found both")
    else:
        turns = _talk_turns(row[text_key], name, text_key, images, unread)
    boxes: tuple[Box, ...] = ()
    if "system" in extra:
        turns = _with_system(turns, extra["system"], name)
    if "boxes" in extra:
        boxes = _boxes(extra["boxes"], name)
    if "objects" in extra:
        if boxes:
            raise BadRow(f"{name}: expected boxes or objects, found both")
        objects = read_objects(extra["objects"], name, images)
        turns, boxes = place_objects(turns, objects, name), objects.boxes
    else:
        _note_marks(turns, name, unread)
    return Example(name, turns, tuple(images), boxes, references or ())


def _note_marks(turns: Sequence[Turn], name: str, unread: UnreadKeys) -> None:
    """Counts marks of other formats that nothing in the row stands for: they are read as text."""
    for turn in turns:
        for mark in FOREIGN_MARKS:
            if mark in turn.text:
                unread.note(mark, turn.text, name, {})


def _caption_key(row: Mapping, form: RowFormat) -> str | None:
    keys = CAPTION_KEYS if form.caption is None else (form.caption,)
    return next((key for key in keys if row.get(key) is not None), None)


def _note_keys(
    row: Mapping,
    name: str,
    form: RowFormat,
    read: Sequence[str | None],
    beside: bool,
    unread: UnreadKeys,
) -> None:
    """Counts the row's keys that are not read, without those that the format's own choice leaves
    out. read: the keys of its text. beside: whether its images lie beside it, when keys that name
    them are of no use."""
    images = IMAGE_KEYS if form.image is None or beside else (form.image,)
    for key in row:
        if key in read or key in HARMLESS or key in images or key in form.chosen_away:
            continue
        if key not in EXTRA_KEYS or key in form.ignore:
            unread.note(key, row[key], name)


def _refuse_media(extra: Mapping, name: str) -> None:
    found = [key for key in MEDIA if key in extra]
    if found:
        raise BadRow(
            f"{name}: expected images and text alone, found {found[0]} {_kind(extra[found[0]])}; "
            f"--ignore-keys {found[0]} reads the row without"
        )


def _talk_turns(
    value: Any, name: str, key: str, images: Sequence[ImageRef], unread: UnreadKeys
) -> tuple[Turn, ...]:
    turns = tuple(_TURNS[key](value, name, unread))
    _check_order(turns, name)
    if not any(turn.is_learned for turn in turns):
        raise BadRow(f"{name}: expected an answer that is scored, found weight or loss 0 on each")
    slots = sum(turn.slots for turn in turns)
    if slots != len(images):
        hint = "" if images else "; literal marks belong in text parts of messages"
        raise BadRow(
            f"{name}: expected one {IMAGE_MARK} mark for each image, "
            f"found {slots} marks and {len(images)} images{hint}"
        )
    return turns


def _with_system(turns: tuple[Turn, ...], said: Any, name: str) -> tuple[Turn, ...]:
    """The turns with the row's own system message first."""
    if not isinstance(said, str):
        raise BadRow(f"{name}: expected system to be text, found {_kind(said)}")
    if not said.strip():
        return turns
    if turns[0].role != "system":
        return Turn("system", (said,)), *turns
    if turns[0].content != (said,):
        raise BadRow(
            f"{name}: expected one system message, found the turn {turns[0].text[:60]!r} and the "
            f"key system {said[:60]!r}"
        )
    return turns


def _image_values(row: Mapping, name: str, form: RowFormat) -> list:
    """The image values in order. A lone string or dict is one image, never a sequence."""
    keys = IMAGE_KEYS if form.image is None else (form.image,)
    given = [key for key in keys if row.get(key) is not None]
    if len(given) > 1:
        raise BadRow(f"{name}: expected image or images, found both")
    if not given:
        return _part_images(row.get("messages"))
    value = row[given[0]]
    if not isinstance(value, list | tuple):
        return [value]
    return list(value)


def _part_images(messages: Any) -> list:
    """Images that stand inside their parts: {"type": "image", "image": PATH}."""
    if not isinstance(messages, list):
        return []
    return [
        part["image"]
        for message in messages
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, Mapping)
        and part.get("type") == "image"
        and part.get("image") is not None
    ]


def _caption_turns(
    row: Mapping, name: str, form: RowFormat, images: Sequence[ImageRef], key: str | None
) -> tuple[Turn, ...]:
    if key is None:
        keys = (form.caption,) if form.caption else (*TALK_KEYS, *CAPTION_KEYS, QUESTION_KEY)
        expected = ", ".join(keys)
        raise BadRow(f"{name}: expected one of the keys {expected}, found {sorted(map(str, row))}")
    captions = row[key] if form.many and isinstance(row[key], list | tuple) else [row[key]]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        expected = "text or a list of texts" if form.many else "text"
        raise BadRow(f"{name}: expected {key} to be {expected}, found {_kind(row[key])}")
    if len(images) != 1:
        raise BadRow(f"{name}: expected one image for the caption, found {len(images)}")
    first, *others = (caption_example(name, images[0], text, form.prompt) for text in captions)
    again = Turn("user", (form.prompt,) if form.prompt else ())
    turns = [turn for example in others for turn in (again, example.turns[1])]
    return (*first.turns, *turns)


def _conversation_turns(value: Any, name: str, unread: UnreadKeys) -> Iterator[Turn]:
    for place, role, said, scored in _said(value, name, "from", "value", unread):
        if not isinstance(said, str):
            raise BadRow(f"{place}: expected value to be text, found {_kind(said)}")
        yield Turn(role, split_marks(said), scored)


def _message_turns(value: Any, name: str, unread: UnreadKeys) -> Iterator[Turn]:
    for place, role, said, scored in _said(value, name, "role", "content", unread):
        if isinstance(said, str):
            yield Turn(role, split_marks(said), scored)
        elif isinstance(said, list):
            yield Turn(role, tuple(_part(part, place) for part in said), scored)
        else:
            raise BadRow(f"{place}: expected content to be text or parts, found {_kind(said)}")


_TURNS = {"conversations": _conversation_turns, "messages": _message_turns}


def _said(
    value: Any, name: str, role_key: str, text_key: str, unread: UnreadKeys
) -> Iterator[tuple[str, str, Any, bool]]:
    """(place for messages, role, what is said, whether it is scored where it is an answer) of each
    turn."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name}: expected a list of turns, found {_kind(value)}")
    for number, turn in enumerate(value):
        place = f"{name}: turn {number}"
        if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
            found = sorted(map(str, turn)) if isinstance(turn, Mapping) else _kind(turn)
            raise BadRow(f"{place}: expected the keys {role_key} and {text_key}, found {found}")
        role = turn[role_key]
        if not isinstance(role, str) or role not in ROLE_NAMES:
            raise BadRow(
                f"{place}: expected {role_key} to be one of {', '.join(ROLE_NAMES)}, found {role!r}"
            )
        scored = True
        if len(turn) > 2:
            for key in turn:
                if key not in (role_key, text_key) and (
                    key not in SCORE_KEYS or key in unread.ignore
                ):
                    unread.note(key, turn[key], place, TURN_MEANING)
            scored = _is_scored(turn, ROLE_NAMES[role], place, unread.ignore)
        yield place, ROLE_NAMES[role], turn[text_key], scored


def _is_scored(turn: Mapping, role: str, place: str, ignore: frozenset[str]) -> bool:
    """Whether a turn's `weight` and `loss` leave it to be learned, where it is an answer."""
    said = {k: turn[k] for k in SCORE_KEYS if turn.get(k) is not None and k not in ignore}
    for key, value in said.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRow(
                f"{place}: expected {key} to be 0 (not scored) or 1, found {value!r}; other "
                "weights are not read"
            )
        if value and role != "assistant":
            raise BadRow(
                f"{place}: expected {key} 1 on answers alone, which are what is learned, found it "
                f"on a {role} turn"
            )
    if len(set(map(bool, said.values()))) > 1:
        raise BadRow(f"{place}: expected weight and loss to say the same, found {said}")
    return role != "assistant" or all(said.values())


def _part(part: Any, place: str) -> str | None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    found = dict(part) if isinstance(part, Mapping) else part
    raise BadRow(
        f'{place}: expected a part {{"type": "image"}} or {{"type": "text", "text": TEXT}}, '
        f"found {str(found)[:120]}"
    )


def split_marks(text: str) -> tuple[str | None, ...]:
    """A turn's content: `text` with None at the place of each mark, nothing else changed.

    >>> split_marks("<image>\\nWhich is older, this or <image>?")
    (None, '\\nWhich is older, this or ', None, '?')
    """
    content: list[str | None] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        content += ([None] if number else []) + ([piece] if piece else [])
    return tuple(content)


def _check_order(turns: Sequence[Turn], name: str) -> None:
    """Roles are system at most once and first, then user and assistant in turn, an answer last."""
    if turns[-1].role != "assistant":
        raise BadRow(f"{name}: expected an answer last, found a {turns[-1].role} turn: no answer")
    talk = turns[1:] if turns[0].role == "system" else turns
    start = len(turns) - len(talk)
    for number, turn in enumerate(talk, start):
        expected = ("user", "assistant")[(number - start) % 2]
        if turn.role != expected:
            raise BadRow(f"{name}: turn {number}: expected {expected}, found {turn.role}")
        if turn.role == "user":
            if not turn.slots and not turn.text.strip():
                raise BadRow(f"{name}: turn {number}: expected text or an image, found nothing")
        elif turn.slots:
            raise BadRow(f"{name}: turn {number}: expected text as the answer, found an image mark")
        elif not turn.text.strip():
            raise BadRow(f"{name}: turn {number}: expected an answer, found no text: no answer")


def _boxes(value: Any, name: str) -> tuple[Box, ...]:
    if not isinstance(value, list):
        raise BadRow(f"{name}: expected boxes to be a list, found {_kind(value)}")
    return tuple(_box(box, f"{name}: box {number}") for number, box in enumerate(value))


def _box(box: Any, place: str) -> Box:
    if not isinstance(box, Mapping) or not set(box) <= {"image", "xyxy", "label"}:
        found = sorted(map(str, box)) if isinstance(box, Mapping) else _kind(box)
        raise BadRow(f"{place}: expected the keys image, xyxy and label, found {found}")
    image, xyxy, label = box.get("image"), box.get("xyxy"), box.get("label")
    image = 0 if image is None else image
    if not isinstance(image, int) or isinstance(image, bool):
        raise BadRow(f"{place}: expected image to be a whole number, found {image!r}")
    if not isinstance(label, str) or not label.strip():
        raise BadRow(f"{place}: expected a label, found {label!r}")
    return Box(image, check_box(xyxy, place), label)


def _kind(value: Any) -> str:
    """A value's kind and beginning, for messages."""
    return f"{type(value).__name__} {str(value)[:60]!r}" if value or value == 0 else repr(value)
