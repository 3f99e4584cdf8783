"""Images one after another: named, opened and batched as they are needed, and their readings
filtered, so that neither images nor readings need to fit in memory together.

Nothing here needs a package of the extra `ocr`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from vlm.ocr.results import Reading
from vlm.pixels import image_size, open_image
from vlm.pixels.image_ref import ImageRef

T = TypeVar("T")


def check_images(images: Iterable, min_confidence: float) -> None:
    """Raises, before anything is read, ValueError for a confidence outside 0 to 1, and BadImage for
    a file that is missing or no image's; those that are damaged within stay unseen.

    Only a sequence is looked into: the items of another iterable are opened as they come.
    """
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence: expected 0 to 1, found {min_confidence}")
    if isinstance(images, Sequence):
        for number, image in enumerate(images, 1):
            if isinstance(image, (str, Path, bytes)):
                image_size(ImageRef(image, name_of(image, number)))


def name_of(image: Any, number: int) -> str:
    """What messages call an image: its path, or "image 1" and so on."""
    if isinstance(image, (str, Path)):
        return str(image)
    return getattr(image, "name", f"image {number}")


def open_each(images: Iterable) -> Iterator[tuple[str, Image.Image]]:
    """The name and the pixels (see `vlm.pixels.open_image`) of each image, opened when it is its
    turn."""
    for number, image in enumerate(images, 1):
        name = name_of(image, number)
        yield name, open_image(image, name=name)


def batches(items: Iterable[T], is_full: Callable[[list[T]], bool]) -> Iterator[list[T]]:
    """Items in lists, each of which ends as soon as it is full.

    Where the next item cannot be had, those before it come first, and then the error.

    >>> list(batches("abcde", lambda held: len(held) == 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    rest = iter(items)
    fault: Exception | None = None
    while fault is None:
        held: list[T] = []
        while not (held and is_full(held)):
            try:
                held.append(next(rest))
            except StopIteration:
                if held:
                    yield held
                return
            except Exception as error:
                fault = error
                break
        if held:
            yield held
    raise fault


def filter_by_confidence(reading: Reading, min_confidence: float) -> tuple[Reading, int]:
    """A reading without its lines below a confidence, and the number of those."""
    lines = tuple(line for line in reading.lines if line.confidence >= min_confidence)
    return replace(reading, lines=lines), len(reading.lines) - len(lines)


def filter_with_warning(reading: Reading, name: str, min_confidence: float) -> Reading:
    """A reading without its lines below a confidence, with a warning that counts them."""
    kept, skipped = filter_by_confidence(reading, min_confidence)
    if skipped:
        warnings.warn(
            f"{name}: {skipped} lines of a confidence below {min_confidence:g} skipped",
            stacklevel=2,
        )
    return kept
