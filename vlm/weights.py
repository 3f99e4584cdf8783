"""Weights in safetensors files: written in shards, read strictly, one complete error.

A module may hold one tensor under several names (a tied head): it is written once, and the other
names are no missing keys when it is read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

INDEX = "model.safetensors.index.json"


class WeightsError(ValueError):
    """Weights that do not fit; the message lists every key that is missing, unused or misshapen."""


def save_weights(module: nn.Module, folder: Path) -> None:
    """Writes all parameters and persistent buffers, each in its own dtype, in shards of 5 GB.

    Raises OSError before anything is written where the disk has no room.
    """
    state = module.state_dict()
    unique = {tensor.data_ptr(): tensor for tensor in state.values()}
    need_room(folder, sum(t.numel() * t.element_size() for t in unique.values()))
    save_torch_state_dict({k: t.contiguous() for k, t in state.items()}, folder)


def need_room(folder: Path, size: int) -> None:
    """Raises OSError where the disk of `folder` has less than `size` bytes (and a little) free."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size * 1.05 + 2**20:
        raise OSError(
            f"{folder}: needs {size / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB free; "
            "name a folder on another disk"
        )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the safetensors files of `folder`, by name.

    Raises WeightsError naming the file that is missing, cut or broken.
    """
    index = folder / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    state: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.exists():
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no folder"
            raise WeightsError(f"{path}: expected a safetensors file, found {found}")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    state[key] = file.get_tensor(key)
        except SafetensorError as error:
            raise WeightsError(f"{path}: broken or cut safetensors file ({error})") from error
    return state


def load_weights(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Puts tensors into a module in place of its own, dtypes as stored, no tensor left over.

    where: names the source in messages.
    Raises WeightsError listing all missing, unused and wrongly shaped keys together.
    """
    own = module.state_dict()
    aliases: dict[int, list[str]] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(tensor), []).append(name)
    twins = {name: names for names in aliases.values() for name in names}
    missing = [name for name in own if not any(twin in state for twin in twins.get(name, [name]))]
    unused = [name for name in state if name not in own]
    misshapen = [
        f"{name}: expected {tuple(own[name].shape)}, found {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if missing or unused or misshapen:
        raise WeightsError(
            f"{where}: the weights do not fit the model.\n"
            f"missing ({len(missing)}): {missing}\n"
            f"unused ({len(unused)}): {unused}\n"
            f"wrong shape ({len(misshapen)}): {misshapen}"
        )
    module.load_state_dict(state, strict=False, assign=True)
    for names in aliases.values():
        given = next((name for name in names if name in state), None)
        if given is not None and len(names) > 1:
            shared = module.get_parameter(given)
            for name in names:
                parent, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(parent), leaf, shared)


def cast_parameters(module: nn.Module, dtype: torch.dtype, where=lambda parameter: True) -> None:
    """Gives the parameters that `where` chooses a dtype, in place. Buffers keep theirs: rotary
    frequencies and running statistics lose their meaning in 16 bits; so do the weights of batch
    norms, which must match their statistics.
    """
    kept = {
        id(parameter)
        for norm in module.modules()
        if isinstance(norm, _BatchNorm)
        for parameter in norm.parameters(recurse=False)
    }
    for parameter in module.parameters():
        if where(parameter):
            parameter.data = parameter.data.to(torch.float32 if id(parameter) in kept else dtype)


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two states hold the same names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )
