"""Image tokenizers, one file for each kind, found by name without importing the others.

A kind's file defines `Config` (its dataclass), `build(config)` (random weights, no download) and,
for the kinds that wrap a library, `load(id, **options)` (that library's pretrained weights).
A new file is a new kind; its docstring's first paragraph says what it is. Nothing of a kind is
imported before it is asked for.
"""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vlm import config as configs

if TYPE_CHECKING:
    from vlm.image_tokens import ImageTokenizer

SHARED = ("encoders", "parts", "timesformer")
"""Files of this folder that no kind is: what several of them share."""


def _kinds() -> dict[str, str]:
    """The kinds, by the files of this folder."""
    files = sorted(module.name for module in iter_modules(__path__))
    return {name: f"{__name__}.{name}" for name in files if name not in SHARED}


KINDS = _kinds()
"""Kind of image tokenizer -> the module that defines it: a file of this folder is a kind."""


def about(kind: str) -> str:
    """What a kind is, for people: the first sentence of its file, which is not imported.

    >>> about("naflex").partition(":")[0]
    "Image tokens at an image's own aspect ratio"
    """
    text = ast.get_docstring(ast.parse(Path(find_spec(KINDS[kind]).origin).read_text()))
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")


def config_to_dict(tokenizer: ImageTokenizer) -> dict[str, Any]:
    """The configuration of a tokenizer as JSON values, its "kind" included; `build` reads it."""
    module = type(tokenizer).__module__
    for kind, path in KINDS.items():
        if path == module:
            return {"kind": kind} | configs.to_dict(tokenizer.config)
    raise ValueError(f"{type(tokenizer).__name__} of {module} is of no known kind; {_known()}")


def build(values: dict[str, Any]) -> ImageTokenizer:
    """A tokenizer with random weights from what `config_to_dict` gave. Downloads nothing.

    Raises ValueError for an unknown kind and for unknown or missing keys.
    """
    values = dict(values)
    kind = values.pop("kind", None)
    module = _module(kind)
    return module.build(configs.from_dict(module.Config, values, where=kind))


def load(name: str, **options: Any) -> ImageTokenizer:
    """A tokenizer with pretrained weights of a library: `name` is "kind:id", such as
    "timm:vit_base_patch16_224"; the options are those of the kind's own `load`.

    Raises ValueError for an unknown kind, and OSError where the weights cannot be had.
    """
    kind, _, id = name.partition(":")
    module = _module(kind)
    if not hasattr(module, "load"):
        raise ValueError(f"kind {kind!r} has no library to load from: build its parts, then it")
    if not id:
        raise ValueError(f"expected 'kind:id', such as 'timm:vit_base_patch16_224', found {name!r}")
    return module.load(id, **options)


def cannot_load(id: str, library: str, offline: str, error: Exception) -> OSError:
    """The one error for weights that cannot be had. `offline` says how to do without a network."""
    reason = str(error).strip().split("\n")[0]
    return OSError(
        f"{library} cannot load {id!r} ({type(error).__name__}: {reason}). "
        f"Without a network: {offline}"
    )


def _module(kind: str | None) -> ModuleType:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of image tokenizer {kind!r}; {_known()}")
    return import_module(KINDS[kind])


def _known() -> str:
    return f"known kinds are {', '.join(KINDS)}"
