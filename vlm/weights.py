"""Weights in safetensors files: written in shards, read strictly, one complete error.

A module may hold one tensor under several names (a tied head): it is written once, and the other
names are no missing keys when it is read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file as write_private
from torch import Tensor, nn

from vlm.compat.torch import BatchNormBase
from vlm.found_weights import (
    SUFFIXES,
    WeightsError,
    misfit,
    read_file,
    read_tensors,
    without_prefix,
)
from vlm.merge import Made, plain_state

INDEX = "model.safetensors.index.json"
PICKLED_INDEX = "pytorch_model.bin.index.json"
"""Of shards that older tools wrote, which are read and not written."""
SHARD, MADE_SHARD = 5 * 10**9, 10**9
"""Bytes of a file at most; the second where tensors are made for it, which are then in memory."""


def save_weights(
    module: nn.Module,
    folder: Path,
    name: Callable[[str], str] = str,
    *,
    merge: bool = True,
    beside: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes all parameters and persistent buffers, each in its own dtype, in shards of 5 GB.

    The files hold the module's plain weights (see `vlm.merge`); the module itself stays as it is.
    name: what each of the module's names is called in the files. merge: whether LoRA is merged;
        where not, its layers are written beside those that they stand for. beside: more tensors, by
        their names in the files.
    Raises OSError before anything is written where the disk is too full.
    """
    state: dict[str, Tensor | Made] = dict(beside or {})
    state |= {name(key): tensor for key, tensor in plain_state(module, lora=merge).items()}
    save_state(state, folder)


def save_state(state: Mapping[str, Tensor | Made], folder: Path) -> None:
    """Writes tensors by their names in the files, in shards; what is made, when it is written, and
    one that stands under several names once.

    Raises OSError before anything is written where the disk is too full.
    """
    likes = {key: t.like if isinstance(t, Made) else t for key, t in state.items()}
    unique = {t.data_ptr() or key: key for key, t in reversed(likes.items())}
    likes = {key: likes[key] for key in likes if key in set(unique.values())}
    require_disk_space(folder, sum(t.numel() * t.element_size() for t in likes.values()))
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)
    made = any(isinstance(tensor, Made) for tensor in state.values())
    plan = split_torch_state_dict_into_shards(likes, max_shard_size=MADE_SHARD if made else SHARD)
    for file, keys in plan.filename_to_tensors.items():
        save_file({key: _whole(state[key]) for key in keys}, folder / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def save_file(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file that others may read as they may any new file: safetensors makes
    its own for the owner alone."""
    path.touch()  # by the process's umask, which cannot be asked without being changed
    mode = path.stat().st_mode & 0o777
    write_private(dict(tensors), path, metadata)
    path.chmod(mode)


def _whole(tensor: Tensor | Made) -> Tensor:
    """The tensor with a storage of its own size, as files take it."""
    if isinstance(tensor, Made):
        return tensor.make()
    tensor = tensor.contiguous()
    own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if own else tensor.clone()


def require_disk_space(folder: Path, size: int) -> None:
    """Raises OSError where the disk of `folder` has less than `size` bytes (and a little) free."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size * 1.05 + 2**20:
        raise OSError(
            f"{folder}: needs {size / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB free; "
            "name a folder on another disk"
        )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the weights of `folder`, by name: in model.safetensors, whole or in shards,
    else in the shards of pytorch_model.bin, or the one other file of weights that lies there.

    Raises WeightsError naming the file that is missing, cut or broken.
    """
    index = folder / INDEX
    if not index.exists() and not (folder / "model.safetensors").exists():
        index = folder / PICKLED_INDEX
    if not index.exists() and (other := other_weights(folder)):
        return read_file(other)
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    state: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        safe = path.suffix == ".safetensors"
        if not path.exists():
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no folder"
            kind = "a safetensors file" if safe else "a file of weights"
            raise WeightsError(f"{path}: expected {kind}, found {found}")
        state |= read_tensors(path) if safe else read_file(path)
    return state


def other_weights(folder: Path) -> Path | None:
    """The one file of weights in a folder that has no model.safetensors; None where it has, or has
    not exactly one."""
    if (folder / "model.safetensors").exists() or not folder.is_dir():
        return None
    files = [path for path in folder.iterdir() if path.suffix in SUFFIXES]
    return files[0] if len(files) == 1 else None


def load_weights(
    module: nn.Module, state: Mapping[str, Tensor], where: str, name: Callable[[str], str] = str
) -> None:
    """Puts tensors into a module in place of its own, dtypes as stored, no tensor left over.

    where: names the source in messages. name: what each of the module's names is called in `state`.
    A prefix before all of the names is taken off, see `vlm.found_weights`.
    Raises WeightsError counting all missing, unused and wrongly shaped keys together, and naming
    the first of each.
    """
    own = {name(key): tensor for key, tensor in module.state_dict().items()}
    if not own.keys() >= state.keys():
        state = without_prefix(state, own.__contains__, where)
    aliases: dict[int, list[str]] = {}
    for key, tensor in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(tensor), []).append(key)
    twins = {name(key): [name(k) for k in keys] for keys in aliases.values() for key in keys}
    missing = [key for key in own if not any(twin in state for twin in twins.get(key, [key]))]
    unused = [key for key in state if key not in own]
    misshapen = [
        f"{key}: expected {tuple(own[key].shape)}, found {tuple(tensor.shape)}"
        for key, tensor in state.items()
        if key in own and own[key].shape != tensor.shape
    ]
    if missing or unused or misshapen:
        raise misfit(f"{where}: the weights do not fit the model", missing, unused, misshapen)
    given = {key: state[name(key)] for key in module.state_dict() if name(key) in state}
    module.load_state_dict(given, strict=False, assign=True)
    for keys in aliases.values():
        first = next((key for key in keys if key in given), None)
        if first is not None and len(keys) > 1:
            shared = module.get_parameter(first)
            for key in keys:
                parent, _, leaf = key.rpartition(".")
                setattr(module.get_submodule(parent), leaf, shared)


def cast_parameters(module: nn.Module, dtype: torch.dtype, where=lambda parameter: True) -> None:
    """Gives the parameters that `where` chooses a dtype, in place; those that lose their meaning in
    16 bits (see `castable`) become float32. Buffers keep theirs: rotary frequencies and running
    statistics are such.
    """
    able = {id(parameter) for parameter in castable(module)}
    for parameter in module.parameters():
        if where(parameter) and parameter.is_floating_point():  # packed weights are not
            wanted = dtype if id(parameter) in able else torch.float32
            if parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted)


def castable(module: nn.Module) -> list[nn.Parameter]:
    """The floating-point parameters that may be held in 16 bits: not the weights of batch norms,
    which must match their statistics, nor scalars, such as a temperature."""
    kept = {
        id(parameter)
        for norm in module.modules()
        if isinstance(norm, BatchNormBase)
        for parameter in norm.parameters(recurse=False)
    }
    return [
        parameter
        for parameter in module.parameters()
        if parameter.is_floating_point() and parameter.dim() and id(parameter) not in kept
    ]


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two states hold the same names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )
