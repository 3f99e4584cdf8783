"""Boxes in pure arrays: what may be a true box, overlap, accuracy of phrases, COCO's precision."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vlm.data.boxes import check_box, check_boxes
from vlm.data.example import BadRow, Box
from vlm.metrics.boxes import BoxTable, coco_precision, iou, phrases_found
from vlm.metrics.share import wilson


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 0, 5), "four numbers, found"),
        ((0, 0, 5, "6"), "four numbers, found"),
        ((0, 0, float("nan"), 6), r"finite numbers, found \[0, 0, nan, 6\]"),
        ((0, 0, float("inf"), 6), "finite numbers"),
        ((5, 0, 3, 6), r"inverted box \[5, 0, 3, 6\] \(is it x, y, width, height"),
        ((5, 0, 5, 6), "x0 < x1 and y0 < y1, found .* without area"),
        ((0.1, 0.2, 0.5, 0.9), "fractions of it: multiply x by its width"),
        ((-3, 0, 5, 6), "inside its image, found"),
        ((0, 0, 66, 6), r"inside its image of 60 × 40 pixels \(width × height\), found"),
        ((0, 0, 6, 45), "not thousandths"),
        ((-1, 0, 0, 6), "beside it"),
        ((60, 0, 60.5, 6), "beside it"),
    ],
)
def test_box_that_cannot_be_true_is_named(box, message):
    with pytest.raises(BadRow, match=f"^row 7: expected .*{message}"):
        check_box(box, "row 7", (40, 60))


def test_box_is_cut_where_rounding_put_it_beyond_the_border():
    assert check_box((-0.01, 3, 60.4, 40.0), "row", (40, 60)) == (0.0, 3.0, 60.0, 40.0)
    assert check_box((3, 4, 900, 800), "row") == (3.0, 4.0, 900.0, 800.0)  # size not known yet
    assert check_box((0, 0, 1, 1), "row", (1, 1)) == (0.0, 0.0, 1.0, 1.0)


def test_boxes_are_checked_against_their_own_image():
    boxes = Box(0, (0, 0, 9, 30), "tall"), Box(1, (0, 0, 30, 9), "wide")
    assert check_boxes(boxes, [(30, 9), (9, 30)], "row") == boxes
    with pytest.raises(BadRow, match=r"row 3: box 0 \('tall'\): expected a box inside"):
        check_boxes(boxes, [(9, 30), (30, 9)], "row 3")


def test_iou_of_hand_made_boxes():
    found = iou(
        [[0, 0, 4, 2], [1, 1, 1, 1]], [[0, 0, 4, 2], [2, 0, 6, 2], [4, 0, 8, 2], [0, 0, 2, 1]]
    )
    np.testing.assert_allclose(found, [[1, 4 / 12, 0, 2 / 8], [0, 0, 0, 0]])
    assert iou([], [[0, 0, 1, 1]]).shape == (0, 1)
    with pytest.raises(ValueError, match=r"shape \[N, 4\], found \[4\]"):
        iou([0, 0, 1, 1], [[0, 0, 1, 1]])


def random_boxes(generator, count):
    start = generator.uniform(0, 60, (count, 2))
    return np.concatenate([start, start + generator.uniform(1, 40, (count, 2))], 1)


def test_iou_equals_the_librarys():
    generator = np.random.default_rng(0)
    first, second = random_boxes(generator, 7), random_boxes(generator, 5)
    sized = [np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], 1) for b in (first, second)]
    theirs = mask.iou(*sized, np.zeros(5, np.uint8))
    np.testing.assert_allclose(iou(first, second), theirs, atol=1e-12)


def test_phrase_is_found_by_its_best_scored_box_alone():
    true = [[0, 0, 10, 10]]
    near, far = [0, 0, 10, 6], [20, 20, 30, 30]
    phrases = [
        ([near], [0.1], true, True),
        ([far, near], [0.2, 0.9], true, True),
        ([far, near], [0.9, 0.2], true, False),  # a second guess does not count
        ([far, near], [0.5, 0.5], true, False),  # of equal scores, the first
        ([], [], true, False),
        ([[0, 0, 10, 5]], [1.0], true, True),  # exactly one half
        ([[0, 0, 10, 4.9]], [1.0], true, False),
        ([far], [1.0], [[0, 0, 10, 10], far], True),  # any of several true boxes
    ]
    *columns, expected = zip(*phrases)
    assert phrases_found(*columns).tolist() == list(expected)
    with pytest.raises(ValueError, match="phrase 0: expected a true box"):
        phrases_found([[near]], [[1.0]], [[]])


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_interval_equals_published_values(hits, count, low, high):
    interval = wilson(hits, count)
    assert interval == pytest.approx((hits / count, low, high), abs=1e-4)
    with pytest.raises(ValueError, match="count >= 1, found 0 and 0"):
        wilson(0, 0)


def table(rows, crowd=None):
    """A table of (image, label, box, score) rows."""
    image, label, boxes, score = zip(*rows) if rows else ((), (), (), ())
    return BoxTable(
        image=np.array(image, int),
        label=np.array(label, int),
        boxes_xyxy_px=np.array(boxes, float).reshape(-1, 4),
        score=np.array(score, float),
        crowd=None if crowd is None else np.array(crowd, bool),
    )


def test_perfect_detector_has_precision_one_and_a_silent_one_none():
    true = table([(0, 3, (0, 0, 5, 5), 1), (0, 3, (9, 9, 12, 14), 1), (8, 0, (1, 1, 4, 9), 1)])
    assert coco_precision(true, true) == pytest.approx({"AP": 1.0, "AP50": 1.0, "AP75": 1.0})
    assert coco_precision(true, table([])) == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}


def test_precision_of_a_hand_made_case():
    """One of two boxes is found at IoU 0.61, and a better-scored box is wrong: precision 1/2 up to
    recall 1/2 (51 of 101 recall points), at 3 of the 10 thresholds."""
    true = table([(0, 0, (0, 0, 10, 10), 1), (0, 0, (50, 50, 60, 60), 1)])
    found = table([(0, 0, (0, 0, 10, 6.1), 0.5), (0, 0, (80, 80, 90, 90), 0.9)])
    at_50 = 0.5 * 51 / 101
    assert coco_precision(true, found) == pytest.approx(
        {"AP": at_50 * 3 / 10, "AP50": at_50, "AP75": 0.0}
    )


def test_box_on_a_crowd_is_neither_right_nor_wrong():
    rows = [(0, 0, (0, 0, 10, 10), 1), (0, 0, (20, 0, 90, 90), 1)]
    found = table([(0, 0, (0, 0, 10, 10), 0.5), (0, 0, (30, 30, 40, 40), 0.9)])
    assert coco_precision(table(rows, [False, True]), found)["AP"] == pytest.approx(1.0)
    assert coco_precision(table(rows[:1]), found)["AP"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="that is not a crowd, found none"):
        coco_precision(table(rows, [True, True]), found)


def test_box_on_a_image_without_that_category_is_wrong():
    true = table([(0, 0, (0, 0, 10, 10), 1), (5, 1, (0, 0, 10, 10), 1)])
    found = table([*[(i, 0, (0, 0, 10, 10), 0.9 - i) for i in (0, 5)], (5, 1, (0, 0, 10, 10), 1)])
    assert coco_precision(true, found)["AP"] == pytest.approx(1.0)  # it comes last
    found.score[1] = 0.95
    assert coco_precision(true, found)["AP"] == pytest.approx(0.75)


def library_precision(true, predicted):
    """All categories at once, as pycocotools itself is used."""
    sized = [np.c_[t.boxes_xyxy_px[:, :2], t.boxes_xyxy_px[:, 2:] - t.boxes_xyxy_px[:, :2]]
             for t in (true, predicted)]  # fmt: skip
    annotations = [
        {"id": i + 1, "image_id": int(true.image[i]), "category_id": int(true.label[i]),
         "bbox": box.tolist(), "area": float(box[2] * box[3]), "iscrowd": int(true.crowd[i])}
        for i, box in enumerate(sized[0])
    ]  # fmt: skip
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": int(i)} for i in np.unique(true.image)],
        "categories": [{"id": int(k)} for k in np.unique(true.label)],
        "annotations": annotations,
    }
    results = np.c_[predicted.image, sized[1], predicted.score, predicted.label]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return dict(zip(("AP", "AP50", "AP75"), judge.stats[:3].tolist()))


@pytest.mark.parametrize("seed", range(3))
def test_precision_one_category_at_a_time_equals_the_librarys(seed):
    """Images with several boxes, and one with 110; boxes that are moved, missed, mislabelled and
    doubled; crowds."""
    generator = np.random.default_rng(seed)
    boxes, count = random_boxes(generator, 60), 60
    rows = [(i % 9, generator.integers(4) * 10, boxes[i], 1) for i in range(count)]
    true = table(rows, generator.random(count) < 0.15)
    guesses = [(2, 10, box, generator.random() / 9) for box in random_boxes(generator, 110)]
    for j in generator.integers(0, count, 80):
        image, label, box, _ = rows[j]
        moved = box + generator.normal(0, 1.5, 4)
        moved[2:] = np.maximum(moved[2:], moved[:2] + 0.1)
        label = label if generator.random() < 0.8 else 20
        guesses.append((image, label, moved, generator.random()))
    found = table(guesses)
    ours = coco_precision(true, found)
    assert ours == pytest.approx(library_precision(true, found), abs=1e-12)
    assert 0.05 < ours["AP"] < 0.95


def test_tables_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"columns of one length, found .*'label': 2"):
        BoxTable(image=np.zeros(1, int), label=np.zeros(2, int), boxes_xyxy_px=np.zeros((1, 4)))
    true = table([(0, 0, (0, 0, 1, 1), 1)])
    with pytest.raises(ValueError, match="a finite score for every predicted box"):
        coco_precision(true, table([(0, 0, (0, 0, 1, 1), float("nan"))]))
