"""The command that takes a model out of a run's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model of a run's checkpoint as a folder that `vlm.load` opens; needs no GPU.

    The run may be going on, or have been stopped. Its settings build the model again, from the same
    pretrained parts and earlier runs, and the checkpoint's weights are put into it.
    """

    run_folder: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    out: Path
    """The folder to write; a new or an empty one."""
    step: int | None = None
    """The checkpoint after so many steps; None takes the newest whole one."""
    layout: Literal["native", "reference", "open_clip"] = "native"
    """native is our own; reference is that of the published system which the model came from."""
    merge: bool = True
    """Whether LoRA is merged into the weights; --no-merge keeps its layers."""
    recipe: Path | None = None
    """The recipe that the run was made by, where it is no recipe of ours."""

    def run(self) -> None:
        from vlm.training.runs.export import export

        path = export(
            self.run_folder,
            self.out,
            step=self.step,
            layout=self.layout,
            merge=self.merge,
            recipe=self.recipe,
        )
        print(f"{self.out}: the model of {path}")
