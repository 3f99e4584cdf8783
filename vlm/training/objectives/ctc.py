"""The objective of line readers: CTC over the characters of each line."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from vlm.families.line_reader.batch import LineBatch, LineRow, by_width, collate_lines
from vlm.families.line_reader.module import LineReader
from vlm.losses.ctc import ctc_losses, least_columns
from vlm.tokenizers.columns import STRIDE
from vlm.training.objectives.base import Autocast, Count, device_of
from vlm.training.sharding import passes_of_ranks


class Transcribe:
    """What a line says: the sum of the lines' CTC losses over the number of their characters in the
    whole step. A line whose image is too narrow for its text counts as unscored."""

    totals = ("characters",)
    every_rank = False
    pack = None

    def collate(self, rows: Sequence[LineRow]) -> tuple[LineBatch, ...]:
        """Lines of one width together."""
        groups = by_width([row.pixels.shape[-1] for row in rows])
        return tuple(collate_lines([rows[number] for number in group]) for group in groups)

    def count(self, batch: LineBatch) -> Count:
        V, _, _, W = batch.pixels.shape
        fits = _fit(batch)
        return Count(
            totals={"characters": int(batch.lengths[fits].sum())},
            samples=V,
            tokens=V * W // STRIDE,
            positions=V * W // STRIDE,
            cost=V * W,
            images=V,
            unscored=int((~fits).sum()),
        )

    def level(self, module: LineReader, batches: Sequence[LineBatch]) -> Sequence[LineBatch]:
        most = max(passes_of_ranks(len(batches)))
        return [*batches, *[dummy_lines(module)] * (most - len(batches))]

    def backward(
        self,
        module: LineReader,
        batches: Sequence[LineBatch],
        totals: Mapping[str, int],
        autocast: Autocast,
    ) -> float:
        share = 0.0
        for batch in batches:
            fits = _fit(batch)
            batch = batch.to(device_of(module))
            with autocast():
                logits = module(batch)
            losses = ctc_losses(logits, batch.ids, batch.lengths)
            loss = losses[fits.to(losses.device)].sum() / max(totals["characters"], 1)
            if loss.requires_grad:
                loss.backward()
            share += float(loss.detach())
            del batch, logits, losses, loss  # before the next batch takes as much
        return share

    def trial(self, module: LineReader, batch: LineBatch, autocast: Autocast) -> None:
        self.backward(module, [batch], dict.fromkeys(self.totals, 1), autocast)

    def after_step(self, module: LineReader) -> None:
        pass

    def alone(self) -> Transcribe:
        return copy.copy(self)

    def classes(self, module: LineReader) -> int:
        return module.head.out_features

    def kept_between(self, module: nn.Module, examples: int) -> int:
        return 0


def dummy_lines(module: LineReader) -> LineBatch:
    """A dummy input: an empty line with a text that does not fit it, so that it has no term in the
    loss."""
    rows = module.tokenizer.pixel_spec.size_hw[0]
    return LineBatch(
        pixels=torch.zeros(1, 3, rows, STRIDE),
        ids=torch.ones(2, dtype=torch.long),
        lengths=torch.tensor([2]),
        names=("dummy",),
    )


def _fit(batch: LineBatch) -> torch.Tensor:
    """Which lines have tokens enough for their text: bool[V]."""
    texts = batch.ids.split(batch.lengths.tolist())
    least = [least_columns(ids.tolist()) for ids in texts]
    return torch.tensor(least) <= batch.pixels.shape[-1] // STRIDE
