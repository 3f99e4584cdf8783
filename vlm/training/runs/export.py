"""The model of any checkpoint of a run, without training further and on any machine.

A checkpoint holds what was trained; all else comes from the run's settings, as it came when the run
began, and is compared with the fingerprint that the checkpoint has of it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

from torch import nn

from vlm import config
from vlm.precision import DTYPES
from vlm.renamed import upgraded
from vlm.training.base_settings import RECIPES, BaseSettings
from vlm.training.checkpoints.checkpoint import is_of, newest_whole
from vlm.training.checkpoints.format import CheckpointError, read, read_about, stored
from vlm.training.run_folder import RunError
from vlm.training.runs.launch import recipe_in
from vlm.training.runs.run import PRECISION_REASON
from vlm.training.stages import hold_in

MOVED = {
    "vlm.training.contrastive:Settings": "vlm.training.runs.contrastive",
    "vlm.training.reading:LineReaderSettings": "vlm.training.runs.line_reader",
    "vlm.training.reading:TranscriberSettings": "vlm.training.runs.encoder_decoder",
}
"""Settings of runs that were made with earlier versions -> where they are now."""


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    layout: str = "native",
    merge: bool = True,
    recipe: Path | None = None,
) -> Path:
    """Writes the model of a run's checkpoint to `out`; gives the checkpoint.

    A line reader's confidences are as its recipe begins with them: they are fitted when a run ends.
    step: the checkpoint after so many steps; None takes the newest, which must be whole. layout,
        merge: see `Model.save`. recipe: the file of the run's recipe; None takes it from the run's
        settings, where it is one of ours.
    Raises RunError or CheckpointError naming what does not fit, before anything is written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: expected a new or an empty folder to write to")
    settings = settings_of(run, recipe)
    path, broken = newest_whole(run / "checkpoints", step)
    if path is None:
        raise RunError(f"{run}: expected checkpoints in it, found none")
    if broken:
        said = "; ".join(line for lines in broken.values() for line in lines)
        older = int(path.name.removeprefix("step_"))
        raise CheckpointError(f"{said}; the newest whole one is that of --step {older}")
    model = settings.build()
    fill(model.module, path, settings.precision)
    model.save(out, layout=layout, merge=merge)
    return path


def settings_of(run: Path, recipe: Path | None = None) -> BaseSettings:
    """The settings that a run was made with.

    Raises RunError for a folder that is no run's, one that names a recipe which is neither ours nor
    given (no file is run because a run names it), and settings that the recipe does not have.
    """
    file = run / "settings.json"
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise RunError(f"{run}: expected a run's folder, with settings.json in it") from error
    except ValueError as error:
        raise RunError(f"{file}: expected settings as JSON, found it broken ({error})") from error
    module, _, name = values.pop("recipe", "").rpartition(":")
    for key in ("stage", PRECISION_REASON):
        values.pop(key, None)
    if recipe is not None:
        found = recipe_in(recipe).Settings
    elif module.startswith("vlm."):
        module = MOVED.get(f"{module}:{name}", module)
        found = getattr(importlib.import_module(module), name, None)
    elif (known := RECIPES / Path(module).name).is_file() and module == f"recipes/{known.name}":
        found = recipe_in(known).Settings
    else:
        raise RunError(f"{file}: made by {module or 'an unnamed recipe'}; name it with --recipe")
    if not isinstance(found, type) or not issubclass(found, BaseSettings):
        raise RunError(f"{file}: expected the settings of a recipe, found {module}:{name}")
    names = {field.name for field in dataclasses.fields(found)}
    return config.from_dict(found, upgraded(values, names), str(file))


def fill(module: nn.Module, path: Path, precision: str) -> None:
    """Puts a checkpoint's weights into the module that its run began with, all in the dtypes that
    training has them in.

    Raises CheckpointError where the module is another.
    """
    names = {name[8:] for name in stored(path) if name.startswith("weights.")}
    strange = sorted(names - {name for name, _ in module.named_parameters()})
    if strange:
        raise CheckpointError(f"{path} is of another model, which has {strange[:20]}")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    hold_in(module, DTYPES[precision])
    if not is_of(read_about(path)["fingerprint"], module):
        raise CheckpointError(
            f"{path}: the weights that its run left as they were are not those that its settings "
            "give now; see whether the model or run that it began with has changed"
        )
    own = dict(module.named_parameters())
    read(path, {f"weights.{name}": own[name].detach() for name in names})
