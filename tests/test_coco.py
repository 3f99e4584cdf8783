"""Detection data in COCO's JSON."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from vlm.data.example import BadRow, Box
from vlm.data.sources import BadSource, CocoSource, open_source
from vlm.pixels import image_size, open_image

SIZES = {"a.png": (40, 60), "b.png": (30, 50), "c.png": (20, 20), "d.png": (20, 20)}


def annotation(id, image, category, bbox, **more):
    return {"id": id, "image_id": image, "category_id": category, "bbox": bbox, **more}


def records():
    """Ids that are no row numbers, annotations not in the pictures' order, a crowd, a picture with
    nothing on it and one with a crowd alone."""
    images = [
        {"id": 70 - i, "file_name": name, "height": height, "width": width}
        for i, (name, (height, width)) in enumerate(SIZES.items())
    ]
    outline = {"segmentation": [[1, 2, 3, 4, 5, 6]], "area": 9.5}
    return {
        "images": images,
        "categories": [{"id": 90, "name": "teddy bear"}, {"id": 2, "name": "cat"}],
        "annotations": [
            annotation(1, 69, 2, [0, 0, 50, 30], iscrowd=0),
            annotation(2, 70, 90, [30, 5.5, 20, 10], **outline),
            annotation(3, 70, 2, [10, 20, 8, 8], **outline, iscrowd=0),
            annotation(4, 70, 90, [0, 0, 60, 12], iscrowd=1),
            annotation(5, 70, 90, [1, 2, 3, 4.25], iscrowd=0),
            annotation(6, 68, 2, [0, 0, 9, 9], iscrowd=1),
        ],
    }


@pytest.fixture
def write(tmp_path):
    """Writes a COCO file beside its pictures, and gives its path."""
    for name, (height, width) in SIZES.items():
        Image.new("RGB", (width, height)).save(tmp_path / name)

    def write(values):
        path = tmp_path / "boxes.json"
        path.write_text(json.dumps(values))
        return path

    return write


def test_rows_are_pictures_with_their_boxes_as_corners(write):
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


def test_crowds_are_left_out_of_rows_and_kept_for_evaluation(write):
    source = CocoSource(write(records()))
    assert source.crowds(0) == (Box(0, (0.0, 0.0, 60.0, 12.0), "teddy bear"),)
    assert source.crowds(1) == ()
    assert (source.crowd_count, source.without_boxes) == (2, 2)


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


def test_source_opens_by_text_with_its_pictures_elsewhere(write, tmp_path):
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
    with pytest.raises(BadSource, match=r"coco takes the options root, found \['caption'\]"):
        open_source(f"coco:{other / 'boxes.json'}?caption=x")
    with pytest.raises(BadSource, match=r"coco takes the options root, found \['prompt'\]"):
        open_source(f"coco:{other / 'boxes.json'}?prompt=x")


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ([50, 5, 20, 10], r"inside its picture of 60 × 40 pixels .* found \[50, 5, 70, 15\]"),
        ([-9, 5, 20, 10], "inside its picture, found"),
        ([30, 5, -20, 10], r"width and height, both above 0, found \[30, 5, -20, 10\]"),
        ([30, 5, 20, 0], "both above 0"),
        ([float("nan"), 5, 20, 10], "four finite numbers, found"),
        ([0.1, 0.2, 0.3, 0.5], "fractions of it"),
    ],
)
def test_box_that_cannot_be_true_names_file_image_and_annotation(write, bbox, message):
    values = records()
    values["annotations"][1]["bbox"] = bbox
    source = CocoSource(write(values))
    start = r"^boxes.json: image 70: annotation 2 \('teddy bear'\): expected "
    with pytest.raises(BadRow, match=f"{start}.*{message}"):
        source[0]
    assert source[1].boxes  # one bad row spoils no other


@pytest.mark.parametrize(
    ("key", "number", "change", "message"),
    [
        ("annotations", 1, {"image_id": 5}, "annotation 2 of image 5: .*the file's 4 images"),
        ("annotations", 1, {"category_id": 7}, "annotation 2 of image 70: .*2 categories, found 7"),
        ("annotations", 1, {"id": 1}, r"annotations\[1\] \(image 70\): .*own, found 1, which is "
            r"that of annotations\[0\]"),
        ("annotations", 1, {"bbox": [1, 2, 3]}, r"annotation 2 .*four numbers, found \[1, 2, 3\]"),
        ("annotations", 1, {"bbox": [1, 2, 3, "4"]}, "annotation 2 .*four numbers"),
        ("annotations", 1, {"iscrowd": 2}, "annotation 2 .*0 or 1, found 2"),
        ("annotations", 1, {"bbox": None}, "annotation 2 .*found None"),
        ("annotations", 1, "bbox", r"annotations\[1\]: expected the keys .*bbox, found"),
        ("images", 0, {"id": 69}, r"images\[1\]: .*own, found 69"),
        ("images", 0, {"id": "a"}, r"images\[0\]: .*whole number, found 'a'"),
        ("images", 0, {"height": 0}, "image 70: .*height and width.*found 0 and 60"),
        ("images", 0, {"file_name": 3}, "image 70: expected file_name to be text, found 3"),
        ("images", 0, "width", r"images\[0\]: expected the keys id, file_name, height, width"),
        ("categories", 1, {"name": "teddy bear"}, "category 2: expected a name of its own"),
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


def test_picture_of_another_size_than_the_files_is_named(write, tmp_path):
    source = CocoSource(write(records()))
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(BadRow, match=r"image 70: expected a\.png to be 60 × 40 .* found 30 × 20"):
        source[0]
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(BadRow, match=r"image 70: a\.png: expected a picture"):
        source[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadRow, match=r"image 70: image file 'a\.png' is not under"):
        source[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_size_equals_the_opened_pictures(write, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    source = CocoSource(write(records()))
    reference = source._images.find("turned.jpg", "row")
    picture = open_image(reference)
    assert image_size(reference) == (picture.height, picture.width)
