"""The training loop: one step is one batch, however it is split over micro-batches and ranks.

What a step minimises is its objective's, such as the cross-entropy of the scored tokens: their sum
over the number of them, a total over all micro-batches and ranks that is known before the first
forward pass. Gradients are summed over ranks once a step, absent ones as zeros, so that a rank
whose examples hold no image still takes part.
Position in the data is the step number alone, so that resuming is exact.
"""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from vlm.data.mixture import MixtureDataset, StepSampler
from vlm.precision import DTYPES
from vlm.training.checkpoints.checkpoint import KEEP, Checkpoints, Progress
from vlm.training.checkpoints.run_identity import run_identity
from vlm.training.loading.loader import MicroBatch, batches_of, micro_batch_loader
from vlm.training.loading.token_cache import cached_tokens
from vlm.training.meter import Meter, device_use, peak_flops
from vlm.training.objectives.base import Objective
from vlm.training.run_folder import Run
from vlm.training.sharding import Shard, gathered
from vlm.training.stages import Stage, describe
from vlm.training.state import build_state
from vlm.training.step import Step


class Interrupted(Exception):
    """The run was asked to stop; its state is saved. `step` is the last step done."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"stopped after step {step}, saved in {folder}; go on with --resume")
        self.step = step


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How a run is carried out; what is learned stays the same, up to the rounding of `precision`.

    precision: "bf16" (fp32 masters of what is trained, bf16 for all else) or "fp32".
    shard: over which processes weights are sharded, see `vlm.training.sharding`.
    token_cache: folder for the tokens of a frozen image tokenizer, see
        `vlm.training.loading.token_cache`; not with sharding. None keeps none.
    workers: processes that read and decode, on each rank; 0 reads in the loop itself.
    eval_every, save_every: in steps; 0 is never between (a checkpoint is saved at the end anyway).
    keep: how many checkpoints are kept, the newest.
    resume: go on from the newest whole checkpoint. change: names of settings that may differ from
        the checkpoint's, see `vlm.training.checkpoints.run_identity.differences`.
    Raises ValueError where two of these do not go together.
    """

    precision: str = "fp32"
    shard: Shard = "no"
    token_cache: Path | None = None
    workers: int = 1
    eval_every: int = 0
    save_every: int = 50
    keep: int = KEEP
    resume: bool = False
    change: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.change and not self.resume:
            raise ValueError(f"change {list(self.change)} goes with resume, found a new run")
        if self.token_cache is not None and self.shard != "no":
            raise ValueError(
                f"token_cache {self.token_cache}: sharded processes compute tokens together, so "
                "that none may read them instead; leave it out, or --shard"
            )
        if self.precision not in DTYPES:
            raise ValueError(f"precision is one of {', '.join(DTYPES)}, found {self.precision!r}")

    def saves(self, step: int, steps: int) -> bool:
        """Whether a checkpoint is saved after step `step` (from 0) of `steps`."""
        done = step + 1
        return done == steps or bool(self.save_every and done % self.save_every == 0)

    def evaluates(self, done: int, steps: int) -> bool:
        """Whether there is an evaluation between steps, after `done` of `steps` steps."""
        return bool(self.eval_every and 0 < done < steps and done % self.eval_every == 0)


def fit(
    model,
    stage: Stage,
    data: MixtureDataset,
    run: Run,
    accelerator: Accelerator,
    objective: Objective,
    loop: LoopConfig,
    *,
    balance: Callable[[Any], int] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> Progress:
    """Trains `model` in place by `stage`; what it logs and saves lies in `run`.

    model: what `vlm.load` gives: its `module` learns, its `processor` reads the rows. A sharded
        module stays so when the run is over.
    balance: the cost of a row, by which those of a step are dealt out, see
        `vlm.training.loading.balance`; None deals them out by number.
    evaluate: figures to log between steps, called on every rank; the end is the caller's.
    Raises StageError, BadRow, BadImage naming what does not fit; Interrupted after SIGINT or
    SIGTERM, when all is saved; OSError before the first step where the disk has too little space;
    CheckpointError, within a step or two, where a checkpoint could not be written.
    """
    module, device, dtype = model.module, accelerator.device, DTYPES[loop.precision]
    state = build_state(module, stage, dtype, device=device, shard=loop.shard)
    run.table(describe(module, state.optimizer), loop.precision)
    identity = run_identity(run.deciding, stage, data) if accelerator.is_main_process else {}
    checkpoints = Checkpoints(
        run.checkpoints, module, state.optimizer, identity, keep=loop.keep, say=run.say
    )
    progress = checkpoints.restore(loop.change) if loop.resume else Progress()
    steps = range(progress.step, stage.steps)
    checkpoints.require_disk_space(sum(loop.saves(step, stage.steps) for step in steps))
    run.open(progress.step)
    sampler = StepSampler(
        batch=stage.batch,
        micro_batch=stage.micro_batch,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        start_step=progress.step,
        steps=stage.steps,
    )
    loader = micro_batch_loader(data, model.processor, sampler, objective, loop.workers, balance)
    meter = Meter(peak_flops(device, dtype), accelerator.num_processes)
    caches = loop.token_cache is not None
    step = Step(state, objective, accelerator, meter, caches)
    due = evaluate and loop.evaluates(progress.step, stage.steps)
    if due and checkpoints.all.first(lambda: not run.evaluated(progress.step)):
        _log_evaluation(run, progress, module, evaluate)  # a kill came between it and its step
    with (
        cached_tokens(module.tokenizer, loop.token_cache) if caches else nullcontext(),
        _progress_bar(stage, progress, accelerator) as bar,
        _stop_requests() as requests,
        checkpoints,
        batches_of(loader) as micro_batches,
    ):
        for number in steps:
            torch.manual_seed(_step_seed(data.mixture.seed, number, accelerator.process_index))
            waiting = time.perf_counter()
            micros = [next(micro_batches) for _ in range(sampler.micro_batches_per_step)]
            waited = time.perf_counter() - waiting
            done = step(number, micros, waited, bool(requests), checkpoints.failed)
            _account(progress, stage, micros, done.skipped, accelerator)
            run.log(progress.step, {**done.metrics, "batch": _digest(data, number, stage.batch)})
            _show(bar, done.metrics)
            if done.unsaved:
                checkpoints.wait()  # which says on every rank what went wrong on one
            if done.stop or loop.saves(number, stage.steps):
                checkpoints.save(progress)
            if done.stop and progress.step < stage.steps:
                checkpoints.wait()
                run.close()
                raise Interrupted(progress.step, run.checkpoints)
            if evaluate and loop.evaluates(progress.step, stage.steps):
                _log_evaluation(run, progress, module, evaluate)
                meter.read()  # evaluation is no training time
    return progress


def _log_evaluation(run: Run, progress: Progress, module, evaluate) -> None:
    with gathered(module):
        run.log(progress.step, {"eval": evaluate()})


def _progress_bar(stage: Stage, progress: Progress, accelerator: Accelerator) -> tqdm:
    return tqdm(
        total=stage.steps,
        initial=progress.step,
        desc=stage.name,
        unit="step",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )


def _show(bar: tqdm, metrics: dict[str, float]) -> None:
    bar.update()
    speed = f"{metrics['samples_per_s']:.1f} samples/s"
    if "tokens_per_s" in metrics:
        speed += f", {metrics['tokens_per_s']:.0f} tok/s"
    bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed}, {device_use(metrics)}")


def _account(
    progress: Progress,
    stage: Stage,
    micros: list[MicroBatch],
    skipped: int,
    accelerator: Accelerator,
) -> None:
    """Takes a step into the run's progress, and with it what was skipped on any rank. skipped: how
    much there is, on all ranks; where there is none, nothing is exchanged."""
    progress.step += 1
    progress.samples += stage.batch
    if not skipped:
        return
    items = [(item.name, item.reason) for micro in micros for item in micro.skipped]
    cut = sum(micro.cut for micro in micros)
    unscored = sum(micro.unscored for micro in micros)
    found = [(items, cut, unscored)]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    for items, cut, unscored in found:
        progress.cut_tokens += cut
        progress.unscored += unscored
        progress.skipped += len(items)
        named = [f"{name}: {reason}" for name, reason in items]
        progress.examples_skipped += named[: max(0, 20 - len(progress.examples_skipped))]


def _digest(data: MixtureDataset, step: int, batch: int) -> str:
    """A short hash of the names of the rows in a step, whatever its split."""
    names = []
    for number in range(step * batch, (step + 1) * batch):
        draw = data.mixture[number]
        names.append(f"{draw.source} {data.sources[draw.source].row_name(draw.row)}")
    return hashlib.sha1("\n".join(names).encode()).hexdigest()[:12]


def _step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's random numbers (dropout), the same whenever the run was resumed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7], "big")


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that fills when the process is asked to stop; the second request stops at once."""
    requests: list[int] = []

    def note(number: int, _) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, note) for kind in kinds]
    try:
        yield requests
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)
