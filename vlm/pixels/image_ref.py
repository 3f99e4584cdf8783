"""An image by its bytes or file, before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image not yet decoded.

    data: encoded bytes (PNG, JPEG, ...), or the path of a file. Models take a decoded image too,
        for its name's sake.
    name: where it comes from, for messages, such as "train.tar: 1f600.png".
    """

    data: bytes | Path
    name: str
