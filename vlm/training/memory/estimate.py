"""Rows that stand for a run's, and the estimated peak memory of its steps, by simulated steps over
them.

What a step holds goes by its rows, so that it is estimated from rows of the run itself. The longest
row that a model could take says little: contexts are far longer than most data, and a run would be
refused that never fills them. What is estimated is what surely comes instead. The n longest of 16
rows meet in one of 360 micro-batches of n at the rarest (n about 6), so that any run of some length
has steps as heavy; micro-batches of more than 16 are as heavy as rows at random make them. A few
rows of every source are among them, however rarely it is drawn. Rows that are longer still may
come, and `vlm.training.memory.preflight` says so where little memory is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from vlm.data.example import BadRow, Skipped
from vlm.data.mixture import MixtureDataset, permuted
from vlm.families.rows import EncodedRow
from vlm.image_tokens import Pixels
from vlm.pixels import BadImage
from vlm.training.loading.encoded import Encoded
from vlm.training.memory.simulate import Held, SimulatedStep, StepMemory
from vlm.training.sharding import units_of
from vlm.training.step import BUCKET_ELEMENTS

ROWS = 16
"""How many rows of a run are looked at."""
EACH = 2
"""The least of them of every source."""
SEARCHED = 1024
"""How many draws are searched for sources that are drawn rarely."""


def rows_of_run(
    data: MixtureDataset, processor: Any, samples: int, count: int = ROWS
) -> list[EncodedRow]:
    """Rows of a run, encoded: `count` of them, and up to as many more where sources gave fewer than
    `EACH`; from all of its steps, since the first may have other sources than the rest, and the
    same each time. Those that cannot be used are skipped.

    samples: examples of the whole run.
    Raises BadRow, with the first one's reason, where none can be used.
    """
    numbers: list[int] = []
    drawn: Counter[int] = Counter()
    for position in range(min(samples, SEARCHED)):
        number = permuted(position, samples, key=0)
        source = data.mixture[number].source
        if len(numbers) < count or (drawn[source] < EACH and len(numbers) < 2 * count):
            numbers.append(number)
            drawn[source] += 1
    encoded = Encoded(data, processor, "skip")
    rows, reasons = [], []
    for number in numbers:
        try:
            row = encoded[number]
        except (BadRow, BadImage) as error:
            reasons.append(str(error))
            continue
        if isinstance(row, Skipped):
            reasons.append(f"{row.name}: {row.reason}")
        else:
            rows.append(row)
    if not rows:
        raise BadRow(f"none of {len(numbers)} rows of the run can be used: {reasons[0]}")
    return rows


class Estimate:
    """What simulated steps over a sample of rows say of steps of any size.

    rows: examples as the run's processor makes them. For memory, a micro-batch of n is the n
    longest of them, or the n with the most pixels, whichever holds more, again and again where
    there are fewer; where rows are packed, one pack filled with such. Time goes by all rows.
    ranks: of the run. group: ranks that share one copy of weights, gradients and moments; 1 shards
    nothing.
    """

    def __init__(
        self, simulated: SimulatedStep, rows: Sequence[EncodedRow], ranks: int = 1, group: int = 1
    ) -> None:
        self.simulated, self.rows, self.ranks, self.group = simulated, list(rows), ranks, group
        self._known: dict[tuple[int, int], Held] = {}

    def held(self, micro_batch: int, accumulation: int) -> Held:
        """Bytes of one device at the fullest moment of a step."""
        key = micro_batch, accumulation
        if key not in self._known:
            found = (self._held(rows, *key) for rows in self._heaviest(micro_batch))
            self._known[key] = max(found, key=lambda held: held.total)
        return self._known[key]

    def _held(self, rows: list[EncodedRow], micro_batch: int, accumulation: int) -> Held:
        """rows: of a micro-batch, or of one of its packs."""
        several = accumulation > 1 or len(rows) < micro_batch
        passes = 2 if several else 1  # further ones hold what the second does
        step = self.simulated.run([rows] * passes)
        waiting = self.simulated.objective.kept_between(
            self.simulated.module, micro_batch * max(0, accumulation - passes)
        )
        held = self._sharded(step) if self.group > 1 else self._whole(step)
        return held._replace(activations=held.activations + waiting)

    @cached_property
    def gathered(self) -> int:
        """Bytes of weights that sharding holds whole at a time: the module's own unit, and two
        others, the one at work and the next; 0 where nothing is sharded."""
        if self.group == 1:
            return 0
        own, largest = self._units
        return own + 2 * largest

    @property
    def tokens_per_example(self) -> float:
        """Tokens of the text stream, image tokens included; of lines, image tokens alone; 0 in
        families without such a stream."""
        batches = self.simulated.objective.collate(self.rows)
        counts = [self.simulated.objective.count(batch) for batch in batches]
        return sum(count.tokens for count in counts) / len(self.rows)

    def flops_per_example(self, micro_batch: int, accumulation: int) -> float:
        """Operations of an example, forward and backward, what is computed again included."""
        passes = min(accumulation, 2)
        count = min(micro_batch, max(1, len(self.rows) // passes))
        rows = [self.rows[number * count :][:count] or self.rows for number in range(passes)]
        return self.simulated.run(rows, count=True).flops / sum(map(len, rows))

    def _heaviest(self, count: int) -> list[list[EncodedRow]]:
        """Rows for `count` examples that may hold most: the longest, and those with most pixels
        (where rows are packed, most for each position), unless these are alike."""
        pack = self.simulated.objective.pack
        sizes = {id(row): (row.length, _pixels(row)) for row in self.rows}

        def first(key: Any) -> list[EncodedRow]:
            order = sorted(self.rows, key=lambda row: key(*sizes[id(row)]), reverse=True)
            again = order * -(-count // len(order))
            return again[:count] if pack is None else _one_pack(again, count, pack)

        longest = first(lambda length, pixels: (length, pixels))
        densest = first(lambda length, pixels: (pixels / length if pack else pixels, length))
        alike = sorted(sizes[id(row)] for row in longest) == sorted(
            sizes[id(row)] for row in densest
        )
        return [longest] if alike else [longest, densest]

    def _whole(self, step: StepMemory) -> Held:
        """Where ranks exchange whole gradients, a bucket of them beside all may be more than a
        pass holds."""
        if self.ranks == 1:
            return step.peak
        sizes = [p.numel() for p in self.simulated.trained]
        bucket = 4 * min(sum(sizes), BUCKET_ELEMENTS + max(sizes))
        exchange = step.peak._replace(gradients=4 * sum(sizes), activations=bucket, logits=0)
        return max(step.peak, exchange, key=lambda held: held.total)

    def _sharded(self, step: StepMemory) -> Held:
        trained = sum(p.numel() for p in self.simulated.trained)
        frozen = sum(p.numel() * p.element_size() for p in self.simulated.frozen)
        learned = 4 * trained
        width = self.simulated.dtype.itemsize
        # One unit's gradients are whole, in 16 bits and as fp32, until they are scattered.
        whole = max(self._units) * (1 + 4 // width) if trained else 0
        return Held(
            weights=(learned + frozen) // self.group + self.gathered,
            gradients=learned // self.group + whole,
            optimizer=2 * learned // self.group,
            activations=step.passing.activations,
            logits=step.passing.logits,
        )

    @cached_property
    def _units(self) -> tuple[int, int]:
        """Bytes in the dtype of compute of the module's own unit, which is what the units of
        sharding leave, and of the largest of those."""
        module, seen, sizes = self.simulated.module, set(), []
        for unit in (*units_of(module), module):
            own = {id(p): p.numel() for p in unit.parameters() if id(p) not in seen}
            seen |= own.keys()
            sizes.append(self.simulated.dtype.itemsize * sum(own.values()))
        *units, rest = sizes
        return rest, max(units, default=0)


def _one_pack(rows: Sequence[EncodedRow], count: int, most: int) -> list[EncodedRow]:
    """Of `rows`, in their order, what one pack of at most `most` positions takes, up to `count`;
    the first alone where it is longer."""
    taken, free = list(rows[:1]), most - rows[0].length
    for row in rows[1:]:
        if row.length <= free and len(taken) < count:
            taken.append(row)
            free -= row.length
    return taken


def _pixels(row: EncodedRow) -> int:
    return sum(_numbers(pixels) for pixels, _ in row.views)


def _numbers(pixels: Pixels) -> int:
    return pixels.numel() if isinstance(pixels, torch.Tensor) else sum(map(_numbers, pixels))
