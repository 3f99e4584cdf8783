"""One optimizer step over a rank's micro-batches: counts, gradients, figures, whatever is learned.

Gradients of all ranks are summed once a step, absent ones as zeros; those of sharded weights by the
sharding itself. Nothing changes where a loss or a gradient is not finite.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from vlm.data.example import BadRow
from vlm.training.loading.loader import MicroBatch
from vlm.training.master_weights import WorkingWeights
from vlm.training.meter import Meter
from vlm.training.objectives.base import Count, Objective
from vlm.training.sharding import clip_gradients, is_sharded, sum_unsharded
from vlm.training.stages import Stage, StageError, set_rates

BUCKET_ELEMENTS = 2**24
"""Numbers of gradients that ranks exchange at once."""


class Step:
    """One optimizer step over the rank's micro-batches; figures are those of all ranks. Among them
    balance: the mean work of the ranks over the largest, up to 1."""

    def __init__(
        self,
        module,
        stage: Stage,
        objective: Objective,
        optimizer,
        accelerator,
        meter: Meter,
        working: WorkingWeights,
    ) -> None:
        self.module, self.stage, self.objective, self.working = module, stage, objective, working
        self.optimizer, self.accelerator, self.meter = optimizer, accelerator, meter
        self.trainable = [p for p in module.parameters() if p.requires_grad]
        self.sharded = is_sharded(module)
        self.keeping = False
        self.reached: torch.Tensor | None = None

    def __call__(
        self, step: int, micros: list[MicroBatch], waited: float, stop: bool, unsaved: bool
    ) -> dict[str, float]:
        batches = [batch for micro in micros for batch in micro.batches]
        counts = [self.objective.count(batch) for batch in batches]
        failed = next((micro.failed for micro in micros if micro.failed), None)
        totals = self._sum(
            [
                sum(count.scored for count in counts),
                sum(count.samples for count in counts),
                sum(count.tokens for count in counts),
                sum(count.positions for count in counts),
                sum(count.work for count in counts),
                sum(count.pictured for count in counts),
                stop,
                unsaved,
                failed is not None,
                sum(len(micro.skipped) + micro.cut + micro.unscored for micro in micros),
                not batches,
                *self._as_own(sum(count.work for count in counts)),
            ]
        )
        (
            scored, samples, tokens, positions, work, images, stops, unsaved, failures, left_out,
            idle, *works,
        ) = map(int, totals)  # fmt: skip
        if failures:
            raise failed or BadRow("another rank found a row that cannot be used; see its message")
        if idle and samples and self.objective.every_rank:
            raise StageError(
                f"every row of step {step + 1} on {idle} of {self.accelerator.num_processes} ranks "
                "was left out; this loss needs an example on each: take a larger batch, or mend "
                "the rows"
            )
        if not samples:
            reasons = [item.reason for micro in micros for item in micro.skipped]
            raise StageError(
                f"every row of step {step + 1} was left out, so there is nothing to learn from; "
                f"here for example: {reasons[:1]}"
            )
        set_rates(self.optimizer, self.stage.factor(step))
        if self.sharded:
            batches = self.objective.level(self.module, batches)
        if self.meter.flops_per_work is None:
            self._first_flops(batches, images > 0)
        with self.working.in_use():
            share = self.objective.backward(self.module, batches, scored, self.accelerator.autocast)
        loss = float(self._sum([share])[0])
        if not math.isfinite(loss):
            raise StageError(_refusal("loss", loss, step, batches))
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            raise StageError(_refusal("gradient norm", norm, step, batches))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step(self.module)
        self.meter.add(samples, tokens, positions, work, waited)
        return {
            "loss": loss,
            **self._rates(),
            "grad_norm": norm,
            "scored": scored,
            "samples": samples,
            **self.meter.read(),
            "balance": work / (len(works) * max(*works, 1)),
            "images": images,
            "stop": stops > 0,
            "unsaved": unsaved > 0,
            "left_out": left_out,
        }

    def _rates(self) -> dict[str, float]:
        """The live learning rate, one for each pattern where there are several."""
        rates = {group["pattern"]: group["lr"] for group in self.optimizer.param_groups}
        if len(rates) == 1:
            return {"lr": next(iter(rates.values()))}
        return {f"lr {pattern}": rate for pattern, rate in rates.items()}

    def _first_flops(self, batches: list, pictured: bool) -> None:
        """Counts the first batch that has a picture, where any has. Sharded ranks pass through
        their first batches together, and take the count of all for their own."""
        if self.sharded:
            count = self.objective.count(batches[0])
            self._count_flops(batches[0], count)
            flops, work = self._sum([self.meter.flops_per_work * max(count.work, 1), count.work])
            self.meter.flops_per_work = flops / max(work, 1)
            return
        for batch in batches:
            count = self.objective.count(batch)
            if count.pictured or not pictured:
                self._count_flops(batch, count)
                return

    def _count_flops(self, batch, count: Count) -> None:
        """Counts a pass whose gradients are thrown away: under the counter torch computes by other
        kernels, with other roundings, which must not depend on where a run was resumed."""
        before = [p.grad for p in self.trainable]
        for parameter in self.trainable:
            parameter.grad = None
        if self.keeping:  # most steps will read the tokens of pictures, so they count for nothing
            self.module.encode(batch.to(self.accelerator.device).groups)
        with torch.random.fork_rng(), self.working.in_use():
            self.meter.count_flops(
                lambda: self.objective.trial(self.module, batch, self.accelerator.autocast),
                count.work,
            )
        for parameter, grad in zip(self.trainable, before):
            parameter.grad = grad

    def _gradient_norm(self) -> float:
        """Sums gradients over ranks and clips them; gives their norm before. A gradient that is
        absent everywhere is zero, on one rank as on many."""
        if self.reached is None or not bool(self.reached.all()):
            flags = torch.tensor([p.grad is not None for p in self.trainable], dtype=torch.float32)
            self.reached = self.accelerator.reduce(flags.to(self.accelerator.device), "sum") > 0
        for parameter in self.trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.sharded:
            sum_unsharded(self.trainable)
            return clip_gradients(self.trainable, self.stage.clip)
        if self.accelerator.num_processes > 1:
            self._sum_gradients()
        return float(nn.utils.clip_grad_norm_(self.trainable, self.stage.clip))

    def _sum_gradients(self) -> None:
        """All-reduces gradients in flat buckets, full with `BUCKET_ELEMENTS` or a bit more."""
        bucket: list[torch.Tensor] = []
        for number, parameter in enumerate(self.trainable):
            bucket.append(parameter.grad)
            full = sum(grad.numel() for grad in bucket) >= BUCKET_ELEMENTS
            if full or number + 1 == len(self.trainable):
                flat = torch.cat([grad.flatten() for grad in bucket])
                torch.distributed.all_reduce(flat)
                for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket])):
                    grad.copy_(part.view_as(grad))
                bucket = []

    def _as_own(self, value: float) -> list[float]:
        """The value at this rank's place among all ranks, so that a sum shows those of each."""
        return [
            value * (rank == self.accelerator.process_index)
            for rank in range(self.accelerator.num_processes)
        ]

    def _sum(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(total, "sum").tolist()


def _refusal(what: str, value: float, step: int, batches: list) -> str:
    names = [name for batch in batches for name in batch.names]
    return (
        f"the {what} of step {step + 1} is {value}; nothing was changed by it. Its rows here: "
        f"{names[:32]}"
    )


def audit_gradients(module: nn.Module, reached: torch.Tensor) -> None:
    """Raises StageError naming every trainable parameter that got no gradient on any rank."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    dead = [name for name, ok in zip(names, reached.tolist()) if not ok]
    if dead:
        raise StageError(
            f"{len(dead)} trainable parameters got no gradient in the first step with images: "
            f"{dead[:20]}; freeze them, or see what cuts them off from the loss"
        )
