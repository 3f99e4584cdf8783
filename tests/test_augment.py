"""Laws of augmentation: pixels and boxes move together, and a seed decides everything."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests import tiny, training
from vlm.data.augment import LIGHT, STRONG
from vlm.data.example import BadRow, Box, Example, Turn

MARKED = (30, 12, 47, 25)


def marked_image(size_wh=(90, 60)):
    """A green box on grey, so that the box can be found again in the pixels."""
    image = Image.new("RGB", size_wh, (120, 120, 120))
    image.paste((0, 255, 0), MARKED)
    return image


def marked_example():
    turn = Turn("user", (None, "where?"))
    return Example(
        "row", (turn, Turn("assistant", (0,))), (marked_image(),), (Box(0, MARKED, "g"),)
    )


@pytest.mark.parametrize("seed", range(30))
def test_box_stays_on_its_pixels(seed):
    still = replace(STRONG, colour=0.0, hue=0.0, degrade=0.0)
    seen = still(marked_example(), seed)
    pixels = np.asarray(seen.images[0]).astype(int)
    rows, columns = np.nonzero((pixels[..., 1] > 250) & (pixels[..., 0] < 5))
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert seen.boxes[0].xyxy_px == found
    assert (found[2] - found[0], found[3] - found[1]) == (17, 13)  # the whole box is still there


def test_seed_decides_the_image():
    first, again, other = (STRONG(marked_example(), seed) for seed in (1, 1, 2))
    assert first.images[0].tobytes() == again.images[0].tobytes()
    assert first.images[0].tobytes() != other.images[0].tobytes()


def test_colours_and_sizes_change():
    seen = [LIGHT(tiny.example(images=(marked_image(),)), seed).images[0] for seed in range(8)]
    assert len({image.size for image in seen}) > 3
    assert len({image.getpixel((0, 0)) for image in seen}) > 3


def test_text_alone_is_left_as_it_is():
    plain = tiny.example(content=("say it",))
    assert STRONG(plain, 0) is plain


def test_box_outside_its_image_is_refused():
    """The window would grow until it holds the box, which then seems to lie within."""
    outside = replace(marked_example(), boxes=(Box(0, (30, 12, 130, 25), "g"),))
    with pytest.raises(BadRow, match=r"row: box 0 \('g'\): .* 90 × 60 pixels"):
        LIGHT(outside, 0)


@pytest.mark.parametrize("size_wh", [(1, 1), (1, 40), (2, 3)])
def test_smallest_images_can_be_changed(size_wh):
    degraded = replace(STRONG, degrade=1.0)
    plain = tiny.example(images=(Image.new("RGB", size_wh),))
    assert all(degraded(plain, seed).images[0].size for seed in range(8))


def test_resumed_run_sees_the_images_of_the_uninterrupted_one(tmp_path):
    """Augmentation depends on the sample's number alone."""
    data = training.dataset()
    data.augment = STRONG
    whole = [np.asarray(data[i].images[0]) for i in range(6) if data[i].images]
    again = [np.asarray(data[i].images[0]) for i in reversed(range(6)) if data[i].images]
    for a, b in zip(whole, reversed(again), strict=True):
        assert np.array_equal(a, b)


def test_large_image_is_shrunk_with_its_box():
    size_wh, box = (6000, 1500), (1800, 300, 2700, 900)
    image = Image.new("RGB", size_wh, (120, 120, 120))
    image.paste((0, 255, 0), box)
    example = replace(marked_example(), images=(image,), boxes=(Box(0, box, "g"),))
    seen = replace(STRONG, colour=0.0, hue=0.0, degrade=0.0)(example, 3)
    pixels = np.asarray(seen.images[0]).astype(int)
    rows, columns = np.nonzero((pixels[..., 1] > 200) & (pixels[..., 0] < 60))
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert max(seen.images[0].size) < 3000
    np.testing.assert_allclose(seen.boxes[0].xyxy_px, found, atol=1.0)
