"""What decides what a run learns, so that one that is resumed is the same run: its settings, its
stage, how sources are mixed, and the data themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm.data.example import BadRow
from vlm.data.mixture import MixtureDataset
from vlm.data.sources.base import Source
from vlm.pixels import BadImage
from vlm.pixels.image_ref import ImageRef
from vlm.renamed import new_name, upgraded
from vlm.training.checkpoints.format import CheckpointError
from vlm.training.stages import Stage

SETTINGS, STAGE, MIXTURE, DATA = "settings", "stage", "mixture", "data"
FOLLOWS = (STAGE, MIXTURE)
"""What settings decide: it may differ where a setting does that may."""
ROWS = 16
"""Rows of a source that are read for its fingerprint."""


def run_identity(settings: dict[str, Any], stage: Stage, data: MixtureDataset) -> dict[str, Any]:
    """All that decides what a run learns, as JSON holds it. How a step is split does not.

    settings: those that decide; see `vlm.training.base_settings.deciding`.
    """
    values = asdict(stage)
    del values["micro_batch"]
    mixture = data.mixture
    mixed = {"weights": mixture.weights, "seed": mixture.seed, "warmup": mixture.warmup}
    found = {
        SETTINGS: settings,
        STAGE: values,
        MIXTURE: mixed | {"augment": repr(data.augment)},
        DATA: {f"{number} {s.name}": fingerprint(s) for number, s in enumerate(data.sources)},
    }
    return json.loads(json.dumps(found, default=str))


def fingerprint(source: Source, rows: int = ROWS) -> str:
    """What tells whether a source's data are the same: the number of rows, the first and the last,
    the sizes of the files that it reads, and a hash of some rows spread over it (what they say,
    their boxes, and the sizes of their image files).

    Cheap, and so no proof: a file that was edited to the same size beside the rows that are read
    stays unnoticed. Rows that cannot be read count as such.
    """
    digest = hashlib.sha256()
    for path in source.files:
        digest.update(f"{Path(path).name} {os.path.getsize(path)}".encode())
    last = len(source) - 1
    for row in sorted({last * number // max(1, rows - 1) for number in range(rows)}):
        digest.update(_said_by(source, row).encode())
    size = sum(os.path.getsize(path) for path in source.files)
    files = f", {size} bytes in {len(source.files)} files" if source.files else ""
    names = f"{source.row_name(0)} to {source.row_name(last)}"
    return f"{len(source)} rows, {names}{files}, {digest.hexdigest()[:12]}"


def _said_by(source: Source, row: int) -> str:
    """A row as text; images that are drawn as they are read are skipped."""
    try:
        example = source[row]
    except (BadRow, BadImage):
        return f"{source.row_name(row)}: cannot be read"
    images = []
    for image in example.images:
        data = image.data if isinstance(image, ImageRef) else None
        if isinstance(data, Path):
            images.append(data.stat().st_size if data.is_file() else None)
        elif isinstance(data, bytes) and source.files:
            images.append(len(data))
    return repr((example.name, example.turns, example.boxes, images))


def differences(
    old: dict[str, Any], new: dict[str, Any], change: Sequence[str], path: Path
) -> list[str]:
    """What a run and the checkpoint that it goes on from do not have in common, a line each, where
    all of it may differ. What follows from a setting is named with it, and not once more.

    old, new: as `run_identity` gives them. change: names of settings that may differ; "stage" and
        "mixture", which may too where a setting that is named here does; "data", for data that were
        changed under their names. path: the checkpoint, for messages.
    Raises CheckpointError listing all that differs without being named, and names of nothing.
    """
    old = old | {part: upgraded(old[part], new[part].keys()) for part in (SETTINGS, STAGE)}
    known = new[SETTINGS].keys() | old[SETTINGS].keys()
    change = [new_name(name, known) or name for name in change]
    unknown = sorted(set(change) - known - {STAGE, MIXTURE, DATA})
    if unknown:
        raise CheckpointError(
            f"change: {unknown} name no setting that decides what is learned; expected any of "
            f"{sorted(known)}, {STAGE}, {MIXTURE}, {DATA}"
        )
    settings = _changed(old[SETTINGS], new[SETTINGS])
    allowed, refused = [], {}
    for name, line in settings.items():
        if name in change:
            allowed.append(line)
        else:
            refused.setdefault(name, []).append(line)
    followed = []
    for part in (STAGE, MIXTURE, DATA):
        changed = _changed(old[part], new[part])
        if part in FOLLOWS:  # a setting of the same name says the same
            changed = {key: line for key, line in changed.items() if key not in settings}
        if part in change:
            allowed += [f"{part}.{line}" for line in changed.values()]
        elif part in FOLLOWS and allowed:
            followed += [f"{part}.{key}" for key in changed]
        elif changed:
            refused[part] = [f"{part}.{line}" for line in changed.values()]
    if followed:
        verb = "differs" if len(followed) == 1 else "differ"
        allowed[-1] += f" (so {', '.join(followed)} {verb} too)"
    if refused:
        lines = "; ".join(line for lines in refused.values() for line in lines)
        if not settings.keys().isdisjoint(refused):  # what follows from them need not be named
            refused = {name: said for name, said in refused.items() if name not in FOLLOWS}
        raise CheckpointError(
            f"{path} is of another run: {lines}. To go on all the same, name what may differ: "
            f"--change {' '.join([*change, *refused])}"
        )
    return allowed


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    return {
        key: f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
