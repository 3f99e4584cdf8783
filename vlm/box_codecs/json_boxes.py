"""Boxes as JSON, in pixels of the resized image: Qwen2.5-VL's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm.box_codecs.codec import NUMBER, ReadBoxes, read_boxes
from vlm.geometry import Resize

_KEY = '"bbox_2d"'
_BOX = re.compile(rf"{_KEY}\s*:\s*\[\s*{NUMBER}\s*,\s*{NUMBER}\s*,\s*{NUMBER}\s*,\s*{NUMBER}\s*\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonBoxes:
    """Boxes as a list of `{"bbox_2d": [x1, y1, x2, y2], "label": "..."}`, in whole pixels of the
    image as the image tokenizer sees it, so that a coordinate is off by half of one at most.

    >>> resized = Resize((100, 200), (112, 196), (196 / 200, 112 / 100), (0, 0))
    >>> QWEN25_VL.write([(50, 25, 200, 100)], resized, ["cat"])
    '[{"bbox_2d": [49, 28, 196, 112], "label": "cat"}]'
    """

    box_tokens: ClassVar[int] = 48
    tokens: ClassVar[tuple[str, ...]] = ()
    tags: ClassVar[tuple[str, ...]] = ()

    def encode(self, boxes_xyxy_px: ArrayLike, resize: Resize) -> NDArray[np.int64]:
        """Boxes of the image as it came, [N, 4], in pixels of the resized one, cut at its border:
        int64[N, 4]."""
        pixels = np.floor(resize.boxes(boxes_xyxy_px) + 0.5)
        return pixels.clip(0, np.tile(resize.output_hw[::-1], 2)).astype(np.int64)

    def write(
        self,
        boxes_xyxy_px: ArrayLike,
        resize: Resize,
        labels: Sequence[str] | None = None,
        before: str = "",
    ) -> str:
        """See `BoxCodec.write`. After a text that writes the list itself, up to a box's key, the
        four numbers alone follow."""
        numbers = self.encode(boxes_xyxy_px, resize).tolist()
        if len(numbers) == 1 and re.search(rf"{_KEY}\s*:\s*\Z", before):
            return before + json.dumps(numbers[0])
        items: list[dict[str, Any]] = []
        for label, box in zip(labels or [""] * len(numbers), numbers, strict=True):
            items.append({"bbox_2d": box} | ({"label": label} if label else {}))
        return before + json.dumps(items, ensure_ascii=False)

    def read(self, text: str, resize: Resize) -> ReadBoxes:
        """See `BoxCodec.read`. What stands around a box's key and its four numbers may be anything,
        as the end of an answer that was cut, or the fence of a block of code."""
        found = list(_BOX.finditer(text))
        numbers = np.array([list(map(float, match.groups())) for match in found])
        boxes = resize.invert_boxes(numbers, clip=True)
        spans = [tuple(match.span(n) for n in range(1, 5)) for match in found]
        return read_boxes(boxes, spans, malformed=len(found) < text.count(_KEY))


QWEN25_VL = JsonBoxes()
"""Source: arXiv 2502.13923, section 2.2.1; QwenLM/Qwen2.5-VL, `cookbooks/spatial_understanding`,
whose drawing divides by the size of the resized image, and `qwen-vl-finetune`, README.md."""
QWEN25_VL_PROMPT = "Locate {phrase} in this image and output the bbox coordinates in JSON format."
"""Asks Qwen2.5-VL for a phrase. Source: QwenLM/Qwen2.5-VL, `qwen-vl-finetune`, README.md."""
