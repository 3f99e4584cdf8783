"""Laws of the resize record: forward and back, on images that are not square."""

import numpy as np
import pytest

from tests.boxes import CROP, PAD, RECORDS, STRETCH, random_boxes
from vlm.geometry import Resize


@RECORDS
def test_boxes_return_to_the_input_image(record):
    boxes = random_boxes(record.input_hw)
    np.testing.assert_allclose(record.invert_boxes(record.boxes(boxes)), boxes, atol=1e-9)
    np.testing.assert_allclose(record.boxes(record.invert_boxes(boxes)), boxes, atol=1e-9)


@RECORDS
def test_points_return_to_the_input_image(record):
    points = random_boxes(record.input_hw)[:, :2]
    np.testing.assert_allclose(record.invert_points(record.points(points)), points, atol=1e-9)


@RECORDS
def test_boxes_are_pairs_of_points(record):
    boxes = random_boxes(record.input_hw)
    assert np.array_equal(record.boxes(boxes)[:, :2], record.points(boxes[:, :2]))
    assert np.array_equal(record.boxes(boxes)[:, 2:], record.points(boxes[:, 2:]))


def test_whole_image_fills_the_output_when_stretched():
    H, W = STRETCH.input_hw
    np.testing.assert_allclose(STRETCH.boxes([[0, 0, W, H]]), [[0, 0, 336, 224]])


def test_padding_shifts_the_image_and_cropping_shifts_it_back():
    np.testing.assert_allclose(PAD.boxes([[0, 0, 300, 451]]), [[64, 0, 319, 384]])
    np.testing.assert_allclose(CROP.points([[0, 0]]), [[-88, 0]])


def test_clipped_boxes_stay_inside_the_input_image():
    whole_output = [[0, 0, 384, 384], [0, 0, 60, 384]]
    np.testing.assert_allclose(
        PAD.invert_boxes(whole_output, clip=True), [[0, 0, 300, 451], [0, 0, 0, 451]]
    )
    assert PAD.invert_boxes(whole_output)[0, 0] < 0


def test_two_resizes_in_a_row_equal_their_composition():
    second = Resize((384, 384), (96, 128), (1 / 3, 0.25), (0.0, 5.0))
    boxes = random_boxes(PAD.input_hw)
    np.testing.assert_allclose(PAD.then(second).boxes(boxes), second.boxes(PAD.boxes(boxes)))
    with pytest.raises(ValueError, match=r"\(300, 451\).*\(384, 384\)"):
        PAD.then(STRETCH)


def test_no_boxes_give_an_empty_table():
    assert PAD.boxes([]).shape == (0, 4)
    assert PAD.invert_points(np.empty((0, 2))).shape == (0, 2)


@pytest.mark.parametrize("values", [[1, 2, 3, 4], [[1, 2, 3]], np.zeros((2, 2, 4))])
def test_boxes_of_a_wrong_shape_are_refused(values):
    with pytest.raises(ValueError, match=r"boxes must have shape \[N, 4\], found"):
        PAD.boxes(values)


def test_records_refuse_sizes_and_scales_that_are_not_positive():
    with pytest.raises(ValueError, match=r"scale_xy must be two positive numbers, found \(0.0, 1"):
        Resize((4, 4), (4, 4), (0.0, 1.0), (0.0, 0.0))
    with pytest.raises(ValueError, match="offset_xy"):
        Resize((4, 4), (4, 4), (1.0, 1.0), (float("nan"), 0.0))
