"""What the public models of all families share: a module with what is needed to use it, where it
computes, how it is saved, and its mode while it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.families.published_files import Reference
from vlm.families.registry import FAMILIES, families_that, save_in

LAYOUTS = ("native", "reference", "open_clip")


@dataclass(kw_only=True, eq=False)
class Model:
    """A model with its processor, ready to use.

    module: the family's plain nn.Module. processor: its prompts and preprocessing.
    reference: the published folder that it came from, in whose layout it can be saved; None for one
        composed here.
    """

    module: nn.Module
    processor: Any
    reference: Reference | None = None

    def __getattr__(self, name: str):
        who = families_that(name)
        if who and "module" in self.__dict__:
            raise AttributeError(
                f"{name}: a {self.module.family} model cannot do this; it is done by models of the "
                f"family {' or '.join(who)}"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def device(self) -> torch.device:
        """Where the module's parameters are."""
        return next(self.module.parameters()).device

    @property
    def pixel_dtype(self) -> torch.dtype:
        """The dtype that the image tokenizer takes pixels in."""
        return next(self.module.tokenizer.parameters()).dtype

    def save(self, folder: str | Path, layout: str = "native", merge: bool = True) -> None:
        """Writes weights, configuration and processor files; `vlm.load(folder)` reads them.

        layout: "native", our own; "reference", the published one that the model came from; or
            "open_clip", for CLIP and SigLIP of any origin.
        merge: whether LoRA is merged into the weights that are written (this model stays as it
            is), or written as layers of its own, to go on training with; "native" alone keeps them.
        Raises ValueError for a layout that the model does not have.
        """
        family, folder = FAMILIES[self.module.family], Path(folder)
        if layout not in LAYOUTS:
            raise ValueError(f"layout is one of {', '.join(LAYOUTS)}, found {layout!r}")
        if layout == "reference" and self.reference is None:
            raise ValueError(
                "layout 'reference': this model came from no published system, so it has only the "
                "layout 'native'"
            )
        if layout not in ("native", "reference", *family.layouts):
            have = [name for name, other in FAMILIES.items() if layout in other.layouts]
            raise ValueError(
                f"layout {layout!r}: expected a {' or '.join(have)} model, found "
                f"{self.module.family}"
            )
        if layout == "native":
            import_module(family.layout).save(self, folder, merge)
            return
        if not merge:
            raise ValueError("merge=False: only the layout 'native' can hold LoRA layers")
        save_in(self, layout if layout != "reference" else self.reference.model_type, folder)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each part has its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def require_list(items: Any, what: str = "images") -> None:
    """Raises ValueError for one path, text or bytes, which would be taken character by character.

    what: the name of the argument.
    """
    if isinstance(items, (str, bytes, Path)):
        raise ValueError(f"{what} is a list of {what}, found a single {type(items).__name__}")


def require_batch_size(batch_size: int) -> None:
    """Raises ValueError for a batch size below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
