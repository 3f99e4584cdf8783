"""Image tokenizers, one file for each kind, found by name without importing the others.

A kind's file defines `Config` (its dataclass), `build(config)` (random weights, no download) and,
for the kinds that wrap a library, `load(id, **options)` (that library's pretrained weights).
Nothing of a kind is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vlm import config as configs

if TYPE_CHECKING:
    from vlm.image_tokens import ImageTokenizer

KINDS = {
    "timm": "vlm.tokenizers.timm",
    "transformers": "vlm.tokenizers.transformers",
    "open_clip": "vlm.tokenizers.open_clip",
    "paired": "vlm.tokenizers.paired",
    "tiles": "vlm.tokenizers.tiles",
    "edge_tiles": "vlm.tokenizers.edge_tiles",
    "pinpoint_tiles": "vlm.tokenizers.pinpoint_tiles",
    "sam_hybrid": "vlm.tokenizers.sam_hybrid",
    "naflex": "vlm.tokenizers.naflex",
    "columns": "vlm.tokenizers.columns",
}
"""Kind of image tokenizer -> the module that defines it."""

ABOUT = {
    "timm": "any backbone of timm: ViT, Swin and other pyramids, convolutional nets",
    "transformers": "vision encoders: SigLIP, SigLIP 2 (fixed sizes), CLIP, ViT, DeiT, DINOv2, SAM",
    "open_clip": "image towers of open_clip",
    "paired": "two towers on one grid, high resolution and low",
    "tiles": "one picture cut into views, with a thumbnail",
    "edge_tiles": "tiles of an image whose long side is brought to a size (Idefics3, SmolVLM)",
    "pinpoint_tiles": "tiles of an image brought to the best of some resolutions (LLaVA-NeXT)",
    "sam_hybrid": "SAM's last and first global features, convolved to a coarser grid",
    "naflex": "SigLIP 2's vision encoder at each picture's own aspect ratio",
    "columns": "lines of text of any length, a token for every four columns of pixels",
}
"""Kind of image tokenizer -> what it is, for people."""


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
