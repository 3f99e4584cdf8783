"""Boxes as the tokens of two patches, upper left and lower right: Kosmos-2's.

Source: arXiv 2306.14824, section 2.1; transformers, `processing_kosmos2.py`,
`coordinate_to_patch_index`, `patch_index_to_coordinate` and `extract_entities_with_patch_indices`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm.box_codecs.codec import ReadBoxes, from_shares, read_boxes, to_shares
from vlm.geometry import Resize, table

PHRASE, OBJECT = ("<phrase>", "</phrase>"), ("<object>", "</object>")
NEXT = "</delimiter_of_multi_objects/>"
_TOKEN = re.compile(r"<patch_index_([0-9]{4})>")


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchTokens:
    """Boxes as two tokens each, `<patch_index_0000>` to the last patch of a square grid over the
    image as it came, counted row by row; neighbours of one label stand together after it.

    side: patches on each axis. A corner is read back as its patch's middle, so that a coordinate is
        off by half a patch at most; but where both corners lie in one row, or in one column, as
        the outer edges of their patches, off by a patch at most.

    >>> same = Resize((320, 320), (320, 320), (1, 1), (0, 0))
    >>> KOSMOS2.write([(120, 10, 310, 265)], same, ["a snowman"])
    '<phrase>a snowman</phrase><object><patch_index_0044><patch_index_0862></object>'
    >>> KOSMOS2.decode([[44, 862]], same).tolist()
    [[125.0, 15.0, 305.0, 265.0]]
    """

    box_tokens: ClassVar[int] = 8
    tags: ClassVar[tuple[str, ...]] = (*PHRASE, *OBJECT, NEXT)

    side: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.side <= 100:  # tokens have four digits
            raise ValueError(f"side must be 1 to 100, found {self.side}")

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token of each patch, in order."""
        return tuple(map(_patch, range(self.side**2)))

    def encode(self, boxes_xyxy_px: ArrayLike, resize: Resize) -> NDArray[np.int64]:
        """Boxes of the image as it came, [N, 4], as upper left and lower right patch:
        int64[N, 2]."""
        cells = to_shares(boxes_xyxy_px, resize, "image") * self.side
        cells = np.concatenate([np.floor(cells[:, :2]), np.ceil(cells[:, 2:] - 1)], 1)
        x0, y0, x1, y1 = cells.clip(0, self.side - 1).astype(np.int64).T
        return np.stack([y0 * self.side + x0, y1 * self.side + x1], 1)

    def decode(self, patches: ArrayLike, resize: Resize) -> NDArray[np.float64]:
        """Upper left and lower right patch, [N, 2], as boxes in the pixels of the image as it came:
        float64[N, 4]. A box may come out inverted, as it was written."""
        y, x = np.divmod(table(patches, 2, "patches"), self.side)
        cells = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)
        thin = (x[:, 0] == x[:, 1]) | (y[:, 0] == y[:, 1])
        inset = np.where(thin[:, None], (0.0, 0.0, 1.0, 1.0), 0.5)
        return from_shares((cells + inset) / self.side, resize, "image")

    def write(
        self,
        boxes_xyxy_px: ArrayLike,
        resize: Resize,
        labels: Sequence[str] | None = None,
        before: str = "",
    ) -> str:
        """See `BoxCodec.write`."""
        patches = self.encode(boxes_xyxy_px, resize).tolist()
        labelled = zip(labels or [""] * len(patches), patches, strict=True)
        text = before
        for label, group in groupby(labelled, lambda pair: pair[0]):
            if label:
                text = text.removesuffix(label) + label.join(PHRASE)
            text += NEXT.join(_patch(a) + _patch(b) for _, (a, b) in group).join(OBJECT)
        return text

    def read(self, text: str, resize: Resize) -> ReadBoxes:
        """See `BoxCodec.read`. Tokens in a row that are not two are no box; white space between
        them counts for nothing."""
        runs: list[list[re.Match]] = []
        for match in _TOKEN.finditer(text):
            if not runs or text[runs[-1][-1].end() : match.start()].strip():
                runs.append([])
            runs[-1].append(match)
        pairs = [run for run in runs if len(run) == 2 and all(map(self._has, run))]
        boxes = self.decode([[int(match[1]) for match in pair] for pair in pairs], resize)
        spans = [tuple(match.span() for match in pair) for pair in pairs]
        return read_boxes(boxes, spans, malformed=len(pairs) < len(runs))

    def _has(self, match: re.Match) -> bool:
        return int(match[1]) < self.side**2


def _patch(number: int) -> str:
    return f"<patch_index_{number:04d}>"


KOSMOS2 = PatchTokens(side=32)
KOSMOS2_PROMPT = "<grounding><phrase> {phrase}</phrase>"
"""Asks Kosmos-2 for a phrase, whose boxes alone are the answer. Source: the page of
microsoft/kosmos-2-patch14-224 on the hub, "Phrase grounding"."""
