"""Reading order: columns from left to right, lines from top to bottom, headings above columns."""

import math
import random

import pytest

from vlm.ocr.line_detection.detect import Found
from vlm.ocr.reading_order import order


def line(x0, y0, x1, y1, degrees=0.0):
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    corners = ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    return Found(tuple((x * cos - y * sin, x * sin + y * cos) for x, y in corners))


def column(x0, x1, top, count, step=30, height=20, **options):
    return [line(x0, top + k * step, x1, top + k * step + height, **options) for k in range(count)]


def is_kept(lines):
    """Whether lines in reading order come back in it from any other."""
    mixed = list(lines)
    random.Random(0).shuffle(mixed)
    return order(mixed) == list(lines)


def test_one_column_is_read_from_top_to_bottom():
    assert is_kept(column(0, 300, 0, 9))
    assert order([]) == []


@pytest.mark.parametrize("degrees", [0.0, -4.0, 4.0])
def test_columns_are_read_one_after_another(degrees):
    left, right = (column(x, x + 300, 50, 12, degrees=degrees) for x in (0, 330))
    assert is_kept([*left, *right])


def test_columns_of_unlike_length_and_offset_lines():
    assert is_kept([*column(0, 300, 40, 12), *column(330, 600, 52, 5)])
    assert is_kept([*column(0, 300, 52, 5), *column(330, 600, 40, 12)])


def test_heading_over_columns_is_read_first_and_one_between_parts_them():
    title = line(100, 0, 500, 40)
    upper = [*column(0, 280, 60, 4), *column(320, 600, 60, 4)]
    heading = line(0, 190, 600, 215)
    lower = [*column(0, 280, 230, 4), *column(320, 600, 230, 4)]
    assert is_kept([title, *upper, heading, *lower])


def test_page_number_between_columns_is_read_last():
    columns = [*column(0, 280, 60, 6), *column(320, 600, 60, 6)]
    assert is_kept([*columns, line(294, 280, 306, 300)])
    assert is_kept([line(294, 0, 306, 20), *columns])
    assert is_kept([*columns, line(270, 280, 300, 300)])  # below the left column's end as well


def test_three_columns_with_short_last_lines():
    columns = []
    for x in (0, 220, 440):
        columns += [*column(x, x + 200, 0, 5), line(x, 150, x + 60, 170)]
    assert is_kept(columns)


def test_pieces_of_one_row_are_read_from_left_to_right():
    rows = []
    for k in range(4):
        y = 30 * k
        rows += [line(0, y, 300, y + 20)]
    last = [line(0, 120, 100, 140), line(150, 121, 300, 139)]
    assert is_kept([*rows, *last])
