"""Builds the packaged sample: drawings of emoji with captions, small enough to ship.

Used once, to make `vlm/data/sample`; kept so that the sample can be made again and checked.
Each split becomes two files: SPLIT.tar, the drawings as lossless WebP, and SPLIT.jsonl, one row
for each drawing in the tar's order. The rows lie outside the tar because a tar pads every member
to 512 bytes and adds a 512 byte header, more than a row is long.

    python -m vlm.data.make_sample FOLDER OUT

FOLDER holds the shards VENDOR-SPLIT-00000.tar for the vendors google and twitter and the splits
train and val: KEY.png (RGBA) followed by KEY.json. The same input and the same Pillow give the
same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image

FIELDS = ("caption", "keywords", "group", "subgroup", "source")
TRANSFER_COUNT = 400


def is_val(key: str) -> bool:
    """Whether the emoji `key` belongs to the val split: one in ten, by the md5 of its key."""
    return int(hashlib.md5(key.encode("ascii")).hexdigest(), 16) % 10 == 0


def make_sample(folder: Path, out: Path, transfer_count: int = TRANSFER_COUNT) -> dict[str, int]:
    """Writes the splits train, val and transfer into `out`; returns the bytes of each file.

    train: every Noto drawing of a train emoji. val: every Twemoji drawing of a val emoji, so both
    the emoji and the hand that drew it are new. transfer: the first `transfer_count` Twemoji
    drawings of train emoji, so only the hand is new.
    Raises ValueError where a shard holds a key of the other split, a member without its partner,
    or an image that WebP does not give back pixel for pixel.
    """
    out.mkdir(parents=True, exist_ok=True)
    plan = {
        "train": ("google-train-00000.tar", None),
        "val": ("twitter-val-00000.tar", None),
        "transfer": ("twitter-train-00000.tar", transfer_count),
    }
    sizes = {}
    for split, (shard, limit) in plan.items():
        rows = islice(_rows(folder / shard, val=split == "val"), limit)
        for path in _write(rows, out / split):
            sizes[path.name] = path.stat().st_size
    return sizes


def pack_image(data: bytes, name: str) -> tuple[bytes, str]:
    """The smallest exact encoding of an image and its extension: lossless WebP, or `data` itself.

    Pixels, alpha and the colours under full transparency stay as they are: checked by decoding.
    """
    image = Image.open(io.BytesIO(data))
    if image.mode != "RGBA":
        raise ValueError(f"{name}: expected an RGBA image, found {image.mode}")
    packed = io.BytesIO()
    image.save(packed, "WEBP", lossless=True, exact=True, quality=100, method=6)
    if Image.open(packed).convert("RGBA").tobytes() != image.tobytes():
        raise ValueError(f"{name}: WebP does not give back the same pixels")
    if len(packed.getvalue()) < len(data):
        return packed.getvalue(), "webp"
    return data, "png"


def _rows(shard: Path, *, val: bool) -> Iterator[tuple[str, bytes, dict]]:
    """(key, encoded image, JSON) of each sample of a shard, in its order."""
    with tarfile.open(shard) as tar:
        key, image = None, b""
        for member in tar:
            stem, extension = member.name.split(".", 1)
            data = tar.extractfile(member).read()
            if extension == "png" and key is None:
                key, image = stem, data
            elif extension == "json" and stem == key:
                if is_val(key) != val:
                    raise ValueError(f"{shard.name}: {key} belongs to the other split")
                yield key, image, json.loads(data)
                key = None
            else:
                raise ValueError(f"{shard.name}: expected KEY.png, KEY.json, found {member.name}")
        if key is not None:
            raise ValueError(f"{shard.name}: {key}.png has no {key}.json")


def _write(rows: Iterator[tuple[str, bytes, dict]], stem: Path) -> tuple[Path, Path]:
    tar_path, rows_path = stem.with_suffix(".tar"), stem.with_suffix(".jsonl")
    with open(tar_path, "wb") as tar, open(rows_path, "w", encoding="utf-8", newline="\n") as text:
        for key, data, row in rows:
            packed, extension = pack_image(data, f"{tar_path.name}: {key}")
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(packed)
            tar.write(member.tobuf(tarfile.USTAR_FORMAT))
            tar.write(packed + b"\0" * (-len(packed) % tarfile.BLOCKSIZE))
            line = {"image": member.name} | {field: row[field] for field in FIELDS}
            text.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
        tar.write(b"\0" * 2 * tarfile.BLOCKSIZE)
    return tar_path, rows_path


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m vlm.data.make_sample FOLDER OUT")
    sizes = make_sample(Path(sys.argv[1]), Path(sys.argv[2]))
    for name, size in sizes.items():
        print(f"{size:>10,} {name}")
    print(f"{sum(sizes.values()):>10,} in all")


if __name__ == "__main__":
    main()
