"""WebDataset shards: tar files in which members that share a key, side by side, are one sample.

The key of `photos/cat.left.png` is `photos/cat`, its extension `left.png`: the name is cut at the
first dot after the last slash. Members without an extension, and those of which the key begins
and ends with two underscores, belong to no sample.
Source: webdataset, `tariterators.py`, `base_plus_ext` and `group_by_keys`; hidden files, which the
former takes for extensions of their folder, belong to no sample here.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vlm.assets import cache_folder
from vlm.data.example import BadRow, BadSource, Example, caption_example
from vlm.data.sources.base import FIRST, Fault, Source, read_bytes
from vlm.data.sources.json_rows import load_json
from vlm.data.sources.keys import MEDIA_EXTENSIONS, UnreadKey, UnreadKeys
from vlm.data.sources.questions import QUESTION_KEY
from vlm.data.sources.row import CAPTION_KEYS, TALK_KEYS, RowFormat, example_from_row
from vlm.data.sources.tar import walk_members
from vlm.pixels.image_ref import ImageRef

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")
INDEX_FORMAT = 2
KEPT_FROM = 50_000
"""Samples from which on the index of shards is kept in the cache, for the next start and the other
ranks of a machine."""
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/)?[^./]+)\.([^/]*)$", re.DOTALL)


class ShardSource(Source):
    """The samples of tar shards, shard by shard, in their order.

    shards: a path with wildcards (*, ?, [..]) and brace ranges ({0000..0009}, {a,b}), or a list
        of these; local files only, not compressed.
    A sample is its images in order, with KEY.json (a row of any form that `row` reads) or
    KEY.txt (a caption, in UTF-8); the JSON is read first, the text where it holds no caption.
    Rows are named SHARD:KEY, the shard relative to the folder that all shards share.
    Members that are not read are counted as keys of rows are, under ".EXTENSION".
    faults: samples of which the names differ after the first dot, which are one by the rule.
    Raises BadSource where a shard is missing, cut short, or its samples are not side by side, where
    a sample has two members of one extension, or videos or sound.
    """

    text_extension = "txt"

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        form: RowFormat | None = None,
        name: str | None = None,
    ) -> None:
        self._paths = find_shards(shards)
        self.files = tuple(self._paths)
        self._form = form or RowFormat()
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in self._paths])
        self._names = [os.path.relpath(path, folder) for path in self._paths]
        self.name = name or str(shards if isinstance(shards, str | Path) else self._names[0])
        self._index = _Index.of(self._paths, self._form.image, self.text_extension)
        self.unread = UnreadKeys(self._form.ignore)
        self._tell_notes()
        self.require_rows()

    def _tell_notes(self) -> None:
        """What the walk through the shards found beside samples, as faults and keys."""
        notes = self._index.notes
        if count := notes["merged"]["count"]:
            kind = "samples with members that differ after the first dot (they are one sample)"
            first = [self._named(*place) for place in notes["merged"]["first"]]
            self.faults = (Fault(kind, count, tuple(first)),)
        for extension, (count, *place) in notes["unread"].items():
            key, name = f".{extension}", self._named(*place)
            if extension in MEDIA_EXTENSIONS and key not in self._form.ignore:
                raise BadSource(
                    f"{name}: expected images and text alone, found {count:,} members {key}; "
                    f"--ignore-keys {key} skips them"
                )
            self.unread.found[key] = UnreadKey(count, name, "a member of the sample")

    def _named(self, shard: int, said: str) -> str:
        return f"{self._names[shard]}:{said}"

    def __len__(self) -> int:
        return len(self._index.sample_shard)

    def row_name(self, row: int) -> str:
        return f"{self._names[self._index.sample_shard[row]]}:{self._index.key(row)}"

    def read(self, row: int) -> Example:
        name = self.row_name(row)
        images = self._images(row, name)
        values = None
        if (data := self._part(row, self._index.json_place, name)) is not None:
            values = load_json(data, name)
            if not self._lacks_caption(values):
                return self._example(values, name, images)
        if (data := self._part(row, self._index.text_place, name)) is not None:
            if len(images) != 1:
                raise BadRow(f"{name}: expected one image for the text, found {len(images)}")
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadRow(f"{name}: expected UTF-8 in the text, found other bytes") from error
            if values is None:
                return caption_example(name, images[0], text, self._form.prompt)
            values = {**values, self._form.caption or CAPTION_KEYS[0]: text}
        if values is not None:
            return self._example(values, name, images)
        raise BadRow(
            f"{name}: expected {self._index.key(row)}.json or .txt beside it, "
            f"found {len(images)} images alone"
        )

    def _example(self, values: object, name: str, images: tuple[ImageRef, ...]) -> Example:
        return example_from_row(values, name, self._form, _no_image, images, self.unread)

    def _lacks_caption(self, values: object) -> bool:
        keys = (self._form.caption,) if self._form.caption else CAPTION_KEYS
        keys += () if self._form.caption else (*TALK_KEYS, QUESTION_KEY)
        return isinstance(values, dict) and all(values.get(key) is None for key in keys)

    def _part(self, row: int, spans: np.ndarray, name: str) -> bytes | None:
        offset, size = map(int, spans[row])
        if offset < 0:
            return None
        return read_bytes(self._paths[self._index.sample_shard[row]], offset, size, name)

    def _images(self, row: int, name: str) -> tuple[ImageRef, ...]:
        index = self._index
        path = self._paths[index.sample_shard[row]]
        first = int(index.image_end[row - 1]) if row else 0
        images = []
        for image in range(first, int(index.image_end[row])):
            offset, size = map(int, index.image_place[image])
            extension = index.extensions[index.image_extension[image]]
            images.append(ImageRef(read_bytes(path, offset, size, name), f"{name}.{extension}"))
        return tuple(images)


def find_shards(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """The local files that a pattern or list of patterns names; wildcards in sorted order.

    Raises BadSource where a pattern names no file, or an address.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    paths: list[str] = []
    for pattern in [shards] if isinstance(shards, str | Path) else shards:
        pattern = str(pattern)
        if "://" in pattern or pattern.startswith("pipe:"):
            raise BadSource(f"{pattern}: expected a local tar file, found an address")
        try:
            expanded = list(braceexpand(pattern, escape=False))
        except UnbalancedBracesError as error:
            raise BadSource(f"{pattern}: expected braces in pairs: {error}") from error
        for path in expanded:
            found = [path] if os.path.isfile(path) else sorted(glob.glob(path))
            if not found:
                raise BadSource(f"{pattern}: expected a tar file, found none at {path}")
            paths += found
    if len(set(paths)) != len(paths):
        raise BadSource(f"{shards}: expected each shard once, found one named twice")
    if not paths:
        raise BadSource("expected at least one shard, found none")
    return paths


class _Index:
    """Where the samples' members lie, in flat arrays; N samples, M images.

    sample_shard: int32[N]. json_place, text_place: int64[N, 2], offset and size, -1 where there
    is none. image_end: int64[N], the images up to and with each sample. image_place:
    int64[M, 2]. image_extension: int16[M] into `extensions`. Keys lie in one run of bytes.
    notes: "merged", the count of samples of several names and the first, each (shard, key and
    extensions), and "unread", for each extension that nothing reads its count, shard and key.
    """

    ARRAYS = ("sample_shard", "json_place", "text_place", "image_end", "image_place",
              "image_extension", "key_end", "keys")  # fmt: skip

    @classmethod
    def of(cls, paths: Sequence[str], image_extension: str | None, text_extension: str) -> _Index:
        """The index that an earlier run kept of these very files, else a walk through them, which
        reads every header: what takes long is kept."""
        files = [(os.path.abspath(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths]
        told = json.dumps([INDEX_FORMAT, image_extension, text_extension, files])
        kept = cache_folder() / "shards" / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.npz"
        if kept.exists():
            return cls._read(kept)
        index = cls._walk(paths, image_extension, text_extension)
        if len(index.sample_shard) >= KEPT_FROM:
            index._write(kept)
        return index

    @classmethod
    def _read(cls, path: Path) -> _Index:
        index = cls()
        with np.load(path, allow_pickle=False) as held:
            for name in cls.ARRAYS:
                setattr(index, name, held[name])
            index.extensions = held["extensions"].tolist()
            index.notes = json.loads(str(held["notes"]))
        return index

    def _write(self, path: Path) -> None:
        """Whole or not at all, whatever other process writes the same; a full or read-only disk
        costs the next run its walk."""
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        part = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            extensions = np.array(self.extensions, dtype=str)
            np.savez(part, extensions=extensions, notes=json.dumps(self.notes), **arrays)
            part.rename(path)
        except OSError:
            part.unlink(missing_ok=True)

    @classmethod
    def _walk(
        cls, paths: Sequence[str], image_extension: str | None, text_extension: str
    ) -> _Index:
        index, sample_shard, image_end, key_end = cls(), array("i"), array("q"), array("q")
        json_place, text_place, image_place = array("q"), array("q"), array("q")
        image_extensions, codes, keys = array("h"), {}, bytearray()
        notes, twice = _Notes(), []
        for shard, path in enumerate(tqdm(paths, "shards", disable=len(paths) < 100)):
            seen: set[str] = set()  # of this shard only
            key, extensions = None, set()
            for member in walk_members(path):
                match = _KEY_AND_EXTENSION.match(member.name)
                if match is None or re.fullmatch("__.*__", match[1]):
                    continue
                if match[1] != key:
                    notes.sample(shard, key, extensions, text_extension)
                    key, extensions = match[1], set()
                    if key in seen:
                        raise BadSource(
                            f"{path}: expected the members of a sample side by side, found "
                            f"{member.name} away from the others of {key}; make the shard with "
                            "`tar --sort=name`"
                        )
                    seen.add(key)
                    sample_shard.append(shard)
                    keys += key.encode("utf-8", "surrogateescape")
                    key_end.append(len(keys))
                    image_end.append(image_end[-1] if image_end else 0)
                    json_place.extend((-1, 0))
                    text_place.extend((-1, 0))
                extension = match[2].lower()
                if extension in extensions:
                    twice.append(f"{path}: {member.name}")
                    continue
                extensions.add(extension)
                if extension == "json":
                    json_place[-2], json_place[-1] = member.offset, member.size
                elif extension == text_extension:
                    text_place[-2], text_place[-1] = member.offset, member.size
                elif _is_image(extension, image_extension):
                    image_place.extend((member.offset, member.size))
                    image_extensions.append(codes.setdefault(extension, len(codes)))
                    image_end[-1] += 1
                else:
                    notes.unread(shard, key, extension)
            notes.sample(shard, key, extensions, text_extension)
        if twice:
            raise BadSource(
                f"expected one member of each extension in a sample (upper and lower case are the "
                f"same, and a sample's name ends at the first dot), found {len(twice):,} more: "
                f"{', '.join(twice[:FIRST])}{', ...' if len(twice) > FIRST else ''}"
            )
        index.notes = notes.found
        index.sample_shard = np.array(sample_shard, np.int32)
        index.image_end = np.array(image_end, np.int64)
        index.json_place = np.array(json_place, np.int64).reshape(-1, 2)
        index.text_place = np.array(text_place, np.int64).reshape(-1, 2)
        index.image_place = np.array(image_place, np.int64).reshape(-1, 2)
        index.image_extension = np.array(image_extensions, np.int16)
        index.extensions = list(codes)
        index.key_end = np.array(key_end, np.int64)
        index.keys = np.frombuffer(bytes(keys), np.uint8)
        return index

    def key(self, row: int) -> str:
        """The key of a sample."""
        start = int(self.key_end[row - 1]) if row else 0
        end = int(self.key_end[row])
        return self.keys[start:end].tobytes().decode("utf-8", "surrogateescape")


class _Notes:
    """What a walk through shards finds that is not as most samples are; see `_Index`."""

    def __init__(self) -> None:
        self.found: dict = {"merged": {"count": 0, "first": []}, "unread": {}}

    def sample(self, shard: int, key: str | None, extensions: set[str], text: str) -> None:
        """A sample that is whole now: whether it is several, by names that go on after the first
        dot. Several images beside one row of JSON are meant to be one."""
        if len(extensions) < 2 or not any("." in extension for extension in extensions):
            return
        stems = {e.rpartition(".")[0] for e in extensions if _is_read(e, text)}
        rows = {e for e in extensions if e.rpartition(".")[2] in ("json", text)}
        if len(stems) < 2 or rows == {"json"}:
            return
        merged = self.found["merged"]
        merged["count"] += 1
        if len(merged["first"]) < FIRST:
            merged["first"].append((shard, f"{key} ({', '.join(sorted(extensions))})"))

    def unread(self, shard: int, key: str, extension: str) -> None:
        """A member that nothing reads, counted by what stands after its last dot; "*." before it
        says that it would be read if no other dot stood there."""
        first, _, last = extension.rpartition(".")
        extension = f"*.{last}" if first and last in (*IMAGE_EXTENSIONS, "json", "txt") else last
        count, *place = self.found["unread"].get(extension, (0, shard, key))
        self.found["unread"][extension] = (count + 1, *place)


def _is_read(extension: str, text: str) -> bool:
    return extension.rpartition(".")[2] in (*IMAGE_EXTENSIONS, "json", text)


def _is_image(extension: str, wanted: str | None) -> bool:
    if wanted is not None:
        return extension == wanted
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def _no_image(value: object, row_name: str) -> ImageRef:
    raise BadRow(f"{row_name}: expected the image as a member beside the row, found {value!r}")
