"""What a run takes of a machine: estimated peak memory by part, the largest micro-batch, time and
price.

Memory is that of a simulated step (`vlm.training.memory.simulate`): the run's own code on fake
tensors, no formula of layers. What sharding changes is reckoned from it: weights, gradients
and moments are divided by the ranks of a shard group, and the blocks at work are held whole. Time
is counted operations at a stated share of the machine's peak.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from vlm.data.mixture import split_of
from vlm.training.memory.estimate import Estimate
from vlm.training.memory.preflight import GIB, MemoryFit, memory_fit
from vlm.training.meter import PEAK_TFLOPS

MEMORY_GIB = {"A100": 80, "H100": 80, "H200": 141, "B200": 180, "L40S": 48, "4090": 24}
"""Memory of a GPU where the machine's name does not state it. Source: each maker's data sheet."""
CPU = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Equal devices. nodes: computers; devices: on each. gib: memory of one in GiB. tflops: its
    peak in bf16; None where it is not known (CPUs)."""

    name: str
    nodes: int
    devices: int
    gib: float
    tflops: float | None

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices


def machine_of(text: str) -> Machine:
    """The machine that a name such as 8xH100-80G, 4x8xH200, A100-40G or cpu-16G states.

    Raises ValueError naming what is known.

    >>> machine_of("4x8xH200").ranks, machine_of("A100-40G").gib
    (32, 40.0)
    """
    found = re.fullmatch(
        r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z]*\d*[A-Za-z]*)(?:-(\d+(?:\.\d+)?)G)?", text
    )
    names = {name.lower(): name for name in (*MEMORY_GIB, CPU)}
    name = names.get(found[3].lower()) if found else None
    if name is None or (name == CPU and found[4] is None):
        raise ValueError(
            f"machine {text!r}: expected [[NODESx]DEVICESx]NAME[-MEMORYG], such as 8xH100-80G, "
            f"4x8xH200 or cpu-16G; known are {', '.join(MEMORY_GIB)}, and cpu with its memory"
        )
    counts = [int(count) for count in found.groups()[:2] if count]
    nodes, devices = [1, 1, *counts][-2:]
    gib = float(found[4] or MEMORY_GIB.get(name, 0))
    if min(nodes, devices, gib) <= 0:
        raise ValueError(f"machine {text!r}: counts and memory must be above 0")
    return Machine(name=name, nodes=nodes, devices=devices, gib=gib, tflops=PEAK_TFLOPS.get(name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(MemoryFit):
    """What one device holds and how long a run takes.

    gathered: bytes of `held.weights` that are whole for the blocks at work. step_s, tokens_per_s,
    hours, cost: None where the peak or the price is not known; tokens_per_s also in families
    without a stream of text.
    """

    ranks: int
    shard_group: int
    gathered: int
    step_flops: float
    step_s: float | None
    tokens_per_s: float | None
    hours: float | None
    cost: float | None

    def values(self) -> dict[str, Any]:
        """All that it says, as plain values."""
        more = ("accumulation", "largest_even", "fits")
        held = {"held": self.held._asdict(), "total": self.held.total}
        return asdict(self) | held | {name: getattr(self, name) for name in more}


def require_shares(mfu: float, reserve: float, price: float | None) -> None:
    """Raises ValueError naming what is outside its range."""
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be above 0 and at most 1, found {mfu:g}")
    if not 0 <= reserve < 1:
        raise ValueError(f"reserve must be at least 0 and below 1, found {reserve:g}")
    if price is not None and not price >= 0:
        raise ValueError(f"price must be at least 0, found {price:g}")


def make_plan(
    estimate: Estimate,
    machine: Machine,
    *,
    batch: int,
    steps: int,
    micro_batch: int | None,
    peak_flops: float | None,
    mfu: float,
    price: float | None = None,
    reserve: float = 0.08,
) -> Plan:
    """The plan of a run.

    batch: examples of a step; steps: of the run. micro_batch: None takes a rank's share at once.
    peak_flops: operations a second of one device in the run's dtype; None where it is not known.
    mfu: the share of it that is reached. price: of a device for an hour, in any currency. reserve:
    the share of memory that is left to what no simulated step sees: the driver's context, kernels'
    workspaces, buffers of communication, fragments.
    Raises ValueError for a batch that does not divide over the devices, and for shares outside
    their range.
    """
    require_shares(mfu, reserve, price)
    share, micro_batch = split_of(batch, micro_batch, machine.ranks)
    fit = memory_fit(estimate, share, micro_batch, int(machine.gib * GIB * (1 - reserve)))
    flops = estimate.flops_per_example(micro_batch, fit.accumulation) * batch
    seconds = None if peak_flops is None else flops / (machine.ranks * peak_flops * mfu)
    tokens = estimate.tokens_per_example * batch
    hours = None if seconds is None else seconds * steps / 3600
    return Plan(
        share=share,
        micro_batch=micro_batch,
        held=fit.held,
        budget=fit.budget,
        largest=fit.largest,
        ranks=machine.ranks,
        shard_group=estimate.group,
        gathered=estimate.gathered,
        step_flops=flops,
        step_s=seconds,
        tokens_per_s=tokens / seconds if seconds and tokens else None,
        hours=hours,
        cost=None if hours is None or price is None else hours * machine.ranks * price,
    )
