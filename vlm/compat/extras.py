"""Packages that only some tasks need: those of the extras in pyproject.

An extra is imported where its task begins, ahead of what computes:

    with needs("ocr"):
        import cv2
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

ABOUT = {
    "ocr": "reading pages and PDFs, drawn lines of text, character and word error rates",
    "retrieval": "indices of embedded images",
    "eval": "caption metrics and average precision of boxes",
    "data": "data sets of the hub, Parquet files and folders of images",
    "tensorboard": "curves of a run for TensorBoard",
    "quantize": "weights in 4 bits",
}
"""Each extra of pyproject, and what it is for; `all` has all but the last, which needs a GPU, and
`test` is for development."""


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message names both and says what installs it."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Within, packages of one of the extras in ABOUT are imported, and nothing else is done.

    Raises MissingExtra, in one line, where one of them is not there. One that is there and broken
    fails with its own error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise MissingExtra(
            f"{ABOUT[extra]}: expected the package {package}, which is not installed; try: "
            f'pip install "vlm[{extra}]"'
        ) from error
