"""Opening images that come from anywhere.

A file is checked by its header before a pixel is decoded, and either gives its true image or
raises `BadImage`: nothing here guesses, downloads, or puts blank pixels in place of lost ones.
Formats whose readers start other programs (EPS and the like) are never tried. Colour profiles are
not applied, as no published preprocessing applies them.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

if TYPE_CHECKING:
    from vlm.pixels.image_ref import ImageRef

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow's names of the formats that are tried."""

MAX_PIXELS = 89_478_485
"""Most rows times columns of an image: Pillow's own first bound against decompression bombs
(a quarter of a GiB in RGB), so that the two never disagree."""

SIDEWAYS = (5, 6, 7, 8)
"""Values of the EXIF orientation that swap rows and columns."""

_SCHEME = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.\-]*://|data:)")


class BadImage(ValueError):
    """An image that cannot be used; the message names it, what was expected and what was found."""


def open_image(
    source: str | Path | bytes | Image.Image | np.ndarray | ImageRef,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """The image itself: 8-bit RGB, upright, fully decoded.

    source: the path of a local file; encoded bytes; a PIL image; an `ImageRef`; or an array of
        shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (RGBA), uint8, uint16, or float in 0 to 1.
    name: what messages call it; None takes the path, the ImageRef's name or the kind of source.
    max_pixels: most rows times columns, compared with the header before any decoding.
    background: RGB, 0 to 255, shown behind transparent pixels.

    The EXIF orientation is applied. 16-bit values are scaled by 255 / 65535, palettes and CMYK are
    converted. Of several frames the first is taken, with a warning that names the image; of a
    PIL image, the frame it stands at.
    Raises BadImage for anything that is not a whole image of a known format and bounded size.
    """
    from vlm.pixels.image_ref import ImageRef

    if isinstance(source, ImageRef):
        with _placed(source):
            return open_image(
                source.data,
                name=name or source.name,
                max_pixels=max_pixels,
                background=background,
            )
    if isinstance(source, np.ndarray):
        name = name or "array"
        return _flatten(_from_array(source, name, max_pixels), background)
    with ExitStack() as stack:
        given = isinstance(source, Image.Image)
        if given:
            name, image = name or "PIL image", source
        elif isinstance(source, (str, Path)):
            name = name or _short(str(source))
            file = stack.enter_context(_open_path(source, name))
            image = stack.enter_context(_read_header(file, name, max_pixels))
        elif isinstance(source, (bytes, bytearray, memoryview)):
            name = name or "bytes"
            if not len(source):
                raise BadImage(f"{name}: expected an encoded image, found zero bytes")
            image = stack.enter_context(_read_header(io.BytesIO(source), name, max_pixels))
        else:
            raise BadImage(
                f"{name or 'image'}: expected a path, bytes, a PIL image, a numpy array or an "
                f"ImageRef, found {type(source).__name__}"
            )
        _check_size(image.height, image.width, name, max_pixels)
        try:
            frames = 1 if given else getattr(image, "n_frames", 1)
            if frames > 1:
                image.seek(0)
            with _whole_files_only():
                image.load()
        except Exception as error:  # decoders raise almost anything on damaged files
            raise BadImage(
                f"{name}: expected a whole {image.format or 'image'}, found a damaged or "
                f"truncated one ({_short(str(error))})"
            ) from error
        if frames > 1:
            warnings.warn(f"{name}: holds {frames} frames, the first is used", stacklevel=2)
        try:
            return _flatten(_to_8_bits(_upright(image, name), name), background)
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(
                f"{name}: expected an image that converts to RGB, found mode {image.mode} "
                f"({_short(str(error))})"
            ) from error


def image_size(source: ImageRef | Image.Image) -> tuple[int, int]:
    """Rows and columns that `open_image` would give, from the image's header alone.

    Raises BadImage where the header cannot be read, or states a size that `open_image` refuses;
    pixels that are damaged stay unseen.
    """
    with ExitStack() as stack:
        if isinstance(source, Image.Image):
            name, image = "PIL image", source
        else:
            stack.enter_context(_placed(source))
            name = source.name
            if isinstance(source.data, bytes):
                file = io.BytesIO(source.data)
            else:
                file = stack.enter_context(_open_path(source.data, name))
            image = stack.enter_context(_read_header(file, name, MAX_PIXELS))
        _check_size(image.height, image.width, name, MAX_PIXELS)
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
        except Exception:  # a damaged EXIF block, which `open_image` leaves out with a warning
            turned = False
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _placed(source: ImageRef) -> Iterator[None]:
    """Within, a BadImage ends with the full path of the image's file: a row names it as it stands
    in its data."""
    try:
        yield
    except BadImage as error:
        if not isinstance(source.data, Path) or str(source.data) in str(error):
            raise
        raise BadImage(f"{error} (in {source.data.absolute()})") from error


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"


def _open_path(path: str | Path, name: str) -> io.BufferedReader:
    """The file at `path`, opened; only regular local files that hold something."""
    if _SCHEME.match(str(path)):
        raise BadImage(f"{name}: expected a local file, found an address; download it first")
    try:
        path = Path(path)
        if path.is_dir():
            raise BadImage(f"{name}: expected an image file, found a directory")
        if not path.exists():
            raise BadImage(f"{name}: expected an image file, found nothing at this path")
        if not path.is_file():
            raise BadImage(f"{name}: expected a regular file, found a device or pipe")
        if path.stat().st_size == 0:
            raise BadImage(f"{name}: expected an encoded image, found a file of zero bytes")
        return path.open("rb")
    except BadImage:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise BadImage(f"{name}: expected a readable file, found: {_short(str(error))}") from error


def _read_header(file: io.BufferedIOBase, name: str, max_pixels: int) -> Image.Image:
    """The image in `file`, its size and mode known and its pixels not yet decoded."""
    try:
        return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage(f"{name}: expected at most {max_pixels} pixels, found: {error}") from error
    except Image.UnidentifiedImageError as error:
        file.seek(0)
        raise BadImage(
            f"{name}: expected an image ({', '.join(FORMATS)}), found bytes that start with "
            f"{file.read(12)!r}"
        ) from error
    except Exception as error:  # header readers raise almost anything on damaged files
        raise BadImage(
            f"{name}: expected an image's header, found a damaged one ({_short(str(error))})"
        ) from error


def _check_size(height: int, width: int, name: str, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise BadImage(f"{name}: expected at least one pixel, found {height} × {width}")
    if height * width > max_pixels:
        raise BadImage(
            f"{name}: expected at most {max_pixels} pixels, found {height} × {width} = "
            f"{height * width}"
        )


_LENIENT = threading.Lock()


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Pillow's global leniency, which fills what a truncated file lacks with grey, put off where
    some other code of the process has set it."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    with _LENIENT:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = True


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # the tag lies in a block of its own: the pixels are sound
        message = f"{name}: its EXIF block cannot be read and is ignored ({error})"
        warnings.warn(message, stacklevel=3)
        return image


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """`image` with 8 bits a channel; a transparent grey value becomes an alpha channel."""
    if image.mode == "F":
        raise BadImage(f"{name}: expected 8- or 16-bit values, found 32-bit floats")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise BadImage(f"{name}: expected grey values in 0 to 65535, found {low} to {high}")
    grey = Image.fromarray(_narrow(values))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _narrow(values: np.ndarray) -> np.ndarray:
    """Integers in 0 to 65535 as uint8, by 255 / 65535 = 1 / 257, rounded."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_array(array: np.ndarray, name: str, max_pixels: int) -> Image.Image:
    shape = list(array.shape)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise BadImage(
            f"{name}: expected an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], found {shape}"
        )
    _check_size(array.shape[0], array.shape[1], name, max_pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    if array.dtype == np.uint16:
        return Image.fromarray(_narrow(array))
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise BadImage(f"{name}: expected floats in 0 to 1, found {low:g} to {high:g}")
        return Image.fromarray(np.rint(array.astype(np.float32) * 255).astype(np.uint8))
    raise BadImage(f"{name}: expected an array of uint8, uint16 or float, found {array.dtype}")


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A new RGB image, transparency shown over `background`, no metadata kept."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(backdrop, image)
    one_image = image.convert("RGB")
    one_image.info = {}
    return one_image
