"""Commands of contrastive models: classify, embed, index, retrieve."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm.commands.model import UsesModel, open_model
from vlm.config import require_least
from vlm.retrieval.index_folder import index_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlm.data.example import Skipped
    from vlm.families.contrastive.model import ContrastiveModel
    from vlm.retrieval.index import Index


@dataclass(frozen=True, kw_only=True)
class UsesTowers(UsesModel):
    """What commands share whose model brings images and texts into one space."""

    def load(self) -> ContrastiveModel:
        return _contrastive(self.model, self.device, self.dtype)


@dataclass(frozen=True, kw_only=True)
class ReadsImages(UsesTowers):
    """What commands share that read many images."""

    batch_size: int = 64
    """Images embedded at once."""
    workers: int = 1
    """Processes that read and decode images."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """What happens to what cannot be read: everything stops and it is named, or it is skipped and
    counted."""

    def reading(self):
        from vlm.retrieval.embed_rows import Reading

        require_least(self, batch_size=1, workers=0)
        return Reading(batch=self.batch_size, workers=self.workers, bad_rows=self.bad_rows)


@dataclass(frozen=True, kw_only=True)
class Classify(UsesTowers):
    """Say which of some labels fits each image, with probabilities."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files."""
    labels: tuple[str, ...]
    """What to choose from."""
    templates: tuple[str, ...] = ("{}",)
    """Texts that a label is put into, at {}; their vectors are averaged."""
    top: int = 5
    """How many labels are shown, the best first."""
    batch_size: int = 64
    """Images classified at once."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """One JSON object an image and line instead of text."""

    def run(self) -> None:
        from vlm.families.contrastive.model import require_labels, require_templates
        from vlm.pixels import open_image

        if not self.images:
            raise ValueError("name at least one image")
        require_least(self, top=1, batch_size=1)
        require_labels(self.labels)
        require_templates(self.templates)
        for path in self.images:
            open_image(path)
        model = self.load()
        scores = model.classify(self.images, self.labels, self.templates, self.batch_size)
        # A sigmoid model scores each label by itself, a softmax model shares 1 among them.
        softmax = model.module.bias is None
        shares = scores.softmax(1) if softmax else scores.sigmoid()
        for path, row in zip(self.images, shares):
            best = row.sort(descending=True, stable=True).indices[: self.top].tolist()
            found = {self.labels[i]: round(row[i].item(), 6) for i in best}
            if self.as_json:
                print(json.dumps({"image": str(path), "labels": found}, ensure_ascii=False))
            else:
                said = ", ".join(f"{label} {share:.3f}" for label, share in found.items())
                print(f"{path}: {said}" if len(self.images) > 1 else said)


@dataclass(frozen=True, kw_only=True)
class Embed(ReadsImages):
    """Write the vectors of images and texts to a NumPy file.

    `images` and `texts` are float32[N, U] of unit norm; products of vectors are cosines.
    `image_names` and `text_names` say whose they are: each is a JSON list as bytes, to be read with
    json.loads(file["text_names"].tobytes()). `model` is the model.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(name="images")] = ()
    """Image files, and folders, in which images are found at any depth."""
    texts: Path | None = None
    """A file with a text on each line."""
    text: tuple[str, ...] = ()
    """Texts; they come before those of the file."""
    out: Path
    """The .npz file to write."""

    def run(self) -> None:
        import numpy as np

        from vlm.retrieval.image_files import embed_images, find_images, require_headers

        _require_file(self.out, ".npz", "--out")
        reading = self.reading()
        texts = [*self.text, *(() if self.texts is None else _lines(self.texts, self.bad_rows))]
        if blank := [repr(text) for text in texts if not text.strip()]:
            raise ValueError(f"--text: expected texts that are not empty, found {blank[0]}")
        if not self.paths and not texts:
            raise ValueError("name at least one image, folder or text")
        files = find_images(self.paths) if self.paths else []
        if self.bad_rows == "raise":
            require_headers(files)
        model = self.load()
        arrays: dict[str, np.ndarray] = {"model": np.array(self.model)}
        skipped: list[Skipped] = []
        if unread := [repr(texts[i]) for i in model.processor.unread(texts)]:
            raise ValueError(f"expected texts that the model can read, found {unread[0]}")
        if texts:  # before the images, which take longer, so that a fault in one loses little
            arrays["texts"] = model.embed_texts(texts).numpy()
            arrays["text_names"] = _json_bytes(texts)
        if files:
            parts = list(embed_images(model, files, reading))
            skipped = [row for part in parts for row in part.skipped]
            if len(skipped) == len(files):
                raise ValueError(f"none of {len(files)} images can be read: {skipped[0].reason}")
            arrays["images"] = np.concatenate([part.vectors for part in parts])
            kept = [i for part in parts for i in part.indices]
            arrays["image_names"] = _json_bytes([str(files[i]) for i in kept])
        new = self.out.with_name(self.out.name + ".new")
        with new.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(new, self.out)
        _report(skipped)
        counts = [f"{len(arrays[k])} {what}" for k, what in KINDS.items() if k in arrays]
        print(f"{self.out}: {', '.join(counts)}, {model.module.dim} numbers each")


def _json_bytes(names: list[str]):
    """Names as a JSON list in uint8[n]: an array of texts gives each the width of the longest and
    loses NULs at its end."""
    import numpy as np

    return np.frombuffer(json.dumps(names).encode(), np.uint8)


KINDS = {"images": "images", "texts": "texts"}


@dataclass(frozen=True, kw_only=True)
class MakeIndex(ReadsImages):
    """Build an index of the images in a folder, to be searched with `vlm retrieve`.

    Run again, it brings the index up to date: only new and changed images are embedded. What was
    embedded before a stop is kept.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder; images (by their files' endings) are found in it at any depth, hidden ones are
    passed by."""
    out: Path
    """The index, a folder of its own."""
    approximate: bool = False
    """Search only the nearest clusters of vectors: quicker where there are millions, and some hits
    are missed; which share is measured and told. Otherwise every search is exact."""

    def run(self) -> None:
        from vlm.data.example import BadRow
        from vlm.retrieval.image_files import find_images
        from vlm.retrieval.index import Index, check_destination

        reading = self.reading()
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: expected a folder of images, found none")
        find_images([self.folder])
        check_destination(self.out)
        model = self.load()
        try:
            index = Index.build(
                self.folder,
                model,
                source=self.model,
                out=self.out,
                dtype=self.dtype,
                approximate=self.approximate,
                reading=reading,
            )
        except BadRow as error:
            raise BadRow(
                f"{error} (what was embedded before it is kept for the next try; --bad-rows skip "
                "leaves such images out)"
            ) from error
        changes = index.changes
        _report(changes.skipped)
        print(
            f"{self.out}: {len(index)} images ({changes.new} new, {changes.changed} changed, "
            f"{changes.kept} as before, {changes.gone} gone, {len(changes.skipped)} skipped)"
        )
        if index.clusters is not None:
            print(
                f"{index.clusters.probes} of {index.clusters.clusters} clusters are searched: "
                f"{index.clusters.recall:.1%} of the nearest ten, with images of its own as "
                "queries"
            )


@dataclass(frozen=True, kw_only=True)
class Retrieve:
    """Search an index of images by a text or an image; cosines, best first."""

    index: Annotated[Path, tyro.conf.Positional]
    """What `vlm index` built."""
    query: Annotated[str | None, tyro.conf.Positional] = None
    """A text, or the path of an image where there is one at it."""
    text: str | None = None
    """A text, whatever lies at such a path."""
    image: Path | None = None
    """An image's path."""
    top: int = 10
    """How many images."""
    draw: Path | None = None
    """Draw the query and the images found into this PNG file."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """One JSON object an image and line instead of text."""
    model: str | None = None
    """Where the model of the index is now; by default where it was."""
    device: str = "auto"
    """auto takes a GPU where there is one."""

    def run(self) -> None:
        require_least(self, top=1)
        if self.draw is not None:
            _require_file(self.draw, ".png", "--draw")
        index_file(self.index)
        query = self._query()
        from vlm.retrieval.fingerprint import fingerprint_of
        from vlm.retrieval.index import Index

        index = Index.load(self.index)
        if not index.complete:
            print(
                f"{self.index}: only part of its images is in it yet; `vlm index` goes on",
                file=sys.stderr,
            )
        model = self._model(index)
        source = index.fingerprint.model if self.model is None else self.model
        index.require(fingerprint_of(model, source, index.fingerprint.dtype), self.index)
        if isinstance(query, str) and model.processor.unread([query]):
            raise ValueError(f"expected a query that the model can read, found {query!r}")
        embed = model.embed_texts if isinstance(query, str) else model.embed_images
        (scores,), (paths,) = index.search(embed([query]), self.top)
        faults = [index.fault(path) for path in paths]
        for rank, (score, path, fault) in enumerate(zip(scores, paths, faults), 1):
            if self.as_json:
                values = {"rank": rank, "score": round(float(score), 6), "path": str(path)}
                print(json.dumps(values | {"fault": fault or None}, ensure_ascii=False))
            else:
                print(f"{score:.4f}  {path}" + (f"  ({FAULTS[fault]})" if fault else ""))
        if self.draw is not None:
            _draw(query, list(zip(scores, paths, faults)), self.draw)

    def _query(self) -> str | Path:
        """The text, or the path of an image that can be opened."""
        from vlm.pixels import BadImage, open_image
        from vlm.retrieval.image_files import SUFFIXES

        given = [value for value in (self.query, self.text, self.image) if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected one of a query, --text and --image, found {len(given)} of them"
            )
        if self.image is not None:
            open_image(self.image)
            return self.image
        text = given[0]
        if not text.strip():
            raise ValueError(f"expected a query, found an empty text {text!r}")
        if self.text is None and os.sep in text and _is_folder(text):
            raise ValueError(
                f"{text}: expected an image or a text, found a folder; to search for this text, "
                "say --text"
            )
        if self.text is None and (
            _is_file(text) or (" " not in text and text.lower().endswith(SUFFIXES))
        ):
            try:
                open_image(text)
                return Path(text)
            except BadImage as error:
                raise BadImage(f"{error}; to search for this text, say --text") from error
        return text

    def _model(self, index: Index) -> ContrastiveModel:
        try:
            return _contrastive(
                index.fingerprint.model if self.model is None else self.model,
                self.device,
                index.fingerprint.dtype,
            )
        except OSError as error:
            if self.model is not None:
                raise
            raise ValueError(
                f"{self.index}: the model that it was built with cannot be opened ({error}); say "
                "with --model where it is now"
            ) from error


HITS_A_ROW = 10
FAULTS = {"missing": "no longer there", "changed": "changed since it was indexed"}


def _contrastive(source: str, device: str, dtype: str) -> ContrastiveModel:
    return open_model(source, "embed_images", "has no embeddings to compare", device, dtype)


def _is_file(text: str) -> bool:
    return _is(Path.is_file, text)


def _is_folder(text: str) -> bool:
    return _is(Path.is_dir, text)


def _is(kind: Callable[[Path], bool], text: str) -> bool:
    try:
        return kind(Path(text))
    except (OSError, ValueError):  # too long for a path, or a null byte in it
        return False


def _lines(path: Path, bad_rows: str) -> list[str]:
    """The texts of a file, one a line. Raises ValueError naming a line that is empty, unless it is
    to be skipped."""
    if not path.is_file():
        raise ValueError(f"--texts: expected a file with a text on each line, found {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, found {error}") from error
    # Not splitlines, which also splits within texts: at form feeds, U+0085, U+2028.
    lines = text.removesuffix("\n").split("\n") if text else []
    blank = [i for i, line in enumerate(lines, 1) if not line.strip()]
    if blank and bad_rows == "raise":
        raise ValueError(f"{path}: expected a text on each line, found line {blank[0]} empty")
    if blank:
        print(f"{path}: {len(blank)} empty lines skipped", file=sys.stderr)
    if len(blank) == len(lines):
        raise ValueError(f"{path}: expected texts, found none in {len(lines)} lines")
    return [line for line in lines if line.strip()]


def _require_file(path: Path, suffix: str, option: str) -> None:
    if path.suffix.lower() != suffix or not path.absolute().parent.is_dir() or path.is_dir():
        raise ValueError(f"{option}: expected a {suffix} file in a folder, found {path}")


def _report(skipped: Sequence[Skipped]) -> None:
    """What was skipped, to the error stream."""
    for row in skipped[:20]:
        print(f"skipped: {row.name}: {row.reason}", file=sys.stderr)
    if len(skipped) > 20:
        print(f"skipped: {len(skipped) - 20} more", file=sys.stderr)


def _draw(query: str | Path, found: Sequence[tuple[float, Path, str]], path: Path) -> None:
    """A page of the query beside what it found; what is no longer there stands as a text."""
    from vlm.draw import Hit, draw_hits
    from vlm.pixels import BadImage, open_image

    hits = []
    for score, file, fault in found:
        try:
            thing = open_image(file)
        except BadImage:
            thing = f"{file.name}: {FAULTS[fault or 'changed']}"
        hits.append(Hit(thing, float(score)))
    starts = range(0, len(hits), HITS_A_ROW)
    rows = [hits[start : start + HITS_A_ROW] for start in starts]
    first = query if isinstance(query, str) else open_image(query)
    notes = [f"ranks {start + 1} to {start + len(row)}" for start, row in zip(starts, rows)]
    draw_hits([first, *[""] * (len(rows) - 1)], rows, path, notes)
