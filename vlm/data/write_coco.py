"""Writes the images and boxes of any source as COCO's files.

    python -m vlm.data.write_coco scenes:2000:seed=1:size=mixed FOLDER

makes FOLDER/instances.json and FOLDER/images/, to open as "coco:FOLDER/instances.json?root=
FOLDER/images". Format: https://cocodataset.org/#format-data, "Object Detection".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tyro
from tqdm import tqdm

from vlm.data.boxes import check_boxes
from vlm.data.sources import Source, open_source
from vlm.pixels import open_image


def write_coco(source: Source, folder: str | Path) -> Path:
    """Every image of a source as a PNG file and every box as an annotation; gives the path of the
    annotations. Categories are the labels in alphabetical order; ids count from 1.

    Raises ValueError where the folder holds such files already, BadRow or BadImage naming the row
    that cannot be read.
    """
    folder = Path(folder)
    path = folder / "instances.json"
    if path.exists():
        raise ValueError(f"{path}: expected no such file yet; name another folder")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    found: list[tuple[int, str, tuple[float, ...]]] = []
    for row in tqdm(range(len(source)), desc=source.name, disable=len(source) < 1000):
        example = source[row]
        image_list = [open_image(reference) for reference in example.images]
        sizes_hw = [(one_image.height, one_image.width) for one_image in image_list]
        boxes = check_boxes(example.boxes, sizes_hw, example.name)
        first = len(images) + 1
        for id, one_image in enumerate(image_list, start=first):
            name = f"{id:06d}.png"
            one_image.save(folder / "images" / name, compress_level=1)
            size = {"height": one_image.height, "width": one_image.width}
            images.append({"id": id, "file_name": name, **size})
        found += [(first + box.image, box.label, box.xyxy_px) for box in boxes]
    labels = sorted({label for _, label, _ in found})
    category = {label: id for id, label in enumerate(labels, start=1)}
    annotations = [
        {
            "id": id,
            "image_id": image,
            "category_id": category[label],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
        }
        for id, (image, label, (x0, y0, x1, y1)) in enumerate(found, start=1)
    ]
    categories = [{"id": id, "name": label} for label, id in category.items()]
    values = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")
    return path


def main(source: tyro.conf.Positional[str], folder: tyro.conf.Positional[Path]) -> None:
    """Writes the images and boxes of SOURCE as COCO's files into FOLDER."""
    path = write_coco(open_source(source), folder)
    print(f"coco:{path}?root={path.parent / 'images'}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
