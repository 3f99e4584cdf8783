"""The public contrastive model: images and texts in, vectors of one space and scores out.

Shapes: N image or text, U shared embedding width, C label.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vlm.families.base import Model, evaluating, require_batch_size, require_list
from vlm.families.contrastive.batch import Pair
from vlm.families.contrastive.module import Contrastive
from vlm.families.contrastive.processor import PairProcessor
from vlm.image_tokens import group_views

WINDOW = 8
"""Batches of texts that are sorted by length together."""


@dataclass(kw_only=True, eq=False)
class ContrastiveModel(Model):
    """A contrastive model with its processor, ready to use.

    processor: preprocessing of images and texts.
    An image is a path, bytes, a PIL image or an array.
    """

    module: Contrastive
    processor: PairProcessor

    @torch.no_grad()
    def embed_images(self, images: Sequence, batch_size: int = 64) -> Tensor:
        """The vector of each image: float32[N, U], unit norm, on the CPU.

        Images are opened a batch at a time, so that they are never all in memory.
        Raises BadImage naming an image that cannot be read, ValueError for what is no list of
        images and for a vector that is not finite.
        """
        require_list(images)
        names = [_name(image, i) for i, image in enumerate(images)]
        done = torch.empty(len(names), self.module.dim)
        with evaluating(self.module), _bar(len(names), "images") as bar:
            for start in _starts(len(names), batch_size):
                part = slice(start, start + batch_size)
                rows = [
                    Pair(name=name, ids=torch.empty(0), views=self.processor.views(image, name))
                    for name, image in zip(names[part], images[part])
                ]
                groups = [group.to(self.device, self.pixel_dtype) for group in group_views(rows)]
                done[part] = self.module.embed_images(groups).float().cpu()
                require_directions(done[part], names[part])
                bar.update(len(rows))
        return done

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """The vector of each text: float32[N, U], unit norm, on the CPU.

        Texts longer than the model's context are cut, with one warning that counts them.
        Raises ValueError for what is no list of texts and for a vector that is not finite.
        """
        require_list(texts, "texts")
        done = torch.empty(len(texts), self.module.dim)
        cut = tokens = 0
        window = WINDOW * max(batch_size, 1)
        with evaluating(self.module), _bar(len(texts), "texts") as bar:
            for first in _starts(len(texts), window if batch_size > 0 else batch_size):
                rows, gone = self.processor.rows(texts[first : first + window])
                cut, tokens = cut + sum(map(bool, gone)), tokens + sum(gone)
                order = iter(sorted(range(len(rows)), key=lambda i: len(rows[i])))
                while part := list(islice(order, batch_size)):
                    ids, valid = self.processor.pad([rows[i] for i in part])
                    vectors = self.module.embed_texts(ids.to(self.device), valid.to(self.device))
                    indices = [first + i for i in part]
                    done[indices] = vectors.float().cpu()
                    require_directions(done[indices], [f"texts[{i}]" for i in indices])
                    bar.update(len(part))
        if cut:
            warnings.warn(
                f"{cut} of {len(texts)} texts were longer than {self.processor.length} tokens: "
                f"{tokens} tokens were cut",
                stacklevel=3,  # beyond no_grad's wrapper
            )
        return done

    def classify(
        self,
        images: Sequence,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """The score of each label for each image: float32[N, C], logits.

        templates: texts with "{}" at the label's position; a label's vector is the mean of its
            texts' vectors, brought to unit norm. None takes the bare label.
        `scores.softmax(1)` are probabilities of one label among these, for models trained with the
        softmax loss (CLIP); `scores.sigmoid()` that a label fits by itself, for models trained with
        the sigmoid loss (SigLIP), whose bias they include.
        Raises ValueError naming labels that are empty or equal, as they are or to the model, and
        templates without "{}".
        Source: CLIP, arXiv 2103.00020, section 3.1.4.
        """
        require_list(images)
        require_batch_size(batch_size)
        labelled = self.embed_labels(labels, templates)
        image_list = self.embed_images(images, batch_size)
        with torch.no_grad():
            scores = self.module.logits(image_list.to(self.device), labelled.to(self.device))
        return scores.float().cpu()

    def embed_labels(self, labels: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """The vector of each label: float32[C, U], unit norm; `classify` scores images with them.

        The arguments and errors are those of `classify`.
        """
        require_labels(labels)
        templates = ["{}"] if templates is None else templates
        require_templates(templates)
        if same := same_labels(self.processor, labels, templates):
            found = [[labels[i] for i in indices] for indices in same]
            raise ValueError(
                f"expected labels that the model can tell apart, found some that it reads as one "
                f"text: {found}"
            )
        texts = [template.replace("{}", label) for label in labels for template in templates]
        vectors = self.embed_texts(texts).view(len(labels), len(templates), -1)
        return F.normalize(vectors.mean(1), dim=-1)


def same_labels(
    processor: PairProcessor, labels: Sequence[str], templates: Sequence[str]
) -> list[list[int]]:
    """The indices of labels that are one text to the model, as in every template their ids are the
    same: it may read no capitals, or cut off where they differ. Groups of two and more.

    Raises ValueError naming labels of which it reads nothing.
    """
    if unread := [labels[i] for i in processor.unread(labels)]:
        raise ValueError(
            f"expected labels of which the text tokenizer leaves something, found {unread}"
        )
    same = [list(range(len(labels)))]
    for template in templates:
        finer = []
        for indices in same:
            groups: dict[tuple[int, ...], list[int]] = {}
            rows, _ = processor.rows([template.replace("{}", labels[i]) for i in indices])
            for i, row in zip(indices, rows):
                groups.setdefault(tuple(row), []).append(i)
            finer += [group for group in groups.values() if len(group) > 1]
        same = finer
    return same


def require_labels(labels: Sequence[str]) -> None:
    """Raises ValueError for labels of which none is there, one is empty, or two are equal."""
    if isinstance(labels, str) or not len(labels):
        raise ValueError(f"labels is a list of at least one text, found {labels!r}")
    for i, label in enumerate(labels):
        if not isinstance(label, str):
            raise ValueError(f"labels[{i}]: expected a text, found {label!r}")
    wrong = [f"labels[{i}]: {x!r}" for i, x in enumerate(labels) if not x.strip()]
    if wrong:
        raise ValueError(f"expected labels that are not empty, found {', '.join(wrong)}")
    indices: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        indices.setdefault(label, []).append(i)
    twice = {label: where for label, where in indices.items() if len(where) > 1}
    if twice:
        raise ValueError(f"expected each label once, found at several positions: {twice}")


def require_templates(templates: Sequence[str]) -> None:
    """Raises ValueError where there is no template, or one without "{}"."""
    if isinstance(templates, str) or not len(templates):
        raise ValueError(f"templates is a list of at least one text, found {templates!r}")
    wrong = [template for template in templates if "{}" not in template]
    if wrong:
        raise ValueError(f"expected templates with {{}} at the label's position, found {wrong}")


def require_directions(vectors: Tensor, names: Sequence[str]) -> None:
    """Raises ValueError naming what has a vector without direction: not finite, or zero."""
    lengths = vectors.norm(dim=1)
    wrong = [name for name, length in zip(names, lengths.tolist()) if not 0.5 < length < 2]
    if wrong:
        raise ValueError(f"the model gives vectors that are zero or not finite for {wrong[:8]}")


def _starts(count: int, batch_size: int) -> range:
    require_batch_size(batch_size)
    return range(0, count, batch_size)


def _bar(count: int, what: str) -> tqdm:
    return tqdm(total=count, desc=what, disable=count <= 64, leave=False)


def _name(image, index: int) -> str:
    if isinstance(image, (list, tuple)):
        raise ValueError(f"images[{index}]: expected one image, found a {type(image).__name__}")
    return str(image) if isinstance(image, (str, Path)) else f"images[{index}]"
