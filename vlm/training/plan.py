"""What a run takes of a machine, on paper: memory by part, the largest micro-batch, time and price.

Memory is that of a rehearsed step (`vlm.training.rehearsal`): the run's own code on tensors without
values, no formula of layers. What sharding changes is reckoned from it: weights, gradients and
moments are divided by the ranks of a shard group, and the blocks at work are held whole. Time is
counted operations at a stated share of the machine's peak.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from vlm.lines import LineRow
from vlm.pairs import Pair
from vlm.placement import IMAGE
from vlm.prompts import Row
from vlm.training.meter import PEAK_TFLOPS
from vlm.training.objectives import Contrast, NextToken, Objective, Transcribe
from vlm.training.rehearsal import Held, Rehearsal, Step
from vlm.training.stages import FROZEN, Stage, assign_rates

GIB = 2**30
MEMORY_GIB = {"A100": 80, "H100": 80, "H200": 141, "B200": 180, "L40S": 48, "4090": 24}
"""Memory of a GPU where the machine's name does not state it. Source: each maker's data sheet."""
CPU = "cpu"
BUCKET = 2**24
"""Gradients that ranks exchange at once, see `vlm.training.fit`."""
MOST = 4096
"""Micro-batches are not tried beyond this."""


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
class Plan:
    """What one device holds and how long a run takes.

    held: bytes at the fullest moment of a step, at `micro_batch` examples a pass; gathered: those
    of `held.weights` that are whole for the blocks at work. budget: bytes that may be used.
    largest: the largest micro-batch within the budget, 0 where none is, `MOST` for that or more;
    largest_even: the largest that divides a rank's share of the batch. accumulation: passes of a
    step. step_s, tokens_per_s, hours, cost: None where the peak or the price is not known.
    """

    micro_batch: int
    accumulation: int
    ranks: int
    shard_group: int
    held: Held
    gathered: int
    budget: int
    largest: int
    largest_even: int
    step_flops: float
    step_s: float | None
    tokens_per_s: float | None
    hours: float | None
    cost: float | None

    @property
    def fits(self) -> bool:
        return self.held.total <= self.budget

    def refusal(self) -> str:
        """What to say of a micro-batch that does not fit."""
        needs = (
            f"a micro-batch of {self.micro_batch} needs {self.held.total / GIB:.3g} GiB on each "
            f"device, which has {self.budget / GIB:.3g}"
        )
        if not self.largest_even:
            part = max(self.held._fields, key=lambda name: getattr(self.held, name))
            return (
                f"{needs}, and not even one example fits: most are {part}. Train less "
                "(--language lora), compute again (--checkpoint-activations), shorten rows "
                "(--max-tokens), or shard over more devices (--shard)"
            )
        share = self.micro_batch * self.accumulation
        return (
            f"{needs}; the largest that fits is {self.largest}: take --micro-batch "
            f"{self.largest_even}, {share // self.largest_even} of which make a device's share of "
            "a step"
        )


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
    the share of memory that is left to what no rehearsal sees: the driver's context, kernels'
    workspaces, buffers of communication, fragments.
    Raises ValueError for a batch that does not divide over the devices, and for shares outside
    their range.
    """
    for name, share in (("mfu", mfu), ("1 - reserve", 1 - reserve)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, found {share:g}")
    share, micro_batch = split_of(batch, micro_batch, machine.ranks)
    budget = int(machine.gib * GIB * (1 - reserve))
    held = {micro_batch: estimate.held(micro_batch, share // micro_batch)}

    def total(count: int) -> int:
        if count not in held:
            held[count] = estimate.held(count, max(1, share // count))
        return held[count].total

    largest = largest_within(total, budget)
    even = max((n for n in range(1, share + 1) if share % n == 0 and n <= largest), default=0)
    flops = estimate.flops_per_example(micro_batch, share // micro_batch) * batch
    seconds = None if peak_flops is None else flops / (machine.ranks * peak_flops * mfu)
    hours = None if seconds is None else seconds * steps / 3600
    return Plan(
        micro_batch=micro_batch,
        accumulation=share // micro_batch,
        ranks=machine.ranks,
        shard_group=estimate.group,
        held=held[micro_batch],
        gathered=estimate.gathered,
        budget=budget,
        largest=largest,
        largest_even=even,
        step_flops=flops,
        step_s=seconds,
        tokens_per_s=None if seconds is None else estimate.tokens_per_example * batch / seconds,
        hours=hours,
        cost=None if hours is None or price is None else hours * machine.ranks * price,
    )


def split_of(batch: int, micro_batch: int | None, ranks: int) -> tuple[int, int]:
    """A rank's share of a batch, and its micro-batch. Raises ValueError where they do not divide,
    naming numbers that do."""
    share, rest = divmod(batch, ranks)
    if rest:
        raise ValueError(
            f"batch {batch} does not divide over {ranks} devices; the next that does is --batch "
            f"{(share + 1) * ranks}"
        )
    micro_batch = micro_batch or share
    if share % micro_batch:
        near = max(n for n in range(1, min(share, micro_batch) + 1) if share % n == 0)
        raise ValueError(
            f"a device's share of {share} examples is no whole number of micro-batches of "
            f"{micro_batch}; the next smaller one is --micro-batch {near}"
        )
    return share, micro_batch


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


class Estimate:
    """What rehearsed steps over a sample of rows say of steps of any size.

    rows: examples as the run's processor makes them. A micro-batch of n is planned as the n longest
    of them, again and again where there are fewer, for memory; time goes by all rows.
    ranks: of the run. group: ranks that share one copy of weights, gradients and moments; 1 shards
    nothing.
    """

    def __init__(
        self, rehearsal: Rehearsal, rows: Sequence[Any], ranks: int = 1, group: int = 1
    ) -> None:
        self.rehearsal, self.rows, self.ranks, self.group = rehearsal, list(rows), ranks, group
        self.longest = sorted(self.rows, key=_length, reverse=True)

    def held(self, micro_batch: int, accumulation: int) -> Held:
        """Bytes of one device at the fullest moment of a step."""
        passes = min(accumulation, 2)  # further ones hold what the second does
        rows = [self._heavy(micro_batch)] * passes
        step = self.rehearsal.step(rows)
        waiting = self._embeddings(micro_batch * (accumulation - passes))
        held = self._sharded(step) if self.group > 1 else self._whole(step)
        return held._replace(activations=held.activations + waiting)

    @cached_property
    def gathered(self) -> int:
        """Bytes of weights that sharding holds whole at a time: what lies outside of blocks, and
        two blocks, the one at work and the next; 0 where nothing is sharded."""
        if self.group == 1:
            return 0
        outside, largest = self._blocks
        return outside + 2 * largest

    @property
    def tokens_per_example(self) -> float:
        """Real places of the text stream, image places included; of lines, image tokens."""
        batches = self.rehearsal.objective.collate(self.rows)
        counts = [self.rehearsal.objective.count(batch) for batch in batches]
        return sum(count.tokens for count in counts) / len(self.rows)

    def flops_per_example(self, micro_batch: int, accumulation: int) -> float:
        """Operations of an example, forward and backward, what is computed again included."""
        passes = min(accumulation, 2)
        count = min(micro_batch, max(1, len(self.rows) // passes))
        rows = [self.rows[number * count :][:count] or self.rows for number in range(passes)]
        return self.rehearsal.step(rows, count=True).flops / sum(map(len, rows))

    def _heavy(self, count: int) -> list[Any]:
        times = -(-count // len(self.longest))
        return (self.longest * times)[:count]

    def _embeddings(self, examples: int) -> int:
        """Bytes of the embeddings of further micro-batches, which a contrast keeps until its last:
        of each picture and text its own, a joined one, and that one's gradient."""
        if not isinstance(self.rehearsal.objective, Contrast):
            return 0
        return examples * 2 * 3 * 4 * self.rehearsal.module.dim

    def _whole(self, step: Step) -> Held:
        """Where ranks exchange whole gradients, a bucket of them beside all may be more than a
        pass holds."""
        if self.ranks == 1:
            return step.peak
        sizes = [p.numel() for p in self.rehearsal.trained]
        bucket = 4 * min(sum(sizes), BUCKET + max(sizes))
        exchange = step.peak._replace(gradients=4 * sum(sizes), activations=bucket, logits=0)
        return max(step.peak, exchange, key=lambda held: held.total)

    def _sharded(self, step: Step) -> Held:
        trained = sum(p.numel() for p in self.rehearsal.trained)
        frozen = sum(p.numel() * p.element_size() for p in self.rehearsal.frozen)
        learned = 4 * trained
        _, largest = self._blocks
        width = self.rehearsal.dtype.itemsize
        # One block's gradients are whole, in 16 bits and as fp32, until they are scattered.
        whole = largest * (1 + 4 // width) if trained else 0
        return Held(
            weights=(learned + frozen) // self.group + self.gathered,
            gradients=learned // self.group + whole,
            optimizer=2 * learned // self.group,
            activations=step.passing.activations,
            logits=step.passing.logits,
        )

    @cached_property
    def _blocks(self) -> tuple[int, int]:
        """Bytes in the dtype of compute of what lies outside of repeated blocks, and of the largest
        block: members of the module's outermost lists of one kind."""
        width = self.rehearsal.dtype.itemsize
        module = self.rehearsal.module
        lists = {name: m for name, m in module.named_modules() if _repeats(m)}
        outer = [m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)]
        blocks = [_numel(block) for blocks in outer for block in blocks]
        return width * (_numel(module) - sum(blocks)), width * max(blocks, default=0)


def objective_for(module: nn.Module, processor: Any, settings: Any) -> Objective:
    """What the recipe of a model's family minimises."""
    if module.family == "contrastive":
        return Contrast(settings.loss)
    if module.family == "line_reader":
        return Transcribe()
    return NextToken(processor.pad_id, getattr(settings, "pack", None))


def kept_parts(module: nn.Module, stage: Stage) -> list[str]:
    """The parts that keep activations for the backward pass: text models, since gradients pass
    through them or they learn, and image tokenizers that learn."""
    rates = assign_rates(module, stage.rates)
    learned = {name.split(".")[0] for name, (_, rate) in rates.items() if rate is not FROZEN}
    through = set() if module.family == "contrastive" else {"text"}
    return [part for part in ("tokenizer", "text") if part in learned | through]


def with_text_places(row: Any, count: int) -> Any:
    """The row with `count` text places, cut at its end, or with more of what its end holds.

    Raises ValueError for rows of lines, which have no text to read.
    """
    if count < 1:
        raise ValueError(f"text places must be at least 1, found {count}")
    if isinstance(row, LineRow):
        raise ValueError("a line reader's rows have no text places; leave --tokens out")
    images = int((row.ids == IMAGE).sum())
    more = images + count - len(row.ids)
    if isinstance(row, Pair):
        valid = None if row.valid is None else _stretched(row.valid, more)
        return dataclasses.replace(row, ids=_stretched(row.ids, more), valid=valid)
    ids = _stretched(row.ids, more)
    if int((ids == IMAGE).sum()) != images:
        raise ValueError(
            f"{row.name}: {count} text places would cut its images; its text has "
            f"{len(row.ids) - images}"
        )
    return dataclasses.replace(row, ids=ids, scored=_stretched(row.scored, more))


def _stretched(values: torch.Tensor, more: int) -> torch.Tensor:
    return values[:more] if more < 0 else torch.cat([values, values[-1:].expand(more)])


def _length(row: Row | Pair | LineRow) -> int:
    return row.pixels.shape[-1] if isinstance(row, LineRow) else len(row.ids)


def _repeats(module: nn.Module) -> bool:
    """Whether it is a list of blocks of one kind."""
    lists = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    return lists and len({type(block) for block in module}) == 1


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
