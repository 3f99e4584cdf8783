"""Retrieval between images and texts: recall, median rank and mean average precision, streamed.

Both directions come from one pass over blocks of scores, of which only counts are kept: how many
wrong candidates score at least as high as each right one (vlm/metrics/ranking.py). They are exact,
so that the metrics are the same for any block, device and number of processes.

Ties: a wrong candidate whose score equals that of a right one comes before it. Duplicates of
another image's text are thus never an advantage, and the order of rows never matters.

Shapes: N image, M text, U shared embedding width, Q query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vlm.metrics.ranking import count_above, top_k, unit_rows
from vlm.metrics.share import Interval, wilson, with_ci

__all__ = ["Direction", "RetrievalResult", "retrieval", "top_k"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Direction:
    """How well the queries of one kind find candidates of the other.

    query: int64[Q], the rows that are queries. rank: int64[Q], 1 or more, the rank of a query's
    best right candidate among all candidates. candidates: how many there are.
    recall: by k, the share of queries with rank k or less, with its 95 % interval.
    median_rank: the mean of the two middle ranks where Q is even.
    mean_average_precision: the mean over queries of average precision: of the shares of right
    candidates up to and with each right one, their mean. Nothing is cut off. A query with one
    right candidate has 1 / rank.
    """

    query: NDArray[np.int64]
    rank: NDArray[np.int64]
    candidates: int
    recall: dict[int, Interval]
    median_rank: float
    mean_average_precision: float

    def metrics(self) -> dict[str, Any]:
        """What stands in a report, for JSON; without the single ranks. n: how many queries."""
        recalls = {}
        for k, found in self.recall.items():
            recalls |= with_ci(f"recall_at_{k}", found)
        return {
            "n": len(self.query),
            "candidates": self.candidates,
            **recalls,
            "median_rank": self.median_rank,
            "map": self.mean_average_precision,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalResult:
    """Both directions; images without a text are no queries, but candidates for every text."""

    image_to_text: Direction
    text_to_image: Direction
    images_without_text: int

    def metrics(self) -> dict[str, Any]:
        """What stands in a report, for JSON, such as image_to_text_recall_at_1: the keys of each
        direction begin with its name."""
        to_text, to_image = self.image_to_text.metrics(), self.text_to_image.metrics()
        return {
            **{f"image_to_text_{name}": value for name, value in to_text.items()},
            **{f"text_to_image_{name}": value for name, value in to_image.items()},
            "images_without_text": self.images_without_text,
        }


def retrieval(
    images: Tensor | ArrayLike,
    texts: Tensor | ArrayLike,
    image_of_text: Tensor | ArrayLike,
    *,
    ks: Sequence[int] = (1, 5, 10),
    rank: int = 0,
    ranks: int = 1,
    total: Callable[[Tensor], Tensor] | None = None,
    block: tuple[int, int] | None = None,
    draws: int = 1000,
    seed: int = 0,
    show: bool = False,
) -> RetrievalResult:
    """Recall at each k, median rank and mean average precision, image to text and text to image.

    images: float[N, U], texts: float[M, U], of any length but 0; cosines are compared. They are
    computed where `images` are. image_of_text: int64[M] in 0 to N - 1; any number of texts may
    share an image. An image's texts are all right, and recall at k asks for one of them among its
    k best texts; the image of a text is its one right candidate.
    rank, ranks: this process and how many there are. Each has all embeddings, compares an equal
    share of the images, divisible or not, with all texts, and returns the figures of the whole.
    total: the sum over processes of a tensor of int64, on every process, such as
    `partial(accelerator.reduce, reduction="sum")`; None for one process.
    block: images and texts that are compared at once; None takes what suits the device.
    draws, seed: the intervals are those between the 2.5th and 97.5th percentile of the recalls of
    `draws` samples of as many images that have texts, drawn with replacement, each with its texts;
    where all samples are alike, as without a hit, Wilson's for so many images.
    show: a progress bar.

    Raises ValueError for embeddings without rows or of unequal widths, rows that hold NaN or
    infinity or have length 0, image_of_text of another length or out of range, and a k, rank or
    block below what it can be; TypeError for types that do not fit.
    """
    ks = tuple(ks)
    if not ks or not all(isinstance(k, int) and k >= 1 for k in ks):
        raise ValueError(f"ks: expected whole numbers of 1 or more, found {list(ks)}")
    if not 0 <= rank < ranks:
        raise ValueError(f"expected 0 <= rank < ranks, found rank {rank} of {ranks}")
    if total is None and ranks > 1:
        raise ValueError(f"total: expected a sum over the {ranks} processes, found None")
    if draws < 1:
        raise ValueError(f"draws: expected 1 or more, found {draws}")
    images, texts = unit_rows(images, "images", texts, "texts")
    owner = _owners(torch.as_tensor(image_of_text), len(images), len(texts)).to(images.device)
    first, last = (len(images) * r // ranks for r in (rank, rank + 1))
    rows = torch.arange(first, last, device=images.device)
    if total is not None:  # before the work: a mean, or a rank given twice, shows here
        covered = int(total(torch.tensor(len(rows), device=rows.device)))
        if covered != len(images):
            raise ValueError(
                f"total: expected the sum over processes, {len(images)} images, found {covered}"
            )
    counts = count_above(images, texts, owner, rows, block=block, show=show)
    if total is not None:
        counts = total(counts)
    wrong_texts, wrong_images = counts.cpu().numpy()
    owner = owner.cpu().numpy()

    # An image's texts from best to worst: each has the wrong ones and the right before it.
    order = np.lexsort((wrong_texts, owner))
    query, start, right = np.unique(owner[order], return_index=True, return_counts=True)
    nth = np.arange(len(order)) - np.repeat(start, right) + 1
    precision = nth / (nth + wrong_texts[order])
    image_rank = wrong_texts[order][start] + 1
    text_rank = wrong_images + 1

    # One row for each image with texts: its hits, its texts, and the hits of its texts, at each k.
    hits = np.stack([image_rank <= k for k in ks], 1).astype(np.int64)
    text_hits = np.stack([text_rank[order] <= k for k in ks], 1).astype(np.int64)
    text_hits = np.add.reduceat(text_hits, start, 0)
    low_high = _intervals(hits, text_hits, right, draws, seed)
    return RetrievalResult(
        image_to_text=Direction(
            query=query,
            rank=image_rank,
            candidates=len(texts),
            recall=_recalls(ks, hits, len(query), len(query), low_high[0]),
            median_rank=float(np.median(image_rank)),
            mean_average_precision=float((np.add.reduceat(precision, start) / right).mean()),
        ),
        text_to_image=Direction(
            query=np.arange(len(texts)),
            rank=text_rank,
            candidates=len(images),
            recall=_recalls(ks, text_hits, len(texts), len(query), low_high[1]),
            median_rank=float(np.median(text_rank)),
            mean_average_precision=float((1 / text_rank).mean()),
        ),
        images_without_text=len(images) - len(query),
    )


def _owners(owner: Tensor, images: int, texts: int) -> Tensor:
    if owner.is_floating_point() or owner.is_complex() or owner.dtype == torch.bool:
        raise TypeError(f"image_of_text: expected whole numbers, found {owner.dtype}")
    if owner.shape != (texts,):
        raise ValueError(f"image_of_text: expected shape [{texts}], found {list(owner.shape)}")
    wrong = ((owner < 0) | (owner >= images)).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"image_of_text: expected 0 to {images - 1}, found {int(owner[wrong[0]])} for text "
            f"{wrong[0]}" + (f" and {len(wrong) - 1} more out of range" if len(wrong) > 1 else "")
        )
    return owner.long()


def _recalls(
    ks: tuple[int, ...],
    hits: NDArray[np.int64],
    queries: int,
    images: int,
    low_high: NDArray[np.float64],
) -> dict[int, Interval]:
    recalls = {}
    for i, k in enumerate(ks):
        share = int(hits[:, i].sum()) / queries
        low, high = map(float, low_high[:, i])
        if low == high:  # samples that are all alike say nothing of its uncertainty
            _, low, high = wilson(share * images, images)
        recalls[k] = Interval(share, low, high)
    return recalls


def _intervals(
    image_hits: NDArray[np.int64],
    text_hits: NDArray[np.int64],
    texts: NDArray[np.int64],
    draws: int,
    seed: int,
) -> list[NDArray[np.float64]]:
    """The 2.5th and 97.5th percentiles, float64[2, k], of both recalls over resampled images.

    Images with the same row of hits are alike, so that what is drawn is how often each kind of
    image comes, which is a multinomial: the same law as drawing images one by one, at less cost.
    """
    columns = np.concatenate([image_hits, text_hits, texts[:, None]], 1)
    kinds, often = np.unique(columns, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(columns), often / len(columns), draws)
    sums, k = drawn @ kinds, image_hits.shape[1]
    shares = sums[:, :k] / len(columns), sums[:, k : 2 * k] / sums[:, [-1]]
    return [np.percentile(values, (2.5, 97.5), axis=0) for values in shares]
