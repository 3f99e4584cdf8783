"""What commands share that use a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm.families.base import Model


@dataclass(frozen=True, kw_only=True)
class UsesModel:
    """The model of a command, and where and how precisely it computes."""

    model: str
    """A run folder, a model folder, a hub id, or a file of CLIP's weights: FILE?model=ViT-B-32."""
    device: str = "auto"
    """auto takes a GPU where there is one."""
    dtype: str = "auto"
    """auto keeps the model's own where the device is fast in it, else takes float32; or float32,
    bfloat16, float16."""


WRITING = {"max_new_tokens": 1, "num_beams": 1, "batch_size": 1}
"""Options of commands that write text, where they have them, and the least that they may be."""


def open_model(
    source: str, task: str, lack: str, device: str = "auto", dtype: str = "auto"
) -> Model:
    """The model that `source` names, of a family that does a task.

    lack: what a model of another family does not do, for the message of the ValueError.
    """
    import vlm
    from vlm.families.registry import FAMILIES, families_that

    model = vlm.load(source, device=device, dtype=dtype)
    found, able = model.module.family, families_that(task)
    if found not in able:
        raise ValueError(
            f"{source}: a {found} model {lack}; expected a model of the family "
            f"{' or '.join(FAMILIES[family].said for family in able)}"
        )
    return model
