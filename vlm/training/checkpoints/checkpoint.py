"""Checkpoints: the trainable weights, the optimizer and the position, written all or not at all.

A checkpoint is a folder `checkpoints/step_00000120`, as `vlm.training.checkpoints.format` describes
it. Frozen weights are not in it: the run's settings rebuild them, and a fingerprint proves that
they are the same ones.

Saving copies the state to host memory (for each trainable weight 12 bytes, fp32 and AdamW's two
moments: replicas share them out, so that it is 12 bytes once for all processes, and a sharded
process copies its own shards); a thread writes the copy while training goes on, and the copy is
freed when it is written. The next save, the end of the run and a stop wait for it. A scheduler or
launcher that stops a run must leave it that time: torchrun gives 30 seconds, then kills. A run that
is killed meanwhile goes on from the checkpoint before.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.training.checkpoints import format as disk
from vlm.training.checkpoints.format import CheckpointError, Together
from vlm.training.checkpoints.run_identity import differences
from vlm.training.run_folder import versions
from vlm.weights import require_disk_space

NAME = re.compile(r"step_(\d{8})")
WRITING = re.compile(r"\.step_(\d{8})\.part")
KEEP = 2


@dataclass
class Progress:
    """How far a run has come.

    step: optimizer steps done; samples: rows drawn by then. skipped: rows skipped, the first of
    them named with their reasons in examples_skipped. cut_tokens: text tokens cut to fit the
    context. unscored: rows without a scored token.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0
    examples_skipped: list[str] = field(default_factory=list)
    cut_tokens: int = 0
    unscored: int = 0


class Checkpoints:
    """The checkpoints of one run: written beside training, the last of them kept.

    Every process makes one and calls each method at the same step. As a context it waits, when it
    is left, for the checkpoint that is being written.

    folder: where they lie, on a disk that all processes share.
    module, optimizer: whose state is saved, as `prepare` and `optimizer_for` left them.
    identity: of the run, see `vlm.training.checkpoints.run_identity`; the first
    process's counts. keep: how many are kept, the newest. say: shows a line to people.
    """

    def __init__(
        self,
        folder: Path,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        identity: dict[str, Any],
        *,
        keep: int = KEEP,
        say: Callable[[str], None] = print,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least one checkpoint, found {keep}")
        self.folder, self.module, self.optimizer = folder, module, optimizer
        self.identity, self.keep, self.say = identity, keep, say
        shared = dist.is_initialized() and dist.get_world_size() > 1
        self.all = Together(dist.new_group(backend="gloo") if shared else None)
        self.fingerprint = fingerprint(module)
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, value, trace) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):  # not at a second request to stop, which stops at once
            self._join()
            if self._error is not None and self._error is not value:
                self.say(str(self._error))

    @property
    def failed(self) -> bool:
        """Whether the last one could not be written; `wait` says why."""
        return self._error is not None

    def require_disk_space(self, saves: int) -> None:
        """Raises OSError where the disk cannot hold what a run will leave: its checkpoints, and the
        model beside them.

        saves: how many checkpoints are still to be written; one more than are kept lie there for a
            moment.
        """
        there = min(self.keep, len(list_checkpoints(self.folder)))
        coming = min(saves, self.keep + 1 - there)
        weights = sum(p.numel() * p.element_size() for p in self.module.parameters())
        require_disk_space(self.folder, coming * _size(self.module) + weights)

    def save(self, progress: Progress) -> None:
        """Takes a copy of the state and has it written; returns when it is copied.

        Raises CheckpointError, on every process, where the one before could not be written.
        """
        self.wait()
        own = share_of(state_of(self.module, self.optimizer), self.all.rank, self.all.ranks)
        copy = {name: tensor.detach().to("cpu", copy=True) for name, tensor in own.items()}
        final = self.folder / f"step_{progress.step:08d}"
        about = {
            "progress": asdict(progress),
            "decided": self.identity,  # the key of the first versions
            "fingerprint": self.fingerprint,
            "versions": versions(),
        }
        self._writer = threading.Thread(
            target=self._write, args=(final, copy, about), name=final.name, daemon=True
        )
        self._writer.start()

    def wait(self) -> None:
        """Waits for the one that is being written.

        Raises CheckpointError, on every process, where it could not be.
        """
        self._join()
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write(self, final: Path, copy: dict[str, Tensor], about: dict[str, Any]) -> None:
        try:
            disk.write(final, copy, about, _size(self.module), self.all)
            self.all.first(self._drop_old)
        except Exception as error:  # of whatever kind: it is raised in the loop
            whole = [path.name for path in list_checkpoints(self.folder)]
            left = f"the newest whole one is {whole[-1]}" if whole else "there is no other"
            self._error = CheckpointError(f"{final} could not be written: {error}; {left}")
            self._error.__cause__ = error

    def _drop_old(self) -> None:
        for old in list_checkpoints(self.folder)[: -self.keep]:
            disk.remove(old)

    def restore(self, change: Sequence[str] = ()) -> Progress:
        """Puts the newest whole checkpoint into module and optimizer.

        Broken ones are named, and set aside; what a killed run was writing is removed, and said.
        Random numbers need no saving: the loop seeds them for each step.
        change: names of settings that may differ from the checkpoint's, see `differences`.
        Gives a fresh Progress where the run was stopped before its first checkpoint.
        Raises CheckpointError naming the file, where none is whole, and every setting, source or
        weight that differs.
        """
        path, broken, about = self.all.first(lambda: self._choose(tuple(change)))
        if path is not None:
            if not is_of(about["fingerprint"], self.module):
                raise CheckpointError(f"{path}: its frozen weights are not those of this model")
            read_state(path, self.module, self.optimizer)
        self.all.first(lambda: self._tidy(broken))
        return Progress(**about["progress"]) if about else Progress()

    def _choose(
        self, change: tuple[str, ...]
    ) -> tuple[Path | None, list[Path], dict[str, Any] | None]:
        """The checkpoint to go on from, the broken ones that are newer, and what it says of its
        run."""
        path, broken = newest_whole(self.folder)
        for old, said in broken.items():
            again = int(NAME.fullmatch(old.name)[1]) - int(NAME.fullmatch(path.name)[1])
            self.say(
                f"broken checkpoint: {'; '.join(said)}; set aside as {_aside(old).name}, going on "
                f"from {path.name}, so that {again} steps will be repeated"
            )
        if path is None:
            self.say(f"{self.folder}: no checkpoint in it, starting from the beginning")
            return None, [], None
        about = disk.read_about(path)
        for line in differences(about["decided"], self.identity, change, path):
            self.say(f"changed since {path.name}: {line}")
        now = versions()
        for name in sorted(about["versions"].keys() | now.keys()):
            before, after = about["versions"].get(name), now.get(name)
            if before != after and before is not None:
                self.say(f"{path.name} was written with {name} {before}, this is {after}")
        return path, list(broken), about

    def _tidy(self, broken: list[Path]) -> None:
        for path in broken:
            shutil.rmtree(_aside(path), ignore_errors=True)
            path.rename(_aside(path))
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if WRITING.fullmatch(path.name):
                self.say(f"{path}: was being written when the run ended; removed")
                shutil.rmtree(path)
            elif path.name.startswith(".step_"):
                shutil.rmtree(path)


def _aside(path: Path) -> Path:
    return path.with_name(f"broken_{path.name}")


def newest_whole(
    folder: Path, step: int | None = None
) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest whole checkpoint in `folder`, or that of a step, and what is wrong with each newer
    one; (None, {}) where there is none at all.

    Raises CheckpointError where there are some and none is whole, naming what is wrong with each,
    and for a step that is not there.
    """
    there = list_checkpoints(folder)
    if step is not None:
        names = [path.name for path in there]
        there = [path for path in there if path.name == f"step_{step:08d}"]
        if not there:
            raise CheckpointError(f"{folder}: expected a checkpoint of step {step}, found {names}")
    broken: dict[Path, list[str]] = {}
    for path in reversed(there):
        said = disk.faults(path)
        if not said:
            return path, broken
        broken[path] = said
    if broken:
        said = "; ".join(line for lines in broken.values() for line in lines)
        if step is not None:
            raise CheckpointError(f"{folder}: the checkpoint of step {step} is broken: {said}")
        raise CheckpointError(f"{folder}: no checkpoint is whole: {said}")
    return None, {}


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder` that were written whole, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


BUFFERS = "b"
"""Begins a fingerprint that counts buffers; those of older checkpoints do not."""


def fingerprint(module: nn.Module, *, buffers: bool = True) -> str:
    """Names, shapes and a sample of the frozen weights and of the buffers that are saved with them
    (a batch norm's statistics), as a short hash: it tells whether a checkpoint's frozen parts are
    these, in whatever precision they compute."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.requires_grad}".encode())
        if not parameter.requires_grad and parameter.numel():
            digest.update(_sample(parameter))
    if not buffers:
        return digest.hexdigest()[:16]
    saved = module.state_dict().keys()
    for name, tensor in sorted(module.named_buffers()):
        if name in saved:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(_sample(tensor))
    return BUFFERS + digest.hexdigest()[:16]


def _sample(tensor: Tensor) -> bytes:
    """Up to 64 numbers spread over a tensor, as 16 bits hold them."""
    whole = tensor.detach()
    flat = (whole.full_tensor() if isinstance(whole, DTensor) else whole).flatten()
    stride = max(1, len(flat) // 64)
    return flat[::stride][:64].to(torch.bfloat16).float().cpu().numpy().tobytes()


def is_of(said: str, module: nn.Module) -> bool:
    """Whether a checkpoint's fingerprint is that of a module, as it was taken when the checkpoint
    was written."""
    return said == fingerprint(module, buffers=said.startswith(BUFFERS) and len(said) == 17)


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a checkpoint: `weights.NAME` of every trainable parameter, and
    `optimizer.NAME.KEY` of what the optimizer keeps of it. Rates and decays are the stage's."""
    state = {}
    for name, parameter in _trainable(module):
        state[f"weights.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{name}.{key}"] = value
    return state


def read_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts a checkpoint into the trainable parameters and an optimizer that has done no step.

    Raises CheckpointError naming what one has and the other lacks.
    """
    there = disk.stored(path)
    known = dict(_trainable(module))
    weights = {name for name in there if name.startswith("weights.")}
    strange = sorted(weights - {f"weights.{name}" for name in known})
    if strange:
        raise CheckpointError(f"{path} holds weights that do not learn here: {strange[:20]}")
    for name, parameter in known.items():
        before = f"optimizer.{name}."
        keys = [key for key in there if key.startswith(before) and "." not in key[len(before) :]]
        optimizer.state[parameter] = {
            key[len(before) :]: _room_for(parameter, *there[key]) for key in sorted(keys)
        }
    disk.read(path, state_of(module, optimizer))


def _room_for(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor of the optimizer: sharded as its parameter is, where it has its shape."""
    if shape == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


def share_of(state: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """What one process writes: its shards, and of what all have alike about as many bytes as the
    others."""
    sharded = {name: tensor for name, tensor in state.items() if isinstance(tensor, DTensor)}
    alike = sorted(state.keys() - sharded.keys(), key=lambda n: (-state[n].nbytes, n))
    filled, own = [0] * ranks, dict(sharded)
    for name in alike:
        least = min(range(ranks), key=lambda r: filled[r])
        filled[least] += state[name].nbytes
        if least == rank:
            own[name] = state[name]
    return own


def _trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def _size(module: nn.Module) -> int:
    """Bytes of one checkpoint: each trainable weight and AdamW's two moments."""
    return 3 * sum(p.numel() * p.element_size() for _, p in _trainable(module))
