"""How rows are shared among the processes of a run, and results gathered in the order of the rows.

Batches are runs of consecutive rows, dealt to ranks in turn, so that what a batch holds, and with
it every prediction, is the same on any number of processes, divisible or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

T = TypeVar("T")


def share(count: int, size: int, rank: int, ranks: int) -> Iterator[range]:
    """Batches of `size` (the last: what remains), dealt to ranks in turn.

    >>> [list(batch) for batch in share(5, 2, 0, 2)], [list(batch) for batch in share(5, 2, 1, 2)]
    ([[0, 1], [4]], [[2, 3]])
    """
    for start in range(rank * size, count, ranks * size):
        yield range(start, min(start + size, count))


def batches_of_rank(accelerator: Accelerator, count: int, size: int, what: str) -> Iterator[range]:
    """This process's share of the batches; the main process shows a bar over all of them.

    what: the bar's name.
    """
    ranks, show = accelerator.num_processes, accelerator.is_main_process
    with tqdm(total=count, desc=what, disable=not show, leave=False) as bar:
        for batch in share(count, size, accelerator.process_index, ranks):
            yield batch
            bar.update(min(ranks * size, count - bar.n))


def gather_list(accelerator: Accelerator, items: list[T]) -> list[T]:
    """The items of all processes, on every process, rank by rank."""
    return gather_object(items) if accelerator.num_processes > 1 else items


def gather_in_order(accelerator: Accelerator, found: list[tuple[int, T]]) -> list[tuple[int, T]]:
    """The (index, item) pairs of all processes, on every process, by their indices."""
    return sorted(gather_list(accelerator, found), key=lambda pair: pair[0])


def reduce_sum(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum over processes, on every process."""
    return accelerator.reduce(tensor, "sum") if accelerator.num_processes > 1 else tensor
