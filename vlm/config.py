"""Configurations as frozen dataclasses, to JSON and back, unknown keys refused."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The fields of a configuration as plain JSON values (tuples become lists)."""
    return _plain(asdict(config))


def require_least(options: object, **least: int) -> None:
    """Raises ValueError naming a command line option that is below the least that it may be; called
    before a model is opened. None is always allowed."""
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value < low:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least {low}, found {value}")


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """A configuration of class `cls` from `values`, nested dataclasses included.

    Lists become tuples where the field is a tuple. `where` names the place in messages.
    Raises ValueError naming every unknown and every missing key at once.
    """
    known = {field.name: field for field in fields(cls)}
    unknown = sorted(set(values) - set(known))
    missing = sorted(
        name
        for name, field in known.items()
        if name not in values and field.default is MISSING and field.default_factory is MISSING
    )
    if unknown or missing:
        raise ValueError(
            f"{where or cls.__name__}: unknown keys {unknown}, missing keys {missing}; "
            f"known keys are {sorted(known)}"
        )
    hints = typing.get_type_hints(cls)
    return cls(
        **{key: _typed(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return _typed(options[0], value, where) if len(options) == 1 else value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        args = typing.get_args(hint)
        inner = args[0] if args else Any
        return tuple(_typed(inner, item, where) for item in value)
    return value
