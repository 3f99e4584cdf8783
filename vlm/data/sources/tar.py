"""Members of tar files by byte position, found by walking the headers once.

A member is then one read at an offset: no tar library, no open file, nothing unpacked to disk.
A file that ends anywhere but at its end mark is refused before any training starts.
"""

from __future__ import annotations

import hashlib
import mmap
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlm.data.example import BadRow, BadSource
from vlm.data.sources.base import read_bytes, refuse_address
from vlm.pixels.image_ref import ImageRef

BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}


class Member(NamedTuple):
    """A regular file in a tar: its content is `size` bytes from `offset` (bytes, from 0)."""

    name: str
    offset: int
    size: int


def walk_members(path: str | Path) -> Iterator[Member]:
    """The regular files in a tar file (USTAR, GNU or PAX, not compressed), in its order.

    Folders and links are skipped, as WebDataset does.
    Raises BadSource where the file is missing, no tar, or cut short: the message names the byte
    and the last whole member.
    """
    path = Path(path)
    if not path.is_file():
        raise BadSource(f"{path}: expected a tar file, found none")
    if path.stat().st_size == 0:
        raise BadSource(f"{path}: expected a tar file, found an empty file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for magic, kind in _COMPRESSED.items():
            if data[: len(magic)] == magic:
                raise BadSource(f"{path}: {kind} files must be unpacked to plain tar first")
        yield from _walk(path, data)


def _walk(path: Path, data: mmap.mmap) -> Iterator[Member]:
    position, last = 0, "none"
    name, size = None, None  # what an extended header says of the member after it
    while True:
        header = data[position : position + BLOCK]
        if len(header) < BLOCK:
            raise BadSource(
                f"{path}: cut short: expected a member or the end mark at byte {position}, found "
                f"the end of the file; last whole member: {last}"
            )
        if not header.strip(b"\0"):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise BadSource(
                f"{path}: expected a tar header at byte {position}, found none ({error}); "
                f"last whole member: {last}"
            ) from error
        holds_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        extended = info.type in (*tarfile.GNU_TYPES, tarfile.XHDTYPE, tarfile.XGLTYPE)
        length = info.size if holds_data or extended else 0
        if size is not None and not extended:
            length = size
        start = position + BLOCK
        if start + length > len(data):
            raise BadSource(
                f"{path}: cut short: {name or info.name} at byte {start} has {length} bytes, "
                f"the file ends at byte {len(data)}; last whole member: {last}"
            )
        position = start - (-length // BLOCK) * BLOCK
        content = data[start : start + length] if extended else b""
        if info.type == tarfile.GNUTYPE_SPARSE or b"\nGNU.sparse" in content:
            raise BadSource(f"{path}: {name or info.name} is a sparse file, which is not read")
        if info.type == tarfile.GNUTYPE_LONGNAME:
            name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            records = _pax_records(content)
            name, size = records.get("path", name), records.get("size", size)
            size = None if size is None else int(size)
        elif not extended:
            last = name or info.name
            if info.isreg():
                yield Member(last, start, length)
            name, size = None, None


def _pax_records(content: bytes) -> dict[str, str]:
    """The records of a PAX header: "LENGTH KEY=VALUE\\n", LENGTH counting the whole record."""
    records, position = {}, 0
    while (space := content.find(b" ", position)) > 0:
        end = position + int(content[position:space])
        key, _, value = content[space + 1 : end - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position = max(end, space + 1)
    return records


class TarImages:
    """Images as members of one tar file, looked up by name.

    The index holds 24 bytes for each member: a hash of its name, its offset and its size.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        hashes, spans = array("Q"), array("q")
        for member in walk_members(path):
            hashes.append(_hash(member.name))
            spans.extend((member.offset, member.size))
        hash_N, span_N2 = np.array(hashes, np.uint64), np.array(spans, np.int64).reshape(-1, 2)
        order = np.argsort(hash_N, kind="stable")
        self._hashes, self._spans = hash_N[order], span_N2[order]
        if len(hash_N) and (self._hashes[1:] == self._hashes[:-1]).any():
            raise BadSource(f"{path}: expected members of different names, found a name twice")

    def find(self, path: str, row_name: str) -> ImageRef:
        refuse_address(path, row_name)
        key = np.uint64(_hash(path))
        at = int(np.searchsorted(self._hashes, key))
        if at == len(self._hashes) or self._hashes[at] != key:
            raise BadRow(f"{row_name}: image {path!r} is not in {self._path}")
        offset, size = map(int, self._spans[at])
        data = read_bytes(self._path, offset, size, row_name)
        return ImageRef(data, f"{row_name}: {path}")


def _hash(name: str) -> int:
    name = name.removeprefix("./").encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
