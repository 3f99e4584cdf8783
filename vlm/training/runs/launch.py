"""What every recipe shares: settings from the command line, the process's rank, and
one clear line where something is wrong.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import torch
import tyro
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object

from vlm.compat.accelerate import asked_for_fsdp
from vlm.compat.versions import warn_untested
from vlm.data.example import BadRow
from vlm.data.mixture import split_of
from vlm.data.sources import BadSource
from vlm.pixels import BadImage
from vlm.precision import Choice, choose, cores
from vlm.renamed import new_name, require_new_names
from vlm.training.activation_checkpointing import set_mmap_threshold
from vlm.training.base_settings import BaseSettings, require_ranges, require_read_rates
from vlm.training.checkpoints.checkpoint import CheckpointError
from vlm.training.fit import Interrupted
from vlm.training.run_folder import RunError
from vlm.training.sharding import Shard
from vlm.training.stages import StageError
from vlm.weights import WeightsError

REPLICAS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
ERRORS = (BadRow, BadImage, BadSource, CheckpointError, RunError, StageError, WeightsError,
          ImportError, OSError, ValueError, RuntimeError)  # fmt: skip


def start(settings_class: type[BaseSettings], run: Callable[..., Any], *stated: Any) -> None:
    """A recipe's main: `run` with settings from the command line and with what the recipe states,
    such as its stage and objective; one clear line where something is wrong."""
    warn_untested()
    try:
        settings = read_settings(settings_class, sys.argv[1:], sys.modules["__main__"].__doc__)
        run(settings, *stated)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    except ERRORS as error:
        if _of_another(error):
            print(
                f"error: a process of this run ended or was silent for {PATIENCE.seconds // 60} "
                f"minutes, so this one ends too; see what the others said, then go on with "
                f"--resume ({' '.join(str(error).split())[:200]})",
                file=sys.stderr,
            )
            os._exit(1)  # what waits for the lost one would wait for ever
        if isinstance(error, RuntimeError) and type(error).__module__ == "builtins":
            raise  # a fault of the program or the machine: show where
        if _rank():
            time.sleep(PAUSE_S)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


PAUSE_S = 3.0
"""How long other processes than the first keep an error to themselves: where all have the same, the
first says it, and its end makes the launcher end the others."""


def _rank() -> int:
    """This process's number among those of a launcher, which states it before they are joined."""
    return int(os.environ.get("RANK", 0))


def _of_another(error: BaseException) -> bool:
    """Whether an error says that another process is gone: gloo's and NCCL's are told by words."""
    said = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL")
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in said):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def read_settings(
    settings_class: type[BaseSettings],
    arguments: list[str],
    about: str | None,
    prog: str | None = None,
) -> BaseSettings:
    """Settings from a command line; `--config FILE.yaml` replaces defaults, options win over it.

    Raises ValueError naming the file's keys that are no settings, numbers out of their range, and
    learning rates of what does not learn.
    """
    require_new_names(arguments, {field.name for field in dataclasses.fields(settings_class)})
    default = None
    arguments = [
        word
        for given in arguments
        for word in (given.split("=", 1) if given.startswith("--config=") else [given])
    ]
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise ValueError("--config: expected a YAML file after it")
        default = _from_yaml(settings_class, Path(arguments[at + 1]))
        arguments = arguments[:at] + arguments[at + 2 :]
    about = f"{about or ''}\n--config FILE.yaml takes settings from a file."
    options = {} if default is None else {"default": default}
    options["console_outputs"] = not _rank()  # all processes are told the same
    settings = tyro.cli(settings_class, args=arguments, description=about, prog=prog, **options)
    require_ranges(settings)
    require_read_rates(settings)
    return settings


def _from_yaml(settings_class: type[BaseSettings], path: Path) -> BaseSettings:
    """The settings in a YAML file, read as options are: a value of the wrong kind ends it as there,
    and 1e-3, which is text in YAML, is a number."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected settings as KEY: VALUE lines, found {values!r}")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    kinds = get_type_hints(settings_class)
    known = {field.name: kinds[field.name] for field in dataclasses.fields(settings_class)}
    old = {key: new for key in values if (new := new_name(key, known))}
    if old:
        said = ", ".join(f"{key} is now {new}" for key, new in old.items())
        raise ValueError(f"{path}: settings have changed their names: {said}")
    unknown = sorted(set(values) - known.keys())
    if unknown:
        raise ValueError(
            f"{path}: {unknown} are no settings of this recipe; it has {sorted(known)}"
        )
    nested = [key for key, value in values.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{path}: {nested} hold keys of their own; expected a value or a list")
    for key, value in values.items():
        if known[key] is bool and not isinstance(value, bool):
            raise ValueError(f"{path}: {key}: expected true or false, found {value!r}")
        if value is None and type(None) not in get_args(known[key]):
            raise ValueError(f"{path}: {key}: expected a value, found none")
    arguments = [word for key, value in values.items() for word in _option(key, value)]
    return tyro.cli(settings_class, args=arguments, prog=str(path))


def _option(key: str, value: Any) -> list[str]:
    """A setting as words of a command line.

    >>> _option("image_px", [192, 128]), _option("merge", False)
    (['--image-px', '192', '128'], ['--no-merge'])
    """
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


STATED = ("Settings", "stage", "objective")
"""What a recipe's file defines: what can be set, who learns at which rate, what is minimised."""


def recipe_in(path: Path, needed: Sequence[str] = STATED[:1]) -> ModuleType:
    """The recipe in a file, imported without running it. needed: what it must define, of STATED."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a recipe file, such as recipes/stage1_adaptor.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    missing = [name for name in needed if not hasattr(module, name)]
    if missing:
        raise ValueError(
            f"{path}: expected a recipe that defines {', '.join(needed)}, found no "
            f"{', '.join(missing)}"
        )
    return module


PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others before it takes one for dead."""


def accelerator_for(settings: BaseSettings) -> tuple[Accelerator, int, Choice]:
    """This process among the others that run the recipe, its share of the cores taken, its share of
    the examples of a step, and the precision that all processes compute in: with "auto" bf16 where
    every one of them is faster in it.

    Raises ValueError for a way of running that the recipes do not have, for a batch that does not
    divide, and for a precision that a device cannot compute in.
    """
    choice = _agreed(settings, PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE))
    accelerator = Accelerator(
        mixed_precision="bf16" if choice.name == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.distributed_type not in (*REPLICAS, DistributedType.FSDP):
        raise ValueError(
            f"this accelerate configuration asks for {accelerator.distributed_type.value}; the "
            "recipes run on one process, on replicas (MULTI_GPU, MULTI_CPU) or sharded (FSDP)"
        )
    _require_alike(settings, accelerator)
    share_cores(accelerator, settings.threads)
    if accelerator.device.type == "cpu":
        set_mmap_threshold()
    share, _ = split_of(settings.batch, settings.micro_batch, accelerator.num_processes)
    return accelerator, share, choice


def _agreed(settings: BaseSettings, state: PartialState) -> Choice:
    """The precision that all processes compute in; where they were asked for different ones, each
    has its own, which `_require_alike` refuses."""
    choice = choose(settings.precision, state.device)
    if state.num_processes == 1:
        return choice
    everyone = gather_object([(settings.precision, choice)])
    if {asked for asked, _ in everyone} != {"auto"}:
        return choice
    choices = [other for _, other in everyone]
    return next((other for other in choices if other.name == "fp32"), choices[0])


def sharding_of(settings: BaseSettings, accelerator: Accelerator) -> Shard:
    """How weights are sharded: as the settings say, or as an accelerate configuration that asks for
    FSDP does; not at all on one process."""
    if accelerator.num_processes == 1:
        return "no"
    return "all" if asked_for_fsdp() and settings.shard == "no" else settings.shard


def wait_for_main(accelerator: Accelerator) -> None:
    """Waits until every process is here, longer than `PATIENCE` where the main one has work."""
    if accelerator.num_processes > 1:
        patient = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=12))
        torch.distributed.barrier(group=patient)
        torch.distributed.destroy_process_group(patient)


def _require_alike(settings: BaseSettings, accelerator: Accelerator) -> None:
    """Raises ValueError naming the settings that differ between the processes of a run."""
    if accelerator.num_processes == 1:
        return
    everyone = gather_object([dataclasses.asdict(settings)])
    differ = {
        name: sorted({repr(values.get(name)) for values in everyone})
        for name in everyone[0]
        if any(values.get(name) != everyone[0][name] for values in everyone)
    }
    if differ:
        said = "; ".join(f"{name}: {' and '.join(found)}" for name, found in differ.items())
        raise ValueError(f"expected the same settings on every process, found {said}")


def share_cores(accelerator: Accelerator, threads: int | None) -> None:
    """Gives this process `threads` CPU threads; None: its share of the cores it may use, unless it
    computes on a GPU. threads is at least 1."""
    if threads is None and accelerator.device.type != "cpu":
        return
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads or max(1, cores() // neighbours))


def processes(accelerator: Accelerator, share: int) -> str:
    """How a run is spread, for people."""
    count = accelerator.num_processes
    return (
        f"{count} process{'es' * (count > 1)} on {accelerator.device.type}, "
        f"{torch.get_num_threads()} threads and {share} examples of each step on each"
    )
