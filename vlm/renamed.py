"""Settings and options whose names have changed: what earlier versions wrote is read under today's
names, and what people still type is refused with the new name.

settings.json and checkpoints carry no version of their own for this: a name that is not known today
and stands in this table is one of an earlier version.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

RENAMED = {
    # recipes
    "warmup": ("warmup_ratio", "warmup_steps"),
    "floor": ("min_lr_ratio",),
    "language": ("lines_text",),
    "tokenizer": ("text_tokenizer",),
    # evaluations
    "pictures": ("images",),
    "batch_size": ("batch",),
    # benchmarks
    "places": ("positions",),
    "room": ("memory_fraction",),
}
"""Name of a setting in earlier versions -> what it may be called now, by what has it."""


def new_name(old: str, known: Collection[str]) -> str | None:
    """What a setting is called now among `known` names; None where it is known as it is, or was
    never known.

    >>> new_name("floor", {"steps", "min_lr_ratio"}), new_name("language", {"language"})
    ('min_lr_ratio', None)
    """
    if old in known:
        return None
    return next((name for name in RENAMED.get(old, ()) if name in known), None)


def upgraded(values: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Values by the names that they have now; `known` are all names of today."""
    return {new_name(name, known) or name: value for name, value in values.items()}


def require_new_names(arguments: Sequence[str], known: Collection[str]) -> None:
    """Raises ValueError for an option of an earlier version, naming the one of today.

    arguments: the command line. known: names of today's options, with _ for -.
    """
    for word in arguments:
        if word.startswith("--"):
            option = word[2:].partition("=")[0]
            found = new_name(option.replace("-", "_"), known)
            if found:
                raise ValueError(f"--{option}: this option is now --{found.replace('_', '-')}")
