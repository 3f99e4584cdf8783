"""Zero-shot classification: pictures are given the class whose name, in prompts, is nearest.

    python eval/zero_shot.py --model runs/contrastive --label group --templates "a drawing of {}"
    python eval/zero_shot.py --model openai/clip-vit-base-patch32 --data clip_benchmark:FOLDER:test
    accelerate launch --multi_gpu --num_processes 2 eval/zero_shot.py --model runs/contrastive ...

A row's caption is its class: --label says which key or column holds it. A class's vector is the
mean of its name's in all templates. Probabilities, for the calibration, are the softmax over
classes of cosines times the model's own scale; a bias, which all classes share, cancels. Any number
of processes gives the same figures; of equal scores the wrong classes come first.

In --out: result.json and reliability.png, confidence against accuracy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import vlm
from vlm.commands.evaluation import require_writable, show_left_out, start
from vlm.commands.model import require_least
from vlm.config import to_dict
from vlm.data.check import check_start, say_on
from vlm.data.example import BadRow, Example
from vlm.data.sources import ClipBenchmark, open_source
from vlm.data.sources.base import Source
from vlm.draw import draw_reliability
from vlm.families.contrastive.model import ContrastiveModel, same_labels
from vlm.families.contrastive.processor import PairProcessor
from vlm.families.decoder_only.generate import evaluating
from vlm.metrics.classification import classification
from vlm.precision import Precision, dtype_name
from vlm.retrieval.embed_rows import (
    Reading,
    embed_pictures,
    embed_texts,
    only_picture,
    require_contrastive,
    sum_of_all,
)
from vlm.training.run_folder import versions
from vlm.training.runs.held_out import held_out_rows
from vlm.training.runs.launch import share_cores

CONFUSIONS = 20
"""How many pairs of classes are listed as taken for one another."""
TEXTS = 256
"""Prompts embedded at once, about: all of a class's go together."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is evaluated."""

    model: str
    """A run folder, a model folder or a hub id of a contrastive model."""
    data: str = "sample:transfer"
    """Pictures with classes: any source that the recipes take, or clip_benchmark:FOLDER:SPLIT."""
    label: str | None = None
    """Key or column of a row that holds its class; None: its caption is."""
    classes: Path | None = None
    """A text file of class names, one a line; where rows name a class otherwise than its prompts
    shall, LABEL, a tab, and the name. None: the classes that the data list, or else all that their
    rows have, sorted."""
    templates: tuple[str, ...] | None = None
    """Prompts with {} (or {c}) at the name's place, or one text file of them, one a line. None: the
    data's own, where they bring some, or else the bare name."""
    same_names: Literal["raise", "merge"] = "raise"
    """Classes whose names are one to the model, as it may read neither capitals nor punctuation, so
    that no prompt tells them apart: stop and name them, or take them as one class."""
    rows: int | None = None
    """How many rows, spread evenly over the data; None takes all."""
    bins: int = 15
    """Bins of confidence."""
    out: Path = Path("runs/eval-zero-shot")
    """Where results go; earlier ones there are replaced."""
    batch: int = 64
    """Pictures embedded at once."""
    workers: int = 1
    """Processes that read and decode pictures, for each process that computes."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """Rows without a class, or with a picture that cannot be read: stop and name the row, or leave
    them out and count them."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows that are left out although they change what a row means."""
    precision: Precision = "auto"
    """auto keeps the model's own where the device is fast in it, else takes fp32."""
    threads: int | None = None
    """CPU threads of each process; None shares the machine's cores among its processes."""


class Classes(NamedTuple):
    """The classes that pictures are sorted into.

    name_of: from the labels that rows may have to the names of their classes.
    names: of all classes in their order. where: what lists them.
    """

    name_of: dict[str, str]
    names: list[str]
    where: str


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file, none empty but at its end.

    Raises ValueError naming file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected {what} in UTF-8, found other bytes") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: expected {what}, one a line, found none")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"{path}:{number}: expected {what}, found an empty line")
    return lines


def read_templates(given: Sequence[str] | None, source: Source) -> tuple[str, ...]:
    """The prompts. Raises ValueError for one without a place for the name."""
    where = "--templates"
    if given is None:
        own = source.templates if isinstance(source, ClipBenchmark) else None
        return own or ("{}",)
    if len(given) == 1 and "{" not in given[0] and Path(given[0]).is_file():
        where, given = given[0], read_lines(Path(given[0]), "prompts")
    templates = tuple(template.strip().replace("{c}", "{}") for template in given)
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise ValueError(f"{where}: expected {{}} at the name's place, found {wrong or 'nothing'}")
    return templates


def read_classes(path: Path | None, source: Source) -> Classes | None:
    """The classes that rows may have; None where neither a file nor the data list them.

    Raises ValueError for a name that is empty and a label with two names.
    """
    if path is not None:
        where, pairs = str(path), []
        for line in read_lines(path, "class names"):
            label, tab, name = line.partition("\t")
            if tab and not name.strip():
                raise ValueError(f"{path}:{len(pairs) + 1}: expected a name behind {label!r}")
            pairs.append((label.strip(), name.strip() if tab else label.strip()))
    elif source.classes is not None:
        where, pairs = source.name, [(name, name) for name in source.classes]
    else:
        return None
    name_of: dict[str, str] = {}
    for label, name in pairs:
        if name_of.setdefault(label, name) != name:
            raise ValueError(f"{where}: expected each label once, found {label!r} with two names")
    return Classes(name_of, [name for _, name in pairs], where)


def told_apart(
    processor: PairProcessor, classes: Classes, templates: Sequence[str], same_names: str
) -> dict[str, str]:
    """From each name to the one that stands for it: itself, or the first that is the same text to
    the model.

    Raises ValueError for names that are the same, with their places in the list, unless
    `same_names` is "merge"; and for names of which the model reads nothing.
    """
    names = classes.names
    try:
        same = same_labels(processor, names, templates)
    except ValueError as error:
        raise ValueError(f"{classes.where}: {error}") from error
    if same and same_names == "raise":
        found = {
            " / ".join(dict.fromkeys(names[i] for i in places)): [i + 1 for i in places]
            for places in same
        }
        raise ValueError(
            f"{classes.where}: expected names that the model can tell apart, found the same at "
            f"several places of the list: {found}; --same-names merge takes them as one class"
        )
    stands = {name: name for name in names}
    return stands | {names[i]: names[places[0]] for places in same for i in places}


def read_label(classes: Classes | None, example: Example) -> str:
    """What a row says that its class is. Raises BadRow where it says nothing, or has not exactly
    one picture, and for none of the classes, where there is a list of them."""
    only_picture(example)
    answers = [turn.text.strip() for turn in example.turns if turn.role == "assistant"]
    if len(answers) != 1 or not answers[0]:
        found = f"{len(answers)} texts" if len(answers) != 1 else "an empty text"
        raise BadRow(f"{example.name}: expected one class, found {found}")
    if classes is not None and answers[0] not in classes.name_of:
        raise BadRow(
            f"{example.name}: expected one of the {len(classes.name_of)} classes of "
            f"{classes.where}, found {answers[0][:80]!r}"
        )
    return answers[0]


@torch.no_grad()
def embed_names(
    model: ContrastiveModel,
    names: Sequence[str],
    templates: Sequence[str],
    accelerator: Accelerator,
) -> tuple[Tensor, int, int]:
    """The vector of each class, float32[C, U], unit norm; and how many prompts were longer than the
    context, and by how many tokens together.

    Source: CLIP, arXiv 2103.00020, section 3.1.4.
    """
    vectors = torch.zeros(len(names), model.module.dim, device=model.device)
    cut = torch.zeros(2, dtype=torch.long, device=model.device)
    step = max(1, TEXTS // len(templates))
    starts = range(0, len(names), step)
    with evaluating(model.module):
        for start in starts[accelerator.process_index :: accelerator.num_processes]:
            part = names[start : start + step]
            texts = [template.replace("{}", name) for name in part for template in templates]
            embedded, gone = embed_texts(model, texts, texts)
            means = embedded.view(len(part), len(templates), -1).mean(1)
            vectors[start : start + step] = F.normalize(means, dim=-1)
            cut += torch.tensor([sum(map(bool, gone)), sum(gone)], device=model.device)
    cut = sum_of_all(accelerator, cut).tolist()
    return sum_of_all(accelerator, vectors), cut[0], cut[1]


def confusions(
    scores: np.ndarray, right: np.ndarray, names: Sequence[str], most: int = CONFUSIONS
) -> list[dict[str, Any]]:
    """The pairs of a right class and a wrong one, chosen in its place, that come most often, with
    their number and its share of the right class's examples.

    scores: float[N, C]. right: int64[N].
    """
    rows = np.arange(len(right))
    wrong = scores.copy()
    wrong[rows, right] = -np.inf
    taken_for = wrong.argmax(1)
    missed = wrong[rows, taken_for] >= scores[rows, right]
    pairs, counts = np.unique(
        np.stack([right[missed], taken_for[missed]], 1), axis=0, return_counts=True
    )
    of_class = np.bincount(right, minlength=len(names))
    worst = np.argsort(-counts, kind="stable")[:most]
    return [
        {
            "class": names[pairs[i, 0]],
            "taken_for": names[pairs[i, 1]],
            "count": int(counts[i]),
            "share": float(counts[i] / of_class[pairs[i, 0]]),
        }
        for i in worst
    ]


def evaluate(settings: Settings) -> dict[str, Any] | None:
    """One evaluation, from settings to results; they are also written to `settings.out`. None on
    processes other than the first."""
    started = time.monotonic()
    require_least(settings, batch=1, bins=1, workers=0, rows=1, threads=1)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    share_cores(accelerator, settings.threads)
    source = open_source(settings.data, caption=settings.label, ignore_keys=settings.ignore_keys)
    check_start([source], None, say_on(accelerator.is_main_process))
    templates = read_templates(settings.templates, source)
    classes = read_classes(settings.classes, source)
    require_writable(settings.out)
    model = vlm.load(
        settings.model, device=str(accelerator.device), dtype=dtype_name(settings.precision)
    )
    model = require_contrastive(model, f"--model {settings.model}")
    stands = classes and told_apart(model.processor, classes, templates, settings.same_names)
    rows = held_out_rows(source, len(source) if settings.rows is None else settings.rows)
    read = partial(read_label, classes)
    reading = Reading(batch=settings.batch, workers=settings.workers, bad_rows=settings.bad_rows)
    pictures = embed_pictures(model, source, rows, accelerator, reading, read)
    skipped = [row for _, row in pictures.skipped]
    if not pictures.beside:
        reason = f"{skipped[0].name}: {skipped[0].reason}"
        raise ValueError(f"{source.name}: none of {len(rows)} rows can be used, such as {reason}")
    if classes is None:
        labels = sorted(set(pictures.beside))
        classes = Classes({label: label for label in labels}, labels, source.name)
        stands = told_apart(model.processor, classes, templates, settings.same_names)
    names = list(dict.fromkeys(stands[name] for name in classes.names))
    if len(names) < 2:
        raise ValueError(f"{source.name}: expected two classes or more, found {names}")
    labelled, cut, cut_tokens = embed_names(model, names, templates, accelerator)
    result = None
    if accelerator.is_main_process:
        number = {name: i for i, name in enumerate(names)}
        right = np.array([number[stands[classes.name_of[label]]] for label in pictures.beside])
        scores = (pictures.vectors[pictures.kept] @ labelled.T).cpu().numpy()
        scale = model.module.log_scale.exp().item()
        measured = classification(scores, right, scale=scale, bins=settings.bins)
        examples = np.bincount(right, minlength=len(names))
        by_class = {
            name: None if np.isnan(share) else float(share)
            for name, share in zip(names, measured.by_class)
        }
        result = {
            "model": settings.model,
            "data": source.name,
            "rows": len(rows),
            "label": settings.label,
            "classes": names,
            "classes_merged": len(classes.names) - len(names),
            "templates": list(templates),
            "preprocessing": to_dict(model.processor.pixel_spec),
            "scale": scale,
            "ties": "wrong classes come before right ones of equal score",
            "seed": None,  # nothing is drawn
            "batch": settings.batch,
            "dtype": str(next(model.module.text.parameters()).dtype).removeprefix("torch."),
            "device": accelerator.device.type,
            "processes": accelerator.num_processes,
            "figures": {
                **measured.figures(),
                "chance": {
                    "top_1": 1 / len(names),
                    "top_5": min(1.0, 5 / len(names)),
                    "most_frequent_class": float(examples.max() / examples.sum()),
                },
                "by_class": by_class,
            },
            "confusions": confusions(scores, right, names),
            "prompts_cut": cut,
            "tokens_cut": cut_tokens,
            "skipped": len(skipped),
            "examples_skipped": [f"{one.name}: {one.reason}" for one in skipped[:20]],
            "versions": versions(),
            "minutes": (time.monotonic() - started) / 60,
        }
        text = json.dumps(result, indent=2, ensure_ascii=False, default=str) + "\n"
        (settings.out / "result.json").write_text(text, encoding="utf-8")
        show(result, settings.out)
        title = f"{settings.model} on {source.name}"
        draw_reliability(measured.calibration, title, settings.out / "reliability.png")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def show(result: dict[str, Any], out: Path) -> None:
    """The figures as a table, and where everything lies."""
    figures, luck = result["figures"], result["figures"]["chance"]
    data, classes = escape(result["data"]), figures["classes"]
    title = f"{figures['examples']} pictures of {data} in {classes} classes"
    table = Table("figure", "value", "by chance", title=title)
    for what in ("top_1", "top_5"):
        low, high = figures[f"{what}_95"]
        value = f"{figures[what]:.1%} ({low:.1%} to {high:.1%})"
        table.add_row(what.replace("_", "-"), value, f"{luck[what]:.1%}")
    table.add_row("  always the most frequent class", "", f"{luck['most_frequent_class']:.1%}")
    table.add_row("mean per class", f"{figures['mean_per_class']:.1%}", f"{luck['top_1']:.1%}")
    table.add_row("calibration error (ECE)", f"{figures['ece']:.3f}", "")
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    if result["confusions"]:
        worst = Table("class", "taken for", "times", "share of it", title="most often confused")
        for pair in result["confusions"][:5]:
            times, share = str(pair["count"]), f"{pair['share']:.0%}"
            worst.add_row(escape(pair["class"]), escape(pair["taken_for"]), times, share)
        console.print(worst)
    if figures["classes_without_examples"]:
        console.print(f"{figures['classes_without_examples']} classes have no pictures")
    if result["classes_merged"]:
        console.print(f"classes merged with others of their name: {result['classes_merged']}")
    if result["prompts_cut"]:
        prompts = len(result["classes"]) * len(result["templates"])
        console.print(
            f"{result['prompts_cut']} of {prompts} prompts were longer than the context: "
            f"{result['tokens_cut']} tokens were cut"
        )
    show_left_out(result, console)
    console.print(f"{out}: result.json, reliability.png", markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    start(Settings, evaluate, __doc__, arguments)


if __name__ == "__main__":
    main()
