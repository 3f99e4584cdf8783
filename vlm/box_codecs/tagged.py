"""Boxes as whole numbers between tags, after their label between tags: Qwen-VL's and Qwen2-VL's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm.box_codecs.codec import NUMBER, ReadBoxes, from_shares, read_boxes, to_shares
from vlm.geometry import Resize

_CORNERS = rf"\s*\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)\s*,\s*\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)\s*"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaggedBoxes:
    """Boxes as `(x1,y1),(x2,y2)`, each between the tags `box`; neighbours of one label stand after
    it, which is written once, between the tags `ref`.

    largest: what the right and the bottom edge of the image as it came are in these numbers, which
        are rounded, so that a coordinate is off by half of one at most.
    ref, box: the tags before and after a label, and a box.

    >>> same = Resize((100, 200), (100, 200), (1, 1), (0, 0))
    >>> QWEN_VL.write([(20, 10, 160, 100), (0, 0, 50, 50)], same, ["cat", "cat"])
    '<ref>cat</ref><box>(100,100),(799,999)</box><box>(0,0),(250,500)</box>'
    >>> QWEN_VL.read("<ref>cat</ref><box>(0,0),(999,999)</box>", same).boxes[0].xyxy_px
    (0.0, 0.0, 200.0, 100.0)
    """

    box_tokens: ClassVar[int] = 32
    tokens: ClassVar[tuple[str, ...]] = ()

    largest: int
    ref: tuple[str, str]
    box: tuple[str, str]

    def __post_init__(self) -> None:
        if self.largest < 1:
            raise ValueError(f"largest must be at least 1, found {self.largest}")
        for name in ("ref", "box"):
            if len(getattr(self, name)) != 2 or not all(getattr(self, name)):
                raise ValueError(f"{name} must be two tags, found {getattr(self, name)}")

    @property
    def tags(self) -> tuple[str, ...]:
        return *self.ref, *self.box

    def encode(self, boxes_xyxy_px: ArrayLike, resize: Resize) -> NDArray[np.int64]:
        """Boxes of the image as it came, [N, 4], in the numbers that are written: int64[N, 4]."""
        numbers = np.floor(to_shares(boxes_xyxy_px, resize, "image") * self.largest + 0.5)
        return numbers.clip(0, self.largest).astype(np.int64)

    def write(
        self,
        boxes_xyxy_px: ArrayLike,
        resize: Resize,
        labels: Sequence[str] | None = None,
        before: str = "",
    ) -> str:
        """See `BoxCodec.write`."""
        numbers = self.encode(boxes_xyxy_px, resize).tolist()
        labelled = zip(labels or [""] * len(numbers), numbers, strict=True)
        text, (start, end) = before, self.box
        for label, group in groupby(labelled, lambda pair: pair[0]):
            if label:
                text = text.removesuffix(label) + label.join(self.ref)
            text += "".join(f"{start}({a},{b}),({c},{d}){end}" for _, (a, b, c, d) in group)
        return text

    def read(self, text: str, resize: Resize) -> ReadBoxes:
        """See `BoxCodec.read`. The first tag may be missing where a prompt has written it, and the
        last where the answer ends."""
        start, end = map(re.escape, self.box)
        found = list(re.finditer(rf"(?:{start}|\A){_CORNERS}(?:{end}|\Z)", text))
        opened = sum(match[0].startswith(self.box[0]) for match in found)
        numbers = [list(map(float, match.groups())) for match in found]
        boxes = from_shares(np.array(numbers).reshape(-1, 4) / self.largest, resize, "image")
        spans = [tuple(match.span(n) for n in range(1, 5)) for match in found]
        return read_boxes(boxes, spans, malformed=opened < text.count(self.box[0]))


QWEN_VL = TaggedBoxes(largest=999, ref=("<ref>", "</ref>"), box=("<box>", "</box>"))
"""Source: arXiv 2308.12966, section 3.2; QwenLM/Qwen-VL, `eval_mm/evaluate_grounding.py`, whose
numbers are 0 to 999; the tokenizer of Qwen/Qwen-VL-Chat, `from_list_format`, for several boxes."""
QWEN_VL_PROMPT = "框出图中{phrase}的位置"
"""Asks Qwen-VL-Chat for a phrase. Source: QwenLM/Qwen-VL, README.md."""

QWEN2_VL = TaggedBoxes(
    largest=1000,
    ref=("<|object_ref_start|>", "<|object_ref_end|>"),
    box=("<|box_start|>", "<|box_end|>"),
)
"""Source: arXiv 2409.12191, section 2.2.1; ms-swift's documentation of Qwen2-VL, "Image grounding
fine-tuning", for several boxes."""
QWEN2_VL_PROMPT = "Find <|object_ref_start|>{phrase}<|object_ref_end|>"
"""Asks Qwen2-VL for a phrase. Source: ms-swift's documentation of Qwen2-VL."""
