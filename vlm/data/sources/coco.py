"""Detection data in COCO's JSON: images with boxes of named categories.

Source: https://cocodataset.org/#format-data, "Object Detection". Records stay in memory as arrays;
outlines (`segmentation`) are dropped while the file is read. What is wrong with the boxes of a file
is found when it opens, by arithmetic on all of them at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.data.boxes import SLACK_PX
from vlm.data.example import BadRow, BadSource, Box, Example, Turn
from vlm.data.grounding import ground
from vlm.data.sources.base import FIRST, Fault, Source
from vlm.data.sources.coco_labels import Labels, read_labels
from vlm.data.sources.json_rows import image_root_at
from vlm.pixels import BadImage, image_size

KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id",),
}
"""The lists of a file, and what each of their records must have."""

BadBoxes = Literal["stop", "skip", "tell"]

SPECKS = 1e-4
"""Share of a file's boxes that may have no width or no height: outlines of specks, which rounding
leaves in published sets (2 of the 860,001 boxes of COCO's train2017). Such boxes are skipped and
said; more of them are a fault."""

GOOD, NO_NUMBERS, NO_LABEL, NO_AREA, FRACTIONS, OUTSIDE, OVER, SPECK = range(8)
FAULTS = {
    NO_NUMBERS: "that are not four finite numbers",
    NO_LABEL: "of a category without a name",
    NO_AREA: "without area (x, y, width and height, both above 0, were expected)",
    FRACTIONS: "that look like fractions of their image (pixels were expected)",
    OUTSIDE: "wholly outside their image",
    OVER: f"that reach more than {SLACK_PX:g} pixel out of their image",
    SPECK: "of no width or height, such as rounding leaves",
}
"""What may be wrong with a box, as it is said after a number of boxes."""


class CocoSource(Source):
    """The images of a COCO file that show something, each asked for every category on it.

    path: the annotations, such as instances_val2017.json.
    image_root: the folder, or .tar file, that each image's `file_name` starts from; None: the
        file's own folder.
    bad_boxes: what becomes of boxes that cannot be one (see FAULTS): "stop" refuses the file,
        "skip" loses these boxes alone, "tell" too and calls them harmful in `faults`. Boxes that
        reach at most SLACK_PX out of their image are cut.
    Rows are images in the file's order, named "FILE: image ID"; boxes keep the file's order.
    labels: the names of the categories, in the file's order, but for those that no box has and
        that have no name, another's name, or are the root that Roboflow writes.
    faults: boxes and categories that are skipped.
    without_boxes: how many images are no row, since nothing is on them but crowds at most.
    crowd_count: how many annotations are crowds (`iscrowd` 1): regions of many things, no answer to
        where one of them is. They are not in rows; `crowds` gives those of a row.

    Raises BadSource where the file is no such JSON, a record lacks a key or repeats an id, an
    annotation is of an unknown image or category, two categories that boxes have share a name, or
    boxes are bad and `bad_boxes` says so. Reading a row raises BadRow where the image is not of
    the size that the file says. Every message names the file, the image and the annotation.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        bad_boxes: BadBoxes = "stop",
    ) -> None:
        if bad_boxes not in ("stop", "skip", "tell"):
            raise BadSource(f"{path}: expected bad_boxes stop or skip, found {bad_boxes!r}")
        self._path = Path(path)
        self.files = (self._path,)
        self.name = self._path.name
        records = _read(self._path)
        self._images = image_root_at(self._path.parent if image_root is None else image_root)
        image_at, category_at = (_by_id(records[k], k, self.name) for k in ("images", "categories"))
        _by_id(records["annotations"], "annotations", self.name)
        self._ids = np.array(list(image_at), np.int64)
        self._files = [_file_name(image, self.name) for image in records["images"]]
        sizes = [_size_hw(image, self.name) for image in records["images"]]
        self._sizes = np.array(sizes, np.int64).reshape(-1, 2)

        annotations = records["annotations"]
        owner, category, crowd = _columns(annotations, image_at, category_at, self.name)
        used = np.bincount(category, minlength=len(category_at))
        found = read_labels(records["categories"], used, self.name)
        self.labels = found.labels
        boxes_xywh_px = _boxes(annotations)
        corners, kinds = _check_boxes(boxes_xywh_px, self._sizes[owner])
        kinds[(kinds == GOOD) & (found.number[category] < 0)] = NO_LABEL
        self.faults = self._box_faults(annotations, kinds, found, bad_boxes)

        good = kinds == GOOD
        order = np.flatnonzero(good)
        order = order[np.argsort(owner[order], kind="stable")]  # an image's stand together
        self._starts = np.searchsorted(owner[order], np.arange(len(image_at) + 1))
        self._label, self._crowd = found.number[category][order], crowd[order].astype(bool)
        self._corners = corners[order]
        shown = np.zeros(len(image_at), bool)
        shown[owner[good & (crowd == 0)]] = True
        self._rows = np.flatnonzero(shown)
        self.without_boxes = int((~shown).sum())
        self.crowd_count = int(crowd[good].sum())
        self.faults += self._skipped(
            [_where(annotations[i]) for i in np.flatnonzero(good & (crowd == 1))[:FIRST]]
        )
        self.require_rows()

    def _skipped(self, crowds: list[str]) -> tuple[Fault, ...]:
        """Images and annotations that are in no row although nothing is wrong with them.
        crowds: the first of those annotations in words."""
        empty = np.flatnonzero(np.isin(np.arange(len(self._ids)), self._rows, invert=True))
        images = tuple(f"image {self._ids[i]}" for i in empty[:FIRST])
        left = (
            Fault("images on which no box can be asked for, skipped", len(empty), images),
            Fault("crowds (iscrowd 1), not in answers", self.crowd_count, tuple(crowds)),
        )
        return tuple(fault for fault in left if fault.count)

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
        boxes = self._of_row(row, crowd=False)
        return ground(Example(name, (Turn("user", (None,)),), (image,), boxes))

    def crowds(self, row: int) -> tuple[Box, ...]:
        """The crowds of a row."""
        return self._of_row(row, crowd=True)

    def _of_row(self, row: int, crowd: bool) -> tuple[Box, ...]:
        number = self._rows[row]
        return tuple(
            Box(0, tuple(self._corners[i].tolist()), self.labels[self._label[i]])
            for i in range(self._starts[number], self._starts[number + 1])
            if self._crowd[i] == crowd
        )

    def _box_faults(
        self,
        annotations: list[dict[str, Any]],
        kinds: np.ndarray,
        found: Labels,
        bad_boxes: BadBoxes,
    ) -> tuple[Fault, ...]:
        """What is wrong with boxes and categories. Raises BadSource as `bad_boxes` says."""
        specks = np.flatnonzero(kinds == SPECK)
        if len(specks) > SPECKS * len(kinds):
            kinds[specks] = NO_AREA
        faults = []
        for kind, words in FAULTS.items():
            found = np.flatnonzero(kinds == kind)
            first = tuple(_where(annotations[i]) for i in found[:FIRST])
            if len(found):
                harmful = kind != SPECK and bad_boxes != "skip"
                faults.append(Fault(f"boxes {words}", len(found), first, harmful))
        harmful = [fault for fault in faults if fault.harmful]
        if harmful and bad_boxes == "stop":
            count = sum(fault.count for fault in harmful)
            raise BadSource(
                f"{self.name}: {count:,} of {len(kinds):,} boxes cannot be used: "
                f"{'; '.join(map(str, harmful))}. Mend the file, or skip these boxes with "
                "--bad-boxes skip"
            )
        return (*faults, *found.faults)


def _check_boxes(boxes_xywh_px: np.ndarray, sizes_hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float64[N, 4] as corners cut at the border of their images int64[N, 2], and what is
    wrong with each, int8[N]; as `vlm.data.boxes.check_box` has it."""
    x, y, width, height = boxes_xywh_px.T
    rows, columns = sizes_hw.T
    x1, y1 = x + width, y + height
    kinds = np.full(len(x), GOOD, np.int8)
    with np.errstate(invalid="ignore"):
        over = (np.minimum(x, y) < -SLACK_PX) | (x1 > columns + SLACK_PX) | (y1 > rows + SLACK_PX)
        kinds[over] = OVER
        kinds[(x >= columns) | (y >= rows) | (x1 <= 0) | (y1 <= 0)] = OUTSIDE
        share = (np.minimum(x, y) >= 0) & (np.maximum(x1, y1) <= 1)
        kinds[share & ~((rows == 1) & (columns == 1))] = FRACTIONS
        kinds[(width == 0) | (height == 0)] = SPECK
        kinds[(width < 0) | (height < 0)] = NO_AREA
    kinds[~np.isfinite(boxes_xywh_px).all(1)] = NO_NUMBERS
    low, high = np.maximum(x, 0), np.maximum(y, 0)
    corners = np.stack([low, high, np.minimum(x1, columns), np.minimum(y1, rows)], 1)
    return corners, kinds


def _boxes(annotations: list[dict[str, Any]]) -> np.ndarray:
    """Each annotation's bbox, float64[N, 4]; one that is not four numbers is NaN."""
    boxes = [annotation["bbox"] for annotation in annotations]
    plain = set(map(type, boxes)) <= {list} and set(map(len, boxes)) <= {4}
    if not plain or not set(map(type, chain.from_iterable(boxes))) <= {int, float}:
        boxes = [box if _is_four_numbers(box) else [np.nan] * 4 for box in boxes]
    return np.array(boxes, np.float64).reshape(-1, 4)


def _is_four_numbers(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and {*map(type, box)} <= {int, float}


def _where(annotation: dict[str, Any]) -> str:
    """An annotation in words."""
    box = str(annotation["bbox"])
    box = box if len(box) <= 60 else f"{box[:57]}..."
    return f"annotation {annotation['id']} of image {annotation['image_id']} {box}"


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
            if not isinstance(record, Mapping) or any(name not in record for name in needed):
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
    """Each record's id -> its index in the list."""
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


def _columns(
    annotations: Sequence[dict[str, Any]],
    image_at: dict[int, int],
    category_at: dict[int, int],
    file: str,
) -> np.ndarray:
    """Each annotation's image and category as indices in their lists, and 1 where it is a crowd:
    int64[3, N]. Raises BadSource naming the annotation where there is none such."""
    columns = []
    for annotation in annotations:
        image, category = annotation["image_id"], annotation["category_id"]
        crowd = annotation.get("iscrowd", 0)
        wrong = None
        if not isinstance(image, int) or image not in image_at:
            wrong = f"expected one of the file's {len(image_at)} images"
        elif not isinstance(category, int) or category not in category_at:
            wrong = f"expected one of the file's {len(category_at)} categories, found {category!r}"
        elif crowd not in (0, 1):
            wrong = f"expected iscrowd to be 0 or 1, found {crowd!r}"
        if wrong is not None:
            raise BadSource(f"{file}: annotation {annotation['id']} of image {image!r}: {wrong}")
        columns.append((image_at[image], category_at[category], int(crowd)))
    return np.array(columns, np.int64).reshape(-1, 3).T
