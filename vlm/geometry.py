"""Where an image's pixels go when it is resized and then cropped or padded, and the way back.

One `Resize` record is made by the code that resizes, so that boxes and points can never drift from
the pixels. Coordinates lie on pixel *edges*: the origin is the outer top left corner, pixel (0, 0)
covers 0 to 1 on both axes, and a box's end is exclusive, so that a box over the whole image is
(0, 0, W, H). Both frames, input and output, are in pixels; x comes before y in every array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class Resize:
    """A resize with its crop or padding: output = input * scale + offset, on each axis.

    input_hw: rows and columns of the image as it came.
    output_hw: rows and columns of the result.
    scale_xy: resized size / input size, horizontally and vertically. The two differ where an
        image is stretched, and slightly wherever a resized side is rounded to whole pixels.
    offset_xy: output pixels; negative where the left or top was cropped, positive where padded.

    >>> half = Resize((100, 200), (64, 64), (0.5, 0.5), (-18.0, 7.0))
    >>> half.boxes([[36, 0, 164, 100]]).tolist()
    [[0.0, 7.0, 64.0, 57.0]]
    """

    input_hw: tuple[int, int]
    output_hw: tuple[int, int]
    scale_xy: tuple[float, float]
    offset_xy: tuple[float, float]

    def __post_init__(self) -> None:
        for name in ("input_hw", "output_hw", "scale_xy"):
            value = getattr(self, name)
            if len(value) != 2 or not all(np.isfinite(value)) or min(value) <= 0:
                raise ValueError(f"{name} must be two positive numbers, found {value}")
        if len(self.offset_xy) != 2 or not all(np.isfinite(self.offset_xy)):
            raise ValueError(f"offset_xy must be two finite numbers, found {self.offset_xy}")

    def points(self, points_xy_px: ArrayLike) -> NDArray[np.float64]:
        """Points of the input image, [N, 2], in the output's pixels: float64[N, 2]."""
        points = table(points_xy_px, 2, "points")
        return points * np.array(self.scale_xy) + np.array(self.offset_xy)

    def invert_points(self, points_xy_px: ArrayLike, clip: bool = False) -> NDArray[np.float64]:
        """Points of the output, [N, 2], in the input image's pixels: float64[N, 2].

        clip: move points that fall outside the input image onto its border.
        """
        points = table(points_xy_px, 2, "points")
        points = (points - np.array(self.offset_xy)) / np.array(self.scale_xy)
        return np.clip(points, 0.0, np.array(self.input_hw[::-1])) if clip else points

    def boxes(self, boxes_xyxy_px: ArrayLike) -> NDArray[np.float64]:
        """Boxes of the input image, [N, 4], in the output's pixels: float64[N, 4].

        They may reach beyond the output where the image was cropped.
        """
        boxes = table(boxes_xyxy_px, 4, "boxes")
        return self.points(boxes.reshape(-1, 2)).reshape(-1, 4)

    def invert_boxes(self, boxes_xyxy_px: ArrayLike, clip: bool = False) -> NDArray[np.float64]:
        """Boxes of the output, [N, 4], in the input image's pixels: float64[N, 4].

        clip: cut boxes at the input image's border; one that lies wholly in the padding becomes
        empty (its end equals its start on some axis) and keeps its place in the array.
        """
        boxes = table(boxes_xyxy_px, 4, "boxes")
        return self.invert_points(boxes.reshape(-1, 2), clip).reshape(-1, 4)

    def then(self, second: Resize) -> Resize:
        """This resize followed by `second`, as one record.

        Raises ValueError where the output of the first is not the input of the second.
        """
        if self.output_hw != second.input_hw:
            raise ValueError(
                f"the second resize takes an image of {second.input_hw}, the first gives "
                f"{self.output_hw}"
            )
        scale_xy = tuple(a * b for a, b in zip(self.scale_xy, second.scale_xy))
        offset_xy = tuple(
            offset * scale + more
            for offset, scale, more in zip(self.offset_xy, second.scale_xy, second.offset_xy)
        )
        return Resize(self.input_hw, second.output_hw, scale_xy, offset_xy)


def table(values: ArrayLike, columns: int, what: str) -> NDArray[np.float64]:
    """`values` as float64[N, columns]; an empty list is N = 0."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 and array.ndim <= 2:
        return np.empty((0, columns))
    if array.ndim != 2 or array.shape[1] != columns:
        raise ValueError(f"{what} must have shape [N, {columns}], found {list(array.shape)}")
    return array
