"""How well scores tell classes apart: accuracy, and whether the confidence in it is right.

Ties: a wrong class whose score equals that of the right one comes before it, so that equal scores
never count as right and the order of classes does not matter. (vlm/metrics/retrieval.py does the
same.)

Shapes: N example, C class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vlm.metrics.calibration import Calibration, calibration, means
from vlm.metrics.share import Interval, wilson, with_ci

_SLICE = 1 << 22
"""How many scores are held in fp64 at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationResult:
    """How well examples are classified.

    top_1, top_5: the share of examples with fewer than 1 or 5 wrong classes that score at least as
    high as the right one, with Wilson's 95 % interval; of 5 classes or fewer, top_5 is 1.
    by_class: float64[C], top-1 accuracy of each class's examples, NaN without examples.
    mean_per_class: its mean over the classes that have examples.
    classes_without_examples: how many have none.
    calibration: of the best class's probability; right where top-1 is.
    """

    top_1: Interval
    top_5: Interval
    by_class: NDArray[np.float64]
    mean_per_class: float
    classes_without_examples: int
    examples: int
    calibration: Calibration

    def metrics(self) -> dict[str, Any]:
        """What stands in a report, for JSON: accuracy (top-1), accuracy_top5 and
        accuracy_mean_per_class, ece. n: how many examples."""
        return {
            "n": self.examples,
            "classes": len(self.by_class),
            "classes_without_examples": self.classes_without_examples,
            **with_ci("accuracy", self.top_1),
            **with_ci("accuracy_top5", self.top_5),
            "accuracy_mean_per_class": self.mean_per_class,
            "ece": self.calibration.error,
            "ece_bins": len(self.calibration.count),
        }


def classification(
    scores: Tensor | ArrayLike, labels: Tensor | ArrayLike, *, scale: float | None, bins: int = 15
) -> ClassificationResult:
    """Accuracy and calibration of the scores of every class for every example.

    scores: float[N, C]. labels: int64[N] in 0 to C - 1, the right class.
    scale: what scores are multiplied by before a softmax over classes makes probabilities of them
    (for cosines the model's own, the exponential of its log_scale); None: scores are
    probabilities.
    bins: how many bins of confidence.

    Raises ValueError for no examples or no classes, NaN or infinite scores (naming rows), labels of
    another length or out of range, a scale or a number of bins that is not above 0, and
    probabilities outside 0 to 1 or of a sum other than 1; TypeError for labels that are not whole
    numbers.
    """
    scores = scores.detach() if torch.is_tensor(scores) else torch.as_tensor(np.asarray(scores))
    labels = np.asarray(labels.cpu() if torch.is_tensor(labels) else labels)
    _check(scores, labels, scale, bins)
    above, confidence = np.empty(len(labels), np.int64), np.empty(len(labels))
    step = max(1, _SLICE // scores.shape[1])
    for start in range(0, len(labels), step):
        part = scores[start : start + step].cpu().double().numpy()
        _check_rows(part, start, scale)
        right = part[np.arange(len(part)), labels[start : start + step]]
        # the right class itself is one of those that score as high
        above[start : start + step] = (part >= right[:, None]).sum(1) - 1
        best = part.max(1)
        if scale is not None:  # the softmax at the best class
            best = 1 / np.exp(scale * (part - best[:, None])).sum(1)
        confidence[start : start + step] = best

    hit = above == 0
    examples = np.bincount(labels, minlength=scores.shape[1])
    hits = np.bincount(labels[hit], minlength=scores.shape[1])
    by_class = means(hits, examples)
    return ClassificationResult(
        top_1=wilson(int(hit.sum()), len(hit)),
        top_5=wilson(int((above < 5).sum()), len(hit)),
        by_class=by_class,
        mean_per_class=float(np.nanmean(by_class)),
        classes_without_examples=int((examples == 0).sum()),
        examples=len(hit),
        calibration=calibration(confidence, hit, bins),
    )


def _check(scores: Tensor, labels: NDArray, scale: float | None, bins: int) -> None:
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores: expected [examples, classes], found {list(scores.shape)}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels: expected whole numbers, found {labels.dtype}")
    if labels.shape != (len(scores),):
        raise ValueError(f"labels: expected shape [{len(scores)}], found {list(labels.shape)}")
    wrong = np.flatnonzero((labels < 0) | (labels >= scores.shape[1]))
    if len(wrong):
        raise ValueError(
            f"labels: expected 0 to {scores.shape[1] - 1}, found {labels[wrong[0]]} for example "
            f"{wrong[0]}" + (f" and {len(wrong) - 1} more out of range" if len(wrong) > 1 else "")
        )
    if bins < 1:
        raise ValueError(f"bins: expected 1 or more, found {bins}")
    if scale is not None and not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: expected a number above 0, found {scale}")


def _check_rows(scores: NDArray[np.float64], start: int, scale: float | None) -> None:
    bad = np.flatnonzero(~np.isfinite(scores).all(1))
    if len(bad):
        raise ValueError(f"scores: NaN or infinity in row {start + bad[0]}")
    if scale is not None:
        return
    sums = scores.sum(1)
    bad = np.flatnonzero((scores < 0).any(1) | (scores > 1).any(1) | (np.abs(sums - 1) > 1e-3))
    if len(bad):
        low, high = scores[bad[0]].min(), scores[bad[0]].max()
        raise ValueError(
            "scores: without a scale expected probabilities, which add up to 1; found "
            f"{low:.4g} to {high:.4g} with the sum {sums[bad[0]]:.4g} in row "
            f"{start + bad[0]}"
        )
