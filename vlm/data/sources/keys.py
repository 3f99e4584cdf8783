"""Keys of rows that are not read: counted, and told once; those that change what a row means stop.

A row without a key that it has may be another row: a conversation without its tools, an answer that
was meant as a bad example. What the keys of common formats mean stands in one table here.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlm.data.example import BadSource

_PREFERRED = "answers to prefer one over another"
_TURNS = "turns of a form of row that is not read"
_CALLS = "a call of a tool or what it gave"

MEANING = {
    "tools": "tools that the prompt offers",
    "functions": "tools that the prompt offers",
    "tool_calls": _CALLS,
    "tool_call_id": _CALLS,
    "function_call": _CALLS,
    "chosen": _PREFERRED,
    "rejected": _PREFERRED,
    "rejected_response": _PREFERRED,
    "rejected_messages": _PREFERRED,
    "rejected_images": _PREFERRED,
    "kto_tag": _PREFERRED,
    "margin": _PREFERRED,
    "positive_messages": _PREFERRED,
    "negative_messages": _PREFERRED,
    "history": "turns before the first",
    "instruction": _TURNS,
    "input": _TURNS,
    "output": _TURNS,
    "query": _TURNS,
    "response": _TURNS,
    "prompt": _TURNS,
    "completion": _TURNS,
    "reasoning_content": "thoughts before an answer",
    "loss_scale": "how much the loss of an answer counts",
    "chat_template_kwargs": "options of the chat template",
}
"""Keys of rows and turns that change what is learned, and what they hold. Sources: what ms-swift
("Custom Dataset"), LLaMA-Factory (data/README.md), OpenAI's fine-tuning and TRL ("Dataset formats
and types") say of their formats."""

ROW_MEANING = MEANING | {"weight": "how much the row counts", "loss": "whether the row is learned"}
MEDIA = ("video", "videos", "audio", "audios")
"""Keys of what no model here sees or hears; rows that have them are refused."""

TURN_MEANING = MEANING | dict.fromkeys(
    ("image", "images", *MEDIA), "images, video or sound of one turn"
)

MEDIA_EXTENSIONS = ("mp4", "avi", "mov", "mkv", "webm", "wav", "mp3", "flac", "ogg", "m4a")
"""Extensions of the same, as members of tar shards."""

HARMLESS = frozenset(
    ("id", "uid", "uuid", "idx", "index", "key", "__key__", "__url__", "row_id", "sample_id",
     "question_id", "image_id", "source", "dataset", "dataset_name", "data_source", "origin",
     "width", "height", "image_width", "image_height", "original_width", "original_height", "url",
     "image_url", "metadata", "meta", "license", "licence", "author", "split", "status",
     "error_message", "exif", "md5", "sha256", "phash", "file_name", "filename",
     "tags", "keywords", "group", "subgroup")
)  # fmt: skip
"""Keys that say where a row or image is from, or what its file says itself; they go untold."""


def is_given(value: Any) -> bool:
    """Whether a key's value says anything: many write null, "" or [] for what is not there."""
    return value is not None and not (isinstance(value, str | list | tuple | dict) and not value)


@dataclass(slots=True)
class UnreadKey:
    """How often a key stands in rows, the first row that has it, and the beginning of its value.
    changes: whether a row without it is another row."""

    count: int
    name: str
    value: str
    changes: bool = False


class UnreadKeys:
    """The keys that the rows of one source have and nobody reads.

    ignore: keys that may be skipped although they change what a row means.
    found: each key with its count, in the order in which they were met by this process.
    stops: whether a key that changes the meaning of its row raises BadSource. It ends a run also
        where bad rows are skipped, since it tells of a format and not of a row.
    tells: whether a key that was not met before is told on stderr, once; true after what was found
        at the start has been listed.
    """

    def __init__(self, ignore: Collection[str] = ()) -> None:
        self.ignore = frozenset(ignore)
        self.found: dict[str, UnreadKey] = {}
        self.stops, self.tells = True, False

    def note(
        self,
        key: str,
        value: Any,
        name: str,
        meaning: Mapping[str, str] = ROW_MEANING,
        count: int = 1,
    ) -> None:
        """Counts a key that is not read; a value that says nothing is none.

        name: the row's, and the turn's where it is one's. meaning: keys that change it. Raises
        BadSource as `stops` says.
        """
        if not is_given(value):
            return
        key = str(key)
        held = self.found.get(key)
        changes = changes_meaning(key, value, meaning)
        if held is not None and (held.changes or not changes):
            held.count += count
            return
        if self.stops and changes and key not in self.ignore:
            raise BadSource(
                f"{name}: key {key!r} ({_what(key, meaning)}) is not read, and without it the row "
                f"says something else: {short(value)}; --ignore-keys {key} skips it"
            )
        before = 0 if held is None else held.count
        self.found[key] = UnreadKey(before + count, name, short(value), changes)
        if self.tells:
            print(f"{name}: key {key!r} is not read: {short(value)}", file=sys.stderr)

    def changing(self) -> tuple[str, ...]:
        """The keys found that change what a row means and are not to be skipped."""
        return tuple(k for k, held in self.found.items() if held.changes and k not in self.ignore)

    def add(self, found: Mapping[str, UnreadKey]) -> None:
        """Adds what another process found."""
        for key, other in found.items():
            held = self.found.setdefault(key, replace(other, count=0))
            held.count += other.count


def changes_meaning(key: str, value: Any, meaning: Mapping[str, str] = ROW_MEANING) -> bool:
    """Whether a row without this key is another row. A `label` that is true or false tells a good
    answer from a bad one (KTO); other labels are of classes."""
    return key in meaning or (key == "label" and isinstance(value, bool))


def _what(key: str, meaning: Mapping[str, str]) -> str:
    return meaning.get(key, _PREFERRED)


def short(value: Any) -> str:
    """The beginning of a value, for messages."""
    text = repr(value if not isinstance(value, str | bytes) else value[:80])
    return text if len(text) <= 80 else f"{text[:77]}..."
