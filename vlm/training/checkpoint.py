"""Checkpoints: the trainable weights, the optimizer and the position, written all or not at all.

A checkpoint is a folder `checkpoints/step_00000120` that appears by one rename when it is whole.
Frozen weights are not in it: the run's settings rebuild them, and a fingerprint proves that they
are the same ones.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.weights import need_room

NAME = re.compile(r"step_(\d{8})")
KEEP = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or belongs to another run; the message names the file."""


@dataclass
class Progress:
    """How far a run has come.

    step: optimizer steps done; samples: rows drawn by then. skipped: rows left out, the first of
    them named with their reasons in examples_skipped. cut_tokens: text tokens cut to fit the
    context. unscored: rows without a scored token.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0
    examples_skipped: list[str] = field(default_factory=list)
    cut_tokens: int = 0
    unscored: int = 0


def fingerprint(module: nn.Module) -> str:
    """Names, shapes and a sample of the frozen weights, as a short hash: it tells whether a
    checkpoint's frozen parts are these."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.requires_grad}".encode())
        if not parameter.requires_grad and parameter.numel():
            flat = parameter.detach().flatten()
            stride = max(1, len(flat) // 64)
            digest.update(flat[::stride][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: dict[str, Any],
) -> Path:
    """Writes a checkpoint and removes all but the last KEEP. One process calls this.

    Raises OSError naming the disk where there is no room; older checkpoints stay whole.
    """
    trainable = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    need_room(folder, _size(module))
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{progress.step:08d}"
    scratch = folder / f".{final.name}.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    torch.save(
        {
            "trainable": trainable,
            "optimizer": optimizer.state_dict(),
            "progress": vars(progress),
            "fingerprint": fingerprint(module),
            "settings": settings,
        },
        scratch / "state.pt",
    )
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)
    for old in list_checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def need_room_for_run(folder: Path, module: nn.Module, saves: int) -> None:
    """Raises OSError where the disk cannot hold what a run will leave: its checkpoints, and the
    model beside them.

    saves: how many checkpoints are still to be written; one more than KEEP lie there for a moment.
    """
    coming = min(saves, KEEP + 1 - min(KEEP, len(list_checkpoints(folder))))
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    need_room(folder, coming * _size(module) + weights)


def _size(module: nn.Module) -> int:
    """Bytes of one checkpoint: each trainable weight and AdamW's two moments."""
    return 3 * sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def restore(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
) -> Progress:
    """Puts the newest checkpoint of `folder` into module and optimizer.

    settings: those that decide what is learned; a run goes on with the same ones only.
    Random numbers need no saving: the loop seeds them for each step.
    Gives a fresh Progress where the run was stopped before its first checkpoint.
    Raises CheckpointError naming the file, and every setting or weight that differs.
    """
    found = list_checkpoints(folder)
    if not found:
        return Progress()
    path = found[-1] / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        raise CheckpointError(f"{path}: broken checkpoint ({error})") from error
    old = state["settings"]
    changed = [
        f"{key}: {old.get(key)!r} then, {settings.get(key)!r} now"
        for key in sorted(old.keys() | settings.keys())
        if old.get(key) != settings.get(key)
    ]
    if changed:
        raise CheckpointError(f"{path} is of another run: {'; '.join(changed)}")
    if state["fingerprint"] != fingerprint(module):
        raise CheckpointError(f"{path}: its frozen weights are not those of this model")
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in state["trainable"].items():
            own[name].copy_(tensor)
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])
