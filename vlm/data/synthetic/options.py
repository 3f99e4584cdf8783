"""What a drawn source is told in text: "COUNT:KEY=VALUE:..."."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlm.data.example import BadSource

Options = Mapping[str, tuple[str, Callable[[str], Any]]]
"""Key -> the argument that it stands for, and what reads its value."""


def read_options(text: str, options: Options, kind: str, usage: str) -> tuple[int, dict[str, Any]]:
    """The count of rows and the arguments that a text states.

    kind: what the source is called. usage: its options, for the message.
    Raises BadSource for a count that is no number, and for unknown keys and values that cannot be
    read.

    >>> read_options("40:size=8", {"size": ("size_px", int)}, "dots", ":size=8")
    (40, {'size_px': 8})
    """
    count, *parts = text.split(":")
    given = {}
    try:
        number = int(count)
        for part in parts:
            key, _, value = part.partition("=")
            argument, read = options[key]
            given[argument] = read(value)
    except (KeyError, ValueError) as error:
        raise BadSource(f"{kind}:{text}: expected {kind}:COUNT, then any of {usage}") from error
    return number, given
