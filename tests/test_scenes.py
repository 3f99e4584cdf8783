"""Scenes: what is said of an image is what was drawn."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from vlm.data.sources import BadSource, open_source
from vlm.data.synthetic.scene import (
    BACKGROUNDS,
    COLOURS,
    HELD_BACK,
    KINDS,
    Background,
    Scene,
    Shape,
    draw,
    exact_box,
)
from vlm.data.synthetic.scene_text import caption, questions, relation
from vlm.data.synthetic.scenes import Scenes

WHITE = Background("plain", (255, 255, 255), (255, 255, 255), 0)
PUBLISHED = [("green square", (167, 64, 209, 106))]  # of Scenes(1, seed=0)


def test_scene_bytes_follow_from_seed_and_row_alone():
    first, second = Scenes(20, seed=3), Scenes(10, seed=3)
    for row in (9, 0, 4):
        assert first[row].images[0].data == second[row].images[0].data
        assert first[row].turns == second[row].turns
    assert Scenes(20, seed=4)[0].images[0].data != first[0].images[0].data


def test_scene_composition_stays_as_published():
    scene = Scenes(1, seed=0).scene(0)
    assert [(shape.label, shape.box_xyxy_px) for shape in scene.shapes] == PUBLISHED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extent", [10, 33, 70])
def test_box_of_a_lone_shape_is_where_the_image_changes(kind, extent):
    shape = Shape(kind, "blue", (7, 20, 7 + extent, 20 + extent))
    pixels = np.asarray(draw(Scene((100, 90), WHITE, (shape,))))
    rows, columns = np.nonzero((pixels != 255).any(-1))
    found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert np.abs(np.subtract(found, exact_box(shape))).max() <= 1


def test_image_holds_the_colour_of_every_shape_inside_its_box():
    source = Scenes(40, seed=1, size_hw=None)
    for row in range(len(source)):
        example = source[row]
        image = Image.open(io.BytesIO(example.images[0].data))
        assert (image.height, image.width) == source.scene(row).size_hw
        for box in example.boxes:
            x0, y0, x1, y1 = map(int, box.xyxy_px)
            assert 0 <= x0 < x1 <= image.width
            assert 0 <= y0 < y1 <= image.height
            inside = np.asarray(image)[y0:y1, x0:x1]
            assert (inside == COLOURS[box.label.split()[0]]).all(-1).any()


def test_shapes_do_not_touch():
    source = Scenes(40, seed=2, shapes=(4, 9))
    for row in range(len(source)):
        cover = np.zeros(source.scene(row).size_hw, int)
        for shape in source.scene(row).shapes:
            x0, y0, x1, y1 = shape.box_xyxy_px
            cover[y0:y1, x0:x1] += 1
        assert cover.max() == 1


def test_caption_names_every_shape_and_no_other():
    source = Scenes(60, seed=5, shapes=(1, 5))
    for row in range(len(source)):
        scene, text = source.scene(row), caption(source.scene(row))
        for colour in COLOURS:
            for kind in KINDS:
                shown = any(shape.label == f"{colour} {kind}" for shape in scene.shapes)
                assert (f"{colour} {kind}" in text) == shown


def test_caption_counts_equal_shapes():
    circles = tuple(Shape("circle", "red", (30 * k, 0, 30 * k + 20, 20)) for k in range(2))
    cross = Shape("cross", "orange", (70, 40, 90, 60))
    text = caption(Scene((100, 100), WHITE, (*circles, cross)))
    assert text == "two red circles and an orange cross"
    crosses = tuple(circle._replace(kind="cross") for circle in circles)
    assert caption(Scene((100, 100), WHITE, crosses)) == "two red crosses"


def test_relation_takes_the_axis_of_the_larger_distance():
    low = Shape("star", "red", (0, 80, 10, 90))
    high = Shape("ring", "blue", (20, 0, 30, 10))
    assert (relation(low, high), relation(high, low)) == ("below", "above")


def test_questions_have_one_answer_each_and_as_many_yes_as_no():
    source = Scenes(40, seed=6, shapes=(1, 9))
    for row in range(len(source)):
        asked = questions(source.scene(row))
        assert len({question.text for question in asked}) == len(asked)
        answers = [question.answer for question in asked if question.kind == "yes-no"]
        assert answers.count("yes") == answers.count("no")


def test_questions_count_and_find_what_was_drawn():
    shapes = Shape("star", "red", (0, 0, 20, 20)), Shape("ring", "blue", (70, 70, 90, 90))
    asked = {q.text: q.answer for q in questions(Scene((100, 100), WHITE, shapes))}
    assert asked["How many shapes are there?"] == "2"
    assert asked["What colour is the star?"] == "red"
    assert asked["Which shape is blue?"] == "ring"
    assert asked["Where is the blue ring?"] == "bottom right"
    assert asked["Is the red star left of the blue ring?"] == "yes"
    assert asked["Is the red star right of the blue ring?"] == "no"


def test_scenes_task_says_what_a_row_asks():
    mixed = Scenes(4, task="mixed", prompt="Describe it.")
    assert mixed[0].turns[0].content == (None, "Describe it.")
    assert mixed[1].turns[0].content[1].endswith("?")
    assert mixed[1].boxes


def test_scenes_text_sets_every_option():
    source = open_source("scenes:7:seed=2:task=question:size=64x96:shapes=2-2")
    assert len(source) == 7
    assert source.scene(0).size_hw == (64, 96)
    assert source[3].turns == Scenes(7, 2, "question", (64, 96), (2, 2))[3].turns


@pytest.mark.parametrize("text", ["x", "5:colour=red", "5:size=9", "5:task=sing", "0", "5:seed"])
def test_scenes_text_that_does_not_fit_is_refused(text):
    with pytest.raises(BadSource, match="scenes:"):
        open_source(f"scenes:{text}")


@pytest.mark.parametrize("kind", HELD_BACK)
def test_held_back_backgrounds_come_only_when_asked_for(kind):
    """The shapes lie where they do on any background."""
    usual, asked = Scenes(40, seed=4), Scenes.from_text(f"40:seed=4:background={kind}")
    for row in range(40):
        assert usual.scene(row).background.kind in BACKGROUNDS
        assert asked.scene(row).background.kind == kind
        places = [[s.box_xyxy_px for s in scenes.scene(row).shapes] for scenes in (usual, asked)]
        assert places[0] == places[1]
    first = np.asarray(draw(asked.scene(0)))
    assert len(np.unique(first[:, 0], axis=0)) >= 2  # something changes down the image


def test_unknown_background_is_named():
    with pytest.raises(BadSource, match=r"expected a background of plain, .*, found 'sky'"):
        Scenes(3, background="sky")
