"""How an image becomes the pixels that a backbone was trained on.

Every published preprocessing in reach is one resize, then one window (a crop or a padding), then
one normalisation. They differ in which box the resize aims at, how a side is rounded to whole
pixels, which way half a pixel goes when the window is centred, and which library resamples. On
square images most of these choices agree, so that mistakes hide there: everything
here is stated, and tested, for images and targets that are not square.
Longer than most files here: the sizes that a specification foretells and the pixels that it makes
are one arithmetic, and stand together so that they cannot differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm.geometry import Resize
from vlm.pixels.decode import MAX_PIXELS, BadImage


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, in units where white is 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


OPENAI = Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Source: openai/CLIP, `clip/clip.py`, `_transform`."""
HALF = Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

CHOICES = {
    "fit": ("stretch", "crop", "pad", "patches", "height", "page", "shrink"),
    "resample": ("nearest", "bilinear", "bicubic", "lanczos"),
    "backend": ("torchvision", "pil"),
    "rounding": ("usual", "truncate", "half_even", "half_even_ratio", "half_up"),
    "anchor": ("centre", "top_left"),
    "half_px": ("truncate", "floor", "half_even"),
}
"""The values that each choice of a PixelSpec may take."""
WIDTHS_PER_OCTAVE = 4
"""How many widths lines share between a width and its double."""
PATCHED = ("patches", "height")
"""Fits under which sides are whole patches."""
FREE = (*PATCHED, "shrink")
"""Fits under which each image has a view of its own size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelSpec:
    """The preprocessing of one backbone: an image in, one view of float[3, H, W] out.

    size_hw: rows and columns of the view; under "patches", which gives every image a view of its
        own size, of a box: no view has more patches than the box; under "height" its rows, and the
        most columns; under "shrink" the most of both, a square.
    fit: how the image meets the box `resize_hw`. "stretch": both sides become the box's. "crop":
        the image, its aspect kept, covers the box. "pad": it fits inside. Then a window of
        size_hw is taken; what the image does not fill is padded. "patches": the image, its
        aspect kept but for the rounding of sides up to whole patches, becomes as large as the
        number of patches in size_hw allows (SigLIP 2's NaFlex); there is no window. "height": the
        image gets the rows of size_hw and about the columns that keep its aspect, at most those
        of size_hw (a line of text); columns come in whole patches and in few widths, a tenth wider
        or narrower at most, so that lines of like width share a batch; there is no window.
        "page": the short side becomes the box's short side; what does not fit then is resized once
        more, to fit inside, and padded (Donut); sides that follow the aspect are cut to whole
        pixels. "shrink": the image, its aspect kept, is made smaller where it does not fit inside
        the box, its short side cut to whole pixels; then a side below `min_side_px` becomes that,
        whatever the aspect; there is no window (Idefics2).
    resample: the filter.
    backend: who resizes. "torchvision": torch on the uint8 tensor, antialiased, as transformers
        does by default; "pil": Pillow, as timm, open_clip and transformers' `backend="pil"` do.
        They differ by a grey level or two.
    mean, std: of each channel, where white is 1.
    resize_hw: the box; None is size_hw itself. A square box under "crop" means "short edge to".
    rounding: how a side that follows the aspect becomes whole: "truncate"; "half_even" and
        "half_up", of side * scale; "half_even_ratio", of side / (1 / scale), which timm and
        open_clip compute and which differs in rare ties; "usual" is "truncate" under "crop" and
        "half_even" under "pad".
    min_side_px: least resized side.
    anchor: the window lies "centre" or "top_left", which pads at the bottom and right.
    half_px: where the odd pixel of a centred window goes. "truncate": the window's start is
        rounded towards the image's corner, whether it crops or pads; "floor": always up and
        left; "half_even": as round() says where it crops, "truncate" where it pads.
    pad_rgb: colour of the padding, 0 to 255; None is 0 *after* normalising (SAM).
    patch_px: side of a patch under "patches", its columns under "height"; None under any other.
    turn: whether an image that lies across the view (one is wider than high, the other higher than
        wide) is first turned by 90 degrees clockwise.

    Raises ValueError that shows the field and its value.
    """

    size_hw: tuple[int, int]
    fit: str
    resample: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    backend: str = "torchvision"
    resize_hw: tuple[int, int] | None = None
    rounding: str = "usual"
    min_side_px: int = 1
    anchor: str = "centre"
    half_px: str = "truncate"
    pad_rgb: tuple[int, int, int] | None = (0, 0, 0)
    patch_px: int | None = None
    turn: bool = False

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {', '.join(allowed)}, found {getattr(self, field)!r}"
                )
        for field in ("size_hw", "resize_hw"):
            value = getattr(self, field)
            if value is None and field == "resize_hw":
                continue
            if not isinstance(value, tuple) or len(value) != 2 or not all(map(_is_side, value)):
                raise ValueError(f"{field} must be (rows, columns), both positive, found {value}")
        if not _is_side(self.min_side_px):
            raise ValueError(f"min_side_px must be a positive integer, found {self.min_side_px}")
        for field in ("mean", "std"):
            value = getattr(self, field)
            if (
                not isinstance(value, tuple)
                or len(value) != 3
                or not all(map(math.isfinite, value))
            ):
                raise ValueError(f"{field} must be three finite numbers, found {value}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, found {self.std}")
        if self.pad_rgb is not None and (
            not isinstance(self.pad_rgb, tuple)
            or len(self.pad_rgb) != 3
            or not all(isinstance(level, int) and 0 <= level <= 255 for level in self.pad_rgb)
        ):
            raise ValueError(f"pad_rgb must be three integers in 0 to 255, found {self.pad_rgb}")
        self._check_patches()

    def _check_patches(self) -> None:
        if self.fit in PATCHED:
            if not _is_side(self.patch_px):
                raise ValueError(
                    f"patch_px must be a positive integer under fit {self.fit!r}, found "
                    f"{self.patch_px}"
                )
            sides = self.size_hw if self.fit == "patches" else self.size_hw[1:]
            if any(side % self.patch_px for side in sides):
                raise ValueError(
                    f"size_hw must be whole patches of {self.patch_px} under fit {self.fit!r}, "
                    f"found {self.size_hw}"
                )
        elif self.patch_px is not None:
            raise ValueError(
                f"patch_px belongs to the fits {', '.join(PATCHED)}, found {self.patch_px} under "
                f"{self.fit!r}"
            )
        if self.free and self.resize_hw is not None:
            raise ValueError(
                f"resize_hw must be None under fit {self.fit!r}, found {self.resize_hw}"
            )
        rows, columns = self.size_hw
        if self.fit == "shrink" and not (self.min_side_px <= rows == columns):
            raise ValueError(
                f"size_hw must be a square of at least min_side_px {self.min_side_px} under fit "
                f"{self.fit!r}, found {self.size_hw}"
            )

    @property
    def free(self) -> bool:
        """Whether each image has a view of its own size, with no window on it."""
        return self.fit in FREE

    @property
    def max_patches(self) -> int | None:
        """The most patches of a view under "patches"; None under any other fit."""
        if self.fit != "patches":
            return None
        return (self.size_hw[0] // self.patch_px) * (self.size_hw[1] // self.patch_px)

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """The views of an RGB image, here one: float32[3, H, W], normalised.

        Raises ValueError for another mode, and BadImage where a very long image would be resized
        to more than MAX_PIXELS.
        """
        resized = self._resize(image)
        if self.pad_rgb is None:
            return [self._window(self.normalise(resized), (0.0, 0.0, 0.0))]
        return [self.normalise(self._window(resized, self.pad_rgb))]

    def resize_u8(self, image: Image.Image) -> Tensor:
        """The view before normalising: uint8[3, H, W]. Where padding is 0 after normalising, the
        mean colour, rounded, stands for it."""
        fill = self.pad_rgb
        if fill is None:
            fill = tuple(min(255, max(0, round(255 * mean))) for mean in self.mean)
        return self._window(self._resize(image), fill)

    def view_sizes(self, size_hw: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each view of an image of `size_hw`: here one, always the same but
        under the fits that are `FREE`."""
        return (self._view_hw(self._resized_hw(size_hw)),)

    def resize_record(self, size_hw: tuple[int, int]) -> Resize:
        """Where the pixels of an image of `size_hw` rows and columns go in the view.

        Raises ValueError for one that is turned, of which a record cannot speak.
        """
        if self._turns(size_hw):
            raise ValueError(
                f"an image of {size_hw[0]} × {size_hw[1]} pixels is turned to fit "
                f"{self.size_hw[0]} × {self.size_hw[1]}: its coordinates have no record"
            )
        resized_hw = self._resized_hw(size_hw)
        top, left = self._start(resized_hw)
        scale_xy = (resized_hw[1] / size_hw[1], resized_hw[0] / size_hw[0])
        view_hw = self._view_hw(resized_hw)
        return Resize(size_hw, view_hw, scale_xy, (float(-left), float(-top)))

    def normalise(self, pixels_u8: Tensor) -> Tensor:
        """(x - 255 mean) / (255 std) of uint8[..., 3, H, W] in float32: mean and std are brought to
        the pixels' unit, as transformers' torchvision backend does."""
        mean, std = (_channels(value, pixels_u8.device) * 255 for value in (self.mean, self.std))
        return pixels_u8.to(torch.float32).sub_(mean).div_(std)

    def unnormalise(self, pixels: Tensor) -> Tensor:
        """Normalised float[..., 3, H, W] as an image to look at: uint8, rounded, cut at 0, 255."""
        mean, std = (_channels(value, pixels.device) * 255 for value in (self.mean, self.std))
        return (pixels.float() * std + mean).round_().clamp_(0, 255).to(torch.uint8)

    def with_size(self, size_hw: tuple[int, int]) -> PixelSpec:
        """The same preprocessing for another view size; resize_hw grows in proportion. Under
        "patches" another box: (512, 512) allows four times the patches of (256, 256)."""
        if self.resize_hw is None:
            return replace(self, size_hw=size_hw)
        resize_hw = tuple(
            max(1, round(box * new / old))
            for box, new, old in zip(self.resize_hw, size_hw, self.size_hw)
        )
        return replace(self, size_hw=size_hw, resize_hw=resize_hw)

    def _resized_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns after the resize, before the window."""
        if self.fit == "patches":
            return _patches_hw(size_hw, self.patch_px, self.max_patches)
        H, W = size_hw[::-1] if self._turns(size_hw) else size_hw
        if self.fit == "shrink":
            return self._shrunk_hw((H, W))
        if self.fit == "page":
            return self._page_steps((H, W))[-1]
        if self.fit == "height":
            columns = _shared_width(W * self.size_hw[0] / H, self.patch_px)
            return self.size_hw[0], min(columns, self.size_hw[1])
        box_h, box_w = self.resize_hw or self.size_hw
        if self.fit == "stretch":
            return box_h, box_w
        rounding = self.rounding
        if rounding == "usual":
            rounding = "truncate" if self.fit == "crop" else "half_even"
        if rounding == "truncate":
            rows_decide = H * box_w <= W * box_h if self.fit == "crop" else H * box_w >= W * box_h
            sides = (box_h, int(box_h * W / H)) if rows_decide else (int(box_w * H / W), box_w)
        elif rounding == "half_even_ratio":
            ratio = (min if self.fit == "crop" else max)(H / box_h, W / box_w)
            sides = (round(H / ratio), round(W / ratio))
        else:
            scale = (max if self.fit == "crop" else min)(box_h / H, box_w / W)
            whole = round if rounding == "half_even" else lambda side: int(side + 0.5)
            sides = (whole(H * scale), whole(W * scale))
        return max(sides[0], self.min_side_px), max(sides[1], self.min_side_px)

    def _shrunk_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns under "shrink".

        Source: transformers, `image_processing_idefics2.py`, `get_resize_output_image_size`.
        """
        (H, W), longest = size_hw, self.size_hw[0]
        aspect = W / H
        if W >= H and longest < W:
            H, W = int(longest / aspect), longest
        elif H > W and longest < H:
            H, W = longest, int(longest * aspect)
        return max(H, self.min_side_px), max(W, self.min_side_px)

    def _turns(self, size_hw: tuple[int, int]) -> bool:
        """Whether an image is turned: it lies across the view, and neither is square."""
        (H, W), (rows, columns) = size_hw, self.size_hw
        return self.turn and (H - W) * (rows - columns) < 0

    def _page_steps(self, size_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns after each resize under "page", one or two.

        Source: transformers, `DonutImageProcessor._preprocess` and `thumbnail`.
        """
        (H, W), (box_h, box_w) = size_hw, self.resize_hw or self.size_hw
        short = min(box_h, box_w)
        rows, columns = (short, int(short * W / H)) if H <= W else (int(short * H / W), short)
        high, wide = min(rows, box_h), min(columns, box_w)
        if (high, wide) == (rows, columns):
            return [(rows, columns)]
        if rows > columns:
            wide = max(1, int(columns * high / rows))
        elif columns > rows:
            high = max(1, int(rows * wide / columns))
        return [(rows, columns), (high, wide)]

    def _view_hw(self, resized_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the window on an image that was resized to `resized_hw`."""
        return resized_hw if self.free else self.size_hw

    def _start(self, resized_hw: tuple[int, int]) -> tuple[int, int]:
        """Row and column of the resized image where the window starts; negative where it pads."""
        if self.anchor == "top_left":
            return 0, 0
        spare_h, spare_w = (a - b for a, b in zip(resized_hw, self._view_hw(resized_hw)))
        return _halve(spare_h, self.half_px), _halve(spare_w, self.half_px)

    def _resize(self, image: Image.Image) -> Tensor:
        """The resized image before the window: uint8[3, rows, columns]."""
        if image.mode != "RGB":
            raise ValueError(
                f"expected an image in mode RGB, as open_image gives, found {image.mode}"
            )
        if self._turns((image.height, image.width)):
            image = image.transpose(Image.Transpose.ROTATE_270)
        size_hw = image.height, image.width
        steps = self._page_steps(size_hw) if self.fit == "page" else [self._resized_hw(size_hw)]
        for rows, columns in steps:
            if rows * columns > MAX_PIXELS:
                raise BadImage(
                    f"expected an image that resizes to at most {MAX_PIXELS} pixels, found one of "
                    f"{size_hw[0]} × {size_hw[1]}, which becomes {rows} × {columns}"
                )
        if self.backend == "pil":
            for rows, columns in steps:
                image = image.resize((columns, rows), Image.Resampling[self.resample.upper()])
            return _tensor(image)
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        # Pillow's nearest neighbour is torch's "nearest-exact": its "nearest" is half a pixel off.
        mode = "nearest-exact" if self.resample == "nearest" else self.resample
        pixels = _tensor(image)
        for rows, columns in steps:
            pixels = functional.resize_image(
                pixels, [rows, columns], InterpolationMode(mode), antialias=True
            )
        return pixels

    def _window(self, resized: Tensor, fill: tuple[float, float, float]) -> Tensor:
        """The view in `resized` [3, rows, columns], `fill` where it has no pixels."""
        rows, columns = resized.shape[1:]
        (top, left), (H, W) = self._start((rows, columns)), self._view_hw((rows, columns))
        inside = resized[:, max(top, 0) : max(top + H, 0), max(left, 0) : max(left + W, 0)]
        if inside.shape[1:] == (H, W):
            return inside.contiguous()
        view = torch.tensor(fill, dtype=resized.dtype)[:, None, None].repeat(1, H, W)
        y, x = max(-top, 0), max(-left, 0)
        view[:, y : y + inside.shape[1], x : x + inside.shape[2]] = inside
        return view


def box_of_patches(max_patches: int, patch_px: int) -> tuple[int, int]:
    """Rows and columns in pixels of the box nearest to a square that has `max_patches` patches: the
    size_hw of a PixelSpec with fit "patches". Raises ValueError for numbers below 1.

    >>> box_of_patches(256, 16), box_of_patches(24, 16), box_of_patches(7, 16)
    ((256, 256), (64, 96), (16, 112))
    """
    if not (_is_side(max_patches) and _is_side(patch_px)):
        raise ValueError(
            "max_patches and patch_px must be positive integers, found "
            f"{max_patches!r} and {patch_px!r}"
        )
    rows = next(n for n in range(math.isqrt(max_patches), 0, -1) if max_patches % n == 0)
    return rows * patch_px, max_patches // rows * patch_px


def _patches_hw(size_hw: tuple[int, int], patch_px: int, max_patches: int) -> tuple[int, int]:
    """Rows and columns of the largest view of at most `max_patches` whole patches: one scale for
    both sides, up to 100, each then rounded up to whole patches.

    The scale is searched by halving, with the source's own steps and end, since where the search
    ends decides which side gets one more patch.
    Source: transformers, `image_processing_siglip2.py`, `get_image_size_for_max_num_patches`.

    >>> _patches_hw((20, 300), 16, 256), _patches_hw((480, 640), 16, 256)
    ((64, 960), (224, 288))
    """

    def sides(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / patch_px)) for side in size_hw)
        return rows, columns

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        low, high = (scale, high) if math.prod(sides(scale)) <= max_patches else (low, scale)
    rows, columns = sides(low)
    return rows * patch_px, columns * patch_px


def _shared_width(columns: float, patch_px: int) -> int:
    """The width nearest to `columns` of those that lines share: whole patches, four to the octave,
    and every number of patches up to eight.

    >>> [_shared_width(columns, 4) for columns in (3, 20, 100, 299, 400)]
    [4, 20, 108, 304, 432]
    """
    patches = columns / patch_px
    if patches <= 8:
        return max(1, round(patches)) * patch_px
    step = round(WIDTHS_PER_OCTAVE * math.log2(patches / 8))
    return round(8 * 2 ** (step / WIDTHS_PER_OCTAVE)) * patch_px


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _halve(spare: int, half_px: str) -> int:
    """Half of `spare` in whole pixels.

    >>> [[_halve(spare, rule) for spare in (3, 1, -1)] for rule in CHOICES["half_px"]]
    [[1, 0, 0], [1, 0, -1], [2, 0, 0]]
    """
    if half_px == "floor":
        return spare // 2
    return round(spare / 2) if half_px == "half_even" and spare > 0 else int(spare / 2)


def _channels(values: tuple[float, float, float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8[3, H, W], contiguous."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
