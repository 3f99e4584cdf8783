"""What printing, scanning, photographing and wear do to drawn text.

A drawn line is first a *mask*: how much ink each pixel has. It is bent as a sheet is, inked and
laid on paper, then seen through a camera or scanner. Each step takes a random generator of numpy
and draws its own strength, so that one seed gives one image.

Shapes: H W pixel rows and columns.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator

from vlm.compat.extras import needs

with needs("ocr"):
    import cv2

WEARS = (
    "slant", "low contrast", "light on dark", "uneven light", "low resolution", "blur", "noise",
    "jpeg",
)  # fmt: skip
"""What may be wrong with a line, one at a time; see `worn`."""
KINDS = ("clean", "print", "scan", "photo", "mixed", "one")
"""clean: black on white. print: ink and paper. scan: also blur, noise, JPEG. photo: also uneven
light, shadow, perspective, low resolution. mixed: any of these, by chance. one: clean but for one
of `WEARS`, moderately, which is how readers are compared."""
SHARES = (0.12, 0.15, 0.35, 0.38)
"""Of the first four kinds in "mixed"."""


def bend(mask: np.ndarray, dice: Generator, kind: str, hand: bool = False) -> np.ndarray:
    """The mask uint8[H, W] (255 is full ink) slanted, turned, curved; grown to hold all of it.

    hand: writing by hand, whose baseline wanders and whose slant is stronger.
    """
    if kind == "clean" and not hand:
        return mask
    H, W = mask.shape
    photo = kind == "photo"
    slant = _some(dice, 0.25, 0.0, 0.12) if not hand else dice.normal(0.0, 0.12)
    turn = math.tan(math.radians(_some(dice, 0.4, 0.0, 0.8 if not photo else 1.4)))
    turn = float(np.clip(turn, -0.25 * H / W, 0.25 * H / W))
    slant = float(np.clip(slant, -0.45, 0.45))
    curved = dice.random() < (0.5 if hand else 0.25 if photo else 0.1)
    rise = dice.uniform(0.03, 0.10) * H if curved else 0.0
    waves = dice.uniform(0.3, max(0.5, W / H / (3 if hand else 8)))
    start = dice.uniform(0, 2 * math.pi)
    tilt = _some(dice, 0.3, 0.0, 0.06) if photo else 0.0  # one end smaller than the other
    shake = dice.uniform(0.2, 0.6) * H / 40 if hand or dice.random() < 0.08 else 0.0
    if not any((slant, turn, rise, tilt, shake)):
        return mask
    spare = int(abs(slant) * H / 2 + 1)
    lift = int(abs(turn) * W / 2 + rise + 1)
    out_h, out_w = H + 2 * lift, W + 2 * spare
    x = np.arange(out_w, dtype=np.float32)[None]
    y = np.arange(out_h, dtype=np.float32)[:, None]
    middle_y, middle_x = (out_h - 1) / 2, (out_w - 1) / 2
    dy = turn * (x - middle_x) + rise * np.sin(start + 2 * math.pi * waves * x / out_w)
    scale = 1 + tilt * (x - middle_x) / out_w
    from_y = (y - middle_y) * scale + (H - 1) / 2 - dy
    from_x = x - spare + slant * (y - middle_y)
    if shake:
        small = (max(2, out_h // 14), max(2, out_w // 14))
        field = dice.normal(0, 1, (*small, 2)).astype(np.float32)
        field = cv2.resize(field, (out_w, out_h), interpolation=cv2.INTER_CUBIC)
        from_x, from_y = from_x + shake * field[..., 0], from_y + shake * field[..., 1]
    from_x = np.broadcast_to(from_x, (out_h, out_w)).astype(np.float32)
    from_y = np.broadcast_to(from_y, (out_h, out_w)).astype(np.float32)
    return cv2.remap(mask, from_x, from_y, cv2.INTER_LINEAR, borderValue=0)


def ink(mask: np.ndarray, dice: Generator, kind: str) -> np.ndarray:
    """The mask as ink takes: strokes thinner or thicker, ragged, with specks and gaps."""
    if kind == "clean":
        return mask
    H = mask.shape[0]
    roll = dice.random()
    size = 2 if H < 56 else 3
    if roll < 0.08:
        mask = cv2.erode(mask, np.ones((1, 2) if dice.random() < 0.5 else (2, 1), np.uint8))
    elif roll < 0.22:
        mask = cv2.dilate(mask, np.ones((size, size), np.uint8))
    if dice.random() < 0.15:  # worn or starved: holes
        small = dice.random((max(2, mask.shape[0] // 2), max(2, mask.shape[1] // 2)), np.float32)
        worn = cv2.resize(small, (mask.shape[1], mask.shape[0]))
        worn = cv2.GaussianBlur(worn, (3, 3), 0)
        low = dice.uniform(0.15, 0.36)
        mask = (mask * np.clip((worn - low) / 0.15, 0.25, 1)).astype(np.uint8)
    if dice.random() < 0.06:  # specks
        specks = dice.random(mask.shape, np.float32) < dice.uniform(0.0005, 0.006)
        specks = cv2.dilate(specks.astype(np.uint8) * 200, np.ones((2, 2), np.uint8))
        mask = np.maximum(mask, specks)
    if dice.random() < 0.05:  # a rule under or through the line
        y = int(mask.shape[0] * dice.uniform(0.05, 0.95))
        height = max(1, int(H * dice.uniform(0.01, 0.04)))
        mask = mask.copy()
        mask[y : y + height] = np.maximum(mask[y : y + height], int(dice.uniform(90, 255)))
    return mask


def paint(mask: np.ndarray, dice: Generator, kind: str) -> np.ndarray:
    """Ink on paper, uint8[H, W, 3]: the mask in some colour on some ground, light on dark too."""
    H, W = mask.shape
    share = mask.astype(np.float32)[..., None] / 255
    if kind == "clean":
        return (255 - np.repeat(mask[..., None], 3, 2)).astype(np.uint8)
    paper, written = _colours(dice)
    ground = np.broadcast_to(paper, (H, W, 3)).astype(np.float32)
    if dice.random() < (0.5 if kind == "photo" else 0.2):  # paper's own structure
        cell = dice.integers(1, 12)
        small = dice.normal(0, 1, (H // cell + 2, W // cell + 2)).astype(np.float32)
        grain = cv2.resize(small, (W, H), interpolation=cv2.INTER_LINEAR)
        ground = ground + (grain * dice.uniform(1, 7))[..., None]
    if kind == "photo" and dice.random() < 0.12:  # print on the other side
        show_through = cv2.GaussianBlur(mask[:, ::-1], (0, 0), 1.5)[..., None] / 255
        ground = ground - (ground - written) * show_through * dice.uniform(0.05, 0.18)
    if dice.random() < 0.05:  # ruled or squared paper
        step = int(dice.integers(max(4, H // 5), max(6, H)))
        ground = ground.copy()
        strength = dice.uniform(0.5, 0.9)
        ground[int(dice.integers(0, step)) :: step] *= strength
        if dice.random() < 0.5:
            ground[:, int(dice.integers(0, step)) :: step] *= strength
    image = ground + (written - ground) * share
    return np.clip(image, 0, 255).astype(np.uint8)


def see(image: np.ndarray, dice: Generator, kind: str) -> np.ndarray:
    """The image uint8[H, W, 3] as a camera or scanner gives it: light, resolution, blur, noise,
    compression."""
    if kind in ("clean", "print"):
        return image
    H, W = image.shape[:2]
    photo = kind == "photo"
    grey = bool((image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all())
    work = image[..., :1].astype(np.float32) if grey else image.astype(np.float32)
    if dice.random() < (0.6 if photo else 0.15):
        work = work * _light(H, W, dice)
    if dice.random() < (0.3 if photo else 0.2):  # fewer pixels, as from further away
        least = min(1.0, dice.uniform(14, 26) / H)
        scale = dice.uniform(least, 1.0)
        size = (max(8, round(W * scale)), max(8, round(H * scale)))
        how = cv2.INTER_AREA if dice.random() < 0.7 else cv2.INTER_LINEAR
        work = cv2.resize(work, size, interpolation=how)
        if dice.random() < 0.5:
            back = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_NEAREST)[dice.integers(3)]
            work = cv2.resize(work, (W, H), interpolation=back)
        work = work if work.ndim == 3 else work[..., None]
    height = work.shape[0]
    if dice.random() < (0.45 if photo else 0.3):
        work = cv2.GaussianBlur(work, (0, 0), dice.uniform(0.3, 1.3) * max(1.0, height / 44))
    elif photo and dice.random() < 0.15:
        work = cv2.filter2D(work, -1, _motion(dice, max(2, round(height / 14))))
    work = work if work.ndim == 3 else work[..., None]
    if dice.random() < 0.5:
        sigma = dice.uniform(1, 12 if photo else 16)
        noise = dice.standard_normal(work.shape[:2], np.float32)[..., None]
        work = work + noise * sigma
    image = np.clip(work, 0, 255).astype(np.uint8)
    if dice.random() < (0.5 if photo else 0.35):
        quality = int(dice.integers(25, 90))
        packed = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        image = cv2.imdecode(packed, cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR)
    if image.ndim == 2:
        image = image[..., None]
    return np.repeat(image, 3, 2) if image.shape[2] == 1 else image


def draw_kind(dice: Generator, kind: str) -> str:
    """The kind itself; one by chance for "mixed", and one of `WEARS` for "one"."""
    if kind == "one":
        return str(dice.choice(WEARS))
    return str(dice.choice(KINDS[: len(SHARES)], p=SHARES)) if kind == "mixed" else kind


def worn(mask: np.ndarray, dice: Generator, wear: str) -> np.ndarray:
    """A line with one fault of `WEARS`, moderate and else black on white: uint8[H, W, 3].

    mask: uint8[H, W], 255 is full ink.
    """
    if wear == "slant":
        mask = _slanted(mask, dice.uniform(0.1, 0.35) * dice.choice((-1, 1)))
    H, W = mask.shape
    share = mask.astype(np.float32) / 255
    image = 255 * (1 - share)
    if wear == "low contrast":
        light = dice.uniform(150, 230)
        image = light - share * dice.uniform(50, 90)
    elif wear == "light on dark":
        dark = dice.uniform(0, 80)
        image = dark + share * (dice.uniform(190, 255) - dark)
    elif wear == "uneven light":
        image = image * _light(H, W, dice)[..., 0]
    elif wear == "low resolution":
        scale = min(1.0, dice.uniform(18, 26) / H)
        small = cv2.resize(image, _at_least(W * scale, H * scale), interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, (W, H), interpolation=cv2.INTER_LINEAR)
    elif wear == "blur":
        image = cv2.GaussianBlur(image, (0, 0), dice.uniform(0.6, 1.4) * max(1.0, H / 44))
    elif wear == "noise":
        image = image + dice.standard_normal((H, W), np.float32) * dice.uniform(12, 36)
    grey = np.clip(image, 0, 255).astype(np.uint8)
    if wear == "jpeg":
        quality = int(dice.integers(8, 30))
        packed = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        grey = cv2.imdecode(packed, cv2.IMREAD_GRAYSCALE)
    return np.repeat(grey[..., None], 3, 2)


def _at_least(width: float, height: float) -> tuple[int, int]:
    return max(8, round(width)), max(8, round(height))


def _slanted(mask: np.ndarray, slant: float) -> np.ndarray:
    """The mask leaning by `slant` columns a row."""
    H, W = mask.shape
    spare = math.ceil(abs(slant) * H / 2) + 1
    move = np.float32([[1, -slant, spare + slant * H / 2], [0, 1, 0]])
    return cv2.warpAffine(mask, move, (W + 2 * spare, H), flags=cv2.INTER_LINEAR)


def _some(dice: Generator, chance: float, low: float, spread: float) -> float:
    """A normal draw of `spread` with a chance; else `low`."""
    return float(dice.normal(0, spread)) if dice.random() < chance else low


def _colours(dice: Generator) -> tuple[np.ndarray, np.ndarray]:
    """RGB of paper and of ink, float32[3] each in 0 to 255, apart enough to be read."""
    light = dice.uniform(150, 255) if dice.random() < 0.5 else dice.uniform(225, 255)
    if dice.random() < 0.18:  # low contrast
        dark = light - dice.uniform(38, 90)
    else:
        dark = dice.uniform(0, min(110, light - 90))
    paper, written = np.full(3, light, np.float32), np.full(3, dark, np.float32)
    if dice.random() < 0.3:
        paper = paper + dice.normal(0, 12, 3).astype(np.float32)
        written = written + dice.normal(0, 30, 3).astype(np.float32)
        luma = np.array((0.299, 0.587, 0.114), np.float32)
        written += dark - float(written @ luma)
    if dice.random() < 0.16:  # light on dark
        paper, written = written, paper
    return np.clip(paper, 0, 255), np.clip(written, 0, 255)


def _light(H: int, W: int, dice: Generator) -> np.ndarray:
    """Uneven light as factors float32[H, W, 1]: a slope, with a shadow's edge by chance."""
    x = np.linspace(-0.5, 0.5, W, dtype=np.float32)[None]
    y = np.linspace(-0.5, 0.5, H, dtype=np.float32)[:, None]
    light = 1 - dice.uniform(0, 0.2) + dice.normal(0, 0.22) * x + dice.normal(0, 0.06) * y
    if dice.random() < 0.3:
        edge = (x - dice.uniform(-0.5, 0.5)) * W / H + dice.normal(0, 0.7) * y
        soft = dice.uniform(0.1, 1.5)
        dark = dice.uniform(0.45, 0.85)
        light = light * (dark + (1 - dark) / (1 + np.exp(-np.clip(edge / soft * 4, -30, 30))))
    return np.clip(light, 0.35, 1.15).astype(np.float32)[..., None]


def _motion(dice: Generator, length: int) -> np.ndarray:
    """The kernel of a hand that moved by `length` pixels."""
    kernel = np.zeros((2 * length + 1, 2 * length + 1), np.float32)
    angle = dice.uniform(0, math.pi)
    for step in np.linspace(-length / 2, length / 2, 4 * length):
        x, y = length + step * math.cos(angle), length + step * math.sin(angle)
        kernel[round(y), round(x)] = 1
    return kernel / kernel.sum()
