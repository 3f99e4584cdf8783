"""An index of images: embedded once, then searched by vectors of texts or images.

An index is a folder: `index.json` says which model made it and which files it holds, and names the
file of vectors, which is faiss' own and is mapped into memory, not read. A new version is written
beside the old one and takes its place in one step. Searching is exact, unless an approximate index
was asked for: vectors in clusters, of which only the nearest are searched.

Shapes: N image or query, U shared embedding width.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from vlm import config
from vlm.data.example import Skipped
from vlm.families.contrastive.model import ContrastiveModel
from vlm.retrieval import nearest
from vlm.retrieval.embed_rows import Reading
from vlm.retrieval.fingerprint import Fingerprint, fingerprint_of
from vlm.retrieval.image_files import embed_images, find_images, require_headers
from vlm.retrieval.index_folder import FILE, index_file
from vlm.retrieval.nearest import Clusters
from vlm.weights import require_disk_space

FORMAT, VERSION = "vlm index", 3
RENAMED = {2: {"origin": "fingerprint"}}
"""By the version of a file, the keys that have another name today."""


@dataclass(frozen=True, slots=True)
class File:
    """An image of an index as it was when it was embedded.

    path: below the index's folder of images. mtime_ns: nanoseconds. size: bytes.
    """

    path: str
    mtime_ns: int
    size: int


class Changes(NamedTuple):
    """What building did: the numbers of images in the index that were new, changed, or kept as
    they were, and of those that are gone; and the files that were skipped."""

    new: int
    changed: int
    kept: int
    gone: int
    skipped: list[Skipped]


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What index.json says, besides `format`, `version` and `files`. vectors: the name of the file
    of vectors. The rest is what `Index` says."""

    fingerprint: Fingerprint
    folder: str
    complete: bool
    clusters: Clusters | None
    vectors: str


class Index:
    """Vectors of the images in a folder.

    fingerprint: of the model that made them. folder: of the images. files: one for each vector, by
    path. clusters: None where searching is exact. complete: False where building was stopped
    half-way. changes: what building did; None for an index that was opened.
    """

    def __init__(
        self,
        engine,
        fingerprint: Fingerprint,
        folder: Path,
        files: Sequence[File],
        *,
        clusters: Clusters | None = None,
        complete: bool = True,
        changes: Changes | None = None,
    ) -> None:
        """engine: an index of faiss, whose rows are the vectors of `files`; see `nearest`.

        Raises ValueError where its rows or their width do not fit.
        """
        found, expected = (engine.ntotal, engine.d), (len(files), fingerprint.dim)
        if found != expected:
            raise ValueError(f"expected vectors {list(expected)}, found {list(found)}")
        self._engine = engine
        self.fingerprint = fingerprint
        self.folder = folder
        self.files = tuple(files)
        self.clusters = clusters
        self.complete = complete
        self.changes = changes

    def __len__(self) -> int:
        return len(self.files)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        model: ContrastiveModel,
        *,
        source: str | Path,
        out: str | Path | None = None,
        dtype: str = "auto",
        approximate: bool = False,
        reading: Reading = Reading(),  # noqa: B008 - frozen
    ) -> Index:
        """The index of all images in a folder and the folders below it.

        source, dtype: what `model` was opened with, by which a search opens it again.
        out: where the index is saved. One that lies there is brought up to date: only images
            that are new or changed (in size or time) are embedded, and those that are gone leave
            it. What was embedded when building stops half-way is saved too, for the next build to
            go on from. None saves nothing.
        approximate: see `Clusters`. reading: how images are read, and whether one that cannot be
            read stops the building or is skipped and counted.
        Raises ValueError for a folder without images, and where `out` is the index of another
        folder or model or no index at all; BadImage or BadRow naming images that cannot be
        read; OSError, before anything is embedded, where the disk is too full for the index.
        """
        folder = Path(folder).resolve()
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder of images, found none")
        nearest.faiss_library()  # missed here, not when all is embedded
        found, skipped = _files(folder)
        present = {file.path: file for file in found}
        fingerprint = fingerprint_of(model, source, dtype)
        old = None if out is None else _existing(Path(out), fingerprint, folder)
        before = {} if old is None else old._by_path
        kept = [i for i, file in enumerate(before.values()) if present.get(file.path) == file]
        todo = [file for file in present.values() if before.get(file.path) != file]
        gone = len(before.keys() - present)
        if reading.bad_rows == "raise":
            lost = [Path(row.name) for row in skipped]
            require_headers(lost + [folder / file.path for file in todo])
        if out is not None and todo:
            require_disk_space(Path(out), _bytes(present.values(), fingerprint.dim))
        files = [old.files[i] for i in kept]
        vectors: list[np.ndarray] = []

        def whole(complete: bool) -> Index:
            order = sorted(range(len(files)), key=lambda i: files[i].path)
            rows = np.concatenate([old.vectors()[kept], *vectors] if kept else vectors)[order]
            engine, clusters = nearest.engine_of(rows, approximate and complete)
            added = files[len(kept) :]
            changed = sum(file.path in before for file in added)
            changes = Changes(len(added) - changed, changed, len(kept), gone, skipped)
            return cls(
                engine, fingerprint, folder, [files[i] for i in order],
                clusters=clusters, complete=complete, changes=changes,
            )  # fmt: skip

        try:
            for part in embed_images(model, [folder / file.path for file in todo], reading):
                vectors.append(part.vectors)
                files += [todo[i] for i in part.indices]
                skipped += part.skipped
        except BaseException:  # an interrupt too: hours of work may lie behind
            if out is not None and len(files) > len(kept):
                whole(complete=False).save(out)
            raise
        if not files:
            raise ValueError(
                f"{folder}: none of {len(skipped)} images can be read, the first for this "
                f"reason: {skipped[0].reason}"
            )
        fits = old is not None and old.complete and approximate == (old.clusters is not None)
        if fits and len(files) == len(kept) == len(old):  # no vectors to write
            if old.fingerprint != fingerprint:  # of the same model, which lies elsewhere now
                _write_fingerprint(Path(out), fingerprint)
                old.fingerprint = fingerprint
            old.changes = Changes(0, 0, len(kept), 0, skipped)
            return old
        index = whole(complete=True)
        if out is not None:
            index.save(out)
        return index

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """The index in a folder, its vectors mapped into memory.

        Raises ValueError naming the file that is missing, broken or of another version.
        """
        path = Path(path)
        where = index_file(path)
        values = _read_head(where)
        rows = values.pop("files", None)
        described = config.from_dict(Description, values, str(where))
        try:
            files = [File(*row) for row in rows]
        except TypeError as error:
            raise ValueError(f"{where}.files: expected rows of path, time, size") from error
        file = path / described.vectors
        engine = nearest.open_engine(file)
        try:
            return cls(
                engine, described.fingerprint, Path(described.folder), files,
                clusters=described.clusters, complete=described.complete,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the index to a folder; the one that lies there stays whole until then.

        Raises ValueError where the folder holds something else, OSError where the disk is too full.
        """
        path = Path(path)
        check_destination(path)
        require_disk_space(path, _bytes(self.files, self.fingerprint.dim))
        path.mkdir(parents=True, exist_ok=True)
        description = Description(
            fingerprint=self.fingerprint,
            folder=str(self.folder),
            complete=self.complete,
            clusters=self.clusters,
            vectors=f"vectors-{secrets.token_hex(6)}.faiss",
        )
        values = config.to_dict(description)
        values["files"] = [[file.path, file.mtime_ns, file.size] for file in self.files]
        with FileLock(path / ".lock"):
            nearest.faiss_library().write_index(self._engine, str(path / description.vectors))
            _write_head(path, values)
            for other in path.glob("vectors-*.faiss"):
                if other.name != description.vectors:
                    other.unlink()

    def require(self, fingerprint: Fingerprint, where: str | Path = "the index") -> None:
        """Raises ValueError naming both models where vectors of the other cannot be compared."""
        if not self.fingerprint.agrees(fingerprint):
            raise ValueError(
                f"{where}: built with {self.fingerprint}; found {fingerprint}. Search it with the "
                "model that it was built with, or build another index"
            )

    def vectors(self) -> np.ndarray:
        """float32[N, U], unit norm, in the order of `files`."""
        if self.clusters is not None:
            self._engine.make_direct_map()
        return self._engine.reconstruct_n(0, len(self))

    def search(self, queries, k: int = 10) -> tuple[np.ndarray, list[list[Path]]]:
        """The nearest images to each query: cosines float32[N, K], falling, and their K files.

        queries: float[N, U], a tensor or an array, of any norm but zero. K is k, or the number of
        images where that is less. Equal cosines come in the order of their paths.
        Raises ValueError naming what was expected and found.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, found {k}")
        queries = nearest.unit_vectors(queries, self.fingerprint.dim)
        k = min(k, len(self))
        scores, rows = nearest.search(self._engine, queries, k)
        return scores, [[self.folder / self.files[i].path for i in row] for row in rows]

    def fault(self, path: Path) -> str:
        """What has become of an image of the index: "" is nothing, else "missing" or "changed"."""
        relative = path.relative_to(self.folder).as_posix()
        try:
            same = _file(self.folder, path) == self._by_path[relative]
        except FileNotFoundError:
            return "missing"
        return "" if same else "changed"

    @cached_property
    def _by_path(self) -> dict[str, File]:
        return {file.path: file for file in self.files}


def _files(folder: Path) -> tuple[list[File], list[Skipped]]:
    """The images of a folder, by path, and what has an image's name and cannot be looked at,
    such as a link that leads nowhere."""
    files, lost = [], []
    for path in find_images([folder]):
        try:
            files.append(_file(folder, path))
        except OSError as error:
            lost.append(Skipped(str(path), f"expected an image file, found: {error.strerror}"))
    return sorted(files, key=lambda file: file.path), lost


def _file(folder: Path, path: Path) -> File:
    about = path.stat()
    return File(path.relative_to(folder).as_posix(), about.st_mtime_ns, about.st_size)


def _bytes(files: Collection[File], dim: int) -> int:
    """About how many bytes the index of some files takes on the disk."""
    return len(files) * dim * 4 + sum(len(file.path) + 48 for file in files)


def _read_head(where: Path) -> dict[str, Any]:
    """What an index.json says by today's keys, `format` and `version` aside.

    Raises ValueError naming the file where it is no index's or of a version that is not read.
    """
    try:
        values = json.loads(where.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"{where}: expected the file of an index, found something else")
    if (version := values.pop("version", None)) not in (VERSION, *RENAMED):
        raise ValueError(
            f"{where}: expected version {VERSION} or {', '.join(map(str, RENAMED))}, found "
            f"{version}; build the index anew"
        )
    renamed = RENAMED.get(version, {})
    return {renamed.get(key, key): value for key, value in values.items()}


def _write_head(path: Path, values: dict[str, Any]) -> None:
    """Puts an index.json with these values, a file on each line, in the place of the old one."""
    values = {"format": FORMAT, "version": VERSION, **values}
    about = json.dumps({k: v for k, v in values.items() if k != "files"}, indent=2)
    rows = ",\n".join(json.dumps(row) for row in values["files"])
    new = path / (FILE + ".new")
    new.write_text(f'{about[:-2]},\n  "files": [\n{rows}]\n}}\n', encoding="utf-8")
    os.replace(new, path / FILE)


def _write_fingerprint(path: Path, fingerprint: Fingerprint) -> None:
    """Puts another fingerprint into the index.json of an index, whose vectors stay as they are."""
    with FileLock(path / ".lock"):
        values = _read_head(path / FILE)
        _write_head(path, values | {"fingerprint": config.to_dict(fingerprint)})


def check_destination(path: Path) -> None:
    """Raises ValueError where an index would be written among other things."""
    if path.is_dir() and not (path / FILE).is_file():
        found = sorted(other.name for other in path.iterdir() if not other.name.startswith("."))
        # Of an index whose writing was stopped the file of vectors may lie there.
        if any(not name.startswith(("vectors-", FILE)) for name in found):
            raise ValueError(f"{path}: expected an index or a new folder, found {found[:8]}")
    elif path.exists() and not path.is_dir():
        raise ValueError(f"{path}: expected a folder for the index, found a file")


def _existing(path: Path, fingerprint: Fingerprint, folder: Path) -> Index | None:
    """The index to bring up to date, if there is one. Raises ValueError where it is another's."""
    check_destination(path)
    if not (path / FILE).is_file():
        return None
    index = Index.load(path)
    index.require(fingerprint, path)
    if index.folder != folder:
        raise ValueError(
            f"{path}: expected an index of {folder}, found one of {index.folder}; name another "
            "folder for the index"
        )
    return index
