"""Memory preflight: whether a run's micro-batches fit the memory of its devices. `vlm plan` asks it
of a machine by name, and every recipe of its own before the first step, so that a run that does
not fit says so before it has begun.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from vlm.data.example import BadRow
from vlm.data.mixture import MixtureDataset
from vlm.precision import DTYPES
from vlm.training.base_settings import BaseSettings
from vlm.training.memory.estimate import ROWS, Estimate, rows_of_run
from vlm.training.memory.simulate import Held, SimulatedStep
from vlm.training.objectives.base import Objective
from vlm.training.sharding import Shard
from vlm.training.stages import Stage

GIB = 2**30
MOST = 4096
"""Micro-batches are not tried beyond this."""
ROWS_AT_MOST = 32
"""How many rows a run looks at before it begins; each is decoded."""
FULL = 0.85
"""The share of a device's memory beyond which a run says that it may not fit: the estimate is up to
a tenth below the measured peak, see `eval/plan_memory.py`."""
COMPARED = ("cpu",)
"""Kinds of device on which estimates were compared with measurements, see `eval/plan_memory.py`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFit:
    """The estimated peak memory of a step on one device, beside what the device has.

    share: examples of a step on one device. held: bytes at the fullest moment of a step, at
    `micro_batch` examples a pass. budget: bytes that may be used. largest: the largest micro-batch
    within the budget, 0 where none is, the most that were asked for where more may fit.
    """

    share: int
    micro_batch: int
    held: Held
    budget: int
    largest: int

    @property
    def accumulation(self) -> int:
        """Passes of a step."""
        return -(-self.share // self.micro_batch)

    @property
    def largest_even(self) -> int:
        """The largest micro-batch that fits and divides the share; 0 where none fits."""
        counts = range(min(self.share, self.largest), 0, -1)
        return next((count for count in counts if self.share % count == 0), 0)

    @property
    def fits(self) -> bool:
        return self.held.total <= self.budget

    def refusal(self, setting: str, remedies: str, holder: str = "device") -> str:
        """What to say of a micro-batch that does not fit.

        setting: the option that asks for it. remedies: what may help where no example fits.
        holder: whose memory it is.
        """
        needs = (
            f"{setting}: a micro-batch of {self.micro_batch} needs {size(self.held.total)} on each "
            f"{holder}, which has {size(self.budget)}"
        )
        if not self.largest:
            part = max(self.held._fields, key=lambda name: getattr(self.held, name))
            return f"{needs}, and not even one example fits: most are {part}. {remedies}"
        return (
            f"{needs}; the largest that fits is {self.largest}: take --micro-batch "
            f"{self.largest_even}, {self.share // self.largest_even} of which make a {holder}'s "
            "share of a step"
        )


def memory_fit(
    estimate: Estimate, share: int, micro_batch: int, budget: int, most: int = MOST
) -> MemoryFit:
    """What a micro-batch of a device's share holds, and the largest, up to `most`, that fits."""

    def held(count: int) -> Held:
        return estimate.held(count, -(-share // count))

    return MemoryFit(
        share=share,
        micro_batch=micro_batch,
        held=held(micro_batch),
        budget=budget,
        largest=largest_within(lambda count: held(count).total, budget, most),
    )


def largest_within(total: Callable[[int], int], budget: int, most: int = MOST) -> int:
    """The largest count, up to `most`, whose `total` is within a budget, to 2 %; 0 where none is.
    total rises, almost evenly: so few are tried.

    >>> largest_within(lambda count: 100 + 7 * count, 1000)
    128
    """
    if total(1) > budget:
        return 0
    low, high = 1, most + 1  # the first fits, the second does not or is not asked for
    slope = total(2) - total(1)
    while high - low > max(1, low // 50):
        more = (budget - total(low)) // slope if slope > 0 else most
        guess = min(max(low + more, low + 1), high - 1)
        slope = (total(guess) - total(low)) // (guess - low)
        if total(guess) <= budget:
            low = guess
        else:
            high = guess
    return low


def require_memory(
    model: Any,
    stage: Stage,
    data: MixtureDataset,
    objective: Objective,
    settings: BaseSettings,
    *,
    accelerator: Accelerator,
    shard: Shard,
    say: Callable[..., None],
) -> None:
    """Compares the estimated peak memory of a run's step with the memory of this process's device,
    before the first step.

    model: its `module`, which stays as it is, and its `processor`. Called on all processes
    together: what the one with the most need and the one with the least memory find decides for
    all. Where little is left, or the step cannot be simulated (some backbones ask for values), a
    line says so, and the run goes on; so it does with `memory_check` "warn" where the micro-batch
    does not fit. With "off" nothing is done.
    Raises, on every process, BadRow with the first one's reason where none of the rows that are
    looked at can be used; and ValueError, with "stop", where the micro-batch does not fit: it shows
    the setting, what is needed, what there is, and the largest micro-batch that fits or what else
    may help.
    """
    device, ranks = accelerator.device, accelerator.num_processes
    check = settings.memory_check or ("stop" if device.type in COMPARED else "warn")
    if check == "off":
        return
    there = memory_for(device, model.module)
    share = stage.batch // ranks
    accumulation = -(-share // stage.micro_batch)
    groups = {"no": 1, "all": ranks, "node": int(os.environ.get("LOCAL_WORLD_SIZE", 1))}
    needed, unknown, unusable = None, "", ""
    try:
        count = min(max(stage.micro_batch, ROWS), ROWS_AT_MOST)
        rows = rows_of_run(data, model.processor, stage.steps * stage.batch, count)
        if there is None:
            raise LookupError("the system does not tell what is free")
        simulated = SimulatedStep(
            model.module, stage, objective, DTYPES[settings.precision], device.type == "cuda"
        )
        estimate = Estimate(simulated, rows, ranks, groups[shard])
        needed = estimate.held(stage.micro_batch, accumulation).total
    except BadRow as error:
        unusable = str(error)
    except Exception as error:  # a backbone's own code, without values, may raise anything
        unknown = " ".join(str(error).split())[:300] or type(error).__name__
    found = [(needed, there, unknown, unusable)]
    if ranks > 1:
        found = gather_object(found)
    for *_, unusable in found:
        if unusable:
            raise BadRow(unusable)
    reasons = [reason for _, _, reason, _ in found if reason]
    if reasons:
        say(f"whether a step fits in memory is not known: {reasons[0]}", markup=False)
        return
    needed, there = max(need for need, *_ in found), min(have for _, have, *_ in found)
    setting = asked(settings, stage.micro_batch)
    holder = "device" if device.type == "cuda" else "process"
    if needed > there:
        fit = memory_fit(estimate, share, stage.micro_batch, there, most=stage.micro_batch - 1)
        helps = remedies(settings, model.module, groups[shard] > 1)
        refusal = fit.refusal(setting, helps, holder)
        if check == "stop":
            raise ValueError(f"{refusal}. To run all the same: --memory-check warn")
        text = f"{refusal}. The run goes on all the same; --memory-check stop would end it here"
        say(text, style="yellow", highlight=False, markup=False)
        return
    if needed > FULL * there:
        say(
            f"{setting}: a step's estimated peak memory is {size(needed)}, and may be more; each "
            f"{holder} has {size(there)}: a smaller --micro-batch takes less",
            highlight=False,
        )


def asked(settings: BaseSettings, micro_batch: int) -> str:
    """The options that ask for a run's micro-batch."""
    alone = settings.micro_batch is None
    option = f"--batch {settings.batch}" if alone else f"--micro-batch {micro_batch}"
    return option if settings.pack is None else f"{option} --pack {settings.pack}"


def remedies(settings: BaseSettings, module: nn.Module, sharded: bool) -> str:
    """What may help a run of which not even one example fits, of what its settings leave open."""
    ways = {
        "compute in 16 bits (--precision bf16)": settings.precision == "fp32",
        "compute activations again (--checkpoint-activations)": "text" in module.parts()
        and not settings.checkpoint_activations,
        "shard over several devices (--shard all)": not sharded,
        "take a smaller model": True,
    }
    open_ways = [way for way, helps in ways.items() if helps]
    return f"What may help: {', '.join((*settings.memory_remedies(), *open_ways))}"


def size(count: int) -> str:
    """Bytes, for people.

    >>> size(3 * 2**30), size(3 * 2**20)
    ('3 GiB', '3 MiB')
    """
    return f"{count / GIB:.3g} GiB" if count >= GIB else f"{count / 2**20:.3g} MiB"


def memory_for(device: torch.device, module: nn.Module) -> int | None:
    """Bytes that this process may hold on its device, what its module holds already included; None
    where the system does not say.

    Of a GPU: what is free, and what torch holds of it. Of a CPU: the process's part of what is
    free, among those of the run on this machine, by the system and by the control groups that the
    process is in. Weights that lie in mapped files count as free already.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = free_memory() if device.type == "cpu" else None
    if free is None:
        return None
    in_file = _in_mapped_file()
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    own_tensors = (t for t in tensors.values() if t.device.type == "cpu" and not in_file(t))
    here = sum(t.numel() * t.element_size() for t in own_tensors)
    own = _kib(Path("/proc/self/status"), "RssAnon")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + min(here, own or 0)


def _in_mapped_file() -> Callable[[torch.Tensor], bool]:
    """Whether a tensor's values lie in a file that is mapped into this process (Linux)."""
    maps = Path("/proc/self/maps")
    ranges = []
    for line in maps.read_text().splitlines() if maps.is_file() else []:
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            ranges.append(tuple(int(end, 16) for end in span.split("-")))
    starts = [start for start, _ in ranges]

    def inside(tensor: torch.Tensor) -> bool:
        number = bisect_right(starts, tensor.data_ptr()) - 1
        return number >= 0 and tensor.data_ptr() < ranges[number][1]

    return inside


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of the host's memory that this process may still take, caches of files counted as free;
    None on systems other than Linux. root: where the system's files lie."""
    system = _kib(root / "proc/meminfo", "MemAvailable")
    if system is None:
        return None
    frees = [system]
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, kinds, path = line.split(":", 2)
        if not kinds:
            names = _Names("memory.max", "memory.current", "")
            top = root / "sys/fs/cgroup"
        elif "memory" in kinds.split(","):
            names = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):  # each group is bound by those above it
            frees += names.free(folder)
            if folder == top:
                break
    return max(0, min(frees))


class _Names(NamedTuple):
    """How a version of control groups calls a group's limit, its use, and the latter's parts."""

    limit: str
    used: str
    prefix: str

    def free(self, folder: Path) -> list[int]:
        """The bytes that a group may still take; nothing where it has no limit, or does not say."""
        try:
            most = (folder / self.limit).read_text().strip()
            if most == "max":
                return []
            stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
            files = sum(int(stat[f"{self.prefix}{kind}_file"]) for kind in ("inactive", "active"))
            return [int(most) - int((folder / self.used).read_text()) + files]
        except (OSError, KeyError):
            return []


def _kib(path: Path, key: str) -> int | None:
    """A value that a file of the system's states in KiB, in bytes; None where it does not."""
    if not path.is_file():
        return None
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(line[1]) * 1024 for line in lines if line and line[0] == f"{key}:"), None)
