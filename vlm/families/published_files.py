"""The small files of a published folder that a model came from, kept as they are so that its layout
can be written again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.weights import INDEX, PICKLED_INDEX

KEPT = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
"""Endings of a published folder's small files: configurations, prompts, vocabularies, and the code
that others open it with, which is never run here. Its licence is kept too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The published layout that a model came from.

    model_type: its entry in `vlm.systems.SYSTEMS`.
    files: name -> content of every small file of its folder, config.json included.
    unused: the weights of that folder which our model has not (a pooling head after tokens that
        are not pooled), by their published names, as they were stored. They are written back, so
        that the system's own class finds all that it asks for.
    """

    model_type: str
    files: Mapping[str, bytes]
    unused: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def config(self) -> dict[str, Any]:
        """What its config.json says; a fresh copy."""
        return json.loads(self.files["config.json"])

    def write(self, folder: Path) -> None:
        """Puts the files into `folder`, as they were."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def read_reference(
    folder: Path, model_type: str, unused: Mapping[str, Tensor] | None = None
) -> Reference:
    """The small files of a published folder, and what the model does not use of its weights; other
    weights and images are skipped."""
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and (path.suffix in KEPT or path.name.startswith("LICENSE"))
        and path.name not in (INDEX, PICKLED_INDEX)
    )
    return Reference(
        model_type=model_type,
        files={name: (folder / name).read_bytes() for name in names},
        unused=dict(unused or {}),
    )


def open_part(loader, folder: Path):
    """What a transformers loader reads of a folder. Raises ValueError naming folder and loader."""
    try:
        return loader.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each part of transformers raises its own kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder}: expected the files that save_pretrained writes of model and processor, but "
            f"{loader.__name__} cannot read them ({type(error).__name__}: {reason})"
        ) from error
