"""Detection data in COCO's JSON: pictures with boxes of named categories.

Source: https://cocodataset.org/#format-data, "Object Detection". Records stay in memory as arrays;
outlines (`segmentation`) are dropped while the file is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.boxes import check_box
from vlm.data.example import BadRow, Box, Example, Turn
from vlm.data.grounding import ground
from vlm.data.sources.base import BadSource, Source
from vlm.data.sources.json_rows import image_root_at
from vlm.pixels import BadImage, image_size

KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
"""The lists of a file, and what each of their records must have."""


class CocoSource(Source):
    """The pictures of a COCO file that show something, each asked for every category on it.

    path: the annotations, such as instances_val2017.json.
    image_root: the folder, or .tar file, that each picture's `file_name` starts from; None: the
        file's own folder.
    Rows are pictures in the file's order, named "FILE: image ID"; boxes keep the file's order.
    labels: the names of all categories, in the file's order.
    without_boxes: how many pictures are no row, since nothing is on them but crowds at most.
    crowd_count: how many annotations are crowds (`iscrowd` 1): regions of many things, no answer to
        where one of them is. They are left out of rows; `crowds` gives those of a row.

    Raises BadSource where the file is no such JSON, a record lacks a key or repeats an id, or an
    annotation is of an unknown image or category. Reading a row raises BadRow where a box cannot be
    one (see `vlm.data.boxes`) or the picture is not of the size that the file says. Every message
    names the file, the image and the annotation.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        self._path = Path(path)
        self.files = (self._path,)
        self.name = self._path.name
        records = _read(self._path)
        self._images = image_root_at(self._path.parent if image_root is None else image_root)
        image_at, category_at = (_by_id(records[k], k, self.name) for k in ("images", "categories"))
        _by_id(records["annotations"], "annotations", self.name)
        self.labels = _labels(records["categories"], self.name)
        self._ids = np.array(list(image_at), np.int64)
        self._files = [_file_name(image, self.name) for image in records["images"]]
        sizes = [_size_hw(image, self.name) for image in records["images"]]
        self._sizes = np.array(sizes, np.int64).reshape(-1, 2)

        annotations, columns = records["annotations"], []
        for annotation in annotations:
            columns.append(_annotation(annotation, image_at, category_at, self.name))
        owner, label, crowd = np.array(columns, np.int64).reshape(-1, 3).T
        order = np.argsort(owner, kind="stable")  # a picture's annotations stand together
        self._starts = np.searchsorted(owner[order], np.arange(len(image_at) + 1))
        self._label, self._crowd = label[order], crowd[order].astype(bool)
        boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
        self._boxes_xywh_px = boxes[order]
        self._annotation_ids = np.array([a["id"] for a in annotations], np.int64)[order]

        shown = np.zeros(len(image_at), bool)
        shown[owner[crowd == 0]] = True
        self._rows = np.flatnonzero(shown)
        self.without_boxes = int((~shown).sum())
        self.crowd_count = int(crowd.sum())
        self.require_rows()

    def __len__(self) -> int:
        return len(self._rows)

    def row_name(self, row: int) -> str:
        return f"{self.name}: image {self._ids[self._rows[row]]}"

    def read(self, row: int) -> Example:
        name, number = self.row_name(row), self._rows[row]
        image = self._images.find(self._files[number], name)
        height, width = self._sizes[number].tolist()
        try:
            found = image_size(image)
        except BadImage as error:
            raise BadRow(str(error)) from error
        if found != (height, width):
            raise BadRow(
                f"{name}: expected {self._files[number]} to be {width} × {height} pixels (width × "
                f"height) as the file says, found {found[1]} × {found[0]}, which its boxes may "
                "not fit"
            )
        boxes = self._boxes(row, crowd=False)
        return ground(Example(name, (Turn("user", (None,)),), (image,), boxes))

    def crowds(self, row: int) -> tuple[Box, ...]:
        """The crowds of a row. Raises BadRow as `read` does."""
        return self._boxes(row, crowd=True)

    def _boxes(self, row: int, crowd: bool) -> tuple[Box, ...]:
        number, boxes = self._rows[row], []
        size_hw = tuple(self._sizes[number].tolist())
        for i in range(self._starts[number], self._starts[number + 1]):
            if self._crowd[i] != crowd:
                continue
            label = self.labels[self._label[i]]
            place = f"{self.row_name(row)}: annotation {self._annotation_ids[i]} ({label!r})"
            x, y, width, height = self._boxes_xywh_px[i].tolist()
            if width <= 0 or height <= 0:
                raise BadRow(
                    f"{place}: expected bbox to be x, y, width and height, both above 0, found "
                    f"[{x:g}, {y:g}, {width:g}, {height:g}]"
                )
            corners = check_box((x, y, x + width, y + height), place, size_hw)
            boxes.append(Box(0, corners, label))
        return tuple(boxes)


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The file's three lists. Raises BadSource where it has none, or a record lacks a key."""
    if not path.is_file():
        raise BadSource(f"{path}: expected a COCO file of annotations, found none")
    try:
        with path.open(encoding="utf-8") as file:
            values = json.load(file, object_hook=_without_outline)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadSource(f"{path.name}: expected COCO's JSON, found an error: {error}") from error
    for key, needed in KEYS.items():
        if not isinstance(values, Mapping) or not isinstance(values.get(key), list):
            found = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise BadSource(
                f"{path.name}: expected COCO's JSON with the lists {', '.join(KEYS)}, found {found}"
            )
        for number, record in enumerate(values[key]):
            if not isinstance(record, Mapping) or not set(needed) <= set(record):
                found = sorted(record) if isinstance(record, Mapping) else repr(record)[:80]
                raise BadSource(
                    f"{path.name}: {key}[{number}]: expected the keys {', '.join(needed)}, "
                    f"found {found}"
                )
    return values


def _without_outline(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("segmentation", None)  # most of a file's bytes, which no box needs
    return record


def _by_id(records: list[dict[str, Any]], key: str, file: str) -> dict[int, int]:
    """Each record's id -> its place in the list."""
    at: dict[int, int] = {}
    for number, record in enumerate(records):
        id = record["id"]
        if not isinstance(id, int) or isinstance(id, bool):
            raise BadSource(
                f"{file}: {key}[{number}]: expected id to be a whole number, found {id!r}"
            )
        if id in at:
            image = f" (image {record['image_id']})" if "image_id" in record else ""
            raise BadSource(
                f"{file}: {key}[{number}]{image}: expected an id of its own, found {id}, which is "
                f"that of {key}[{at[id]}]"
            )
        at[id] = number
    return at


def _labels(categories: list[dict[str, Any]], file: str) -> tuple[str, ...]:
    labels: list[str] = []
    for category in categories:
        name = category["name"]
        if not isinstance(name, str) or not name.strip() or name in labels:
            raise BadSource(
                f"{file}: category {category['id']}: expected a name of its own, found {name!r}"
            )
        labels.append(name)
    return tuple(labels)


def _file_name(image: dict[str, Any], file: str) -> str:
    if not isinstance(image["file_name"], str):
        raise BadSource(
            f"{file}: image {image['id']}: expected file_name to be text, found "
            f"{image['file_name']!r}"
        )
    return image["file_name"]


def _size_hw(image: dict[str, Any], file: str) -> tuple[int, int]:
    size = image["height"], image["width"]
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise BadSource(
            f"{file}: image {image['id']}: expected height and width to be whole numbers above 0, "
            f"found {size[0]!r} and {size[1]!r}"
        )
    return size


def _annotation(
    annotation: dict[str, Any], image_at: dict[int, int], category_at: dict[int, int], file: str
) -> tuple[int, int, int]:
    """An annotation's image and category as places in their lists, and 1 where it is a crowd."""
    image, category = annotation["image_id"], annotation["category_id"]
    place = f"{file}: annotation {annotation['id']} of image {image!r}"
    if not isinstance(image, int) or image not in image_at:
        raise BadSource(f"{place}: expected one of the file's {len(image_at)} images")
    if not isinstance(category, int) or category not in category_at:
        raise BadSource(
            f"{place}: expected one of the file's {len(category_at)} categories, found {category!r}"
        )
    box, crowd = annotation["bbox"], annotation.get("iscrowd", 0)
    usable = isinstance(box, list) and len(box) == 4
    if not usable or not all(isinstance(v, Real) and not isinstance(v, bool) for v in box):
        raise BadSource(f"{place}: expected bbox to be four numbers, found {str(box)[:80]}")
    if crowd not in (0, 1):
        raise BadSource(f"{place}: expected iscrowd to be 0 or 1, found {crowd!r}")
    return image_at[image], category_at[category], int(crowd)
