"""Zero-shot classification: images are given the class whose name, in prompts, is nearest.

    vlm eval zero-shot runs/contrastive --label group --templates "a drawing of {}"
    vlm eval zero-shot openai/clip-vit-base-patch32 --data clip_benchmark:FOLDER:test

A row's caption is its class: --label says which key or column holds it. A class's vector is the
mean of its name's in all templates. Probabilities, for the calibration, are the softmax over
classes of cosines times the model's own scale; a bias, which all classes share, cancels. Any number
of processes gives the same metrics; of equal scores the wrong classes come first.

In --out: result.json and reliability.png, confidence against accuracy.

Shapes: N image, C class, U shared embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from vlm.config import to_dict
from vlm.data.check import check_start
from vlm.draw import draw_reliability
from vlm.evaluation import base
from vlm.evaluation.class_names import (
    Classes,
    read_classes,
    read_label,
    read_templates,
    told_apart,
)
from vlm.families.base import evaluating
from vlm.families.contrastive.model import ContrastiveModel
from vlm.metrics.classification import classification
from vlm.ranks import reduce_sum
from vlm.retrieval.embed_rows import (
    Images,
    Reading,
    embed_images,
    embed_texts,
)

CONFUSIONS = 20
"""How many pairs of classes are listed as taken for one another."""
MOST_FREQUENT = "most_frequent_class"
"""In result.json, what always saying the class that most images have would reach."""
TEXTS = 256
"""Prompts embedded at once, about: all of a class's go together."""


@dataclass(frozen=True, kw_only=True)
class Settings(base.Settings):
    """What is evaluated."""

    data: str = "sample:transfer"
    """Images with classes: any source that the recipes take, or clip_benchmark:FOLDER:SPLIT."""
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
    bins: int = 15
    """Bins of confidence."""
    out: Path = Path("runs/eval-zero-shot")
    """Where results go; earlier ones there are replaced."""
    batch: int = 64
    """Images embedded at once."""
    workers: int = 1
    """Processes that read and decode images, for each process that computes."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """Rows without a class, or with an image that cannot be read: stop and name the row, or skip
    and count them."""


class ZeroShotEvaluation(base.Evaluation[Settings]):
    """How often the nearest class is the right one, and whether the confidence in it is."""

    task = "zero-shot"
    settings_type = Settings
    ability = "classify"
    least: ClassVar = {"batch": 1, "bins": 1, "workers": 0}
    files = ("reliability.png",)

    def open(self, say: Callable[..., None]) -> None:
        options = {"caption": self.settings.label}
        self.sources = [self.open_source("data", self.settings.data, **options)]
        check_start(self.sources, None, say)
        self.rows = self.spread(self.source)
        self.templates = read_templates(self.settings.templates, self.source)
        self.classes = read_classes(self.settings.classes, self.source)

    def load(self, device: torch.device) -> ContrastiveModel:
        model = super().load(device)
        self.stands = self.classes and self._told_apart(model)
        return model

    def _told_apart(self, model: ContrastiveModel) -> dict[str, str]:
        same_names = self.settings.same_names
        return told_apart(model.processor, self.classes, self.templates, same_names)

    def predict_all(self, model: ContrastiveModel, accelerator: Accelerator) -> Images:
        """The vectors of all images and of all classes, on every rank."""
        options = self.settings
        read = partial(read_label, self.classes)
        reading = Reading(batch=options.batch, workers=options.workers, bad_rows=options.bad_rows)
        found = embed_images(model, self.source, self.rows, accelerator, reading, read)
        self.skipped = [row for _, row in found.skipped]
        self.require_some(found.beside)
        if self.classes is None:
            labels = sorted(set(found.beside))
            self.classes = Classes({label: label for label in labels}, labels, self.source.name)
            self.stands = self._told_apart(model)
        self.names = list(dict.fromkeys(self.stands[name] for name in self.classes.names))
        if len(self.names) < 2:
            raise ValueError(
                f"{self.source.name}: expected two classes or more, found {self.names}"
            )
        self.vectors, self.prompts_cut, self.tokens_cut = embed_names(
            model, self.names, self.templates, accelerator
        )
        return found

    def score(
        self, model: ContrastiveModel, predictions: Images, accelerator: Accelerator
    ) -> dict[str, Any]:
        names, stands = self.names, self.stands
        number = {name: i for i, name in enumerate(names)}
        name_of = self.classes.name_of
        right = np.array([number[stands[name_of[label]]] for label in predictions.beside])
        scores = (predictions.vectors[predictions.kept] @ self.vectors.T).cpu().numpy()
        self.scale = model.module.log_scale.exp().item()
        measured = classification(scores, right, scale=self.scale, bins=self.settings.bins)
        examples = np.bincount(right, minlength=len(names))
        self.calibration = measured.calibration
        self.confusions = confusions(scores, right, names)
        self.chance = {
            "accuracy": 1 / len(names),
            "accuracy_top5": min(1.0, 5 / len(names)),
            "accuracy_mean_per_class": 1 / len(names),
        }
        self.most_frequent = float(examples.max() / examples.sum())
        self.by_class = {
            name: {"n": int(count), "accuracy": float(share) if count else None}
            for name, count, share in zip(names, examples, measured.by_class)
        }
        return measured.metrics()

    def details(self, model: ContrastiveModel) -> dict[str, Any]:
        return {
            "chance": self.chance,
            "baselines": {MOST_FREQUENT: {"metrics": {"accuracy": self.most_frequent}}},
            "groups": {"class": self.by_class},
            "label": self.settings.label,
            "classes": self.names,
            "classes_merged": len(self.classes.names) - len(self.names),
            "templates": list(self.templates),
            "preprocessing": to_dict(model.processor.pixel_spec),
            "scale": self.scale,
            "ties": "wrong classes come before right ones of equal score",
            "confusions": self.confusions,
            "prompts_cut": self.prompts_cut,
            "tokens_cut": self.tokens_cut,
        }

    def show(self, result: dict[str, Any], console: Console) -> None:
        metrics, luck = result["metrics"], result["chance"]
        most_frequent = result["baselines"][MOST_FREQUENT]["metrics"]["accuracy"]
        data, classes = base.data_of(result), metrics["classes"]
        title = f"{metrics['n']} images of {data} in {classes} classes"
        table = Table("metric", "value", "by chance", title=title)
        for name, what in (("top-1 accuracy", "accuracy"), ("top-5 accuracy", "accuracy_top5")):
            table.add_row(name, base.percent_with_ci(metrics, what), f"{luck[what]:.1%}")
        table.add_row("  always the most frequent class", "", f"{most_frequent:.1%}")
        mean = "accuracy_mean_per_class"
        table.add_row("mean per class", f"{metrics[mean]:.1%}", f"{luck[mean]:.1%}")
        table.add_row("calibration error (ECE)", f"{metrics['ece']:.3f}", "")
        console.print(table)
        if result["confusions"]:
            worst = Table("class", "taken for", "times", "share of it", title="most often confused")
            for pair in result["confusions"][:5]:
                times, share = str(pair["count"]), f"{pair['share']:.0%}"
                worst.add_row(pair["class"], pair["taken_for"], times, share)
            console.print(worst)
        if metrics["classes_without_examples"]:
            console.print(f"{metrics['classes_without_examples']} classes have no images")
        if result["classes_merged"]:
            console.print(f"classes merged with others of their name: {result['classes_merged']}")
        if result["prompts_cut"]:
            prompts = len(result["classes"]) * len(result["templates"])
            console.print(
                f"{result['prompts_cut']} of {prompts} prompts were longer than the context: "
                f"{result['tokens_cut']} tokens were cut"
            )

    def write(self, predictions: Images) -> None:
        title = f"{self.settings.model} on {self.source.name}"
        draw_reliability(self.calibration, title, self.out / "reliability.png")


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
    cut = reduce_sum(accelerator, cut).tolist()
    return reduce_sum(accelerator, vectors), cut[0], cut[1]


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
