"""The objective of families that write: cross-entropy of the next token."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import nn

from vlm.families.decoder_only.batch import (
    Batch,
    Row,
    collate,
    collate_packed,
    pack_rows,
    rows_of_like_length,
)
from vlm.losses.token import backward_state_losses
from vlm.training.flop_cost import FlopCost
from vlm.training.objectives.base import Autocast, Count, device_of
from vlm.training.sharding import level


class NextToken:
    """Cross-entropy of the scored tokens: their sum over the number of them in the whole step.

    pack: the most positions of a packed row, at least 1; None pads rows side by side.
    cost: the FLOP cost of rows and batches; None counts one for each position.
    Raises ValueError naming a pack below 1.
    """

    totals = ("tokens",)
    every_rank = False

    def __init__(self, pad_id: int, pack: int | None = None, cost: FlopCost | None = None) -> None:
        if pack is not None and pack < 1:
            raise ValueError(f"pack must be at least 1, found {pack}")
        self.pad_id = pad_id
        self.pack = pack
        self.cost = cost or FlopCost()

    def collate(self, rows: Sequence[Row]) -> tuple[Batch, ...]:
        """Rows packed end to end; or those of like length together, padded."""
        if self.pack is not None:
            return tuple(collate_packed(part) for part in pack_rows(rows, self.pack))
        return tuple(collate(part, self.pad_id) for part in rows_of_like_length(rows))

    def count(self, batch: Batch) -> Count:
        return Count(
            totals={"tokens": int(batch.scored.sum())},
            samples=len(batch.names),
            tokens=int(batch.valid.sum()),
            positions=batch.valid.numel(),
            cost=self.cost.of_batch(batch),
            images=sum(len(group.owner) for group in batch.groups if not group.is_text),
            unscored=len(batch.names) - len(batch.target_rows.unique()),
        )

    def level(self, module: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        return level(module, batches)

    def backward(
        self,
        module: nn.Module,
        batches: Sequence[Batch],
        totals: Mapping[str, int],
        autocast: Autocast,
    ) -> float:
        share = 1 / max(totals["tokens"], 1)
        loss = 0.0
        for batch in batches:
            batch = batch.to(device_of(module))
            with autocast():
                states = module.states(batch)
            losses = backward_state_losses(module.logits, states, batch.targets, share, autocast)
            loss += float(losses.sum()) * share
            del batch, states, losses  # before the next batch takes as much
        return loss

    def trial(self, module: nn.Module, batch: Batch, autocast: Autocast) -> None:
        self.backward(module, [batch], dict.fromkeys(self.totals, 1), autocast)

    def after_step(self, module: nn.Module) -> None:
        pass

    def alone(self) -> NextToken:
        return copy.copy(self)

    def classes(self, module: nn.Module) -> int:
        return module.text.config.get_text_config().vocab_size

    def kept_between(self, module: nn.Module, examples: int) -> int:
        return 0
