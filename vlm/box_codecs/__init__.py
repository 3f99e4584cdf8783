"""How models write boxes, behind one interface, `BoxCodec`: each way is a frozen value.

`LocTokens` are PaliGemma's and our own, `QWEN_VL`, `QWEN2_VL`, `QWEN25_VL` and `KOSMOS2` those of
these systems, beside what asks them for a phrase.
"""

from __future__ import annotations

from typing import Any

from vlm.box_codecs.codec import MALFORMED, NO_AREA, NO_BOX, BoxCodec, ReadBox, ReadBoxes
from vlm.box_codecs.json_boxes import QWEN25_VL, QWEN25_VL_PROMPT, JsonBoxes
from vlm.box_codecs.loc_tokens import LocTokens
from vlm.box_codecs.patch_tokens import KOSMOS2, KOSMOS2_PROMPT, PatchTokens
from vlm.box_codecs.tagged import (
    QWEN2_VL,
    QWEN2_VL_PROMPT,
    QWEN_VL,
    QWEN_VL_PROMPT,
    TaggedBoxes,
)
from vlm.config import from_dict, to_dict

__all__ = [
    "KINDS",
    "KOSMOS2",
    "KOSMOS2_PROMPT",
    "MALFORMED",
    "NO_AREA",
    "NO_BOX",
    "QWEN2_VL",
    "QWEN2_VL_PROMPT",
    "QWEN25_VL",
    "QWEN25_VL_PROMPT",
    "QWEN_VL",
    "QWEN_VL_PROMPT",
    "BoxCodec",
    "JsonBoxes",
    "LocTokens",
    "PatchTokens",
    "ReadBox",
    "ReadBoxes",
    "TaggedBoxes",
    "build",
    "config_of",
]

KINDS = {"loc": LocTokens, "tagged": TaggedBoxes, "json": JsonBoxes, "patches": PatchTokens}


def build(values: dict[str, Any] | None) -> BoxCodec | None:
    """A codec from its configuration, `kind` included; None from None. Raises ValueError naming the
    kinds."""
    if values is None:
        return None
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"box codec {kind!r} is not one of {', '.join(KINDS)}")
    return from_dict(KINDS[kind], values, where=f"box codec {kind}")


def config_of(codec: BoxCodec | None) -> dict[str, Any] | None:
    """The configuration of a codec, `kind` included: the inverse of `build`."""
    if codec is None:
        return None
    kind = next(kind for kind, cls in KINDS.items() if type(codec) is cls)
    return {"kind": kind, **to_dict(codec)}
