"""One optimizer step over a rank's micro-batches: totals, gradients, metrics, whatever is learned.

Gradients of all ranks are summed once a step, absent ones as zeros; those of sharded weights by the
sharding itself. Nothing changes where a loss or a gradient is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from vlm.data.example import BadRow
from vlm.training.loading.loader import MicroBatch
from vlm.training.meter import Meter
from vlm.training.objectives.base import Count, Objective, sum_totals
from vlm.training.sharding import allow_unused, sum_unsharded
from vlm.training.stages import StageError, set_rates
from vlm.training.state import TrainState

BUCKET_ELEMENTS = 2**24
"""Numbers of gradients that ranks exchange at once."""


class StepResult(NamedTuple):
    """What a step did; the same on every rank.

    metrics: what is logged of it, over all ranks. Among them balance: the mean cost of the ranks
        over the largest, up to 1. skipped: rows skipped, text tokens cut and rows without a term in
        the loss, added up. stop, unsaved: whether any rank said so when the step began.
    """

    metrics: dict[str, float]
    skipped: int
    stop: bool
    unsaved: bool


class Step:
    """Optimizer steps of one run.

    cached: whether a token cache gives the image tokens of most steps.
    """

    def __init__(
        self,
        state: TrainState,
        objective: Objective,
        accelerator,
        meter: Meter,
        cached: bool = False,
    ) -> None:
        self.state, self.objective = state, objective
        self.accelerator, self.meter, self.cached = accelerator, meter, cached
        self.reached: torch.Tensor | None = None
        self._audited = False

    def __call__(
        self,
        step: int,
        micros: list[MicroBatch],
        waited: float,
        stop: bool = False,
        unsaved: bool = False,
    ) -> StepResult:
        """Step number `step`, from 0, over this rank's micro-batches; called on all ranks together.

        waited: seconds for data. stop: whether this process was asked to stop. unsaved: whether it
        could not write its last checkpoint.
        Raises BadRow or BadImage for a row that must not be skipped, on any rank; StageError where
        a step has nothing to learn from, or a loss or gradient is not finite.
        """
        state, objective = self.state, self.objective
        batches = [batch for micro in micros for batch in micro.batches]
        totals, found = self._over_ranks(micros, stop, unsaved)
        self._require_usable(step, micros, found)
        set_rates(state.optimizer, state.stage.factor(step))
        if state.sharded:
            batches = objective.level(state.module, batches)
        if self.meter.flops_per_cost is None:
            self._first_flops(batches, found["images"] > 0)
        with state.computing():
            share = objective.backward(state.module, batches, totals, self.accelerator.autocast)
        loss = self._sum({"loss": share})["loss"]
        _require_finite("loss", loss, step, batches)
        self._sum_gradients()
        norm = state.clip_gradients()
        _require_finite("gradient norm", norm, step, batches)
        if found["images"] and not self._audited:
            audit_gradients(state.module, self.reached)
            allow_unused(state.module)
            self._audited = True
        state.update()
        objective.after_step(state.module)
        samples, tokens, positions, cost = (
            int(found[name]) for name in ("samples", "tokens", "positions", "cost")
        )
        self.meter.add(samples, tokens, positions, cost, waited)
        costs = [found[f"cost of rank {rank}"] for rank in range(self.accelerator.num_processes)]
        metrics = {
            "loss": loss,
            **self._rates(),
            "grad_norm": norm,
            **_scored(totals),
            "samples": samples,
            **self.meter.read(),
            "balance": cost / (len(costs) * max(*costs, 1)),
        }
        return StepResult(metrics, int(found["skipped"]), found["stop"] > 0, found["unsaved"] > 0)

    def _over_ranks(
        self, micros: list[MicroBatch], stop: bool, unsaved: bool
    ) -> tuple[dict[str, int], dict[str, float]]:
        """The totals of the step, and what else the ranks must know of each other before the first
        forward pass; in one exchange."""
        counts = [self.objective.count(batch) for micro in micros for batch in micro.batches]
        own = {
            name: sum(getattr(count, name) for count in counts)
            for name in ("samples", "tokens", "positions", "cost", "images")
        }
        own |= {
            "stop": stop,
            "unsaved": unsaved,
            "failed": any(micro.failed for micro in micros),
            "skipped": sum(len(micro.skipped) + micro.cut + micro.unscored for micro in micros),
            "idle": not counts,
        }
        own |= {
            f"cost of rank {rank}": own["cost"] * (rank == self.accelerator.process_index)
            for rank in range(self.accelerator.num_processes)
        }
        totals = sum_totals(self.objective.totals, counts)
        found = self._sum({f"total {name}": value for name, value in totals.items()} | own)
        return {name: int(found.pop(f"total {name}")) for name in totals}, found

    def _require_usable(
        self, step: int, micros: list[MicroBatch], found: Mapping[str, float]
    ) -> None:
        if found["failed"]:
            failed = next((micro.failed for micro in micros if micro.failed), None)
            raise failed or BadRow("another rank found a row that cannot be used; see its message")
        if found["idle"] and found["samples"] and self.objective.every_rank:
            raise StageError(
                f"every row of step {step + 1} on {int(found['idle'])} of "
                f"{self.accelerator.num_processes} ranks was skipped; this loss needs an example "
                "on each: take a larger batch, or mend the rows"
            )
        if not found["samples"]:
            reasons = [item.reason for micro in micros for item in micro.skipped]
            raise StageError(
                f"every row of step {step + 1} was skipped, so there is nothing to learn from; "
                f"here for example: {reasons[:1]}"
            )

    def _rates(self) -> dict[str, float]:
        """The live learning rate, one for each pattern where there are several."""
        rates = {group["pattern"]: group["lr"] for group in self.state.optimizer.param_groups}
        if len(rates) == 1:
            return {"lr": next(iter(rates.values()))}
        return {f"lr {pattern}": rate for pattern, rate in rates.items()}

    def _first_flops(self, batches: list, with_image: bool) -> None:
        """Counts the first batch that has an image, where any has. Sharded ranks pass through
        their first batches together, and take the count of all for their own."""
        if self.state.sharded:
            count = self.objective.count(batches[0])
            self._count_flops(batches[0], count)
            own = {"flops": self.meter.flops_per_cost * max(count.cost, 1), "cost": count.cost}
            found = self._sum(own)
            self.meter.flops_per_cost = found["flops"] / max(found["cost"], 1)
            return
        for batch in batches:
            count = self.objective.count(batch)
            if count.images or not with_image:
                self._count_flops(batch, count)
                return

    def _count_flops(self, batch, count: Count) -> None:
        """Counts a pass whose gradients are thrown away: under the counter torch computes by other
        kernels, with other roundings, which must not depend on where a run was resumed."""
        module, trained = self.state.module, self.state.trained
        before = [p.grad for p in trained]
        for parameter in trained:
            parameter.grad = None
        with torch.random.fork_rng(), self.state.computing():
            if self.cached:  # most steps will read the tokens of images, so they count for nothing
                self._cache_tokens(batch)
            self.meter.count_flops(
                lambda: self.objective.trial(module, batch, self.accelerator.autocast), count.cost
            )
        for parameter, grad in zip(trained, before):
            parameter.grad = grad

    def _cache_tokens(self, batch) -> None:
        """Has the image tokens of a batch kept, just as the pass that follows asks for them."""
        with torch.no_grad(), self.accelerator.autocast():
            for group in batch.to(self.accelerator.device).groups:
                if not group.is_text:
                    self.state.module.tokenizer(group.pixels)

    def _sum_gradients(self) -> None:
        """Sums gradients over ranks. A gradient that is absent everywhere is zero, on one rank as
        on many."""
        trained, device = self.state.trained, self.accelerator.device
        if self.reached is None or not bool(self.reached.all()):
            flags = torch.tensor([p.grad is not None for p in trained], dtype=torch.float32)
            self.reached = self.accelerator.reduce(flags.to(device), "sum") > 0
        self.state.fill_absent_gradients()
        if self.state.sharded:
            sum_unsharded(trained)
        elif self.accelerator.num_processes > 1:
            _all_reduce(trained)

    def _sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over ranks, which all give the same names in the same order."""
        own = torch.tensor(
            list(values.values()), dtype=torch.float64, device=self.accelerator.device
        )
        return dict(zip(values, self.accelerator.reduce(own, "sum").tolist()))


def _all_reduce(parameters: list[nn.Parameter]) -> None:
    """Sums gradients over ranks in flat buckets, full with `BUCKET_ELEMENTS` or a bit more."""
    bucket: list[torch.Tensor] = []
    for number, parameter in enumerate(parameters):
        bucket.append(parameter.grad)
        full = sum(grad.numel() for grad in bucket) >= BUCKET_ELEMENTS
        if full or number + 1 == len(parameters):
            flat = torch.cat([grad.flatten() for grad in bucket])
            torch.distributed.all_reduce(flat)
            for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket])):
                grad.copy_(part.view_as(grad))
            bucket = []


def _scored(totals: Mapping[str, int]) -> dict[str, int]:
    """The totals as metrics.jsonl has them.

    >>> _scored({"tokens": 9}), _scored({"boxes": 2, "images": 1})
    ({'scored': 9}, {'scored boxes': 2, 'scored images': 1})
    """
    if len(totals) == 1:
        return {"scored": next(iter(totals.values()))}
    return {f"scored {name}": value for name, value in totals.items()}


def _require_finite(what: str, value: float, step: int, batches: list) -> None:
    if not math.isfinite(value):
        names = [name for batch in batches for name in batch.names]
        raise StageError(
            f"the {what} of step {step + 1} is {value}; the optimizer step was skipped. Its rows "
            f"here: {names[:32]}"
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
