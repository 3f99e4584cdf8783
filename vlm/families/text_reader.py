"""The public models that read: lines and pages of text in, readings with confidences out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from vlm.families.base import Model, evaluating, require_batch_size, require_list
from vlm.families.decoder_only.batch import Row
from vlm.families.line_reader.batch import LineRow, by_width
from vlm.image_tokens import pixel_hw
from vlm.metrics.calibration import UNFITTED, Temperatures, fit_scaling
from vlm.ocr.results import Reading, Transcript

WINDOW = 16
"""Batches of lines that are sorted by width together."""
LARGEST = 2**28
"""Lines times the square of their columns that are read at once, at most: so attention along the
line grows. One line of 16,384 columns, 256 of 1,024."""


@dataclass(kw_only=True, eq=False)
class TextReader(Model):
    """What models of lines share: pages are found out in lines, and lines are read in batches.

    A subclass implements `_encode` and `_read`.
    reads: whether it is shown "lines", or whole "pages" as models of other families are.
    temperatures: of confidences; kept in our own layout alone.
    """

    reads: str = "lines"
    temperatures: Temperatures = UNFITTED
    options: ClassVar[Collection[str]] = ()
    """Options that reading takes beside those that `ocr` and `read_lines` name."""

    def ocr(
        self,
        images: Iterable,
        layout: str = "auto",
        batch_size: int = 32,
        num_beams: int = 1,
        min_confidence: float = 0.0,
        stream: bool = False,
        **options,
    ) -> list[Reading] | Iterator[Reading]:
        """What is written in each image, line by line; see `vlm.ocr.pages.read_each`. Texts are
        in logical order (see `vlm.ocr.results`).

        images: paths, bytes, PIL images or arrays; any iterable, from which they are taken as they
            are needed. layout: "line" takes each image as one line, "page" finds its lines, "auto"
            decides for each.
        min_confidence: lines of a lower confidence are skipped, with a warning that counts them.
        stream: gives an iterator that yields each reading as soon as it is there, before further
            images are opened, so that any number of pages is read in bounded memory.
        options: those of `read_lines`.
        """
        from vlm.ocr.pages import read_each  # which needs OpenCV

        require_list(images)
        self._require_known(options)
        require_batch_size(batch_size)
        readings = read_each(
            self, images, layout, batch_size, min_confidence, num_beams=num_beams, **options
        )
        return readings if stream else list(readings)

    def read_lines(
        self, images: Sequence, batch_size: int = 32, num_beams: int = 1, **options
    ) -> list[Transcript]:
        """What is written in each image of a single line.

        num_beams: 1 takes the likeliest character or token each time; more search among texts.
        A blank image has the text "", and as confidence that nothing stands there.
        Raises ValueError for an option that reading does not have.
        """
        require_list(images)
        self._require_known(options)
        if batch_size < 1 or num_beams < 1:
            raise ValueError(
                f"batch_size and num_beams must be at least 1, found {batch_size}, {num_beams}"
            )
        done: list[Transcript | None] = [None] * len(images)
        bar = tqdm(total=len(images), desc="lines", disable=len(images) <= 256, leave=False)
        with evaluating(self.module), torch.inference_mode(), bar:
            for first in range(0, len(images), WINDOW * batch_size):
                part = images[first : first + WINDOW * batch_size]
                rows = [self._encode(p, name_of(p, first + i)) for i, p in enumerate(part)]
                for group in _groups([_width(row) for row in rows], batch_size):
                    read = self._read([rows[i] for i in group], num_beams, **options)
                    for i, transcript in zip(group, read, strict=True):
                        done[first + i] = transcript
                    bar.update(len(group))
        return done

    def fit_temperatures(self, images: Sequence, truths: Sequence[str]) -> Temperatures:
        """Calibrates confidences, by lines that it has not learned from; they are kept, and saved
        with the model in our own layout. The order of confidences never changes.

        truths: what stands on each image; compared in NFC, white space joined. Where all lines,
        or all tokens, are right (or all wrong), theirs stay as they were.
        Raises ValueError where there are more of one than of the other.
        """
        from vlm.metrics.text import normalise, pieces_right  # of the extra ocr

        require_list(images)
        require_list(truths, "truths")
        if len(images) != len(truths):
            raise ValueError(
                f"expected a truth for each image, found {len(images)} images and "
                f"{len(truths)} truths"
            )
        before, self.temperatures = self.temperatures, UNFITTED
        try:
            read = self.read_lines(images)
        except BaseException:
            self.temperatures = before
            raise
        truths = [normalise(truth) for truth in truths]
        lines = [(r.confidence, normalise(r.text) == truth) for r, truth in zip(read, truths)]
        tokens = [
            (token.confidence, right)
            for r, truth in zip(read, truths)
            for token, right in zip(r.tokens, pieces_right(truth, [t.text for t in r.tokens]))
        ]
        fitted = Temperatures(line=_temperature(lines), token=_temperature(tokens))
        self.temperatures = fitted
        return fitted

    def _require_known(self, options: dict[str, Any]) -> None:
        """Raises ValueError naming options that reading does not have, and those that it has."""
        unknown = sorted(set(options).difference(self.options))
        if unknown:
            known = ["layout", "batch_size", "num_beams", "min_confidence", "stream"]
            more = ", and transformers' names, such as max_new_tokens" if self.options else ""
            raise ValueError(
                f"expected options of reading ({', '.join(known)}{more}), found "
                f"{', '.join(unknown)}"
            )

    def _encode(self, image, name: str) -> LineRow | Row:
        """An image as what is read."""
        raise NotImplementedError

    def _read(self, rows: Sequence, num_beams: int, **options) -> list[Transcript]:
        """What stands on rows of one width."""
        raise NotImplementedError


def _temperature(said: Sequence[tuple[float, bool]]) -> float:
    """The temperature that makes (confidence, right) likeliest; 1 where nothing tells it."""
    rights = [right for _, right in said]
    if not said or all(rights) or not any(rights):
        return 1.0
    return fit_scaling([math.log(max(c, 1e-30)) for c, _ in said], rights).temperature


def _groups(widths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers of lines to be read at once: of one width, at most a batch, and within LARGEST."""
    groups = []
    for group in by_width(widths):
        most = max(1, min(batch_size, LARGEST // widths[group[0]] ** 2))
        groups += [group[start : start + most] for start in range(0, len(group), most)]
    return groups


def _width(row: LineRow | Row) -> int:
    """Columns of a row's first view."""
    return pixel_hw(row.views[0][0])[1]


def name_of(image, index: int) -> str:
    """What messages call an image."""
    return str(image) if isinstance(image, (str, Path)) else f"line {index}"
