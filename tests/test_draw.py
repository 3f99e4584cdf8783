"""Queries beside their hits, and confidence; boxes are drawn in test_ground."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from vlm.draw import GREEN, Hit, draw_hits, draw_reliability
from vlm.metrics.classification import classification

LONG = "a very long caption of many words that does not fit " * 8


def colours(page):
    return {tuple(pixel) for pixel in np.asarray(page).reshape(-1, 3)}


def test_hits_stand_beside_their_queries_the_right_ones_framed(tmp_path):
    red, blue = (
        Image.new("RGB", size, name) for size, name in (((30, 90), "red"), ((8, 8), "blue"))
    )
    queries = ["犬 $x$ [b]", red]
    hits = [
        [Hit(blue, 0.5, True), Hit(red, -0.25, False)],
        [Hit(LONG, 0.1, False), Hit("", 0, True)],
    ]
    draw_hits(queries, hits, tmp_path / "a.png", ["rank 1", LONG], cell_px=100)
    page = np.asarray(Image.open(tmp_path / "a.png"))
    assert page.shape[1] > 3 * 100
    assert page.shape[0] > 2 * 100
    is_blue = (page == (0, 0, 255)).all(2)
    assert is_blue.sum() >= 90 * 90
    ys, xs = np.nonzero(is_blue)
    green = tuple(int(GREEN[i : i + 2], 16) for i in (1, 3, 5))
    assert tuple(page[ys[0] + 50, xs.min() - 2]) == green
    reds = (page == (255, 0, 0)).all(2)
    assert reds[:, : page.shape[1] // 3].sum() == reds[:, page.shape[1] // 3 :].sum() > 0


def test_hits_of_unknown_truth_are_not_marked(tmp_path):
    for right in (None, True):
        draw_hits([tiny.image(0)], [[Hit("a", 0.5, right)]], tmp_path / f"{right}.png")
    green = tuple(int(GREEN[i : i + 2], 16) for i in (1, 3, 5))
    found = [green in colours(Image.open(tmp_path / f"{right}.png")) for right in (None, True)]
    assert found == [False, True]


def test_transparent_and_grey_images_are_drawn(tmp_path):
    for mode in ("RGBA", "L", "P", "1", "CMYK"):
        draw_hits(["a"], [[Hit(Image.new(mode, (3, 500)), 1.0, False)]], tmp_path / "a.png")
    draw_hits(["a", "b"], [[], [Hit("b", 1.0)]], tmp_path / "a.png")


def test_queries_without_hits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected queries with hits and notes, found 1, 0, 1"):
        draw_hits(["a"], [], tmp_path / "a.png")
    with pytest.raises(ValueError, match="found 0, 0, 0"):
        draw_hits([], [], tmp_path / "a.png")


def test_reliability_of_any_bins_is_drawn(tmp_path):
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.45, 0.55]])
    for bins in (1, 15):
        measured = classification(scores, torch.tensor([0, 1, 0]), scale=None, bins=bins)
        draw_reliability(measured.calibration, "runs/$x on [data]", tmp_path / "a.png")
        page = np.asarray(Image.open(tmp_path / "a.png"))
        assert page.shape[0] > page.shape[1] > 300
        assert (page[..., :3].max(2) < 255).mean() > 0.01
