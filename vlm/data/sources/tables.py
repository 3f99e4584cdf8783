"""Tables of the `datasets` library: hub sets, Parquet files, image folders, saved folders.

The table stays memory-mapped on disk. Its images are taken as encoded bytes or paths: decoding
is `vlm.pixels.open_image`'s, which has limits that `datasets` has not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.compat.extras import needs
from vlm.data.example import BadRow, BadSource, Example
from vlm.data.sources.base import FolderImages, Source
from vlm.data.sources.keys import HARMLESS, ROW_MEANING, UnreadKeys
from vlm.data.sources.questions import ANSWERS_KEY, QUESTION_KEY
from vlm.data.sources.row import (
    CAPTION_KEYS,
    EXTRA_KEYS,
    IMAGE_KEYS,
    TALK_KEYS,
    RowFormat,
    example_from_row,
)
from vlm.pixels.image_ref import ImageRef

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

LABEL_KEY = "label"


class TableSource(Source):
    """The rows of one split of a `datasets` table.

    table: a `datasets.Dataset`.
    form: its columns, in place of keys. Where no column holds text, class labels do: their names,
        under "label" or the column that `form.caption` names.
    image_root: the folder that image paths start from and may not leave; None: paths are refused,
        images must lie in the table.
    Rows are named NAME[ROW]. Raises BadSource where a column is missing.
    """

    def __init__(
        self,
        table: Dataset,
        name: str,
        form: RowFormat | None = None,
        image_root: str | Path | None = None,
    ) -> None:
        self.name = name
        form = form or RowFormat()
        self._images = None if image_root is None else FolderImages(image_root)
        columns = set(table.column_names)
        for wanted in (form.image, form.caption):
            if wanted is not None and wanted not in columns:
                raise BadSource(f"{name}: expected column {wanted!r}, found {sorted(columns)}")
        texts = (*TALK_KEYS, *CAPTION_KEYS, QUESTION_KEY)
        if form.caption is None and not columns.intersection(texts):
            if LABEL_KEY not in columns or not hasattr(table.features[LABEL_KEY], "names"):
                raise BadSource(
                    f"{name}: expected one of the columns {', '.join(texts)}, or class labels "
                    f"under {LABEL_KEY}, found {sorted(columns)}"
                )
            form = dataclasses.replace(form, caption=LABEL_KEY)
        self._form = form
        images = IMAGE_KEYS if form.image is None else (form.image,)
        captions = (*texts, ANSWERS_KEY) if form.caption is None else (form.caption,)
        known = (*images, *captions, *EXTRA_KEYS, *ROW_MEANING, LABEL_KEY)
        read = [key for key in dict.fromkeys(known) if key in columns]
        self.unread = UnreadKeys(form.ignore)
        self._note_columns(table, read)
        table = table.select_columns(read)
        feature = table.features[form.caption] if form.caption else None
        names = getattr(feature, "names", None)
        self.classes = None if names is None else tuple(names)
        self._table = _undecoded(table)
        self.require_rows()

    def _note_columns(self, table: Dataset, read: list[str]) -> None:
        """Counts the columns that are skipped: each by all rows, shown by the first."""
        untold = {*read, *HARMLESS, *self._form.chosen_away}
        rest = [key for key in table.column_names if key not in untold]
        if rest and len(table):
            first = _undecoded(table.select_columns(rest))[0]
            for key in rest:
                self.unread.note(key, first[key], self.row_name(0), count=len(table))

    def __len__(self) -> int:
        return len(self._table)

    def row_name(self, row: int) -> str:
        return f"{self.name}[{row}]"

    def read(self, row: int) -> Example:
        values = self._table[row]
        name = self.row_name(row)
        if self.classes is not None and values[self._form.caption] is not None:
            label = values[self._form.caption]
            if not 0 <= label < len(self.classes):
                raise BadRow(f"{name}: expected a label with a name, found {label}")
            values = values | {self._form.caption: self.classes[label]}
        return example_from_row(values, name, self._form, self._find, unread=self.unread)

    def _find(self, value: Any, row_name: str) -> ImageRef:
        path = value
        if isinstance(value, Mapping):
            if value.get("bytes") is not None:
                return ImageRef(value["bytes"], f"{row_name}: {value.get('path') or 'image'}")
            path = value.get("path")
        if isinstance(value, bytes):
            return ImageRef(value, f"{row_name}: image")
        if not isinstance(path, str):
            raise BadRow(f"{row_name}: expected an image, found {str(value)[:80]!r}")
        if self._images is None:
            raise BadRow(
                f"{row_name}: expected the image in the table, found the path {path!r}; "
                "say where paths start with root="
            )
        return self._images.find(path, row_name)


def load_table(body: str, split: str | None, config: str | None = None) -> tuple[Dataset, Path]:
    """A table and the folder that its image paths start from.

    body: a .parquet file; a folder saved by `save_to_disk`; another folder, read as images with
        class folders or a metadata file; or else a hub id, such as "org/name".
    split: the split; None where there is but one.
    config: the hub set's configuration.
    Raises BadSource where it cannot be loaded, naming `body`.
    """
    with needs("data"):
        import datasets

    path = Path(body)
    try:
        if path.is_dir() and _is_saved(path):
            return _one_split(datasets.load_from_disk(body), body, split), path
        if path.is_dir():
            folder = datasets.load_dataset("imagefolder", data_dir=body)
            table = _one_split(folder, body, split)
            _require_texts(table, body)
            return table, path
        if path.is_file() and path.suffix.lower() == ".parquet":
            return datasets.Dataset.from_parquet(body), path.parent
        table = datasets.load_dataset(body, config)
        return _one_split(table, body, split), Path(datasets.config.HF_CACHE_HOME)
    except BadSource:
        raise
    except Exception as error:  # of many libraries: hub, http, fsspec, pyarrow, datasets
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        kind = (
            "it" if path.exists() else f"the set {body!r} from the hub (no local file has its name)"
        )
        raise BadSource(f"datasets: {body}: cannot load {kind}: {reason}") from error


def _require_texts(table: Dataset, body: str) -> None:
    """Raises BadSource for a folder of images alone, saying what would make it a source."""
    if table.column_names == ["image"]:
        raise BadSource(
            f"{body}: expected texts or classes beside images, found {len(table)} images alone; "
            "such a folder needs a metadata.jsonl with file_name and caption on each line, or "
            "images in a folder for each class (cat/1.png); rows of any other form are in a .jsonl "
            "file, which is named instead"
        )


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _one_split(table: Dataset | DatasetDict, body: str, split: str | None) -> Dataset:
    if not isinstance(table, Mapping):
        if split is not None and split != str(table.split):
            raise BadSource(
                f"{body}: expected the split {split!r}, found {str(table.split)!r} only"
            )
        return table
    if split is None and len(table) == 1:
        return next(iter(table.values()))
    if split not in table:
        raise BadSource(f"{body}: expected one of the splits {sorted(table)}, found {split!r}")
    return table[split]


def _undecoded(table: Dataset) -> Dataset:
    """The table with every column of images, sound or videos, or lists of these, left encoded."""
    from datasets import Audio, Image, LargeList, List, Video

    encoded = (Image, Audio, Video)
    for column, feature in table.features.items():
        if isinstance(feature, encoded):
            table = table.cast_column(column, type(feature)(decode=False))
        elif isinstance(feature, List | LargeList) and isinstance(feature.feature, encoded):
            undecoded = type(feature)(type(feature.feature)(decode=False))
            with contextlib.suppress(AttributeError):
                undecoded.length = feature.length
            table = table.cast_column(column, undecoded)
    return table
