"""`vlm plan`: what a recipe's run takes of a machine, before it is rented."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vlm.config import require_least

if TYPE_CHECKING:
    from vlm.training.memory.estimate import Estimate
    from vlm.training.memory.plan import Machine, Plan


@dataclass(frozen=True, kw_only=True)
class MakePlan:
    """Say what a recipe's run takes of a machine: memory by part, the largest micro-batch, time.

    Nothing is trained: steps are simulated with fake tensors, by the run's own code. The
    model is built as the recipe builds it. All other options are the recipe's own settings, such
    as --shard all.
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    """A recipe's file, such as recipes/stage1_adaptor.py."""
    machine: str
    """[[NODESx]DEVICESx]NAME[-MEMORYG]: 8xH100-80G, 4x8xH200, A100-40G, 4090, cpu-16G."""
    mfu: float = 0.4
    """Share of the machine's peak that training reaches."""
    price: float | None = None
    """Of one device for an hour, in any currency."""
    reserve: float = 0.08
    """Share of memory that is left free, for what no simulated step sees."""
    rows: int = 16
    """How many of the run's rows are looked at, drawn from all of its steps."""
    tokens: int | None = None
    """Text tokens of each row, instead of its own text."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self, rest: list[str]) -> None:
        from dataclasses import replace

        from vlm.data.mixture import split_of
        from vlm.training.memory.plan import machine_of, make_plan, require_shares
        from vlm.training.memory.preflight import asked, remedies
        from vlm.training.runs.launch import STATED, read_settings, recipe_in

        require_least(self, rows=1, tokens=1)
        require_shares(self.mfu, self.reserve, self.price)
        _require_new_shard(rest)
        machine = machine_of(self.machine)
        recipe = recipe_in(self.recipe, STATED)
        settings = read_settings(recipe.Settings, rest, recipe.__doc__, f"vlm plan {self.recipe}")
        split_of(settings.batch, settings.micro_batch, machine.ranks)
        settings = replace(settings, precision=_precision(machine, settings.precision))
        estimate, name = self._estimate(recipe, settings, machine)
        peak, source = _peak(machine, settings.precision)
        plan = make_plan(
            estimate,
            machine,
            batch=settings.batch,
            steps=settings.steps,
            micro_batch=settings.micro_batch,
            peak_flops=peak,
            mfu=self.mfu,
            price=self.price,
            reserve=self.reserve,
        )
        if self.json:
            print(json.dumps(plan.values() | {"peak": source}, indent=2))
        else:
            self._show(plan, machine, settings, name, source)
        if not plan.fits:
            helps = remedies(settings, estimate.simulated.module, settings.shard != "no")
            raise ValueError(plan.refusal(asked(settings, plan.micro_batch), helps))

    def _estimate(self, recipe: Any, settings: Any, machine: Machine) -> tuple[Estimate, str]:
        """The estimate of a recipe's steps, and the name of its stage."""
        from vlm.precision import DTYPES
        from vlm.training.activation_checkpointing import checkpoint_activations, kept_parts
        from vlm.training.memory.estimate import Estimate, rows_of_run
        from vlm.training.memory.simulate import SimulatedStep

        data = settings.data()
        model = settings.build()
        rows = rows_of_run(data, model.processor, settings.steps * settings.batch, self.rows)
        if self.tokens is not None:
            rows = [row.with_text(self.tokens) for row in rows]
        module = model.module
        stage = recipe.stage(settings, module, settings.micro_batch or 1)
        if settings.checkpoint_activations:
            checkpoint_activations(module, kept_parts(module, stage))
        objective = recipe.objective(settings, model, stage)
        gpu = machine.tflops is not None
        simulated = SimulatedStep(module, stage, objective, DTYPES[settings.precision], gpu)
        group = {"no": 1, "all": machine.ranks, "node": machine.devices}[settings.shard]
        return Estimate(simulated, rows, machine.ranks, group), stage.name

    def _show(self, plan: Plan, machine: Machine, settings: Any, name: str, peak: str) -> None:
        from rich.table import Table

        from vlm.console import plain_console
        from vlm.training.memory.preflight import GIB, MOST

        unit, size = ("GiB", GIB) if plan.held.total >= GIB else ("MiB", GIB / 1024)

        console = plain_console(soft_wrap=True)
        spread = f"{plan.ranks} x {machine.name}, {machine.gib:g} GiB each"
        if plan.ranks > 1:
            spread += ", all alike" if plan.shard_group == 1 else f", sharded by {plan.shard_group}"
        console.print(f"{name}: {spread}", style="bold")
        table = Table("on each device, at the fullest moment of a step", unit)
        table.columns[1].justify = "right"
        for part, held in plan.held._asdict().items():
            table.add_row(part, f"{held / size:,.2f}")
        table.add_row("together", f"{plan.held.total / size:,.2f}", style="bold", end_section=True)
        table.add_row(f"memory, {self.reserve:.0%} left free", f"{plan.budget / size:,.2f}")
        console.print(table)
        if plan.gathered:
            console.print(
                f"of the weights {plan.gathered / size:,.2f} {unit} are whole blocks at work"
            )
        devices = f"{plan.ranks} devices x " if plan.ranks > 1 else ""
        passes = f" x {plan.accumulation} passes" if plan.accumulation > 1 else ""
        more = " or more" if plan.largest == MOST else ""
        console.print(
            f"a batch of {settings.batch} is {devices}a micro-batch of {plan.micro_batch}{passes}; "
            f"the largest micro-batch that fits is {plan.largest}{more}"
        )
        if plan.step_s is None:
            console.print(f"{plan.step_flops:.3g} operations a step; no time: {peak}")
            return
        cost = "" if plan.cost is None else f", {plan.cost:,.2f} at {self.price:g} an hour each"
        tokens = "" if plan.tokens_per_s is None else f", {plan.tokens_per_s:,.0f} tokens/s"
        console.print(
            f"a step takes {_duration(plan.step_s)} at an MFU of {self.mfu:.0%} of {peak}: "
            f"{plan.step_flops:.3g} operations, {settings.batch / plan.step_s:,.1f} samples/s"
            f"{tokens}"
        )
        console.print(
            f"{settings.steps:,} steps take {_duration(plan.hours * 3600)}, "
            f"{plan.hours * plan.ranks:,.2f} device hours{cost}"
        )
        console.print(
            f"memory by the heaviest and time by all of some {self.rows} rows of the run; reading "
            "data, evaluations and checkpoints not counted",
            style="dim",
        )


def _require_new_shard(arguments: Sequence[str]) -> None:
    """Raises ValueError for --shard without a value and for --hybrid, as earlier versions had them,
    naming the options of today."""
    for word, value in zip(arguments, [*arguments[1:], "--"]):
        if word in ("--hybrid", "--no-hybrid"):
            raise ValueError(f"{word}: this option is now --shard node")
        if word == "--no-shard" or (word == "--shard" and value.startswith("--")):
            raise ValueError(f"{word}: expected --shard no, all or node, as the recipe takes it")


def _precision(machine: Machine, asked: str) -> str:
    """What a run computes in on the machine: of GPUs whose peak is known bf16, else as here."""
    from vlm.precision import choose

    if asked != "auto":
        return asked
    return choose("auto", "cpu").name if machine.tflops is None else "bf16"


def _peak(machine: Machine, precision: str) -> tuple[float | None, str]:
    """Operations a second of one device, and where the figure comes from."""
    from vlm.precision import DTYPES, gflops

    if machine.tflops is None:
        peak = gflops("cpu", DTYPES[precision])
        return peak * 1e9, f"{peak:,.0f} GFLOP/s ({precision} products measured on this machine)"
    if precision != "bf16":
        return None, f"{machine.name}'s data sheet is known for bf16, found {precision}"
    return machine.tflops * 1e12, f"{machine.tflops:g} TFLOP/s ({machine.name} data sheet)"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} minutes"
    return f"{seconds / 3600:,.1f} hours"
