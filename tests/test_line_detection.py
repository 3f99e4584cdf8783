"""Lines on pages: each found once, whole, in the caller's pixels (no image is square)."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps
from skimage import data

from tests.pages import DEJAVU, PARAGRAPH, draw_lines, overlap
from vlm.ocr.line_detection.detect import cut, find_lines, runs_sideways
from vlm.ocr.reading_order import order

PAGE_WIDTHS = (288, 370, 370, 370, 370, 165, 223)
"""Of the lines of skimage.data.page(), in pixels, by eye."""


def test_every_line_is_found_with_its_ascenders_and_descenders():
    image, true = draw_lines(PARAGRAPH, px=24)
    found = find_lines(image)
    assert len(found) == len(true)
    for one, box in zip(found, true):
        assert np.abs(np.subtract(one.xyxy_px, box)).max() <= 2


@pytest.mark.parametrize("px", [11, 16, 40, 90])
def test_type_of_any_size_is_found(px):
    image, true = draw_lines(PARAGRAPH[:3], px)
    found = find_lines(image)
    assert len(found) == len(true)
    assert min(overlap(one.xyxy_px, box) for one, box in zip(found, true)) > 0.7


def test_large_and_small_type_stand_on_one_page():
    image, _ = draw_lines(PARAGRAPH, px=18, top=200)
    pen = ImageDraw.Draw(image)
    pen.text((30, 30), "Large type", fill="black", font=ImageFont.truetype(DEJAVU, 110))
    found = find_lines(image)
    assert len(found) == len(PARAGRAPH) + 1
    assert found[0].size_px[1] > 80


@pytest.mark.parametrize("degrees", [-4, -1.5, 2, 4])
def test_turned_page_gives_corners_along_its_lines(degrees):
    image, true = draw_lines(PARAGRAPH, px=24)
    turned = image.rotate(-degrees, Image.Resampling.BICUBIC, expand=True, fillcolor="white")
    found = find_lines(turned)
    assert len(found) == len(true)
    middle = np.array(image.size) / 2
    angle = math.radians(degrees)  # clockwise, as y goes down
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    for one, (x0, y0, x1, y1) in zip(sorted(found, key=lambda f: f.corners_px[0][1]), true):
        expected = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]) - middle
        expected = expected @ turn.T + np.array(turned.size) / 2
        assert np.abs(np.array(one.corners_px) - expected).max() < 4
        assert cut(turned, one).height < 1.6 * (y1 - y0)


def test_light_text_on_a_dark_page_is_found_as_dark_on_light():
    image, true = draw_lines(PARAGRAPH, px=24)
    found = find_lines(ImageOps.invert(image))
    assert len(found) == len(true)
    assert min(overlap(one.xyxy_px, box) for one, box in zip(found, true)) > 0.8


def test_light_text_in_a_dark_box_is_found_once():
    image, true = draw_lines(PARAGRAPH, px=24)
    x0, y0, x1, y1 = (round(value) for value in true[1])
    box = (x0 - 12, y0 - 5, x1 + 30, y1 + 5)
    image.paste(ImageOps.invert(image.crop(box)), box)
    found = find_lines(image)
    assert len(found) == len(true)
    assert overlap(found[1].xyxy_px, true[1]) > 0.8


def test_uneven_light_and_noise_hide_no_line():
    image, true = draw_lines(PARAGRAPH, px=24)
    grey = np.asarray(image.convert("L")).astype(np.float32)
    x = np.linspace(0.35, 1.0, grey.shape[1])[None]
    noise = np.random.default_rng(0).normal(0, 8, grey.shape)
    worn = Image.fromarray(np.clip(grey * x + noise, 0, 255).astype(np.uint8)).convert("RGB")
    found = find_lines(worn)
    assert len(found) == len(true)
    assert min(overlap(one.xyxy_px, box) for one, box in zip(found, true)) > 0.7


def test_lines_of_two_columns_are_two_lines():
    left, true = draw_lines(PARAGRAPH, px=20, width=620)
    both = Image.new("RGB", (2 * left.width - 60, left.height), "white")
    both.paste(left, (left.width - 60, 0))
    both.paste(left.crop((0, 0, left.width - 60, left.height)), (0, 0))
    assert len(find_lines(both)) == 2 * len(true)


def test_image_beside_text_adds_no_line_to_it():
    image, true = draw_lines(PARAGRAPH, px=20, left=260)
    photo = Image.fromarray(data.camera()).resize((200, 180)).convert("RGB")
    image.paste(photo, (20, 30))
    found = [one for one in find_lines(image) if one.xyxy_px[0] >= 240]
    assert len(found) == len(true)
    assert min(overlap(one.xyxy_px, box) for one, box in zip(found, true)) > 0.8


@pytest.mark.parametrize("colour", ["white", "black", (120, 90, 60)])
def test_blank_page_has_no_lines(colour):
    assert find_lines(Image.new("RGB", (300, 400), colour)) == []
    noise = np.random.default_rng(1).normal(0, 4, (400, 300))
    grey = np.asarray(Image.new("RGB", (300, 400), colour).convert("L")).astype(np.float32)
    noisy = Image.fromarray(np.clip(grey + noise, 0, 255).astype(np.uint8)).convert("RGB")
    assert find_lines(noisy) == []


@pytest.mark.parametrize("text", ["x", "7", "One line, with gaps: y", "jump"])
def test_image_of_one_line_gives_one_line(text):
    image, _ = draw_lines([text], px=32)
    assert len(find_lines(image)) == 1


@pytest.mark.parametrize("size", [(1, 1), (2, 900), (900, 2), (5, 5), (20000, 5)])
def test_images_of_any_shape_are_taken(size):
    assert find_lines(Image.new("RGB", size, "white")) == []


@pytest.mark.parametrize("degrees", [0, -4, -2, 1, 4])
def test_photographed_page_gives_its_lines(degrees):
    """skimage.data.page(): six lines of a book and one of code, curved, under uneven light, and the
    upper half of an eighth at its edge."""
    page = Image.fromarray(data.page()).convert("RGB")
    page = page.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=(200, 200, 200))
    found = order(find_lines(page))
    assert len(found) in (7, 8)
    heights = [one.size_px[1] for one in found]
    assert heights[0] == max(heights)  # the heading
    widths = [one.size_px[0] for one in found[:7]]
    assert np.abs(np.subtract(widths, PAGE_WIDTHS)).max() < 12


def test_cut_of_a_level_line_is_the_pixels_themselves():
    image, _ = draw_lines(PARAGRAPH, px=24)
    one = find_lines(image)[2]
    line = cut(image, one, margin=0)
    x0, y0, x1, y1 = one.xyxy_px
    box = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
    assert np.array_equal(line, image.crop(box))
    wide = cut(image, one, margin=0.5)
    assert wide.height == pytest.approx(2 * line.height, abs=2)


def test_text_turned_by_90_degrees_runs_sideways():
    image, _ = draw_lines(PARAGRAPH, px=24)
    assert not runs_sideways(image)
    for turn in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270):
        assert runs_sideways(image.transpose(turn))
    assert not runs_sideways(Image.new("RGB", (50, 300), "white"))
