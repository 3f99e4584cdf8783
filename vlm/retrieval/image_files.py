"""Images in files and folders: which there are, and their vectors, a batch at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from vlm.data.example import Example, Skipped, Turn
from vlm.data.sources.base import Source
from vlm.families.base import evaluating
from vlm.families.contrastive.batch import Pair
from vlm.families.contrastive.model import ContrastiveModel
from vlm.families.contrastive.processor import PairProcessor
from vlm.image_tokens import ViewGroup, group_views
from vlm.pixels import BadImage, image_size
from vlm.pixels.image_ref import ImageRef
from vlm.retrieval.embed_rows import Reading, only_image, read_batches
from vlm.retrieval.nearest import unit_vectors

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
"""What the names of images end with, of the formats that `vlm.pixels` opens."""
NAMED = 8
"""How many bad files a message names."""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The image files among files and folders, each once.

    paths: a file is taken whatever its suffix; of a folder all files below it whose suffix is one
        of SUFFIXES, in the order of their paths. Names that begin with a dot are passed by, and
        folders that are links.
    Raises ValueError naming a path that is not there, or a folder without an image.
    """
    if not paths:
        raise ValueError("name at least one image or folder")
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            images, others = _walk(path)
            if not images:
                raise ValueError(
                    f"{path}: expected images ({', '.join(SUFFIXES)}), found none among "
                    f"{others} files"
                )
            found |= dict.fromkeys(images)
        elif path.is_file():
            found[path] = None
        else:
            raise ValueError(f"{path}: expected an image or a folder, found nothing at this path")
    return list(found)


def _walk(folder: Path) -> tuple[list[Path], int]:
    """The images below a folder, and the number of its other files."""

    def fail(error: OSError) -> None:
        raise error

    images, others = [], 0
    for path, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                images.append(Path(path, name))
            else:
                others += 1
    return sorted(images), others


def require_headers(paths: Sequence[Path]) -> None:
    """Raises BadImage naming the files that do not even begin as an image; far quicker than
    decoding them."""
    faults = []
    for path in paths:
        try:
            image_size(ImageRef(path, str(path)))
        except BadImage as error:
            faults.append(str(error))
    if len(faults) == 1:
        raise BadImage(faults[0])
    if faults:
        more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise BadImage(f"{len(faults)} bad images: {'; '.join(faults[:NAMED])}{more}")


class Part(NamedTuple):
    """Vectors of some images.

    vectors: float32[N, U], unit norm. indices: which N of the files they are of. skipped: files
    that were skipped.
    """

    vectors: np.ndarray
    indices: list[int]
    skipped: list[Skipped]


class ImageFiles(Source):
    """Image files as rows without text."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.name = "images"
        self.paths = list(paths)
        self.require_rows()

    def __len__(self) -> int:
        return len(self.paths)

    def row_name(self, row: int) -> str:
        return str(self.paths[row])

    def read(self, row: int) -> Example:
        name = self.row_name(row)
        return Example(name, (Turn("user", (None,)),), (ImageRef(self.paths[row], name),))


def embed_images(
    model: ContrastiveModel, paths: Sequence[Path], reading: Reading
) -> Iterator[Part]:
    """The vectors of image files, batch after batch, under a progress bar; whoever takes them
    keeps what came before a fault.

    Raises BadRow naming an image that cannot be read, unless `reading` says to skip it; ValueError
    for a vector that is not finite, and where several processes run.
    """
    if reading.batch < 1:
        raise ValueError(f"batch must be at least 1, found {reading.batch}")
    if not paths:
        return
    if len(paths) <= reading.batch:  # not worth a process of its own
        reading = replace(reading, workers=0)
    dtype = next(model.module.tokenizer.parameters()).dtype
    accelerator = Accelerator()
    if accelerator.num_processes > 1:  # each would get a share only
        raise ValueError(
            f"files are embedded by one process, found {accelerator.num_processes}; start one"
        )
    source, read = ImageFiles(paths), partial(_read, model.processor)
    batches = read_batches(source, range(len(paths)), read, accelerator, reading, "images", _stack)
    with evaluating(model.module):
        for batch in batches:
            skipped = [item for _, item in batch.skipped]
            vectors = np.empty((0, model.module.dim), np.float32)
            if batch.indices:
                groups, names = batch.items
                with torch.no_grad():  # not around the yield, where others' code runs
                    groups = [group.to(model.device, dtype) for group in groups]
                    found = model.module.embed_images(groups)
                vectors = unit_vectors(found, model.module.dim, names)
            yield Part(vectors, batch.indices, skipped)


def _read(processor: PairProcessor, example: Example) -> Pair:
    """No closure, so that it travels to the processes that read."""
    try:
        views = processor.views(only_image(example), example.name)
    except BadImage as error:  # which has the file's name twice, as row and as image
        raise BadImage(str(error).removeprefix(f"{example.name}: ")) from error
    return Pair(name=example.name, ids=torch.empty(0), views=views)


def _stack(pairs: list[Pair]) -> tuple[tuple[ViewGroup, ...], list[str]]:
    return group_views(pairs), [pair.name for pair in pairs]
