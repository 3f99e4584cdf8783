"""Many sources as one endless, seeded stream in which a position is one integer.

Sample i of the stream is (source, row), worked out from i, the weights and the seed alone. So
nothing is shuffled ahead, ranks and workers need not talk, and to resume is to start at a number.

All arithmetic is on whole numbers and written out here, so that a stream stays the same whatever
the version of a library's random generator.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from torch.utils.data import Dataset, Sampler

from vlm.data.example import BadRow, Example, Skipped
from vlm.data.sources.base import Source
from vlm.pixels import BadImage

if TYPE_CHECKING:
    from vlm.data.augment import Augment

_MASK = (1 << 64) - 1
_ROUNDS = 8


class Mixture:
    """Which row of which source is sample i, for every i >= 0.

    sources: at least one; only their lengths and names are used.
    weights: each source's share of the samples, in any unit, at least 0; None: its number of rows.
    seed: any integer; another seed gives other orders of rows.
    warmup: (weights, samples): the shares at the start, which turn evenly into `weights` over the
        first `samples` samples; None: the same shares throughout.
    resampled: whether each draw takes any row of its source, independently of all others.

    Shares: among the first i samples, whatever i, a source has its exact share to within 2
    samples (within 1/2 where there are two sources), however many sources there are; with a
    warm-up to within 5.
    Epochs: a source's draws, taken len(source) at a time, are its rows each exactly once, in an
    order of their own; where rows are resampled some come twice and some not at all.
    Raises ValueError naming the values where weights do not fit.

    >>> from vlm.data.synthetic.scenes import Scenes
    >>> mixture = Mixture([Scenes(4), Scenes(2)], weights=[3, 1], seed=0)
    >>> [mixture[i].source for i in range(8)], mixture.counts(8)
    ([0, 0, 1, 0, 0, 0, 1, 0], [6, 2])
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        warmup: tuple[Sequence[float], int] | None = None,
        resampled: bool = False,
    ) -> None:
        self.resampled = resampled
        self.lengths = [len(source) for source in sources]
        names = [source.name for source in sources]
        if not sources:
            raise ValueError("a mixture has at least one source, found none")
        if 0 in self.lengths:
            raise ValueError(f"source {names[self.lengths.index(0)]} has no rows")
        self.weights = list(self.lengths if weights is None else weights)
        check_weights(self.weights, names)
        self.seed = seed
        self.warmup = None if warmup is None else (list(warmup[0]), warmup[1])
        self._shares = _Shares(self.weights)
        self._first = self._shares
        self._warm = 0
        if self.warmup is not None:
            check_weights(self.warmup[0], names)
            self._first, self._warm = _Shares(self.warmup[0]), max(0, self.warmup[1])
        self._keys = [_mix(_mix(seed & _MASK) ^ source) for source in range(len(sources))]

    def __getitem__(self, i: int) -> Draw:
        """Sample i >= 0: its source's number and its row."""
        if i < 0:
            raise IndexError(f"samples are numbered from 0, found {i}")
        late = self._late(i)
        if self._late(i + 1) > late:
            source, position = self._shares.source_of(late)
            position += self._first.counts(i - late)[source] if self._warm else 0
        else:
            source, position = self._first.source_of(i - late)
            position += self._shares.counts(late)[source]
        epoch, position = divmod(position, self.lengths[source])
        key = _mix(self._keys[source] ^ epoch)
        if self.resampled:
            return Draw(source, _mix(_mix(key) ^ position) % self.lengths[source], epoch)
        return Draw(source, permuted(position, self.lengths[source], key), epoch)

    def counts(self, i: int) -> list[int]:
        """How many of the first i samples each source gives."""
        late = self._late(i)
        counts = self._shares.counts(late)
        first = self._first.counts(i - late)
        return [a + b for a, b in zip(counts, first)]

    def _late(self, i: int) -> int:
        """How many of the first i samples are drawn by `weights`: their density rises evenly from
        0 to 1 over the warm-up; the others are drawn by the shares at the start."""
        if i >= self._warm:
            return i - self._warm + (self._warm + 1) // 2
        return (i * i + self._warm) // (2 * self._warm)


def check_weights(weights: Sequence[float], names: Sequence[str]) -> None:
    """Raises ValueError, showing the weights, where they are no shares of the named sources."""
    if len(weights) != len(names):
        raise ValueError(
            f"{len(weights)} weights {list(weights)} for {len(names)} sources "
            f"{list(names)}: one weight for each source"
        )
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise ValueError(f"weights are finite and at least 0, found {list(weights)}")
    if not any(weights):
        raise ValueError(f"at least one weight is above 0, found {list(weights)}")


class _Shares:
    """Fixed shares: which source each sample comes from, and its number among that source's."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._sources = len(weights)
        self._root = _share_tree(weights)

    def source_of(self, i: int) -> tuple[int, int]:
        """Sample i's source, and how many of the samples before it that source gave."""
        node = self._root
        while isinstance(node, _Fork):
            before = node.left_count(i)
            goes_left = node.left_count(i + 1) > before
            node, i = (node.left, before) if goes_left else (node.right, i - before)
        return node, i

    def counts(self, i: int) -> list[int]:
        """How many of the first i samples each source gives."""
        counts = [0] * self._sources
        open_nodes = [(self._root, i)]
        while open_nodes:
            node, count = open_nodes.pop()
            if isinstance(node, _Fork):
                left = node.left_count(count)
                open_nodes += [(node.left, left), (node.right, count - left)]
            else:
                counts[node] = count
        return counts


class Draw(NamedTuple):
    """Where a sample comes from: its source's number, its row, and how many epochs the source had
    done."""

    source: int
    row: int
    epoch: int


class _Fork(NamedTuple):
    """Shares samples between two subtrees: of the first k, k * left_share, rounded, go left."""

    left: _Fork | int
    right: _Fork | int
    share: Fraction

    def left_count(self, k: int) -> int:
        top, bottom = self.share.numerator, self.share.denominator
        return (2 * k * top + bottom) // (2 * bottom)


def _share_tree(weights: Sequence[float]) -> _Fork | int:
    """A Huffman tree over the sources of weight above 0; a leaf is the source's number.

    A fork is off by at most half a sample. A leaf inherits its forks' errors shrunk by its share
    of each, and in a Huffman tree subtrees grow fast enough that these stay below 2 in sum.
    """
    heap = [
        (Fraction(weight), number, number) for number, weight in enumerate(weights) if weight > 0
    ]
    heapq.heapify(heap)
    order = len(weights)
    while len(heap) > 1:
        small, _, right = heapq.heappop(heap)
        large, _, left = heapq.heappop(heap)
        share = large / (small + large)
        heapq.heappush(heap, (small + large, order, _Fork(left, right, share)))
        order += 1
    return heap[0][2]


def permuted(position: int, length: int, key: int) -> int:
    """Where `position` goes in the permutation of 0 to length - 1 that `key` names.

    A Feistel network over the next square of a power of two, applied until it lands below
    `length`: no table, so that a source of any size costs no memory.
    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002 (cycle walking).

    >>> sorted(permuted(position, 5, key=7) for position in range(5))
    [0, 1, 2, 3, 4]
    """
    half_bits = max(3, ((length - 1).bit_length() + 1) // 2)
    low = (1 << half_bits) - 1
    while True:
        left, right = position >> half_bits, position & low
        for step in range(_ROUNDS):
            left, right = right, left ^ (_mix(key ^ (right << 8 | step)) & low)
        position = left << half_bits | right
        if position < length:
            return position


def _mix(value: int) -> int:
    """A 64-bit hash of a whole number. Source: Steele, Lea and Flood, 2014 (SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class MixtureDataset(Dataset):
    """The examples of a mixture by sample number; endless, so it has no length.

    on_bad_row: "raise" stops at a row that cannot be read, naming it; "skip" gives Skipped in its
    place, for the loop to count and report.
    augment: changes a training example by a seed, the same whenever the run is resumed.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        mixture: Mixture,
        on_bad_row: str = "raise",
        augment: Augment | None = None,
    ) -> None:
        if on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row is 'raise' or 'skip', found {on_bad_row!r}")
        lengths = [len(source) for source in sources]
        if lengths != mixture.lengths:
            raise ValueError(
                f"the mixture is of {mixture.lengths} rows, the sources have {lengths}"
            )
        self.sources = list(sources)
        self.mixture = mixture
        self.on_bad_row = on_bad_row
        self.augment = augment

    def plain(self, number: int) -> Example:
        """The example as its source has it. Raises BadRow, whatever on_bad_row says."""
        draw = self.mixture[number]
        return self.sources[draw.source][draw.row]

    def __getitem__(self, number: int) -> Example | Skipped:
        draw = self.mixture[number]
        source = self.sources[draw.source]
        try:
            example = source[draw.row]
            if self.augment is not None:
                example = self.augment(example, _mix(_mix(self.mixture.seed & _MASK) ^ number) >> 1)
            return example
        except (BadRow, BadImage) as error:
            if self.on_bad_row == "raise":
                raise
            name = source.row_name(draw.row)
            return Skipped(name, str(error).removeprefix(f"{name}: "))


def split_of(batch: int, micro_batch: int | None, ranks: int) -> tuple[int, int]:
    """A rank's share of a batch, and its micro-batch: None takes the share whole. Raises ValueError
    where one is below 1 or they do not divide, naming numbers that do."""
    for name, number in (("batch", batch), ("micro_batch", micro_batch)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, found {number}")
    share, rest = divmod(batch, ranks)
    if rest:
        raise ValueError(
            f"batch {batch} does not divide over {ranks} processes; the next that does is --batch "
            f"{(share + 1) * ranks}"
        )
    micro_batch = micro_batch or share
    if share % micro_batch:
        near = max(n for n in range(1, min(share, micro_batch) + 1) if share % n == 0)
        raise ValueError(
            f"a process's share of {share} examples is no whole number of micro-batches of "
            f"{micro_batch}; the next smaller one is --micro-batch {near}"
        )
    return share, micro_batch


class StepSampler(Sampler[list[int]]):
    """The sample numbers of one rank, micro-batch by micro-batch: a DataLoader's batch_sampler.

    Step s is samples s * batch to (s + 1) * batch - 1, however it is split. Rank r takes the r-th
    of `ranks` equal runs of them, cut into runs of `micro_batch`, in order.

    batch: samples of a step, all ranks together. micro_batch: samples of one forward pass.
    start_step: the first step, so that to resume after k steps is start_step=k.
    steps: the run's last step + 1, whatever the start.
    Raises ValueError where the batch does not divide.

    >>> list(StepSampler(batch=8, micro_batch=2, rank=1, ranks=2, start_step=1, steps=2))
    [[12, 13], [14, 15]]
    """

    def __init__(
        self,
        batch: int,
        micro_batch: int,
        rank: int = 0,
        ranks: int = 1,
        start_step: int = 0,
        steps: int = 1,
    ) -> None:
        if min(batch, micro_batch, ranks) < 1 or batch % (micro_batch * ranks):
            raise ValueError(
                f"a batch of {batch} is no whole number of micro-batches of {micro_batch} on each "
                f"of {ranks} ranks"
            )
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is 0 to {ranks - 1}, found {rank}")
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step is 0 to steps = {steps}, found {start_step}")
        self.batch, self.micro_batch = batch, micro_batch
        self.rank, self.ranks = rank, ranks
        self.start_step, self.steps = start_step, steps
        self.micro_batches_per_step = batch // (micro_batch * ranks)

    def __len__(self) -> int:
        """Micro-batches from start_step to the end."""
        return (self.steps - self.start_step) * self.micro_batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch // self.ranks
        for step in range(self.start_step, self.steps):
            first = step * self.batch + self.rank * share
            for start in range(first, first + share, self.micro_batch):
                yield list(range(start, start + self.micro_batch))
