"""What a step minimises: how rows become batches, and batches gradients.

The trainer knows no family: it hands an objective the rows of a micro-batch, then the batches of a
step, and sums the gradients that it leaves over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn

from vlm.families.contrastive.batch import Pair, PairBatch, collate_pairs
from vlm.families.contrastive.module import Contrastive, Embedded
from vlm.families.decoder_only.batch import Batch, Row, collate, collate_packed, pack_rows
from vlm.families.line_reader.batch import LineBatch, LineRow, by_width, collate_lines
from vlm.families.line_reader.module import LineReader
from vlm.losses.contrastive import RefusedRows, sigmoid_loss, softmax_loss
from vlm.losses.ctc import ctc_losses, least_columns
from vlm.losses.token import backward_state_losses
from vlm.tokenizers.columns import STRIDE
from vlm.training.flop_cost import Work
from vlm.training.sharding import level, passes_of_ranks
from vlm.training.stages import StageError

Autocast = Callable[[], AbstractContextManager]
LARGEST_SCALE = 100.0
"""Source: CLIP, arXiv 2103.00020, section 2.5: logits are scaled by no more than 100."""


class Count(NamedTuple):
    """What a batch holds: terms of the loss, examples, real text places, computed ones, what the
    cost of a pass goes by, examples that have a picture, and examples without a term."""

    scored: int
    samples: int
    tokens: int
    positions: int
    work: int
    pictured: int
    unscored: int


class Objective(Protocol):
    """What `fit` asks of an objective.

    every_rank: whether a step needs an example on each rank.
    """

    every_rank: bool

    def collate(self, rows: Sequence[Any]) -> tuple[Any, ...]:
        """The rows of one micro-batch, at least one, as batches."""

    def count(self, batch: Any) -> Count:
        """What a batch holds."""

    def level(self, module: nn.Module, batches: Sequence[Any]) -> Sequence[Any]:
        """The batches with blank ones beside them, so that every rank makes the same calls on a
        sharded module; called on all ranks together."""

    def backward(
        self, module: nn.Module, batches: Sequence[Any], scored: int, autocast: Autocast
    ) -> float:
        """Adds the gradients of this rank's batches; gives its share of the loss.

        batches: in the host's memory; each is moved to the module's device for its own passes.
        scored: terms of the loss of the step, over all ranks. Shares and gradients add up over
        ranks to those of the whole step.
        """

    def trial(self, module: nn.Module, batch: Any, autocast: Autocast) -> None:
        """One pass forward and backward over a batch, to count its operations; its gradients are
        thrown away."""

    def after_step(self, module: nn.Module) -> None:
        """Called when the optimizer has changed the module."""


class NextToken:
    """Cross-entropy of the scored tokens: their sum over the number of them in the whole step.

    pack: the most places of a packed row; None pads rows side by side. Raises ValueError below 1.
    work: what rows and batches cost.
    """

    every_rank = False

    def __init__(self, pad_id: int, pack: int | None = None, work: Work | None = None) -> None:
        if pack is not None and pack < 1:
            raise ValueError(f"pack must be at least 1 place, found {pack}")
        self.pad_id = pad_id
        self.pack = pack
        self.work = work or Work()

    def collate(self, rows: Sequence[Row]) -> tuple[Batch, ...]:
        """Rows packed end to end; or those of like length together, padded."""
        if self.pack is not None:
            return tuple(collate_packed(part) for part in pack_rows(rows, self.pack))
        return tuple(collate(part, self.pad_id) for part in _of_like_length(rows))

    def count(self, batch: Batch) -> Count:
        return Count(
            scored=int(batch.scored.sum()),
            samples=len(batch.names),
            tokens=int(batch.valid.sum()),
            positions=batch.valid.numel(),
            work=self.work.of_batch(batch),
            pictured=sum(len(group.owner) for group in batch.groups),
            unscored=len(batch.names) - len(batch.target_rows.unique()),
        )

    def level(self, module: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        return level(module, batches)

    def backward(
        self, module: nn.Module, batches: Sequence[Batch], scored: int, autocast: Autocast
    ) -> float:
        return sum(self._backward(module, batch, scored, autocast) for batch in batches)

    def trial(self, module: nn.Module, batch: Batch, autocast: Autocast) -> None:
        self._backward(module, batch, 1, autocast)

    def after_step(self, module: nn.Module) -> None:
        pass

    def _backward(self, module: nn.Module, batch: Batch, scored: int, autocast: Autocast) -> float:
        batch = batch.to(_device(module))
        with autocast():
            states = module.states(batch)
        share = 1 / max(scored, 1)
        losses = backward_state_losses(module.logits, states, batch.targets, share, autocast)
        return float(losses.sum()) * share


class Transcribe:
    """What a line says: the sum of the lines' CTC losses over the number of their characters in the
    whole step. A line whose picture is too narrow for its text counts as unscored."""

    every_rank = False

    def collate(self, rows: Sequence[LineRow]) -> tuple[LineBatch, ...]:
        """Lines of one width together."""
        groups = by_width([row.pixels.shape[-1] for row in rows])
        return tuple(collate_lines([rows[number] for number in group]) for group in groups)

    def count(self, batch: LineBatch) -> Count:
        V, _, _, W = batch.pixels.shape
        fits = _fit(batch)
        return Count(
            scored=int(batch.lengths[fits].sum()),
            samples=V,
            tokens=V * W // STRIDE,
            positions=V * W // STRIDE,
            work=V * W,
            pictured=V,
            unscored=int((~fits).sum()),
        )

    def level(self, module: LineReader, batches: Sequence[LineBatch]) -> Sequence[LineBatch]:
        most = max(passes_of_ranks(len(batches)))
        return [*batches, *[blank_lines(module)] * (most - len(batches))]

    def backward(
        self, module: LineReader, batches: Sequence[LineBatch], scored: int, autocast: Autocast
    ) -> float:
        return sum(self._backward(module, batch, scored, autocast) for batch in batches)

    def trial(self, module: LineReader, batch: LineBatch, autocast: Autocast) -> None:
        self._backward(module, batch, 1, autocast)

    def after_step(self, module: LineReader) -> None:
        pass

    def _backward(
        self, module: LineReader, batch: LineBatch, scored: int, autocast: Autocast
    ) -> float:
        fits = _fit(batch)
        batch = batch.to(_device(module))
        with autocast():
            logits = module(batch)
        losses = ctc_losses(logits, batch.ids, batch.lengths)
        loss = losses[fits.to(losses.device)].sum() / max(scored, 1)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


def blank_lines(module: LineReader) -> LineBatch:
    """A blank line with a text that does not fit it, so that it has no term in the loss."""
    rows = module.tokenizer.pixel_spec.size_hw[0]
    return LineBatch(
        pixels=torch.zeros(1, 3, rows, STRIDE),
        ids=torch.ones(2, dtype=torch.long),
        lengths=torch.tensor([2]),
        names=("blank",),
    )


def _fit(batch: LineBatch) -> torch.Tensor:
    """Which lines have tokens enough for their text: bool[V]."""
    texts = batch.ids.split(batch.lengths.tolist())
    least = [least_columns(ids.tolist()) for ids in texts]
    return torch.tensor(least) <= batch.pixels.shape[-1] // STRIDE


class Contrast:
    """Pictures and their captions told apart within the batch of all ranks and micro-batches.

    kind: "softmax" (CLIP) or "sigmoid" (SigLIP). group: the ranks among whose pairs they are told
    apart, as the losses take it; all at first.
    One micro-batch is an ordinary pass. Of several, embeddings alone are kept from a first pass
    without gradients; the loss over all of them gives each embedding's gradient, and a second pass
    through each micro-batch, with the random numbers of its first, takes it on to the weights. The
    gradients are those of one pass, at the memory of a micro-batch. Source: arXiv 2101.06983.
    """

    every_rank = True

    def __init__(self, kind: Literal["softmax", "sigmoid"]) -> None:
        if kind not in ("softmax", "sigmoid"):
            raise ValueError(f"loss is 'softmax' or 'sigmoid', found {kind!r}")
        self.kind = kind
        self.group: torch.distributed.ProcessGroup | None = None
        self.limit: torch.Tensor | None = None

    def collate(self, rows: Sequence[Pair]) -> tuple[PairBatch, ...]:
        return (collate_pairs(rows),)

    def count(self, batch: PairBatch) -> Count:
        pairs = len(batch.names)
        return Count(
            scored=pairs,
            samples=pairs,
            tokens=int(batch.valid.sum()),
            positions=batch.valid.numel(),
            work=pairs,  # pictures are most of it, and all of one size
            pictured=pairs,
            unscored=0,
        )

    def level(self, module: Contrastive, batches: Sequence[PairBatch]) -> Sequence[PairBatch]:
        """Raises StageError where ranks differ in their batches: each enters the loss."""
        passes = passes_of_ranks(len(batches))
        if len(set(passes)) > 1:
            raise StageError(
                f"ranks have {passes} micro-batches, since rows were left out; a sharded "
                "contrastive run needs as many on each: mend the rows, or take a larger "
                "--micro-batch"
            )
        return batches

    def backward(
        self, module: Contrastive, batches: Sequence[PairBatch], scored: int, autocast: Autocast
    ) -> float:
        """Raises StageError naming this rank's rows where the loss refuses their embeddings."""
        before = module.log_scale.detach()
        self.limit = before.clamp(min=math.log(LARGEST_SCALE))
        device = _device(module)
        if len(batches) == 1:
            with autocast():
                embedded = module(batches[0].to(device))
            return self._backward(module, embedded, batches)
        states, kept = [], []
        for batch in batches:
            states.append(_random_state(device))
            with torch.no_grad(), autocast():
                kept.append(module(batch.to(device)))
        after = _random_state(device)
        joined = Embedded(*(torch.cat(parts).requires_grad_() for parts in zip(*kept)))
        share = self._backward(module, joined, batches)
        sizes = [len(batch.names) for batch in batches]
        grads = zip(*(embeddings.grad.split(sizes) for embeddings in joined))
        for batch, state, grad in zip(batches, states, grads):
            _set_random_state(state)
            with autocast():
                embedded = module(batch.to(device))
            _backward_through(embedded, grad)
        _set_random_state(after)
        return share

    def trial(self, module: Contrastive, batch: PairBatch, autocast: Autocast) -> None:
        with autocast():
            embedded = module(batch.to(_device(module)))
        _backward_through(embedded, [torch.ones_like(vectors) for vectors in embedded])

    def after_step(self, module: Contrastive) -> None:
        """Keeps the scale at `LARGEST_SCALE` or below. One that was above before the step, as that
        of published SigLIP models is, may fall but not rise."""
        if module.log_scale.requires_grad:
            with torch.no_grad():
                module.log_scale.clamp_(max=self.limit)

    def _backward(
        self, module: Contrastive, embedded: Embedded, batches: Sequence[PairBatch]
    ) -> float:
        """Gradients of the loss of all ranks' embeddings; gives this rank's share of its value,
        which is the same on every rank."""
        try:
            if self.kind == "softmax":
                loss = softmax_loss(*embedded, module.log_scale, group=self.group)
            else:
                scalars = module.log_scale, module.bias
                loss = sigmoid_loss(*embedded, *scalars, group=self.group)
        except RefusedRows as error:
            names = [name for batch in batches for name in batch.names]
            refused = [names[row] for row in error.rows[:32]]
            raise StageError(
                f"{error}. These rows are: {refused}; where they are sound, the run has diverged: "
                "lower its rates"
            ) from error
        except ValueError as error:
            raise StageError(str(error)) from error
        loss.backward()
        here = torch.distributed.is_available() and torch.distributed.is_initialized()
        return float(loss.detach()) / (torch.distributed.get_world_size() if here else 1)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _backward_through(embedded: Embedded, grads: Sequence[torch.Tensor]) -> None:
    """Takes gradients of embeddings on to the weights. A locked tower's embeddings need none."""
    learned = [(vectors, grad) for vectors, grad in zip(embedded, grads) if vectors.requires_grad]
    if learned:
        torch.autograd.backward(*zip(*learned))


def _of_like_length(rows: Sequence[Row], spread: float = 1.5) -> list[list[Row]]:
    """The rows in parts whose longest is at most `spread` times the shortest, each in the rows' own
    order, so that a short caption is not padded to a long document's length."""
    parts: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number].ids)):
        if not parts or len(rows[number].ids) > spread * len(rows[parts[-1][0]].ids):
            parts.append([])
        parts[-1].append(number)
    return [[rows[number] for number in sorted(part)] for part in parts]


def _random_state(device: torch.device) -> tuple[torch.device, list[torch.Tensor]]:
    """What dropout will draw next, on the CPU and on a GPU."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return device, states


def _set_random_state(state: tuple[torch.device, list[torch.Tensor]]) -> None:
    device, (here, *there) = state
    torch.set_rng_state(here)
    for values in there:
        torch.cuda.set_rng_state(values, device)
