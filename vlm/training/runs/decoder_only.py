"""What the decoder-only recipes share: a run from settings to result.

A recipe file states its stage as a value and its own defaults; what can be set is in
`vlm.training.runs.decoder_only_settings`, everything else here.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vlm.data.example import BadRow, Skipped
from vlm.data.mixture import MixtureDataset
from vlm.data.sources.base import Source
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.kernels.packed_attention import require_segments
from vlm.pixels import open_image
from vlm.training.fit import fit
from vlm.training.flop_cost import flop_cost_of
from vlm.training.objectives.next_token import NextToken
from vlm.training.run_folder import draw_captions
from vlm.training.runs.decoder_only_settings import Settings, training_data
from vlm.training.runs.evaluate import image_gain_on, text_loss_on
from vlm.training.runs.held_out import held_out_rows
from vlm.training.runs.run import MakeObjective, MakeStage, TrainingRun
from vlm.training.stages import Stage
from vlm.weights import cast_parameters

IMAGES = 16


def usable_documents(model: DecoderOnlyModel, source: Source, count: int) -> list[int]:
    """Rows of a text-only source that fit the context. Raises ValueError where a row has images or
    none fits."""
    usable = []
    for row in held_out_rows(source, count):
        encoded = model.processor.encode(source[row])
        if not isinstance(encoded, Skipped):
            if encoded.views:
                raise ValueError(f"{encoded.name}: expected text alone, found images")
            usable.append(row)
    if not usable:
        raise ValueError(f"{source.name}: no row fits the context")
    return usable


def next_token(settings: Settings, model: DecoderOnlyModel, stage: Stage) -> NextToken:
    """Cross-entropy of the scored tokens, with the FLOP cost of rows and batches under the stage's
    rates."""
    cost = flop_cost_of(model.module, stage.rates, views=settings.token_cache is None)
    return NextToken(model.processor.pad_id, settings.pack, cost)


def run(settings: Settings, make_stage: MakeStage, make_objective: MakeObjective) -> dict[str, Any]:
    """One run from settings to result: trains, evaluates, captions, saves."""
    training_run = TrainingRun(settings)
    data = training_data(settings)
    source = settings.source(settings.held_out) if settings.held_out else None
    evaluated = source if settings.held_out_rows else None
    documents = settings.open(settings.text_held_out) if settings.text_held_out_rows else None
    training_run.check(data, evaluated, documents)
    with training_run.accelerator.main_process_first():
        model = settings.build()
    require_loc_tokens(data, model, settings.bad_rows)
    if settings.pack is not None:
        require_segments(model.module.text)
    plan = training_run.stage(make_stage, model.module)
    rows, _, cut = training_run.held_out(model, evaluated)
    texts = usable_documents(model, documents, settings.text_held_out_rows) if documents else []
    evaluate = _Evaluate(model, training_run.accelerator, source, rows, documents, texts)
    if texts:  # else nothing is computed before the run knows that it fits
        if training_run.settings.precision == "fp32":  # as the run will: 16 bits may be far slower
            cast_parameters(model.module, torch.float32)
        model.module.to(training_run.accelerator.device)
    before = evaluate.text_loss()
    objective = make_objective(settings, model, plan)
    training_run.preflight(model, plan, data, objective)
    progress = fit(
        model,
        plan,
        data,
        training_run.folder,
        training_run.accelerator,
        objective,
        training_run.loop(settings.token_cache),
        balance=objective.cost.of_row if settings.balance else None,
        evaluate=evaluate if rows else None,
    )
    training_run.save(model, merge=settings.merge, evaluated=bool(rows or texts))
    figures = evaluate(full=True) if rows else {}
    if texts:
        figures |= {
            "text_loss": evaluate.text_loss(),
            "text_loss_before": before,
            "text_loss_first": first_text_loss(settings, before),
        }

    def show(result: dict[str, Any]) -> None:
        if rows:
            show_some(model, source, rows, training_run)
        report(training_run, result)

    more = {"held_out": source.name if source else "", "held_out_cut_tokens": cut}
    return training_run.end(progress, figures, more, show)


def require_loc_tokens(data: MixtureDataset, model: DecoderOnlyModel, bad_rows: str) -> None:
    """Raises ValueError where a source answers with boxes and the model cannot write them; checked
    by each source's first row. Raises BadRow for one that cannot be read, unless it is skipped."""
    for source in data.sources:
        try:
            example = source[0]
        except BadRow:
            if bad_rows == "raise":
                raise
            continue
        if model.processor.loc is None and any(turn.box_numbers for turn in example.turns):
            raise ValueError(
                f"{source.name}: its answers hold boxes, and this model has no <loc> tokens to "
                "write them; add some, such as --loc-bins 1024"
            )


def first_text_loss(settings: Settings, before: float) -> float:
    """The loss on the same documents before the first stage of the chain that reported it; `before`
    where no earlier run did."""
    previous = getattr(settings, "previous", None)
    if previous is None:
        return before
    try:
        held = json.loads(Path(previous, "settings.json").read_text())
        result = json.loads(Path(previous, "result.json").read_text())
    except FileNotFoundError:
        return before
    keys = ("text_held_out", "text_held_out_rows")
    same = all(held.get(key) == getattr(settings, key) for key in keys)
    return result.get("text_loss_first", before) if same else before


class _Evaluate:
    """The held-out figures: on a quarter of the rows during training, on all at the end."""

    def __init__(
        self,
        model: DecoderOnlyModel,
        accelerator: Accelerator,
        source: Source | None,
        rows: list[int],
        documents: Source | None,
        texts: list[int],
    ) -> None:
        self.model, self.accelerator = model, accelerator
        self.source, self.rows = source, rows
        self.documents, self.texts = documents, texts

    def __call__(self, full: bool = False) -> dict[str, float]:
        rows = self.rows if full or len(self.rows) < 8 else self.rows[::4]
        return image_gain_on(self.model, self.source, rows, self.accelerator)

    def text_loss(self) -> float | None:
        """The loss on documents, nats per token; None where there are none."""
        if not self.texts:
            return None
        return text_loss_on(self.model, self.documents, self.texts, self.accelerator)


def show_some(
    model: DecoderOnlyModel, source: Source, rows: list[int], training_run: TrainingRun
) -> None:
    """Writes samples.png: some held-out images with their true and generated answers, and a few
    of the images themselves, named after their row, to try the model on."""
    out, say = training_run.settings.out, training_run.say
    examples = [source[row] for row in rows[:: max(1, len(rows) // IMAGES)][:IMAGES]]
    images = [open_image(example.images[0]) for example in examples]
    with training_run.accelerator.autocast():
        written = model.answer_examples(examples, max_new_tokens=32)
    true = [example.answer for example in examples]
    draw_captions(images, true, written, out / "samples.png")
    (out / "images").mkdir(exist_ok=True)
    paths = [out / "images" / f"{number}.png" for number in range(4)]
    for image, path in zip(images, paths):
        image.save(path)
    say()
    for said, wrote in list(zip(true, written))[:6]:
        say(f"  true: {_short(said):34} generated: {_short(wrote)}", highlight=False, markup=False)
    say(f"\nnext: vlm caption {paths[0]} --model {out}", highlight=False)


def report(training_run: TrainingRun, result: dict[str, Any]) -> None:
    """The run's result, for people."""
    settings, say = training_run.settings, training_run.say
    training_run.say_skipped(result)
    drawn = "loss.png, samples.png" if "gain" in result else "loss.png"
    say(f"{settings.out}: {drawn}, metrics.jsonl, model/", highlight=False)
    if "text_loss" in result:
        loss, before, first = (result[f"text_loss{w}"] for w in ("", "_before", "_first"))
        say(
            f"loss on {settings.text_held_out}: {loss:.3f} nats per token; before this stage "
            f"{before:.3f} ({loss / before - 1:+.1%}), before any {first:.3f} "
            f"({loss / first - 1:+.1%})"
        )
    if "gain" in result:
        say(
            f"image gain on {result['held_out']}: {result['gain']:.2f} "
            f"± {result['gain_se']:.2f} nats per caption "
            f"(wrong image {result['wrong']:.2f}, right image {result['right']:.2f}, "
            f"{result['captions']} captions)",
            style="bold",
        )


def _short(text: str) -> str:
    return textwrap.shorten(text, 60)
