"""What commands share that use a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm.families.registry import FAMILIES


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


def require_least(options: object, **least: int) -> None:
    """Raises ValueError naming an option that is below the least that it may be; called before a
    model is opened. None is always allowed."""
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value < low:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least {low}, found {value}")


WRITING = {"max_new_tokens": 1, "num_beams": 1, "batch_size": 1}
"""Options of commands that write text, where they have them, and the least that they may be."""


def open_model(
    source: str, families: Sequence[str], lack: str, device: str = "auto", dtype: str = "auto"
):
    """The model that `source` names, of one of some families.

    lack: what a model of another family does not do, for the message of the ValueError.
    """
    import vlm

    model = vlm.load(source, device=device, dtype=dtype)
    found = model.module.family
    if found not in families:
        raise ValueError(
            f"{source}: a {found} model {lack}; expected a model of the family "
            f"{' or '.join(FAMILIES[family].said for family in families)}"
        )
    return model
