"""What every source is, and how a row's image path finds its file.

Rows come from strangers, paths in them too: a path is looked up under one root and nowhere else,
and nothing is ever fetched from an address.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vlm.data.example import BadRow, BadSource, Example
from vlm.pixels.image_ref import ImageRef

if TYPE_CHECKING:
    from vlm.data.sources.keys import UnreadKeys

FIRST = 3
"""How many places a fault is named by."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong in a source, of one kind.

    kind: what, in words, after which a number of them stands. count: how often.
    first: where first, at most FIRST places.
    harmful: whether it makes the source one that has to be mended; else it was got around.
    """

    kind: str
    count: int
    first: tuple[str, ...]
    harmful: bool = False

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        return f"{self.count:,} {self.kind}: {', '.join(self.first)}{more}"


class Source(ABC):
    """Examples by row number, 0 to len - 1.

    A subclass sets `name`, calls `require_rows` once it knows its length, and implements
    `__len__`, `row_name` and `read`. It must be picklable and safe to read from several processes
    at once, so it keeps no open file.
    """

    name: str
    classes: tuple[str, ...] | None = None
    """The names that captions are chosen from, in the source's own order, where it lists them."""
    files: tuple[str | Path, ...] = ()
    """The files whose rows it reads, where it knows them; none of a source that draws."""
    faults: tuple[Fault, ...] = ()
    """What was found wrong when it was opened, and got around."""
    unread: UnreadKeys | None = None
    """Keys of its rows that are not read, where rows have keys; filled as rows are read."""
    drawn: bool = False
    """Whether its rows are drawn, so that none can be wrong."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row_name(self, row: int) -> str:
        """The name of a row, unique in this source, found without decoding the row."""

    @abstractmethod
    def read(self, row: int) -> Example:
        """The example of a row that exists. Raises BadRow naming file, row, expected, found."""

    def __getitem__(self, row: int) -> Example:
        """The example at `row`. Raises IndexError outside 0 to len - 1, BadRow as `read` does, with
        the full path of the row's file at its end: names of rows have the file's name alone."""
        if not 0 <= row < len(self):
            raise IndexError(f"{self.name}: row {row} of {len(self)}")
        try:
            return self.read(row)
        except BadRow as error:
            place = self._place_of(row)
            if place is None or place in str(error):
                raise
            raise BadRow(f"{error} (in {place})") from error

    def _place_of(self, row: int) -> str | None:
        """The full path of the file that a row is in; None where it is not known."""
        name = self.row_name(row)
        named = [path for path in self.files if name.startswith(Path(path).name)]
        files = named or self.files
        return os.path.abspath(files[0]) if len(files) == 1 else None

    def require_rows(self) -> None:
        """Raises BadSource where the source is empty: it would leave its share of a mixture out."""
        if len(self) == 0:
            why = "; ".join(map(str, self.faults))
            raise BadSource(
                f"{self.name}: expected at least one row, found none" + (f": {why}" if why else "")
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} rows)"


class ListSource(Source):
    """Examples held in memory, for tests and small hand-made sets."""

    def __init__(self, examples: Sequence[Example], name: str = "list") -> None:
        self.name = name
        self._examples = tuple(examples)
        self.require_rows()

    def __len__(self) -> int:
        return len(self._examples)

    def row_name(self, row: int) -> str:
        return self._examples[row].name

    def read(self, row: int) -> Example:
        return self._examples[row]


class Derived(Source):
    """Another source's rows, changed as they are read; a subclass implements `read`."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name, self.files = source.name, source.files
        self.faults, self.unread, self.drawn = source.faults, source.unread, source.drawn

    def __len__(self) -> int:
        return len(self.source)

    def row_name(self, row: int) -> str:
        return self.source.row_name(row)


class ImageRoot(Protocol):
    """A place where image paths of rows are looked up."""

    def find(self, path: str, row_name: str) -> ImageRef:
        """The image at `path`. Raises BadRow where the path is unsafe or nothing is there."""


class FolderImages:
    """Images as files under one folder.

    Absolute paths are taken where they lie under the folder. The test is on the path's words, not
    on what links lead to: a link inside the folder is its owner's choice, a row cannot make one.
    """

    def __init__(self, folder: str | Path) -> None:
        self._given = Path(folder)
        self._folder = os.path.abspath(folder)
        self._real = os.path.realpath(folder)

    def find(self, path: str, row_name: str) -> ImageRef:
        refuse_address(path, row_name)
        full = os.path.normpath(os.path.join(self._folder, path))
        if not any(_lies_under(full, root) for root in (self._folder, self._real)):
            raise BadRow(
                f"{row_name}: expected an image path under {self._given}, found {path!r}, "
                "which leaves it"
            )
        if not os.path.isfile(full):
            raise BadRow(f"{row_name}: image file {path!r} is not under {self._folder}")
        return ImageRef(Path(full), f"{row_name}: {path}")


def refuse_address(path: str, row_name: str) -> None:
    """Raises BadRow where `path` is no file path: an address, data, or nothing."""
    if "://" in path or path.lower().startswith("data:"):
        raise BadRow(f"{row_name}: expected a local image path, found the address {path[:80]!r}")
    if not path or "\0" in path:
        raise BadRow(f"{row_name}: expected an image path, found {path!r}")


def read_bytes(path: str | Path, offset: int, size: int, row_name: str) -> bytes:
    """`size` bytes of a file from `offset`. Raises BadRow where the file is gone or shorter now.

    The file is opened anew: a handle kept open would share its position between the loader's
    forked workers.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise BadRow(f"{row_name}: {path} cannot be read: {error.strerror}") from error
    if len(data) != size:
        raise BadRow(
            f"{row_name}: expected {size} bytes at byte {offset} of {path}, found {len(data)}; "
            "the file has changed since it was opened"
        )
    return data


def _lies_under(path: str, root: str) -> bool:
    return path.startswith(root if root.endswith(os.sep) else root + os.sep)
