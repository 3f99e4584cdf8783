"""The training loop: one step is one batch, however it is split over micro-batches and ranks.

What a step minimises is its objective's: next tokens, their sum divided by the number of scored
ones over all micro-batches and ranks, counted before the first backward pass; or a contrast.
Gradients are summed over ranks once a step, absent ones as zeros, so that a rank whose examples
hold no image still takes part.
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

import torch
from accelerate import Accelerator
from tqdm import tqdm

from vlm.data.mixture import MixtureDataset, StepSampler
from vlm.families.decoder_only.batch import Row
from vlm.kernels.norm_mlp import lean, lean_ways
from vlm.precision import DTYPES
from vlm.training.checkpoints.checkpoint import KEEP, Checkpoints, Progress
from vlm.training.checkpoints.run_identity import decided_by
from vlm.training.loading.loader import MicroBatch, batches_of, micro_batch_loader
from vlm.training.loading.token_cache import cached_tokens
from vlm.training.master_weights import WorkingWeights
from vlm.training.meter import Meter, device_use, peak_flops
from vlm.training.objectives.base import Objective
from vlm.training.objectives.next_token import NextToken
from vlm.training.run_folder import Run
from vlm.training.sharding import (
    Shard,
    allow_unused,
    gathered,
    mesh_for,
    shard_module,
)
from vlm.training.stages import (
    Stage,
    choose_trained,
    describe,
    optimizer_for,
    prepare,
)
from vlm.training.step import Step, audit_gradients


class Interrupted(Exception):
    """The run was asked to stop; its state is saved. `step` is the last step done."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"stopped after step {step}, saved in {folder}; go on with --resume")
        self.step = step


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How a run is carried out; nothing here changes what is learned.

    workers: processes that read and decode, on each rank; 0 reads in the loop itself.
    eval_every, save_every: in steps; 0 is never between (a checkpoint is saved at the end anyway).
    keep: how many checkpoints are kept, the newest.
    """

    workers: int = 1
    eval_every: int = 0
    save_every: int = 50
    keep: int = KEEP

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
    *,
    objective: Objective | None = None,
    precision: str = "fp32",
    shard: Shard = "no",
    token_cache: Path | None = None,
    balance: Callable[[Row], int] | None = None,
    pace: Pace | None = None,
    resume: bool = False,
    change: Sequence[str] = (),
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> Progress:
    """Trains `model` in place by `stage`; what it logs and saves lies in `run`.

    model: what `vlm.load` gives: its `module` learns, its `processor` reads the rows.
    objective: what is minimised; None is the cross-entropy of the scored tokens.
    precision: "bf16" (fp32 masters of what is trained, bf16 for all else) or "fp32".
    shard: over which processes weights are parted, see `vlm.training.sharding`; the module stays
        so when the run is over.
    token_cache: where tokens of a frozen image tokenizer are kept, see
        `vlm.training.loading.token_cache`; not with sharding.
    balance: what a row costs, by which those of a step are dealt out, see
        `vlm.training.loading.balance`; None deals them out by number.
    resume: go on from the newest whole checkpoint. change: names of settings that may differ from
        the checkpoint's, see `vlm.training.checkpoints.run_identity.differences`.
    evaluate: figures to log between steps, called on every rank; the end is the caller's.
    Raises StageError, BadRow, BadImage naming what does not fit; Interrupted after SIGINT or
    SIGTERM, when all is saved; OSError before the first step where the disk has too little room;
    CheckpointError, within a step or two, where a checkpoint could not be written.
    """
    pace = pace or Pace()
    if change and not resume:
        raise ValueError(f"change {list(change)} goes with resume, found a new run")
    if token_cache is not None and shard != "no":
        raise ValueError(
            f"token_cache {token_cache}: sharded processes compute tokens together, so that none "
            "may read them instead; leave it out, or --shard"
        )
    if precision not in DTYPES:
        raise ValueError(f"precision is one of {', '.join(DTYPES)}, found {precision!r}")
    objective = objective or NextToken(model.processor.pad_id)
    module, device = model.module, accelerator.device
    ways = lean_ways(module)  # before it is sharded, when it can be tried
    if shard == "no":
        module.to(device)
        prepare(module, stage, DTYPES[precision])
    else:
        choose_trained(module, stage)
        shard_module(module, mesh_for(shard, device), DTYPES[precision], device)
    optimizer = optimizer_for(module, stage)
    run.table(describe(module, optimizer), precision)
    main = accelerator.is_main_process
    decided = decided_by(run.deciding, stage, data) if main else {}
    checkpoints = Checkpoints(
        run.checkpoints, module, optimizer, decided, keep=pace.keep, say=run.say
    )
    progress = checkpoints.restore(change) if resume else Progress()
    saves = len([s for s in range(progress.step, stage.steps) if pace.saves(s, stage.steps)])
    checkpoints.need_room(saves)
    run.open(progress.step)
    sampler = StepSampler(
        batch=stage.batch,
        micro_batch=stage.micro_batch,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        start_step=progress.step,
        steps=stage.steps,
    )
    loader = micro_batch_loader(data, model.processor, sampler, objective, pace.workers, balance)
    meter = Meter(peak_flops(device, DTYPES[precision]), accelerator.num_processes)
    working = WorkingWeights(module, DTYPES[precision if shard == "no" else "fp32"])
    step_of = Step(module, stage, objective, optimizer, accelerator, meter, working)
    bar = tqdm(
        total=stage.steps,
        initial=progress.step,
        desc=stage.name,
        unit="step",
        disable=not main,
        dynamic_ncols=True,
    )
    due = evaluate and pace.evaluates(progress.step, stage.steps)
    if due and checkpoints.all.first(lambda: not run.evaluated(progress.step)):
        with gathered(module):
            run.log(progress.step, {"eval": evaluate()})  # a kill came between it and its step
    audited = False
    keeping = cached_tokens(module.tokenizer, token_cache) if token_cache else nullcontext()
    step_of.keeping = token_cache is not None
    with (
        keeping,
        lean(module, ways),
        bar,
        _stop_requests() as requests,
        checkpoints,
        batches_of(loader) as micro_batches,
    ):
        for step in range(progress.step, stage.steps):
            torch.manual_seed(_step_seed(data.mixture.seed, step, accelerator.process_index))
            waiting = time.perf_counter()
            micros = [next(micro_batches) for _ in range(sampler.micro_batches_per_step)]
            waited = time.perf_counter() - waiting
            figures = step_of(step, micros, waited, bool(requests), checkpoints.failed)
            _account(progress, micros, figures.pop("left_out"), accelerator)
            progress.step, progress.samples = step + 1, progress.samples + stage.batch
            if figures.pop("images") and not audited:
                audit_gradients(module, step_of.reached)
                allow_unused(module)
                audited = True
            stop, unsaved = figures.pop("stop"), figures.pop("unsaved")
            run.log(step + 1, {**figures, "batch": _digest(data, step, stage.batch)})
            bar.update()
            bar.set_postfix_str(
                f"loss {figures['loss']:.3f}, {figures['samples_per_s']:.1f} samples/s, "
                f"{figures['tokens_per_s']:.0f} tok/s, {device_use(figures)}"
            )
            if unsaved:
                checkpoints.wait()  # which says on every rank what went wrong on one
            if stop or pace.saves(step, stage.steps):
                checkpoints.save(progress)
            if stop and step + 1 < stage.steps:
                checkpoints.wait()
                raise Interrupted(step + 1, run.checkpoints)
            if evaluate and pace.evaluates(step + 1, stage.steps):
                with gathered(module):
                    run.log(step + 1, {"eval": evaluate()})
                step_of.meter.read()  # evaluation is no training time
    return progress


def _account(
    progress: Progress, micros: list[MicroBatch], left_out: int, accelerator: Accelerator
) -> None:
    """Adds what was left out, on any rank, to the run's progress. left_out: how much there is, on
    all ranks; where there is none, nothing is exchanged."""
    if not left_out:
        return
    skipped = [item for micro in micros for item in micro.skipped]
    cut = sum(micro.cut for micro in micros)
    unscored = sum(micro.unscored for micro in micros)
    found = [([(item.name, item.reason) for item in skipped], cut, unscored)]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    for items, cut_tokens, without in found:
        progress.cut_tokens += cut_tokens
        progress.unscored += without
        for name, reason in items:
            progress.skipped += 1
            if len(progress.examples_skipped) < 20:
                progress.examples_skipped.append(f"{name}: {reason}")


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
