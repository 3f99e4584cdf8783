"""What every run does alike from settings to result: set up, train, evaluate, save."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from vlm.data.check import check_start, say_on
from vlm.data.mixture import MixtureDataset
from vlm.data.sources.base import Source
from vlm.families.base import Model
from vlm.training.activation_checkpointing import checkpoint_activations, kept_parts
from vlm.training.base_settings import BaseSettings, deciding, recorded
from vlm.training.checkpoints.checkpoint import Progress
from vlm.training.fit import LoopConfig
from vlm.training.memory.preflight import require_memory
from vlm.training.objectives.base import Objective
from vlm.training.run_folder import CAPTIONS, Curves, Run
from vlm.training.runs.held_out import held_out_rows, usable_rows
from vlm.training.runs.launch import accelerator_for, processes, sharding_of, wait_for_main
from vlm.training.sharding import gathered, whole_on_first
from vlm.training.stages import Stage

SAID = {
    "no": "",
    "all": ", weights sharded over all",
    "node": ", weights sharded over each machine's",
}
PRECISION_REASON = "precision_reason"
"""Key of settings.json: why a run computes in its precision."""
MakeStage = Callable[[Any, nn.Module, int], Stage]
"""From the settings, the model's module and the examples of one forward pass to the stage."""
MakeObjective = Callable[[Any, Model, Stage], Objective]
"""From the settings, the model and its stage to what a step minimises."""


class HeldOut(NamedTuple):
    """Rows to evaluate on. skipped: how many more were asked for; cut: text tokens that do not fit
    the model."""

    rows: list[int]
    skipped: int
    cut: int


def precision_of(run: Path) -> str | None:
    """The precision that a run computes in, by its settings.json; None where it states none."""
    try:
        return json.loads((run / "settings.json").read_text()).get("precision")
    except (OSError, ValueError):
        return None


class TrainingRun:
    """One run of a recipe, on each of its processes.

    accelerator: this process among the others. main: whether it is the one that writes and speaks.
    share: its examples of a step. folder: what the run leaves. say: prints a text for people, as
    rich's `Console.print` does, on the main process alone.
    Raises RunError for a folder that cannot be used, ValueError for settings that the processes
    cannot follow.
    """

    def __init__(self, settings: BaseSettings, curves: Curves = CAPTIONS) -> None:
        self._started = time.monotonic()
        kept = precision_of(settings.out) if settings.resume else None
        if kept and settings.precision == "auto":
            settings = dataclasses.replace(settings, precision=kept)
        else:
            kept = None
        self.accelerator, self.share, choice = accelerator_for(settings)
        self.settings = settings = dataclasses.replace(settings, precision=choice.name)
        self.shard = sharding_of(settings, self.accelerator)
        self._gathered = ExitStack()
        self.main = self.accelerator.is_main_process
        self.say = say_on(self.main)
        reason = "as when the run began" if kept else choice.reason
        if choice.warning():
            self.say(choice.warning(), style="yellow", highlight=False, markup=False)
        self.folder = Run(
            settings.out,
            {"stage": None, PRECISION_REASON: reason, **recorded(settings)},
            deciding(settings),
            main=self.main,
            resume=settings.resume,
            curves=curves,
        )

    def stage(self, make: MakeStage, module: nn.Module) -> Stage:
        """The stage of the settings, and what it is called, said and noted down; the module keeps
        fewer activations where the settings say so, and raises as `checkpoint_activations` does."""
        stage = make(self.settings, module, self.settings.micro_batch or self.share)
        if self.settings.checkpoint_activations:
            checkpoint_activations(module, kept_parts(module, stage))
        self.folder.settings["stage"] = stage.name
        self.say(f"{stage.name}: {processes(self.accelerator, self.share)}{SAID[self.shard]}")
        if self.settings.shard != self.shard == "no":
            self.say(f"shard {self.settings.shard}: one process holds all there is")
        return stage

    def check(
        self,
        data: MixtureDataset,
        *evaluated: Source | None,
        reads_prompts: bool = True,
        reads_system: bool = True,
    ) -> None:
        """Looks at the first rows of all sources, and says and raises as `check_start` does."""
        reads = {"reads_prompts": reads_prompts, "reads_system": reads_system}
        check = partial(check_start, say=self.say, **reads)
        check(data.sources, self.settings.bad_rows)
        evaluated_on = [source for source in evaluated if source is not None]
        check(evaluated_on, None)  # `held_out` checks the rows that are evaluated

    def held_out(self, model: Any, source: Source | None) -> HeldOut:
        """The rows of a source that the settings evaluate, without those that cannot be, which are
        said; none of no source. Raises as `usable_rows` does."""
        if source is None:
            return HeldOut([], 0, 0)
        asked = held_out_rows(source, self.settings.held_out_rows)
        rows, cut = usable_rows(model, source, asked, self.settings.bad_rows, self.say)
        return HeldOut(rows, len(asked) - len(rows), cut)

    def preflight(
        self, model: Any, stage: Stage, data: MixtureDataset, objective: Objective
    ) -> None:
        """Raises ValueError, before anything is written, where a step does not fit in memory, as
        `require_memory` says it."""
        require_memory(
            model,
            stage,
            data,
            objective,
            self.settings,
            accelerator=self.accelerator,
            shard=self.shard,
            say=self.say,
        )

    def loop(self, token_cache: Path | None = None) -> LoopConfig:
        """How the settings say that `fit` carries the run out."""
        settings = self.settings
        return LoopConfig(
            precision=settings.precision,
            shard=self.shard,
            token_cache=token_cache,
            workers=settings.workers,
            eval_every=settings.eval_every,
            save_every=settings.save_every,
            keep=settings.keep,
            resume=settings.resume,
            change=settings.change,
        )

    def save(self, model: Any, *, merge: bool = True, evaluated: bool = True) -> None:
        """Saves the model, before anything that may fail; all processes wait for the main one,
        however long it takes.

        merge: whether LoRA is merged into the saved weights. evaluated: whether the model is called
            afterwards, by any process as it likes.
        """
        self._gathered.close()
        with whole_on_first(model.module):
            if self.main:
                model.save(self.settings.out / "model", merge=merge)
            wait_for_main(self.accelerator)
        if evaluated:
            self._gathered.enter_context(gathered(model.module))
            before = signal.signal(signal.SIGTERM, self._stop_evaluation)
            self._gathered.callback(signal.signal, signal.SIGTERM, before)

    def _stop_evaluation(self, *_: Any) -> None:
        """Ends the program where it is asked to stop after its last step: nothing is lost but the
        closing evaluation."""
        if self.main:
            print(
                f"stopped during the closing evaluation; the model is saved in "
                f"{self.settings.out / 'model'}, and --resume evaluates it",
                file=sys.stderr,
            )
        raise SystemExit(130)

    def end(
        self,
        progress: Progress,
        figures: dict[str, Any],
        more: dict[str, Any],
        show: Callable[[dict[str, Any]], None],
    ) -> dict[str, Any]:
        """The run's result, written, shown by the main process, and waited for by the others.

        figures: the closing evaluation's, for the metrics; none where nothing was evaluated. more:
        what else the result states. show: draws and says it.
        """
        result = vars(progress) | more | figures
        if figures:
            self.folder.log(progress.step, {"eval": figures, "final": True})
        if self.main:
            result["minutes"] = (time.monotonic() - self._started) / 60
            self.folder.write_result(result)
            self.folder.close()
            show(result)
        self._gathered.close()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return result

    def say_skipped(self, result: dict[str, Any], limit: str = "the context") -> None:
        """Says which rows the training skipped, and what it cut. limit: what cut texts had to
        fit."""
        lines = []
        if result["skipped"]:
            lines.append(f"{result['skipped']} rows skipped, such as:")
            lines += [f"  {line}" for line in result["examples_skipped"][:5]]
        if result["cut_tokens"]:
            lines.append(f"{result['cut_tokens']} text tokens cut to fit {limit}")
        if result["unscored"]:
            lines.append(
                f"rows with nothing to score: {result['unscored']}; no text to write, or a line "
                "too narrow for it"
            )
        self.say("\n".join(lines or ["no training row was skipped"]), highlight=False, markup=False)
