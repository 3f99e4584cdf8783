"""A checkpoint's folder: torch's distributed format, what the run was, and a manifest of checksums.

    __0_0.distcp, __1_0.distcp   tensors, one file for each process that wrote
    .metadata                    which tensor lies where; torch's
    run.json                     the run's settings, data, library versions and progress
    manifest.json                sizes and SHA-256 of all other files

It is written into `.step_00000120.part` and appears by one rename, after every file and folder was
brought to the disk: what is called `step_00000120` was whole once, and the manifest tells whether
it still is. It can be read on any number of processes, sharded or not.

Only tensors are stored, and they are read without running what a file says: torch's `.metadata` is
a pickle, of which the few classes that it needs are let through.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from vlm.weights import require_disk_space

MANIFEST, ABOUT = "manifest.json", "run.json"
VERSION = 1
READERS = 4
"""Threads that compute checksums; SHA-256 takes about a second a gigabyte in each."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, was not written, or belongs to another run; the message
    names the file."""


T = TypeVar("T")


class Together:
    """Work that processes share, so that the fault of one ends all of them and none waits for
    ever. group: a gloo group of its own, as it is used beside training; None for one process."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = 1 if group is None else dist.get_world_size(group)

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on each process, in their order. Raises what it raised here, or else
        CheckpointError saying which process failed and how."""
        if self.group is None:
            return [work()]
        mine, error = None, None
        try:
            mine = work()
        except Exception as raised:  # of whatever kind: the others wait for an answer
            error = raised
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, (mine, _said(error)), group=self.group)
        if error is not None:
            raise error
        faults = [f"process {rank}: {said}" for rank, (_, said) in enumerate(found) if said]
        if faults:
            raise CheckpointError("; ".join(faults))
        return [given for given, _ in found]

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first process, on all of them. Raises as `each` does."""
        return self.each(lambda: work() if self.rank == 0 else None)[0]


def _said(error: BaseException | None) -> str | None:
    if error is None or isinstance(error, CheckpointError):
        return error and str(error)
    return f"{type(error).__name__}: {error}"


def write(
    final: Path, tensors: Mapping[str, Tensor], about: dict[str, Any], size: int, all: Together
) -> None:
    """Writes a checkpoint `final`, every process its part; it appears when all of it is on the
    disk.

    tensors: this process's, on the CPU: plain ones that no other process has, and its DTensors.
    about: what run.json holds; the first process's is taken. size: bytes of the whole.
    Raises OSError or CheckpointError on every process where one could not write its part; what was
    written by then is removed.
    """
    part = final.with_name(f".{final.name}.part")

    def begin() -> None:
        require_disk_space(final.parent, size)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)

    def finish() -> None:
        write_json(part / ABOUT, about)
        found = {".metadata": checksum(part / ".metadata"), ABOUT: checksum(part / ABOUT)}
        for rank, files in enumerate(written):
            for name, said in files.items():
                if not (part / name).exists():
                    raise CheckpointError(
                        f"{part / name}: process {rank} wrote it, and process 0 does not see it; "
                        "a run's folder must lie on a disk that all machines share"
                    )
                found[name] = said
        write_json(part / MANIFEST, {"version": VERSION, "files": found})
        _to_disk(part)
        if final.exists():
            remove(final)
        part.rename(final)
        _to_disk(final.parent)

    try:
        all.first(begin)
        _write_tensors(part, tensors, all)
        own = sorted(part.glob(f"__{all.rank}_*.distcp"))
        written = all.each(lambda: {path.name: checksum(path) for path in own})
        all.first(finish)
    except Exception:
        if all.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise


def _write_tensors(part: Path, tensors: Mapping[str, Tensor], all: Together) -> None:
    """Writes tensors by torch's own planner and writer. `dcp.save`, which does the same, logs each
    tensor and gathers by a way of its own, and does not divide plain tensors among processes."""
    planner, writer = dcp.DefaultSavePlanner(), dcp.FileSystemWriter(part)
    first = all.rank == 0

    def plan():
        planner.set_up_planner(dict(tensors), writer.storage_meta(), first)
        writer.set_up_storage_writer(first)
        return writer.prepare_local_plan(planner.create_local_plan())

    plans, metadata = planner.create_global_plan(all.each(plan))  # the same on every process
    own = planner.finish_plan(writer.prepare_global_plan(plans)[all.rank])
    results = all.each(lambda: writer.write_data(own, planner).wait())
    all.first(lambda: writer.finish(metadata, results))


def faults(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's files, each named with what was expected and found; nothing
    where it is as it was written. Reads all of it."""
    manifest = folder / MANIFEST
    try:
        said = json.loads(manifest.read_text())
        files = said["files"]
    except FileNotFoundError:
        return [f"{manifest}: expected a manifest of checksums, found none"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{manifest}: expected a manifest of checksums, found it unreadable ({error})"]
    if said.get("version") != VERSION:
        return [f"{manifest}: expected version {VERSION}, found {said.get('version')}"]

    def fault(name: str) -> str | None:
        path, expected = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{path}: expected {expected['bytes']} bytes, found {size}"
            found = checksum(path)
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
        if found != expected:
            return f"{path}: expected SHA-256 {expected['sha256']}, found {found['sha256']}"
        return None

    with ThreadPoolExecutor(READERS) as readers:
        return [said for said in readers.map(fault, sorted(files)) if said]


def checksum(path: Path) -> dict[str, Any]:
    """The size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def read_about(folder: Path) -> dict[str, Any]:
    """What run.json holds."""
    return json.loads((folder / ABOUT).read_text())


def stored(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and dtype of every tensor of a checkpoint, by name.

    Raises CheckpointError where it holds anything but tensors.
    """
    found = {}
    for name, entry in _Reader(folder).read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{folder}: expected tensors alone, found {name!r} to be none")
        found[name] = (entry.size, entry.properties.dtype)
    return found


def read(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fills tensors, plain or DTensors, from a checkpoint; each process reads what it needs.

    Raises CheckpointError listing every name that the checkpoint lacks and every other shape.
    """
    there = stored(folder)
    lacking = sorted(name for name in into if name not in there)
    other = [
        f"{name}: expected {tuple(tensor.shape)}, found {tuple(there[name][0])}"
        for name, tensor in into.items()
        if name in there and tensor.shape != there[name][0]
    ]
    if lacking or other:
        raise CheckpointError(
            f"{folder} is of another model: lacking ({len(lacking)}): {lacking[:20]}; of another "
            f"shape ({len(other)}): {other[:20]}"
        )
    planner, reader = dcp.DefaultLoadPlanner(), _Reader(folder)
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(into), metadata, True)
    reader.set_up_storage_reader(metadata, True)
    (plan,) = planner.create_global_plan([planner.create_local_plan()])
    reader.read_data(planner.finish_plan(plan), planner).wait()


class _Reader(dcp.FileSystemReader):
    """torch's reader, whose `.metadata` can name nothing but what it is made of."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = Path(self.path, ".metadata")
        with path.open("rb") as file:
            return _Unpickler(file, path).load()


ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
}  # fmt: skip
"""What `.metadata` is made of, besides torch's dtypes."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        found = f"{module}.{name}"
        raise CheckpointError(f"{self.path}: expected a description of tensors, found {found}")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file, brought to the disk."""
    with path.open("w") as file:
        file.write(json.dumps(values, indent=1, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def remove(folder: Path) -> None:
    """Removes a checkpoint; one that is removed in part is called so by nobody."""
    gone = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def _to_disk(folder: Path) -> None:
    """Brings a folder's own entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
