"""A training stage as a value: what is trained at which rate, for how long, on what schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from vlm.compat.torch import BatchNormBase
from vlm.weights import cast_parameters

FROZEN = None
"""The rate of parameters that are not trained."""


class StageError(ValueError):
    """A stage that does not fit its model; the message names parameters or patterns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of training.

    name: for folders and messages.
    rates: (pattern, peak learning rate or FROZEN) pairs. A pattern is a shell wildcard over
        parameter names ("adaptor.*"); the first that matches decides.
    steps: optimizer steps. batch: examples of a step, over all micro-batches and ranks.
    micro_batch: examples of one forward pass on one rank.
    warmup_steps: steps of linear rise. min_lr_ratio: the last rate as a share of the peak (cosine
        decay to it; 1 keeps the rate constant).
    weight_decay: on matrices only. clip: largest gradient norm, over all trainable parameters.
    """

    name: str
    rates: tuple[tuple[str, float | None], ...]
    steps: int
    batch: int
    micro_batch: int
    warmup_steps: int
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "micro_batch"):
            if getattr(self, field) < 1:
                raise StageError(f"{field} must be at least 1, found {getattr(self, field)}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise StageError(
                f"warmup_steps must be in 0 to steps={self.steps}, found {self.warmup_steps}"
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise StageError(f"min_lr_ratio must be in 0 to 1, found {self.min_lr_ratio}")
        if not 0 <= self.weight_decay < math.inf:
            raise StageError(f"weight_decay must be at least 0, found {self.weight_decay}")
        if not self.clip > 0:
            raise StageError(f"clip must be above 0 (inf clips nothing), found {self.clip}")
        for pattern, rate in self.rates:
            if rate is not FROZEN and not 0 < rate < math.inf:  # NaN is neither
                raise StageError(f"rate of {pattern!r} must be positive or FROZEN, found {rate}")

    def factor(self, step: int) -> float:
        """The share of the peak rate that step `step` (from 0) uses.

        >>> schedule = {"steps": 11, "warmup_steps": 2, "min_lr_ratio": 0.0}
        >>> stage = Stage(name="s", rates=(), batch=1, micro_batch=1, **schedule)
        >>> [round(stage.factor(step), 2) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 0.98, 0.5, 0.02]
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step + 1 - self.warmup_steps) / (self.steps - self.warmup_steps + 1)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (
            1 + math.cos(math.pi * progress)
        )


def assign_rates(
    module: nn.Module, rates: tuple[tuple[str, float | None], ...]
) -> dict[str, tuple[str, float | None]]:
    """The (pattern, rate) that decides over each parameter, by name.

    Raises StageError listing all parameters that no pattern matches and all patterns that match
    no parameter.
    """
    names = [name for name, _ in module.named_parameters()]
    chosen = {}
    for name in names:
        for pattern, rate in rates:
            if fnmatchcase(name, pattern):
                chosen[name] = (pattern, rate)
                break
    orphans = [name for name in names if name not in chosen]
    idle = [p for p, _ in rates if not any(fnmatchcase(name, p) for name in names)]
    if orphans or idle:
        raise StageError(
            f"parameters matched by no pattern ({len(orphans)}): {orphans[:20]}; "
            f"patterns matching no parameter: {idle}; "
            f"the model's parts are {sorted({name.split('.')[0] for name in names})}"
        )
    return chosen


def prepare(module: nn.Module, stage: Stage, compute_dtype: torch.dtype) -> None:
    """Makes the stage true of a module, in place: `choose_trained`, then `hold_in`."""
    choose_trained(module, stage)
    hold_in(module, compute_dtype)


def choose_trained(module: nn.Module, stage: Stage) -> None:
    """Frozen parameters get no gradient; parts with trainable parameters are in training mode, all
    others and every batch norm in evaluation mode. Dtypes stay.

    Raises StageError where nothing is trained.
    """
    chosen = assign_rates(module, stage.rates)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(chosen[name][1] is not FROZEN)
    if not any(p.requires_grad for p in module.parameters()):
        raise StageError(f"stage {stage.name!r} trains no parameter")
    for part in module.children():
        part.train(any(p.requires_grad for p in part.parameters()))
    for m in module.modules():
        if isinstance(m, BatchNormBase):
            m.eval()


def hold_in(module: nn.Module, compute_dtype: torch.dtype) -> None:
    """Trainable parameters become fp32 masters, frozen ones get `compute_dtype`, in place."""
    cast_parameters(module, torch.float32, lambda parameter: parameter.requires_grad)
    cast_parameters(module, compute_dtype, lambda parameter: not parameter.requires_grad)


def optimizer_for(module: nn.Module, stage: Stage) -> torch.optim.AdamW:
    """Fused AdamW with one group for each pattern and decay; a group names its pattern and peak.

    Weight decay falls on matrices only, not on biases, norms or single vectors.
    """
    chosen = assign_rates(module, stage.rates)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = (chosen[name][0], parameter.dim() > 1)
            groups.setdefault(key, []).append(parameter)
    peaks = dict(stage.rates)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "pattern": pattern,
                "peak": peaks[pattern],
                "lr": peaks[pattern],
                "weight_decay": stage.weight_decay if decays else 0.0,
            }
            for (pattern, decays), parameters in groups.items()
        ],
        betas=stage.betas,
        fused=True,
    )


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's rate to `factor` times its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def describe(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, ...]]:
    """The start-up table: for each part, and each parameter beside the parts, its name, parameters,
    trainable ones, learning rates and dtypes, read from the live module and optimizer."""
    rates = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    rows = []
    parts = [(name, list(part.parameters())) for name, part in module.named_children()]
    parts += [(name, [p]) for name, p in module.named_parameters(recurse=False)]
    for name, parameters in parts:
        if not parameters:
            continue
        trainable = [p for p in parameters if p.requires_grad]
        found = sorted({rates[id(p)] for p in trainable})
        rows.append(
            (
                name,
                f"{sum(p.numel() for p in parameters):,}",
                f"{sum(p.numel() for p in trainable):,}",
                ", ".join(f"{rate:g}" for rate in found) or "frozen",
                ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
            )
        )
    return rows
