"""Whether a confidence is right: of what is said with 0.9, nine in ten should be so.

Measured by bins (`calibration`), and mended by one number, or two, that are fitted on held-out
examples (`fit_scaling`). The order of confidences never changes, only their size.

Shapes: N example (a token, a word, a line, a classified image), K bin of confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

TEMPERATURES = (0.05, 20.0)
"""Within these a temperature is sought: where confidences part right from wrong without a fault,
the likelihood grows for ever towards 0."""
_FAR = 30.0
"""Log-odds beyond this, either way, are taken as this: fp32 knows no probability nearer to 1."""
_STEPS = 50
"""Halvings of an interval, after which it is narrower than fp64 resolves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Examples by their confidence, in K bins of equal width: [0, 1/K], (1/K, 2/K], ...,
    (1 - 1/K, 1]; what a reliability plot shows.

    edges: float64[K + 1]. count: int64[K]. confidence: float64[K], the mean confidence. accuracy:
    float64[K], the share of right ones. Both are NaN in empty bins.
    error: the expected calibration error (ECE), the mean over examples of their bin's
    |accuracy - confidence|, in 0 to 1. Source: Guo et al. 2017, "On Calibration of Modern Neural
    Networks", equation 3; its bins are 15.
    """

    edges: NDArray[np.float64]
    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    error: float


def calibration(confidence: ArrayLike, right: ArrayLike, bins: int = 15) -> Calibration:
    """How far confidences are from the share that is right.

    confidence: float[N] in 0 to 1. right: bool[N]. bins: how many.
    Raises ValueError for no examples, unequal lengths, confidences out of range, bins below 1.

    >>> round(calibration([0.9, 0.9, 0.6], [True, False, True], bins=2).error, 4)
    0.1333
    """
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, bool)
    if bins < 1:
        raise ValueError(f"bins: expected 1 or more, found {bins}")
    _check(confidence, right, "confidence")
    wrong = np.flatnonzero(~((confidence >= 0) & (confidence <= 1)))
    if len(wrong):
        raise ValueError(
            f"confidence: expected 0 to 1, found {confidence[wrong[0]]} for example {wrong[0]}"
        )
    edges = np.linspace(0, 1, bins + 1)
    bin_N = np.searchsorted(edges[1:-1], confidence, side="left")  # a bin holds its upper edge
    count = np.bincount(bin_N, minlength=bins)
    sums = np.bincount(bin_N, confidence, bins), np.bincount(bin_N, right, bins)
    return Calibration(
        edges=edges,
        count=count,
        confidence=means(sums[0], count),
        accuracy=means(sums[1], count),
        error=float(np.abs(sums[1] - sums[0]).sum() / len(right)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """From a raw confidence p to a calibrated one: sigmoid(logit(p) / temperature + offset).

    A temperature above 1 brings confidences nearer to one half, one below 1 away from it. With
    temperature 1 and offset 0 nothing changes.
    Source: Platt 1999, with logit(p) as the score; Guo et al. 2017, section 4.
    """

    temperature: float = 1.0
    offset: float = 0.0

    def __call__(self, log_confidence: ArrayLike) -> NDArray[np.float64]:
        """The confidences, float64[N] in 0 to 1, of raw ones given by their logarithms, 0 or less:
        a long text's probability may be too small to be held otherwise.

        >>> Scaling()(np.log([0.25, 1.0])).round(6).tolist()
        [0.25, 1.0]
        >>> Scaling(temperature=2)(np.log([0.9])).round(6).tolist()
        [0.75]
        """
        return _sigmoid(_logit(log_confidence) / self.temperature + self.offset)


@dataclass(frozen=True, kw_only=True, slots=True)
class Temperatures:
    """What log-odds of confidences are divided by, so that they say how often they are right:
    fitted on held-out lines; 1 leaves the model's own. For lines and for tokens each its own."""

    line: float = 1.0
    token: float = 1.0


UNFITTED = Temperatures()
"""Confidences as the model says them."""


def fit_scaling(log_confidence: ArrayLike, right: ArrayLike, *, offset: bool = False) -> Scaling:
    """The scaling that makes held-out examples most likely, in nats.

    log_confidence: float[N], logarithms of raw confidences, 0 or less; log-odds beyond +-30 are
    taken as that. right: bool[N]. offset: whether one is fitted too, or is 0.
    The loss is convex in 1 / temperature and offset, so that what is found is the best within
    TEMPERATURES.
    Raises ValueError for no examples, unequal lengths, logarithms above 0 or NaN, and where all
    examples are right or all are wrong: any confidence would then do better by growing.

    >>> round(fit_scaling(np.log([0.9] * 4), [True, True, True, False]).temperature, 4)
    2.0
    """
    right = np.asarray(right, bool)
    logits = _logit(log_confidence)
    _check(logits, right, "log_confidence")
    if right.all() or not right.any():
        kind = "right" if right.all() else "wrong"
        raise ValueError(f"right: expected examples of both kinds, found all {len(right)} {kind}")

    def shift(slope: float) -> float:
        """The best offset at a slope."""
        if not offset:
            return 0.0
        far = _FAR * (1 + slope)
        return _root(lambda b: float((_sigmoid(slope * logits + b) - right).mean()), -far, far)

    def steepness(slope: float) -> float:
        """The loss's derivative by the slope, at the slope's best offset."""
        return float(((_sigmoid(slope * logits + shift(slope)) - right) * logits).mean())

    slope = _root(steepness, 1 / TEMPERATURES[1], 1 / TEMPERATURES[0])
    return Scaling(temperature=1 / slope, offset=shift(slope))


def means(sums: NDArray, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums over counts, NaN where there is none."""
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def _root(rising, low: float, high: float) -> float:
    """Where a function that never falls crosses 0, or the end that is nearest to it."""
    if rising(low) >= 0:
        return low
    if rising(high) <= 0:
        return high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def _logit(log_confidence: ArrayLike) -> NDArray[np.float64]:
    """log p - log(1 - p) from log p, without the loss of digits near 0 and 1."""
    log_p = np.asarray(log_confidence, np.float64)
    bad = np.flatnonzero(~(log_p <= 0))
    if len(bad):
        raise ValueError(
            f"log_confidence: expected 0 or less, found {log_p.flat[bad[0]]} for example {bad[0]}"
        )
    log_less = np.log(np.maximum(-np.expm1(log_p), np.exp(-_FAR)))
    return np.maximum(log_p, -_FAR) - log_less


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def _check(values: NDArray, right: NDArray[np.bool_], name: str) -> None:
    if values.ndim != 1 or values.shape != right.shape or not len(values):
        raise ValueError(
            f"{name} and right: expected two equally long lists, not empty, found shapes "
            f"{list(values.shape)} and {list(right.shape)}"
        )


def apply_temperature(logprob: float, temperature: float) -> float:
    """The probability whose log-odds are those of exp(logprob), divided by `temperature`.

    >>> round(apply_temperature(math.log(0.9), 2.0), 4)
    0.75
    >>> apply_temperature(0.0, 2.0), apply_temperature(-800.0, 0.5)
    (1.0, 0.0)
    """
    if logprob >= 0.0:
        return 1.0
    log_odds = logprob - math.log(-math.expm1(logprob))
    small = math.exp(-abs(log_odds) / temperature)
    return (1.0 if log_odds >= 0 else small) / (1 + small)
