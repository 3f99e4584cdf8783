"""Conversations about images, each of which is encoded once.

Messages have transformers' chat format: {"role": "system" | "user" | "assistant", "content": text
or a list of parts}, a part being {"type": "text", "text": ...} or {"type": "image", "image": a
path, bytes, PIL image or array}. A text that spells "<image>" stays text: images are parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vlm.data.example import BadRow, Turn
from vlm.families.base import evaluating
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import Row, collate
from vlm.families.decoder_only.image_layout import ImageLayout

if TYPE_CHECKING:
    from vlm.families.base import Model

ROLES = ("system", "user", "assistant")
PART_KEYS = {"text": "text", "image": "image"}
"""Types of parts -> the key that holds what they are."""
IMAGES = (str, Path, bytes, bytearray, memoryview, Image.Image, np.ndarray)
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Ends a decoded text whose last character's bytes are not all there yet."""


@dataclass(slots=True)
class _Seen:
    """An image of the conversation: its layout in the stream, and what the module encodes it to
    once it has, which the pixels in `row` are kept for until then."""

    layout: ImageLayout
    row: Row | None
    encoded: Any = None


class Chat:
    """A conversation with a model.

    messages: how it begins; None or empty begins anew. Not ended by a question: that is asked.
    What is asked and answered is added to it. An image is encoded once; the language model reads
    the conversation anew for each answer, for in bf16 keys and values kept from the writing of
    earlier answers differ in their last bits, and with them now and then a greedy id.
    """

    def __init__(self, model: Model, messages: Sequence[dict] | None = None) -> None:
        self.model = model
        self.reset()
        messages = list(messages or ())
        for number, (turn, images) in enumerate(read_messages(messages)):
            self._turns.append(turn)
            self._seen += self._look(images, f"messages[{number}]")
        if self._turns and self._turns[-1].role == "user":
            raise ValueError("messages: a conversation to go on with ends with the assistant's, "
                             "found the user's; ask that")  # fmt: skip
        self._messages = messages

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far."""
        return list(self._messages)

    def reset(self) -> None:
        """Forgets the conversation and its images."""
        self._messages: list[dict] = []
        self._turns: list[Turn] = []
        self._seen: list[_Seen] = []

    def ask(
        self,
        content: str | Sequence[dict],
        *,
        stream: bool = False,
        seed: int | None = None,
        **options,
    ) -> str | Iterator[str]:
        """The answer to what the user says: a text, or parts of text and images.

        stream: gives the answer's pieces as they are written; joined, they are the answer. The
            conversation grows when the last is taken. Given up earlier, it stays as it was.
        seed, options: those of `DecoderOnlyModel.generate`. An answer ends where the context does.
        Raises, before anything is computed: ValueError for content that is none; BadImage naming
        the image; BadRow naming both numbers where the conversation fills the context.
        """
        message = {"role": "user", "content": content}
        number = len(self._turns)
        last = self._turns[-1].role if self._turns else None
        turn, images = _read_message(message, number, last)
        name = f"messages[{number}]"
        turns = [*self._turns, turn]
        seen = [*self._seen, *self._look(images, name)]
        processor = self.model.processor
        row = processor.prompt_row(turns, [one.layout for one in seen], name)
        options = {**engine.GREEDY, **options}
        if processor.max_tokens is not None:
            left = processor.max_tokens - len(row.ids)
            if left < 1:
                raise BadRow(
                    f"{name}: the conversation has {len(row.ids)} tokens, the context takes "
                    f"{processor.max_tokens} with the answer; begin a new one"
                )
            options["max_new_tokens"] = min(options["max_new_tokens"], left)
        engine.check_options(options, seed)
        if stream and options["num_beams"] > 1:
            raise ValueError(f"stream=True needs num_beams=1, found {options['num_beams']}")
        pieces = self._pieces(message, turns, seen, row, seed, options, stream)
        return pieces if stream else "".join(pieces)

    def _pieces(
        self,
        message: dict,
        turns: list[Turn],
        seen: list[_Seen],
        row: Row,
        seed: int | None,
        options: dict,
        stream: bool,
    ) -> Iterator[str]:
        """The answer piece by piece, or at once; then it and the question are kept."""
        decode = self.model.processor.decode

        def write(**watch) -> engine.Written:
            return self._write(seen, row, seed, _merged(options, watch))

        said = ""
        if stream:
            written: list[int] = []
            with closing(engine.stream(write)) as steps:
                while True:
                    try:
                        written.append(next(steps))
                    except StopIteration as end:
                        done = end.value
                        break
                    text = decode(written)
                    if len(text) > len(said) and text.startswith(said):
                        if text.endswith(INCOMPLETE):
                            continue
                        yield text[len(said) :]
                        said = text
        else:
            done = write()
        answer = decode(done[0])
        self._turns = [*turns, Turn("assistant", (answer,))]
        self._messages = [*self._messages, message, {"role": "assistant", "content": answer}]
        self._seen = seen
        if len(answer) > len(said):
            yield answer[len(said) :]

    @torch.no_grad()
    def _write(
        self, seen: list[_Seen], row: Row, seed: int | None, options: dict
    ) -> engine.Written:
        """What the model writes after a prompt with the images in it."""
        model = self.model
        module, device = model.module, model.device
        with evaluating(module), engine.seeded(seed, device):
            encoded = [self._encode(one) for one in seen]
            images = type(encoded[0]).in_one_example(encoded) if encoded else None
            ends, pad_id, banned = model.stop_ids, model.processor.pad_id, model.banned_ids
            batch = collate([row], pad_id, "left").to(device)
            (written,) = engine.write(module, images, batch, ends, pad_id, banned, **options)
        return written

    def _look(self, images: Sequence, name: str) -> list[_Seen]:
        """The images' pixels and layouts; nothing is encoded yet."""
        processor = self.model.processor
        mark = processor.image_mark
        rows = [processor.encode_literal([one], mark, name=name) for one in images]
        return [_Seen(row.layout.images[0], row) for row in rows]

    def _encode(self, one: _Seen) -> Any:
        """An image as the module encodes it, the only one of its example."""
        if one.encoded is None:
            batch = collate([one.row], self.model.processor.pad_id)
            dtype = next(self.model.module.tokenizer.parameters()).dtype
            batch = batch.to(self.model.device, dtype)
            one.encoded = self.model.module.encode(batch.groups, batch.arrangement)
            one.row = None
        return one.encoded


def read_messages(messages: Sequence[dict]) -> list[tuple[Turn, list]]:
    """Each message as a turn and its images.

    Raises ValueError naming the message, what was expected and what was found.
    """
    if isinstance(messages, (str, dict)) or not isinstance(messages, Sequence):
        raise ValueError(f"messages: expected a list of messages, found {_kind(messages)}")
    turns: list[tuple[Turn, list]] = []
    for number, message in enumerate(messages):
        turns.append(_read_message(message, number, turns[-1][0].role if turns else None))
    return turns


def _read_message(message: dict, number: int, last: str | None) -> tuple[Turn, list]:
    """A message after one of role `last` (None: the first)."""
    name = f"messages[{number}]"
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        found = sorted(map(str, message)) if isinstance(message, dict) else _kind(message)
        raise ValueError(f"{name}: expected the keys role and content, found {found}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{name}: role {role!r} is not one of {', '.join(ROLES)}")
    expected = {None: ("system", "user"), "user": ("assistant",)}.get(last, ("user",))
    if role not in expected:
        after = f" after {last!r}" if last else " first"
        raise ValueError(f"{name}: expected the role {' or '.join(expected)}{after}, found {role}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if isinstance(parts, dict) or not isinstance(parts, Sequence) or isinstance(parts, bytes):
        raise ValueError(f"{name}: content is a text or a list of parts, found {_kind(content)}")
    values, images = [], []
    for number, part in enumerate(parts):
        value = _read_part(part, f"{name}.content[{number}]")
        if isinstance(value, str) and part["type"] == "text":
            values.append(value)
        elif role == "user":
            values.append(None)
            images.append(value)
        else:
            raise ValueError(f"{name}: images stand in user messages, found one in {role}'s")
    if role == "user" and not images and not "".join(values).strip():
        raise ValueError(f"{name}: expected a text or an image, found neither")
    return Turn(role, tuple(values)), images


def _read_part(part: dict, name: str):
    """A part's text or image."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in PART_KEYS:
        found = repr(kind) if isinstance(part, dict) else _kind(part)
        raise ValueError(f"{name}: expected a part of type text or image, found {found}")
    key = PART_KEYS[kind]
    if set(part) != {"type", key}:
        raise ValueError(f"{name}: expected the keys type and {key}, found {sorted(part)}")
    wanted = (str,) if kind == "text" else IMAGES
    if not isinstance(part[key], wanted):
        what = "a text" if kind == "text" else "a path, bytes, PIL image or array"
        raise ValueError(f"{name}: expected {what}, found {_kind(part[key])}")
    return part[key]


def _merged(options: dict, watch: dict) -> dict:
    """Options with what watches over generation; the caller's own stopping criteria stay."""
    if watch and "stopping_criteria" in options:
        own = [*options["stopping_criteria"], *watch["stopping_criteria"]]
        watch = {**watch, "stopping_criteria": type(watch["stopping_criteria"])(own)}
    return {**options, **watch}


def _kind(value) -> str:
    return f"a {type(value).__name__}"
