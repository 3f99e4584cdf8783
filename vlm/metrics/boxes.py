"""How well predicted boxes meet true ones: overlap, accuracy of phrases, COCO's average precision.

Boxes are x0, y0, x1, y1 on pixel edges, the end exclusive, so that a box of one pixel has area 1.

Shapes: M predicted box, N true box, C phrase.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm.compat.extras import needs

with needs("eval"):  # here, so that boxes are not predicted first
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval


def iou(predicted_xyxy_px: ArrayLike, true_xyxy_px: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of every pair of boxes, float64[M, N] in 0 to 1; 0 where both boxes
    are empty.

    >>> iou([[0, 0, 2, 2]], [[1, 0, 3, 2], [5, 5, 6, 6]]).round(3).tolist()
    [[0.333, 0.0]]
    """
    predicted, true = _boxes(predicted_xyxy_px), _boxes(true_xyxy_px)
    start = np.maximum(predicted[:, None, :2], true[None, :, :2])
    end = np.minimum(predicted[:, None, 2:], true[None, :, 2:])
    common = (end - start).clip(min=0).prod(-1)
    union = _areas(predicted)[:, None] + _areas(true)[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def phrases_found(
    predicted_xyxy_px: Sequence[ArrayLike],
    scores: Sequence[ArrayLike],
    true_xyxy_px: Sequence[ArrayLike],
    threshold: float = 0.5,
) -> NDArray[np.bool_]:
    """Which phrases are found: the best-scored predicted box overlaps a true one by at least
    `threshold` (intersection over union), bool[C].

    One entry for each phrase: boxes float[M, 4], their scores float[M] and the true boxes
    float[N, 4], N at least 1. Only the one box with the highest score counts (the first of equal
    ones), so that writing many boxes does not help; of several true boxes any will do. A phrase
    without a predicted box is not found. Their mean is "accuracy at IoU 0.5", which for one true
    box is the measure of RefCOCO (Yu et al. 2016, section 5).
    """
    found = np.zeros(len(true_xyxy_px), bool)
    for i, (boxes, score, true) in enumerate(
        zip(predicted_xyxy_px, scores, true_xyxy_px, strict=True)
    ):
        if not len(true):
            raise ValueError(f"phrase {i}: expected a true box, found none")
        if len(boxes) != len(score):
            raise ValueError(f"phrase {i}: found {len(boxes)} boxes and {len(score)} scores")
        if len(boxes):
            best = int(np.argmax(score))
            found[i] = iou([boxes[best]], true).max() >= threshold
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxTable:
    """Boxes of many images, a row each.

    image: int64[N], which image. label: int64[N], which category; both any numbers.
    boxes_xyxy_px: float64[N, 4]. score: float64[N] of predicted boxes; None for true ones.
    crowd: bool[N] of true boxes, regions of many things; None: there are none.
    Raises ValueError naming lengths or a shape that does not fit.
    """

    image: NDArray[np.int64]
    label: NDArray[np.int64]
    boxes_xyxy_px: NDArray[np.float64]
    score: NDArray[np.float64] | None = None
    crowd: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"expected columns of one length, found {lengths}")
        _boxes(self.boxes_xyxy_px)


def coco_precision(true: BoxTable, predicted: BoxTable, max_boxes: int = 100) -> dict[str, float]:
    """COCO's average precision of boxes in all sizes: ap, ap50 and ap75, each in 0 to 1.

    ap is the mean over IoU 0.5 to 0.95 and over the categories that have a true box. Of one
    image and category the `max_boxes` best-scored boxes count. Boxes on a crowd are neither
    right nor wrong.
    Computed by pycocotools, one category at a time: what it holds in memory is that of the largest
    category, not of the whole set.
    Raises ValueError where no true box is left that is not a crowd, or a score is missing or NaN.
    """
    if predicted.score is None or not np.isfinite(predicted.score).all():
        raise ValueError("expected a finite score for every predicted box")
    crowd = np.zeros(len(true.image), bool) if true.crowd is None else true.crowd
    labels = np.unique(true.label[~crowd])
    if not len(labels):
        raise ValueError("expected a true box that is not a crowd, found none")
    by_label = np.stack([_precision_by_iou(true, predicted, crowd, k, max_boxes) for k in labels])
    precision = by_label.mean(0)
    return {"ap": precision.mean().item(), "ap50": precision[0].item(), "ap75": precision[5].item()}


def _precision_by_iou(
    true: BoxTable, predicted: BoxTable, crowd: NDArray, label: int, max_boxes: int
) -> NDArray[np.float64]:
    """Average precision of one category at IoU 0.5, 0.55, ..., 0.95: float64[10]."""
    theirs, ours = (table.label == label for table in (true, predicted))
    images = np.union1d(true.image[theirs], predicted.image[ours])
    sets = []
    for table, chosen in ((true, theirs), (predicted, ours)):
        x0, y0, x1, y1 = table.boxes_xyxy_px[chosen].T
        columns = {
            "image_id": np.searchsorted(images, table.image[chosen]),
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": crowd[chosen].astype(int) if table is true else np.zeros(len(x0), int),
        }
        if table is predicted:
            columns["score"] = table.score[chosen]
        boxes = np.stack([x0, y0, x1 - x0, y1 - y0], 1).tolist()
        annotations = [
            # pycocotools takes the id of a match for its truth: 0 would be no match
            {"id": i + 1, "category_id": 1, "bbox": box, **dict(zip(columns, values))}
            for i, (box, values) in enumerate(
                zip(boxes, zip(*(column.tolist() for column in columns.values())))
            )
        ]
        sets.append(COCO())
        sets[-1].dataset = {
            "images": [{"id": i} for i in range(len(images))],
            "categories": [{"id": 1}],
            "annotations": annotations,
        }
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on every step
        for made in sets:
            made.createIndex()
        evaluator = COCOeval(*sets, "bbox")
        evaluator.params.maxDets = [max_boxes]
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"][:, :, 0, 0, 0].mean(1)


def _boxes(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.size == 0:
        return np.empty((0, 4))
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes must have shape [N, 4], found {list(array.shape)}")
    return array


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(1)
