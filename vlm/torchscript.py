"""Weights out of a TorchScript archive, such as OpenAI's `ViT-B-32.pt`, without running any of it.

torch opens such an archive by compiling the program inside. Here its program is passed by: the
pickle beside it is read by an unpickler that makes tensors and plain attributes, and nothing else.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""torch's classes of storage that an archive may name -> what they hold."""


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive that `torch.jit.save` wrote."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Every tensor that the modules in an archive hold, by its dotted name, on the CPU.

    Raises pickle.UnpicklingError for an archive with anything but modules, numbers and tensors;
    zipfile.BadZipFile for a broken one.
    """
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl"))
        root = name.removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise pickle.UnpicklingError("expected numbers in little-endian order")
        found = _Unpickler(archive, root).load()
    if not isinstance(found, _Part):
        raise pickle.UnpicklingError(f"expected a module, found {type(found).__name__}")
    return dict(_tensors(found, ""))


class _Part:
    """A module of the archive, whose class is not looked at: its attributes alone."""

    def __init__(self, *_: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        # A pickle may set attributes of what it is given, so it is given nothing that others use.
        if module.split(".")[0] == "__torch__":
            return type("Part", (_Part,), {})
        if (module, name) in KNOWN:
            call = KNOWN[module, name]
            return lambda *given: call(*given)
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not read")

    def persistent_load(self, saved: Any) -> Tensor:
        """The storage that a tensor lies in, as a flat tensor."""
        _, dtype, key, _, count = saved
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            if len(data) != count * dtype.itemsize:
                raise pickle.UnpicklingError(
                    f"data/{key}: expected {count * dtype.itemsize} bytes, found {len(data)}"
                )
            empty = torch.empty(0, dtype=dtype)
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else empty
        return self._storages[key]


def _first(value: Any, *_: Any) -> Any:
    return value


def _tensor(flat: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    if not math.prod(size):
        return flat.new_empty(size)
    return flat.as_strided(size, stride, offset)  # which refuses what lies outside


KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    ("torch.jit._pickle", "build_intlist"): _first,
    ("torch.jit._pickle", "build_doublelist"): _first,
    ("torch.jit._pickle", "build_boollist"): _first,
    ("torch.jit._pickle", "build_tensorlist"): _first,
    ("collections", "OrderedDict"): OrderedDict,
}
"""What an archive may call, and what is called instead."""


def _tensors(part: _Part, before: str):
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            yield before + name, value
        elif isinstance(value, _Part):
            yield from _tensors(value, f"{before}{name}.")
