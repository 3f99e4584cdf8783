"""Micro-batches read ahead of the loop, by processes that end with it.

What a worker cannot read crosses its border as a value, so that every rank learns of it in the same
step and none waits for another.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from vlm.compat.torch import stop_workers
from vlm.data.example import BadRow, Skipped
from vlm.data.mixture import MixtureDataset, StepSampler
from vlm.families.rows import EncodedRow
from vlm.pixels import BadImage
from vlm.training.loading.balance import Costs, Dealt
from vlm.training.loading.encoded import Encoded
from vlm.training.objectives.base import Objective


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What the loader gives: batches (none where all rows were skipped), rows skipped, text
    tokens cut, rows without a scored token, and the error of a row that must not be skipped."""

    batches: tuple
    skipped: tuple[Skipped, ...]
    cut: int
    unscored: int
    failed: Exception | None


def micro_batch_loader(
    data: MixtureDataset,
    processor,
    sampler: StepSampler,
    objective: Objective,
    workers: int,
    balance: Callable[[EncodedRow], int] | None = None,
) -> DataLoader:
    """Gives a `MicroBatch` for each list of rows that the sampler names.

    workers: processes that read and decode; 0 reads in the loop itself.
    balance: the cost of a row, by which the rows of a step are dealt out; None takes them as the
        sampler does, and so does one rank.
    """
    rows = _Guarded(Encoded(data, processor, data.on_bad_row))
    if balance is not None and sampler.ranks > 1:
        rows = Dealt(rows, Costs(data, processor, balance), sampler)
    return DataLoader(
        rows,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_Collate(objective),
        worker_init_fn=_leave_stopping_to_the_loop if workers else None,
        generator=torch.Generator(),  # so that making the loader draws no global random number
    )


class _Guarded(Dataset):
    """Gives a bad row's error as a value, so that it crosses the worker's border unchanged."""

    def __init__(self, rows: Encoded) -> None:
        self.rows = rows

    def __getitem__(self, index: int):
        try:
            return self.rows[index]
        except (BadRow, BadImage) as error:
            return error


class _Collate:
    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, items: list) -> MicroBatch:
        skipped = tuple(item for item in items if isinstance(item, Skipped))
        failed = next((item for item in items if isinstance(item, Exception)), None)
        rows = [item for item in items if not isinstance(item, (Skipped, Exception))]
        batches = self.objective.collate(rows) if rows else ()
        return MicroBatch(
            batches=batches,
            skipped=skipped,
            cut=sum(row.cut for row in rows),
            unscored=sum(self.objective.count(batch).unscored for batch in batches),
            failed=failed,
        )


def _leave_stopping_to_the_loop(_: int) -> None:
    """A loader's worker ignores the first request to stop, which a terminal or a scheduler sends to
    every process: the loop still needs its rows. A second SIGTERM ends it: one that ignored every
    one would keep the main process waiting for it for ever."""

    def end_at_the_next(number: int, _) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_at_the_next)


@contextmanager
def batches_of(loader: DataLoader) -> Iterator[Iterator]:
    """The loader's iterator; its workers have ended when the block is left, however it is left."""
    batches = iter(loader)
    try:
        yield batches
    finally:
        if loader.num_workers:
            stop_workers(batches)
