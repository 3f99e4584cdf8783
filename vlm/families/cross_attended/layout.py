"""Our own folder layout of cross-attention towers: that of decoder-only models, and the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.config import from_dict, to_dict
from vlm.families import native_layout
from vlm.families.cross_attended.model import CrossAttendedModel
from vlm.families.cross_attended.module import Cross, CrossAttended, CrossConfig
from vlm.families.decoder_only import layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder(layout.Folder):
    """What config.json says of a cross-attention tower. cross: a `CrossConfig`."""

    cross: dict[str, Any]


def save(model: CrossAttendedModel, folder: Path, merge: bool = True) -> None:
    """Writes our own layout. merge: whether LoRA is merged into the weights that are written, or
    kept as layers of its own."""
    cross = to_dict(model.module.cross.config)
    native_layout.write(model, Folder(**layout.described(model), cross=cross), folder, merge)


def load(folder: Path, values: dict[str, Any]) -> CrossAttendedModel:
    """The model in a folder of our own layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit.
    """
    where = f"{folder / 'config.json'}.cross"

    def cross(said: Folder) -> tuple[Cross]:
        return (Cross(from_dict(CrossConfig, said.cross, where)),)

    return layout.load_as(CrossAttended, folder, values, Folder, cross)
