"""Weights as other tools leave them, brought to plain names: what a training tool wraps around a
state dict is taken off in this one place, for every file and every layout.

Taken off are the dictionary around it (`state_dict`, `model`, ...) and a prefix that all of its
names share (`module.` of DDP, `_orig_mod.` of torch.compile, `model.` of Lightning,
`base_model.model.` of peft, and any other). Averaged (EMA) weights are taken only where they are
asked for, or alone. What is skipped is told in a warning. Only safetensors, pickles that torch
reads with `weights_only`, and the tensors of TorchScript archives are opened: nothing in a file is
ever run.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm.torchscript import is_torchscript, read_torchscript

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Endings of files that hold weights."""
PLAIN = ("state_dict", "model_state_dict", "model", "module", "weights")
"""Where tools put the weights that were trained, the likeliest first."""
BESIDE = re.compile(r"optim|scaler|sched|callbacks|loops|hyper_parameters")
"""Keys of what else a checkpoint holds."""
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)", re.IGNORECASE)


class WeightsError(ValueError):
    """Weights that do not fit, or a file that holds none."""


def misfit(
    what: str, missing: Sequence[str], unused: Sequence[str], misshapen: Sequence[str] = ()
) -> WeightsError:
    """The error of weights that do not fit: how many keys of each kind, and the first of them.
    what: the sentence before, without its full stop."""
    said = {"missing": missing, "unused": unused, "wrong shape": misshapen}
    lines = [f"{kind} ({len(keys)}): {_first(keys)}" for kind, keys in said.items()]
    return WeightsError("\n".join((f"{what}.", *lines)))


def _first(keys: Sequence[str], most: int = 12) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{list(keys[:most])}{more}"


def read_file(path: Path, state: str | None = None) -> dict[str, Tensor]:
    """The weights in a file by the names that they have there, on the CPU; `weights_in` of what
    `open_file` gives."""
    return weights_in(open_file(path), path, state)


def open_file(path: Path) -> Any:
    """What a file of weights holds, nothing of it run. Raises WeightsError naming a file that is
    broken, or holds Python objects or something else."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if path.suffix in SUFFIXES:
        return _read_torch(path)
    raise WeightsError(f"{path}: expected weights in {', '.join(SUFFIXES)}, found another file")


def weights_in(found: Any, path: Path, state: str | None = None) -> dict[str, Tensor]:
    """The weights in a checkpoint.

    path: names it in messages. state: which of several sets of weights, by its key
        ("state_dict_ema"), or by the prefix of its names; None takes those that were trained, not
        their averages.
    Raises WeightsError where there are none, or several sets and no telling which is meant.
    """
    sets = dict(_sets(found, ""))
    if state is not None:
        return _asked(sets, state, path)
    if not sets:
        said = sorted(found)[:8] if isinstance(found, Mapping) else type(found).__name__
        raise WeightsError(f"{path}: expected weights by name, found {said}")
    averaged = [key for key in sets if AVERAGED.search(key)]
    plain = [key for key in sets if key not in averaged]
    named = [key for key in PLAIN if key in plain]
    if len(plain) > 1 and not named:
        raise WeightsError(f"{path}: holds several sets of weights: {_choices(path, plain)}")
    if not plain and len(averaged) > 1:
        raise WeightsError(f"{path}: holds averaged weights alone: {_choices(path, averaged)}")
    taken = (named or plain or averaged)[0]
    others = [key for key in plain if key != taken]
    if others:
        warnings.warn(
            f"{path}: {taken!r} is taken; other weights are there too: {_choices(path, others)}",
            stacklevel=2,
        )
    if taken in averaged:
        warnings.warn(f"{path}: averaged weights, {taken!r}, are taken: no others are there",
                      stacklevel=2)  # fmt: skip
    elif averaged:
        warnings.warn(
            f"{path}: the weights that were trained are taken; averaged ones are there too: "
            f"{_choices(path, averaged)}",
            stacklevel=2,
        )
    return sets[taken]


def _choices(path: Path, keys: list[str]) -> str:
    return "say " + " or ".join(f"{path}?state={key.rstrip('.')}" for key in keys)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name. Raises WeightsError for a broken one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        _refuse_text(path)
        raise WeightsError(f"{path}: broken or cut safetensors file ({error})") from error


def _read_torch(path: Path) -> Any:
    try:
        if is_torchscript(path):
            return read_torchscript(path)
        mapped = zipfile.is_zipfile(path)  # so that an optimizer's state is not read
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError,
            KeyError, TypeError, AttributeError, IndexError) as error:  # fmt: skip
        _refuse_text(path)
        objects = _objects_in(path)
        if objects:
            raise WeightsError(
                f"{path}: holds Python objects ({', '.join(objects[:4])}), and opening those can "
                "run code; where you trust the file, write its weights alone: torch.save("
                f"torch.load({path.name!r}, weights_only=False)['state_dict'], 'weights.pt') (of a "
                "whole module: its .state_dict())"
            ) from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        said = "" if "weights_only" in reason[0] else f" ({reason[0][:200]})"
        raise WeightsError(f"{path}: broken or cut, or no file of weights{said}") from error


LFS = b"version https://git-lfs.github.com"


def _refuse_text(path: Path) -> None:
    """Raises WeightsError for a file that is text, such as what Git LFS leaves in place of one."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(LFS):
        raise WeightsError(
            f"{path}: expected weights, found a pointer of Git LFS; `git lfs pull` fetches the file"
        )
    if start.isascii() and all(chr(c).isprintable() or chr(c).isspace() for c in start):
        raise WeightsError(f"{path}: expected weights, found text: {start.decode()[:40]!r}")


def _objects_in(path: Path) -> list[str]:
    """The classes and functions that a pickle of torch's names and `weights_only` refuses."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of a broken file, each its own
        return []


def _sets(found: Any, where: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary of tensors in a checkpoint, under the keys that lead to it."""
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        return
    inner = {key: value for key, value in found.items() if isinstance(value, Mapping)}
    if not inner:
        tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
        if tensors:
            yield where, tensors
    for key, value in inner.items():
        if not BESIDE.search(key):
            yield from _sets(value, f"{where}.{key}" if where else key)


def _asked(sets: Mapping[str, dict[str, Tensor]], state: str, path: Path) -> dict[str, Tensor]:
    if state in sets:
        return sets[state]
    prefix = f"{state}."
    for tensors in sets.values():
        part = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        if part:
            return part
    raise WeightsError(f"{path}: expected weights under {state!r}, found {sorted(sets)}")


def without_prefix(
    state: Mapping[str, Tensor], fits: Callable[[str], bool], where: str
) -> dict[str, Tensor]:
    """The weights under names that a layout has: without the prefix that stands before them.

    fits: whether a name is one of the layout's. where: names the source in messages.
    Names that fit nowhere stay as they are, so that the layout's own check names them; weights
    outside the prefix belong to something else and are skipped, with a warning that says so.
    Raises WeightsError where there are two such sets and no telling which is meant.
    """
    under: dict[str, set[str]] = {}
    for key in state:
        words = key.split(".")
        for count in range(len(words)):
            if fits(".".join(words[count:])):
                under.setdefault("".join(f"{word}." for word in words[:count]), set()).add(key)
    if not under:
        return dict(state)
    most = max(map(len, under.values()))
    whole: list[str] = []
    for prefix in sorted((p for p, keys in under.items() if len(keys) == most), key=len):
        if all(under[prefix].isdisjoint(under[other]) for other in whole):
            whole.append(prefix)
    plain = [prefix for prefix in whole if not AVERAGED.search(prefix.rstrip("."))] or whole
    if len(plain) > 1:
        asked = " or ".join(f"?state={prefix.rstrip('.')}" for prefix in plain)
        raise WeightsError(f"{where}: holds {len(plain)} models; say after the file {asked}")
    (prefix,) = plain
    others = set().union(*(under[other] for other in whole if other != prefix))
    kept = {key: state[key] for key in state if key.startswith(prefix) and key not in others}
    left = [key for key in state if key not in kept]
    if prefix or left:
        said = f"read without the prefix {prefix!r}" if prefix else "read as they are"
        more = f"; {len(left)} others skipped, such as {sorted(left)[:3]}" if left else ""
        warnings.warn(f"{where}: names are {said}{more}", stacklevel=2)
    return {key.removeprefix(prefix): tensor for key, tensor in kept.items()}
