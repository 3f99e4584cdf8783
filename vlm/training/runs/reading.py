"""A run that teaches reading: what it can be told, and its way from settings to result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from vlm.data.mixture import Mixture, MixtureDataset, check_weights
from vlm.data.sources.base import Source
from vlm.draw import draw_lines
from vlm.families.text_reader import TextReader
from vlm.pixels import open_image
from vlm.training.base_settings import BaseSettings, require_share
from vlm.training.fit import fit
from vlm.training.run_folder import Curves
from vlm.training.runs.run import MakeObjective, MakeStage, TrainingRun

if TYPE_CHECKING:
    from vlm.metrics.text import Comparison

ENDLESS = 1_000_000_000
WORST = 24
"""Lines on the page of the worst."""
ERRORS = Curves(
    "nats per character",
    "held-out lines",
    "error rate",
    "lines",
    (("cer", "#1f4e8c", "characters"), ("wer", "#b5532a", "words")),
)
NEW = "new"


@dataclass(frozen=True, kw_only=True)
class ReadingSettings(BaseSettings):
    """Settings of any run that teaches reading. A subclass says what is built.

    reads_prompts: whether what is built reads what stands before a text; none reads a system
    message.
    """

    reads_prompts: ClassVar[bool] = True

    alphabet: str = "english"
    """Characters that are read: english, latin, cyrillic, greek, or a text file that holds them."""
    lines_text: str = "english"
    """What drawn lines say: english (Python's documentation), a text file in the language, or the
    name that the package faker has for it, such as ru_RU or el_GR."""
    fonts: str = "any"
    """Fonts of drawn lines: any, train, system, families of fontpkg, folders or files, separated by
    commas. Those that lack characters of the alphabet are skipped."""
    train: tuple[str, ...] = ()
    """Training data, any number of: lines:COUNT:KEY=VALUE, PATH.tsv, FOLDER, PATH-{0000..0009}.tar,
    PATH.jsonl. None: drawn lines in the language, endlessly many."""
    held_out: str = ""
    """Lines to evaluate on. None: drawn lines in the language that training never draws."""
    weight_decay: float = 0.02
    min_lr_ratio: float = 0.02
    batch: int = 64
    eval_every: int = 500
    save_every: int = 500

    def characters(self) -> str:
        """The characters that are read.

        Raises ValueError for an alphabet that is neither a name nor a file.
        """
        from vlm.data.synthetic.lines import characters_of  # of the extra ocr

        return characters_of(self.alphabet)

    def drawn(self, count: int, seed: int, split: str) -> str:
        """The source of drawn lines in the settings' language."""
        return (
            f"lines:{count}:seed={seed}:fonts={self.fonts}:alphabet={self.alphabet}"
            f":text={self.lines_text}:split={split}"
        )

    def data(self) -> MixtureDataset:
        require_share("warmup_ratio", self.warmup_ratio)
        if self.augment != "none":
            raise ValueError(
                f"augment {self.augment!r}: expected none, as windows would cut characters off a "
                "line; drawn lines are worn already"
            )
        specs = self.train or (self.drawn(ENDLESS, self.seed + 1, "train"),)
        sources = [self.open(spec) for spec in specs]
        if self.weights is not None:
            check_weights(self.weights, [source.name for source in sources])
        mixture = Mixture(sources, self.weights, self.seed)
        return MixtureDataset(sources, mixture, self.bad_rows)

    def held_out_source(self) -> Source:
        """What is evaluated on."""
        return self.open(self.held_out or self.drawn(self.held_out_rows, 0, "validation"))


def run(
    settings: ReadingSettings,
    make_stage: MakeStage,
    make_objective: MakeObjective,
) -> dict[str, Any]:
    """One run from settings to result: trains, evaluates on held-out lines, saves."""
    import vlm.metrics.text  # noqa: F401 - of the extra ocr: missed here, not after training

    training_run = TrainingRun(settings, ERRORS)
    accelerator = training_run.accelerator
    data = settings.data()
    held_out = settings.held_out_source() if settings.held_out_rows else None
    reads_prompts = settings.reads_prompts
    training_run.check(data, held_out, reads_prompts=reads_prompts, reads_system=False)
    with accelerator.main_process_first():
        model = settings.build()
    plan = training_run.stage(make_stage, model.module)
    rows, skipped, _ = training_run.held_out(model, held_out)
    quarter = rows[::4]

    def evaluate() -> dict[str, float]:
        return metrics_of(errors_on(model, held_out, quarter, accelerator))

    objective = make_objective(settings, model, plan)
    training_run.preflight(model, plan, data, objective)
    progress = fit(
        model,
        plan,
        data,
        training_run.folder,
        accelerator,
        objective,
        training_run.loop(),
        evaluate=evaluate if rows else None,
    )
    training_run.save(model, evaluated=bool(rows))
    more: dict[str, Any] = {}
    if rows:
        examples = [held_out[row] for row in rows]
        with accelerator.autocast():
            temperatures = model.fit_temperatures(
                [open_image(example.images[0]) for example in examples],
                [example.answer for example in examples],
            )
        more["temperatures"] = dataclasses.asdict(temperatures)
        training_run.save(model)
    found = errors_on(model, held_out, rows, accelerator) if rows else None
    if found:
        more |= {"held_out": held_out.name, "held_out_skipped": skipped}

    def show(result: dict[str, Any]) -> None:
        if found:
            _draw_worst(found, held_out, rows, settings.out / "worst_lines.png")
        _report(training_run, result, found)

    return training_run.end(progress, metrics_of(found) if found else {}, more, show)


def metrics_of(compared: Comparison) -> dict[str, Any]:
    """What a run's result says of read lines; `lines` is how many they are."""
    metrics = compared.result().metrics()
    return {"lines": metrics.pop("n"), **metrics}


def errors_on(
    model: TextReader, source: Source, rows: Sequence[int], accelerator: Accelerator
) -> Comparison:
    """What the model reads of rows, beside what stands there; the same on any number of ranks."""
    from vlm.metrics.text import compare_texts

    rank, ranks = accelerator.process_index, accelerator.num_processes
    examples = [source[row] for row in rows[rank::ranks]]
    with accelerator.autocast():
        read = model.read_lines([open_image(example.images[0]) for example in examples])
    mine = [(e.answer, transcript.text) for e, transcript in zip(examples, read)]
    by_rank = gather_object([mine]) if ranks > 1 else [mine]
    pairs: list[tuple[str, str]] = [("", "")] * len(rows)
    for other, theirs in enumerate(by_rank):
        pairs[other::ranks] = theirs
    return compare_texts(*zip(*pairs))


def _draw_worst(found: Comparison, source: Source, rows: Sequence[int], path: Path) -> None:
    order = sorted(range(len(rows)), key=lambda i: -found.line_cer[i])[:WORST]
    draw_lines(
        [open_image(source[rows[i]].images[0]) for i in order],
        [found.truths[i] for i in order],
        [found.reads[i] for i in order],
        path,
        [source.row_name(rows[i]) for i in order],
    )


def _report(training_run: TrainingRun, result: dict[str, Any], found: Comparison | None) -> None:
    """The run's result, for people."""
    out, say = training_run.settings.out, training_run.say
    training_run.say_skipped(result)
    say(f"{out}: loss.png, worst_lines.png, metrics.jsonl, model/", highlight=False)
    if found is None:
        return
    pairs = ", ".join(f"{c.truth!r} as {c.read!r} ({c.count})" for c in found.confusions(8))
    say(f"most often misread: {pairs or 'nothing'}", highlight=False, markup=False)
    say(
        f"{result['held_out']}, {result['lines']} lines: CER {result['cer']:.2%} "
        f"({result['cer_ci'][0]:.2%} to {result['cer_ci'][1]:.2%}), WER {result['wer']:.2%}, "
        f"lines without a fault {result['exact_match']:.1%}",
        style="bold",
        highlight=False,
        markup=False,
    )
