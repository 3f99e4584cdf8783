"""Rows of every kind of source, written to files."""

from __future__ import annotations

import io
import json
import tarfile

import webdataset
from PIL import Image

SIZES = {"a.png": (40, 60), "b.png": (30, 50), "c.png": (20, 20), "d.png": (20, 20)}


def annotation(id, image, category, bbox, **more):
    return {"id": id, "image_id": image, "category_id": category, "bbox": bbox, **more}


def records():
    """Ids that are no row numbers, annotations not in the images' order, a crowd, an image with
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


def png(colour: int = 0) -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", (5, 3), (colour, 0, 0)).save(packed, "PNG")
    return packed.getvalue()


def write_tar(path, members: dict[str, bytes], **options) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def sample(key: str, caption: str = "a cat") -> dict[str, bytes]:
    return {f"{key}.png": png(), f"{key}.json": json.dumps({"caption": caption}).encode()}


CAPTIONS = (["a cat", "one cat"], ["two dogs"], ["a fox", "the fox", "a red fox"])
NAMES = ["cat", "dog", "red fox"]


def packed(number, kind="png"):
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (40 * number, 0, 0)).save(file, kind)
    return file.getvalue()


def write(folder, samples, split="test", **files):
    """samples: dicts of extension -> value. files: what lies in the folder itself."""
    (folder / split).mkdir(parents=True)
    pattern = str(folder / split / "%d.tar")
    with webdataset.ShardWriter(pattern, maxcount=2, verbose=False) as sink:
        for number, sample in enumerate(samples):
            sink.write({"__key__": f"s{number:07d}", **sample})
        count = sink.shard
    (folder / split / "nshards.txt").write_text(f"{count}\n")
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def retrieval_folder(folder, captions=CAPTIONS, **more):
    samples = [
        {"jpg": packed(i, "jpeg"), "txt": "\n".join(said)} for i, said in enumerate(captions)
    ]
    return write(folder, samples, dataset_type="retrieval\n", **more)


def classification_folder(folder, classes=(2, 0, 1, 2), names=NAMES, **more):
    samples = [{"webp": packed(i, "webp"), "cls": number} for i, number in enumerate(classes)]
    return write(folder, samples, classnames="\n".join(names) + "\n", **more)
