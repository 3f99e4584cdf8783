"""Texts in a ring of ranks: each rank keeps its images and sees every rank's texts in turn.

What a rank adds to a text travels with it and comes home with what all ranks have added. A rank
holds one visiting shard and the blocks under way, however many ranks there are.

Shapes: B pair of a rank, U shared embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ring:
    """The ranks that share a batch, and the order in which texts visit them: from rank to rank + 1.

    rank: this one; sizes: the pairs of each; block: rows and columns of a block.
    """

    rank: int
    sizes: list[int]
    block: int
    group: dist.ProcessGroup | None

    @property
    def is_one_block(self) -> bool:
        return len(self.sizes) == 1 and self.sizes[0] <= self.block

    def buffer(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for any rank's shard, float[largest B, U]."""
        return like.new_empty(max(self.sizes), like.shape[1], dtype=dtype)

    def total(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        if len(self.sizes) > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def blocks(
        self, count: int, texts: Tensor, carried: Sequence[Tensor]
    ) -> Iterator[tuple[slice, bool, Tensor, *tuple[Tensor, ...]]]:
        """Every block of logits of this rank's `count` images: its rows, whether pairs lie on its
        diagonal, the texts of its columns, and the rows of each tensor of `carried` that go with
        those texts.

        carried: [largest B, ...], this rank's rows first. Texts are passed on once all images have
        met them, with what the caller made of their `carried`, beside the work on the next ones; at
        the end `carried` is home again, in place, with what all ranks made of it.
        """
        ranks = len(self.sizes)
        visitor = texts
        if ranks > 1:
            visitor = self.buffer(texts, texts.dtype)
            visitor[: len(texts)] = texts
        under_way = _UnderWay()
        for hop in range(ranks):
            owner = (self.rank - hop) % ranks
            present, coming = self.sizes[owner], self.sizes[owner - 1]
            # On their way home texts themselves have nothing left to do.
            travelling = (visitor, *carried) if hop < ranks - 1 else tuple(carried)
            for start in range(0, max(present, coming), self.block):
                here = slice(start, min(start + self.block, present))
                if start < present:
                    for first in range(0, count, self.block):
                        rows = slice(first, min(first + self.block, count))
                        columns = (tensor[here] for tensor in (visitor, *carried))
                        yield rows, hop == 0 and first == start, *columns
                under_way.store()
                if ranks > 1:
                    there = slice(start, min(start + self.block, coming))
                    self._pass_on(under_way, travelling, here, there)
            under_way.store()

    def _pass_on(
        self, under_way: _UnderWay, tensors: Sequence[Tensor], here: slice, there: slice
    ) -> None:
        """Begins to send the rows `here` of each tensor to the next rank, and to receive the rows
        `there` from the rank before."""
        ranks = len(self.sizes)
        after, before = (self.rank + 1) % ranks, (self.rank - 1) % ranks
        exchange = []
        for tag, tensor in enumerate(tensors):
            ends = {"group": self.group, "tag": tag}
            if here.start < here.stop:
                exchange.append(dist.P2POp(dist.isend, tensor[here], group_peer=after, **ends))
            if there.start < there.stop:
                received = torch.empty_like(tensor[there])
                exchange.append(dist.P2POp(dist.irecv, received, group_peer=before, **ends))
                under_way.rows.append((tensor[there], received))
        if exchange:
            under_way.requests.extend(dist.batch_isend_irecv(exchange))


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """Rows being exchanged. What is received, (destination, rows) pairs, is put in its place only
    when all is done, since until then the destination holds what is being sent."""

    requests: list[dist.Work] = field(default_factory=list)
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def store(self) -> None:
        for request in self.requests:
            request.wait()
        for destination, received in self.rows:
            destination.copy_(received)
        self.requests.clear()
        self.rows.clear()


def exchange_reports(
    report: list[int], device: torch.device, group: dist.ProcessGroup | None
) -> tuple[int, list[list[int]]]:
    """This rank's number, and the reports of all ranks, each as long as this one's. group: None is
    all ranks, or this process alone where torch.distributed is not initialised; it is alone too
    where it is no member of the group."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 0, [report]
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if ranks < 2:
        return 0, [report]
    mine = torch.tensor(report, device=device)
    reports = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(reports, mine, group=group)
    return rank, torch.stack(reports).tolist()
