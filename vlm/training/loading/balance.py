"""The rows of a step dealt out to processes and micro-batches by their cost.

A step waits for its slowest process. Rows differ in images, views and text; dealt out by number
alone, one process gets more of the long ones than another. Which rows a step has stays as it is, so
losses and gradients do too.

Every process works out the whole deal by itself, from headers and text, so that none asks another;
its price is that each reads every row of the step.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from torch.utils.data import Dataset

from vlm.data.example import BadRow, Skipped
from vlm.data.mixture import MixtureDataset, StepSampler
from vlm.families.decoder_only.batch import Row
from vlm.families.decoder_only.processor import Processor
from vlm.pixels import BadImage


def deal(costs: Sequence[int], parts: int) -> list[list[int]]:
    """The numbers 0 to len(costs) - 1 in parts of equal count whose largest cost is small.

    costs: at least 0, of which `parts` divides the number. Every part has its numbers in order.
    The dearest first, each to the cheapest part that is not full (longest processing time first);
    of equals the first, so that all who deal the same costs deal alike.
    Source: Graham, "Bounds on Multiprocessing Timing Anomalies", 1969, there without counts.

    >>> deal([9, 1, 1, 5, 5, 3], 2)
    [[0, 2, 5], [1, 3, 4]]
    """
    most, rest = divmod(len(costs), parts)
    if rest:
        raise ValueError(f"{len(costs)} costs cannot be dealt out in {parts} parts of equal count")
    dealt: list[list[int]] = [[] for _ in range(parts)]
    open_parts = [(0, part) for part in range(parts)]  # in order, so that it is a heap
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        cost, part = heapq.heappop(open_parts)
        dealt[part].append(number)
        if len(dealt[part]) < most:
            heapq.heappush(open_parts, (cost + costs[number], part))
    return [sorted(part) for part in dealt]


def deal_step(costs: Sequence[int], ranks: int, micro_batches: int) -> list[int]:
    """The rows of a step in the order in which the ranks, one after the other, take them: a
    permutation of 0 to len(costs) - 1.

    ranks get equal counts of rows, and cut them into equal counts, `micro_batches` of them: so
    memory stays that of a micro-batch. A rank begins with its dearest one, so that sharded ranks,
    which go through each together, have ones of like cost at a time.
    """
    order: list[int] = []
    for own in deal(costs, ranks):
        micros = deal([costs[number] for number in own], micro_batches)
        micros.sort(key=lambda micro: -sum(costs[own[at]] for at in micro))
        order += [own[at] for micro in micros for at in micro]
    return order


class Costs:
    """What each sample of a mixture costs, by its text and the headers of its images.

    data: of which rows are taken as they are, before any augmentation. cost: of a row whose pixels
    have no values, such as `FlopCost.of_row`. A call gives the cost of a sample number, 0 for a
    row that does not fit the context, and None for one that cannot be read, of which whoever reads
    it will speak.
    """

    def __init__(
        self, data: MixtureDataset, processor: Processor, cost: Callable[[Row], int]
    ) -> None:
        self.data, self.processor, self.cost = data, processor, cost

    def __call__(self, number: int) -> int | None:
        try:
            row = self.processor.measure(self.data.plain(number))
        except (BadRow, BadImage):
            return None
        return 0 if isinstance(row, Skipped) else self.cost(row)


class Dealt(Dataset):
    """Rows in the order that a deal by cost gives them: what a `StepSampler` takes for sample
    `number` is another one of the same step.

    rows: anything by sample number. cost: of a sample, as `Costs` gives it; one of which nothing is
    known costs as much as the others do on average. sampler: how steps are cut, whatever its rank.
    The last step's deal is remembered: each row is measured once for a step, in each worker.
    """

    def __init__(self, rows, cost: Callable[[int], int | None], sampler: StepSampler) -> None:
        self.rows, self.cost = rows, cost
        self.batch, self.ranks = sampler.batch, sampler.ranks
        self.micro_batches = sampler.micro_batches_per_step
        self._step: int | None = None
        self._order: list[int] = []

    def __getitem__(self, number: int):
        return self.rows[self.dealt(number)]

    def dealt(self, number: int) -> int:
        """The sample that takes the place of sample `number`."""
        step, index = divmod(number, self.batch)
        first = step * self.batch
        if step != self._step:
            found = [self.cost(first + at) for at in range(self.batch)]
            known = [cost for cost in found if cost is not None]
            usual = sum(known) // max(len(known), 1)
            costs = [usual if cost is None else cost for cost in found]
            self._order = deal_step(costs, self.ranks, self.micro_batches)
            self._step = step
        return first + self._order[index]
