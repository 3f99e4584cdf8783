"""Detection data in COCO's JSON."""

import json
import pickle
import time

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tests.rows import SIZES, annotation, records
from vlm.data.boxes import check_box
from vlm.data.example import BadRow, Box
from vlm.data.sources import BadSource, CocoSource, coco, open_source
from vlm.pixels import image_size, open_image


@pytest.fixture
def write(tmp_path):
    """Writes a COCO file beside its images, and gives its path."""
    for name, (height, width) in SIZES.items():
        Image.new("RGB", (width, height)).save(tmp_path / name)

    def write(values):
        path = tmp_path / "boxes.json"
        path.write_text(json.dumps(values))
        return path

    return write


def test_rows_are_images_with_their_boxes_as_corners(write):
    source = CocoSource(write(records()))
    assert len(source) == 2
    assert source.labels == ("teddy bear", "cat")
    assert source.row_name(0) == "boxes.json: image 70"
    assert source[0].boxes == (
        Box(0, (30.0, 5.5, 50.0, 15.5), "teddy bear"),
        Box(0, (10.0, 20.0, 18.0, 28.0), "cat"),
        Box(0, (1.0, 2.0, 4.0, 6.25), "teddy bear"),
    )
    assert source[0].images[0].data.name == "a.png"
    assert source[1].boxes == (Box(0, (0.0, 0.0, 50.0, 30.0), "cat"),)


def test_each_category_is_asked_for_once_and_answered_with_all_its_boxes(write):
    example = CocoSource(write(records()))[0]
    assert [turn.content for turn in example.turns] == [
        (None, "Where is teddy bear?"),
        (2, 0),
        ("Where is cat?",),
        (1,),
    ]


def test_crowds_are_skipped_in_rows_and_kept_for_evaluation(write):
    source = CocoSource(write(records()))
    assert source.crowds(0) == (Box(0, (0.0, 0.0, 60.0, 12.0), "teddy bear"),)
    assert source.crowds(1) == ()
    assert (source.crowd_count, source.without_boxes) == (2, 2)
    assert list(map(str, source.faults)) == [
        "2 images on which no box can be asked for, skipped: image 68, image 67",
        "2 crowds (iscrowd 1), not in answers: annotation 4 of image 70 [0, 0, 60, 12], "
        "annotation 6 of image 68 [0, 0, 9, 9]",
    ]
    assert not any(fault.harmful for fault in source.faults)


def test_boxes_equal_the_librarys(write):
    values = records()
    values["annotations"][1]["iscrowd"] = 0  # which the library needs
    path = write(values)
    source, library = CocoSource(path), COCO(path)
    for row in range(len(source)):
        image = int(source.row_name(row).split()[-1])
        theirs = library.loadAnns(library.getAnnIds(image, iscrowd=0))
        x, y, width, height = np.array([a["bbox"] for a in theirs]).T
        ours = [box.xyxy_px for box in source[row].boxes]
        np.testing.assert_allclose(ours, np.stack([x, y, x + width, y + height], 1))
        names = [library.loadCats(a["category_id"])[0]["name"] for a in theirs]
        assert [box.label for box in source[row].boxes] == names


def test_source_opens_by_text_with_its_images_elsewhere(write, tmp_path):
    path = write(records())
    other = tmp_path / "elsewhere"
    other.mkdir()
    caption_prompt = "Describe the picture."  # of the run's other sources
    source = open_source(f"coco:{path}", prompt=caption_prompt)
    assert source[0].images[0].data == tmp_path / "a.png"
    path.rename(other / "boxes.json")
    source = open_source(f"coco:{other / 'boxes.json'}?root={tmp_path}", prompt=caption_prompt)
    assert source[0].images[0].data == tmp_path / "a.png"
    again = pickle.loads(pickle.dumps(source))
    assert again[1] == source[1]
    with pytest.raises(
        BadSource, match=r"coco takes the options root, bad_boxes, found \['caption'\]"
    ):
        open_source(f"coco:{other / 'boxes.json'}?caption=x")
    with pytest.raises(
        BadSource, match=r"coco takes the options root, bad_boxes, found \['prompt'\]"
    ):
        open_source(f"coco:{other / 'boxes.json'}?prompt=x")


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ([50, 5, 20, 10], "reach more than 1 pixel out of their image"),
        ([-9, 5, 20, 10], "reach more than 1 pixel out"),
        ([80, 5, 20, 10], "wholly outside their image"),
        ([-30, 5, 20, 10], "wholly outside their image"),
        ([30, 5, -20, 10], "without area"),
        ([30, 5, 20, 0], "without area"),
        ([float("nan"), 5, 20, 10], "that are not four finite numbers"),
        ([1, 2, 3], "that are not four finite numbers"),
        ([1, 2, 3, "4"], "that are not four finite numbers"),
        ([1, 2, 3, True], "that are not four finite numbers"),
        (None, "that are not four finite numbers"),
        ([0.1, 0.2, 0.3, 0.5], "look like fractions of their image"),
    ],
)
def test_bad_box_stops_at_opening_or_is_lost_alone(write, bbox, message):
    values = records()
    values["annotations"][1]["bbox"] = bbox
    path = write(values)
    with pytest.raises(
        BadSource, match=f"^boxes.json: 1 of 6 boxes cannot be used: 1 boxes .*{message}.*: "
        "annotation 2 of image 70 .*--bad-boxes skip"
    ):  # fmt: skip
        CocoSource(path)
    source = CocoSource(path, bad_boxes="skip")
    assert [box.xyxy_px for box in source[0].boxes] == [(10, 20, 18, 28), (1, 2, 4, 6.25)]
    counts = [(fault.count, fault.harmful) for fault in source.faults]
    assert counts[0] == (1, False)
    assert message in source.faults[0].kind
    same = open_source(f"coco:{path}?bad_boxes=skip")
    assert same[0] == source[0]
    assert source[1].boxes


def test_boxes_checked_at_once_are_those_that_are_checked_one_by_one(write):
    """The arithmetic on all boxes agrees with `check_box`, whatever the box."""
    rng = np.random.default_rng(0)
    starts = rng.choice([-30, -2, -1, -0.5, 0, 0.2, 5, 39, 59.5, 60, 61], (3000, 2))
    sides = rng.choice([-1, 0, 0.25, 0.5, 1, 1.5, 20, 60, 61.5, 200], (3000, 2))
    boxes = np.concatenate([starts, sides], 1)
    corners, kinds = coco._check_boxes(boxes, np.tile([40, 60], (3000, 1)))
    for (x, y, w, h), corner, kind in zip(boxes.tolist(), corners.tolist(), kinds):
        try:
            expected = list(check_box((x, y, x + w, y + h), "box", (40, 60)))
        except BadRow:
            expected = None
        assert (kind == coco.GOOD) == (expected is not None), (x, y, w, h, kind)
        if expected is not None:
            assert corner == expected


def test_specks_that_rounding_leaves_are_lost_by_the_way_and_said(write):
    values = records()
    values["annotations"] += [annotation(i, 70, 2, [1, 1, 9, 9]) for i in range(100, 20_100)]
    values["annotations"][1]["bbox"] = [29.65, 8.33, 1.03, 0.0]
    source = CocoSource(write(values))
    assert str(source.faults[0]) == (
        "1 boxes of no width or height, such as rounding leaves: "
        "annotation 2 of image 70 [29.65, 8.33, 1.03, 0.0]"
    )
    assert not source.faults[0].harmful
    for number in (2, 4):
        values["annotations"][number]["bbox"] = [1, 1, 0, 3]
    with pytest.raises(BadSource, match="3 of 20,006 boxes cannot be used: 3 boxes without area"):
        CocoSource(write(values))


def test_box_that_reaches_out_by_rounding_is_cut(write):
    values = records()
    values["annotations"][1]["bbox"] = [-0.5, 5, 61.2, 36]
    assert CocoSource(write(values))[0].boxes[0].xyxy_px == (0, 5, 60, 40)


def test_root_category_with_the_name_of_a_class_is_skipped(write):
    values = records()
    for category in values["categories"]:
        category["supercategory"] = "cat"
    values["categories"].insert(0, {"id": 0, "name": "cat", "supercategory": "none"})
    source = CocoSource(write(values))
    assert source.labels == ("teddy bear", "cat")
    assert source[1].boxes[0].label == "cat"
    assert str(source.faults[0]) == (
        "1 categories without boxes and with another's name, skipped: 0 ('cat')"
    )
    values["categories"][0]["name"] = "animals"
    for category in values["categories"][1:]:
        category["supercategory"] = "animals"
    source = CocoSource(write(values))
    assert source.labels == ("teddy bear", "cat")
    assert "that the others belong to, skipped: 0 ('animals')" in str(source.faults[0])


def test_category_without_a_name_is_skipped_or_loses_its_boxes(write):
    values = records()
    values["categories"] += [{"id": 5}, {"id": 6, "name": " "}, {"id": 7, "name": None}]
    source = CocoSource(write(values))
    assert source.labels == ("teddy bear", "cat")
    assert str(source.faults[0]).startswith("3 categories without a name and without boxes")
    values["annotations"][1]["category_id"] = 5
    with pytest.raises(BadSource, match="1 boxes of a category without a name: annotation 2 of"):
        CocoSource(write(values))
    source = CocoSource(write(values), bad_boxes="skip")
    assert [box.label for box in source[0].boxes] == ["cat", "teddy bear"]


def test_image_that_loses_all_its_boxes_is_no_row(write):
    values = records()
    values["annotations"][0]["bbox"] = [0, 0, 0, 0]
    source = CocoSource(write(values), bad_boxes="skip")
    assert (len(source), source.without_boxes) == (1, 3)


def test_file_of_bad_boxes_alone_says_why_it_has_no_row(write):
    values = records()
    values["annotations"] = [annotation(1, 69, 2, [5, 5, -4, 3])]
    with pytest.raises(BadSource, match=r"found none: 1 boxes without area .*annotation 1 of"):
        CocoSource(write(values), bad_boxes="skip")


@pytest.mark.slow
def test_file_with_a_bad_box_opens_as_fast_as_one_without(tmp_path):
    """A file of some 20 MB: what is wrong is found by arithmetic on all boxes at once."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 480, "width": 640} for i in range(5000)]
    outline = [[float(i) for i in range(20)]]
    found = [
        annotation(i, i % 5000, 1, [1.5, 2, 30, 40.25], segmentation=outline) for i in range(80_000)
    ]
    values = {"images": images, "categories": [{"id": 1, "name": "x"}], "annotations": found}
    seconds = {}
    for kind in ("good", "bad"):
        if kind == "bad":
            found[77_777]["bbox"] = [630, 2, 30, 40]
        (tmp_path / f"{kind}.json").write_text(json.dumps(values))
        started = time.perf_counter()
        source = CocoSource(tmp_path / f"{kind}.json", bad_boxes="skip")
        seconds[kind] = time.perf_counter() - started
        assert sum(fault.count for fault in source.faults) == (kind == "bad")
    assert (tmp_path / "bad.json").stat().st_size > 15e6
    assert seconds["bad"] < 1.5 * seconds["good"] + 0.5


@pytest.mark.parametrize(
    ("key", "number", "change", "message"),
    [
        ("annotations", 1, {"image_id": 5}, "annotation 2 of image 5: .*the file's 4 images"),
        ("annotations", 1, {"category_id": 7}, "annotation 2 of image 70: .*2 categories, found 7"),
        ("annotations", 1, {"id": 1}, r"annotations\[1\] \(image 70\): .*own, found 1, which is "
            r"that of annotations\[0\]"),
        ("annotations", 1, {"iscrowd": 2}, "annotation 2 .*0 or 1, found 2"),
        ("annotations", 1, "bbox", r"annotations\[1\]: expected the keys .*bbox, found"),
        ("images", 0, {"id": 69}, r"images\[1\]: .*own, found 69"),
        ("images", 0, {"id": "a"}, r"images\[0\]: .*whole number, found 'a'"),
        ("images", 0, {"height": 0}, "image 70: .*height and width.*found 0 and 60"),
        ("images", 0, {"file_name": 3}, "image 70: expected file_name to be text, found 3"),
        ("images", 0, "width", r"images\[0\]: expected the keys id, file_name, height, width"),
        ("categories", 1, {"name": "teddy bear"}, "category 2: expected a name of its "
            "own, found 'teddy bear', .* of category 90; 3 boxes have the one and 3 the other"),
        ("categories", 1, {"id": 90}, r"categories\[1\]: .*own, found 90"),
    ],
)  # fmt: skip
def test_file_whose_records_do_not_fit_is_refused_at_once(write, key, number, change, message):
    values = records()
    if isinstance(change, str):
        del values[key][number][change]
    else:
        values[key][number] |= change
    with pytest.raises(BadSource, match=f"^boxes.json: .*{message}"):
        CocoSource(write(values))


def test_file_that_is_no_coco_file_says_what_was_expected(write, tmp_path):
    with pytest.raises(BadSource, match=r"gone\.json: expected a COCO file"):
        CocoSource(tmp_path / "gone.json")
    with pytest.raises(BadSource, match="images, annotations, categories, found list"):
        CocoSource(write([]))
    with pytest.raises(BadSource, match=r"found \['images'\]"):
        CocoSource(write({"images": []}))
    with pytest.raises(BadSource, match="at least one row, found none"):
        CocoSource(write(records() | {"annotations": []}))
    path = write({})
    path.write_text('{"images": [')
    with pytest.raises(BadSource, match="expected COCO's JSON, found an error"):
        CocoSource(path)


def test_image_of_another_size_than_the_files_is_named(write, tmp_path):
    source = CocoSource(write(records()))
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(BadRow, match=r"image 70: expected a\.png to be 60 × 40 .* found 30 × 20"):
        source[0]
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(BadRow, match=r"image 70: a\.png: expected an image"):
        source[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadRow, match=r"image 70: image file 'a\.png' is not under"):
        source[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_size_equals_the_opened_images(write, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    source = CocoSource(write(records()))
    reference = source._images.find("turned.jpg", "row")
    image = open_image(reference)
    assert image_size(reference) == (image.height, image.width)
