"""What a folder says of how its model writes (`generation_config.json`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GENERATION = (
    "num_beams",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram_size",
    "repetition_penalty",
)
"""What a folder may say of how its model writes, in transformers' names, besides lengths."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a published folder says of writing: see `EncoderDecoderModel` and `LineProcessor`."""

    start_id: int
    end_ids: tuple[int, ...]
    pad_id: int
    banned: tuple[int, ...]
    generation: dict[str, Any]
    max_new_tokens: int


def read_said(folder: Path, values: dict[str, Any], positions: int) -> Said:
    """What generation_config.json says, else config.json, else the decoder's part of it.

    values: what config.json holds. positions: the decoder's, the limit where none is said.
    Raises ValueError naming the file and the id that nothing states.
    """
    path = folder / "generation_config.json"
    own = json.loads(path.read_text()) if path.is_file() else {}

    def find(name: str) -> Any:
        for part in (own, values, values["decoder"]):
            if part.get(name) is not None:
                return part[name]
        raise ValueError(
            f"{folder}: expected {name} in generation_config.json or config.json, found none"
        )

    ends = find("eos_token_id")
    source = own or values
    length = source.get("max_new_tokens") or (source.get("max_length") or positions) - 1
    words = source.get("bad_words_ids") or []
    return Said(
        start_id=find("decoder_start_token_id"),
        end_ids=tuple(ends) if isinstance(ends, list) else (ends,),
        pad_id=find("pad_token_id"),
        banned=tuple(word[0] for word in words if len(word) == 1),
        generation={name: source[name] for name in GENERATION if source.get(name) is not None},
        max_new_tokens=min(length, positions - 1),
    )
