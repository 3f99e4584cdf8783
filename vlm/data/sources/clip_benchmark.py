"""CLIP_benchmark's own folders of WebDataset shards, for retrieval and for classification.

    FOLDER/dataset_type.txt     retrieval or classification; without it: classification
    FOLDER/SPLIT/nshards.txt    how many shards there are: 0.tar, 1.tar, ...
    FOLDER/SPLIT/0.tar          KEY.jpg, .png or .webp, with KEY.txt (captions, one a line) or
                                KEY.cls (the number of the class, from 0)

and, for classification,

    FOLDER/classnames.txt                           the names of the classes, one a line
    FOLDER/zeroshot_classification_templates.txt    prompts with {c} in them, one a line; optional

Source: CLIP_benchmark, `clip_benchmark/datasets/builder.py`, `build_wds_dataset`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlm.data.example import BadRow, BadSource, Example, caption_example
from vlm.data.sources.row import RowFormat
from vlm.data.sources.shards import ShardSource

TYPES = {"retrieval": "txt", "classification": "cls"}
"""What a folder says it is for -> the extension of what goes with an image."""


class ClipBenchmark(ShardSource):
    """One split of a folder in CLIP_benchmark's layout.

    For retrieval each caption is a row, with its image: an image with five captions is five
    rows, SHARD:KEY:LINE. For classification each image is a row, SHARD:KEY, and its caption is
    the name of its class.
    classes: the names in their order, of which some may be equal (ImageNet's are); None for
    retrieval. templates: prompts with {} at the place of a name; None where the folder has none.
    Raises BadSource naming the file, what was expected there and what was found.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "test",
        form: RowFormat | None = None,
        name: str | None = None,
    ) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise BadSource(f"{folder}: expected a folder in CLIP_benchmark's layout, found none")
        kind = _dataset_type(folder / "dataset_type.txt")
        count = _shard_count(folder / split / "nshards.txt")
        self.text_extension = TYPES[kind]
        self.templates: tuple[str, ...] | None = None
        if kind == "classification":
            self.classes = tuple(_lines(folder / "classnames.txt"))
            path = folder / "zeroshot_classification_templates.txt"
            self.templates = _templates(path) if path.is_file() else None
        self._line_end: np.ndarray | None = None  # None: each sample is one row
        shards = [folder / split / f"{shard}.tar" for shard in range(count)]
        super().__init__(shards, form, name or f"clip_benchmark:{folder}:{split}")
        if kind == "retrieval":
            # An image without captions is a row too, which says so when it is read.
            lines = [max(1, self._count_lines(sample)) for sample in range(len(self))]
            self._line_end = np.cumsum(lines)

    def __len__(self) -> int:
        return super().__len__() if self._line_end is None else int(self._line_end[-1])

    def row_name(self, row: int) -> str:
        if self._line_end is None:
            return super().row_name(row)
        sample, line = self._place(row)
        return f"{super().row_name(sample)}:{line + 1}"

    def read(self, row: int) -> Example:
        sample, line = (row, 0) if self._line_end is None else self._place(row)
        name = self.row_name(row)
        images = self._images(sample, name)
        if len(images) != 1:
            raise BadRow(f"{name}: expected one image, found {len(images)}")
        text = self._text(sample, name)
        if self._line_end is None:
            caption = self._class_name(text, name)
        else:
            caption = (text.splitlines() or [""])[line]
        return caption_example(name, images[0], caption, self._form.prompt)

    def _place(self, row: int) -> tuple[int, int]:
        """The sample of a caption, and which of its lines it is, from 0."""
        sample = int(np.searchsorted(self._line_end, row, side="right"))
        return sample, row - (int(self._line_end[sample - 1]) if sample else 0)

    def _count_lines(self, sample: int) -> int:
        try:
            return len(self._text(sample, "").splitlines())
        except BadRow:  # which reading the row says again, with its name
            return 0

    def _text(self, sample: int, name: str) -> str:
        data = self._part(sample, self._index.text_place, name)
        if data is None:
            key = f"{self._index.key(sample)}.{self.text_extension}"
            raise BadRow(f"{name}: expected {key} beside the image, found none")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRow(f"{name}: expected UTF-8 in the text, found other bytes") from error

    def _class_name(self, text: str, name: str) -> str:
        number = text.strip()
        if not number.isdecimal() or int(number) >= len(self.classes):
            raise BadRow(
                f"{name}: expected the number of one of {len(self.classes)} classes, "
                f"0 to {len(self.classes) - 1}, found {number[:40]!r}"
            )
        return self.classes[int(number)]


def _dataset_type(path: Path) -> str:
    kind = _text_of(path).strip().lower() if path.is_file() else "classification"
    if kind not in TYPES:
        raise BadSource(f"{path}: expected {' or '.join(TYPES)}, found {kind[:40]!r}")
    return kind


def _shard_count(path: Path) -> int:
    if not path.is_file():
        splits = sorted(file.parent.name for file in path.parent.parent.glob("*/nshards.txt"))
        raise BadSource(
            f"{path}: expected the number of shards in it, found no such file; splits are {splits}"
        )
    text = _text_of(path).strip()
    if not text.isdecimal() or int(text) < 1:
        raise BadSource(f"{path}: expected the number of shards, found {text[:40]!r}")
    return int(text)


def _templates(path: Path) -> tuple[str, ...]:
    lines = _lines(path)
    for number, line in enumerate(lines, 1):
        if "{c}" not in line:
            raise BadSource(
                f"{path}:{number}: expected {{c}} at the place of a name, found {line!r}"
            )
    return tuple(line.replace("{c}", "{}") for line in lines)


def _lines(path: Path) -> list[str]:
    """The lines of a text file; none may be empty."""
    if not path.is_file():
        raise BadSource(f"{path}: expected names, one a line, found no such file")
    lines = [line.strip() for line in _text_of(path).rstrip().splitlines()]
    if not lines:
        raise BadSource(f"{path}: expected at least one line, found none")
    if "" in lines:
        raise BadSource(f"{path}:{lines.index('') + 1}: expected a text, found an empty line")
    return lines


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadSource(f"{path}: expected UTF-8, found other bytes") from error
