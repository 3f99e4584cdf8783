"""Laws of opening images: what they become, and what is refused in which words."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from vlm.pixels import MAX_PIXELS, BadImage, open_image
from vlm.pixels.image_ref import ImageRef

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (23, 41, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def claimed_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b"")


def opened(*args, **kwargs) -> np.ndarray:
    image = open_image(*args, **kwargs)
    assert image.mode == "RGB"
    return np.asarray(image)


# Every source of an image.


def test_every_kind_of_source_gives_the_same_image(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(Image.fromarray(PHOTO)))
    data = path.read_bytes()
    sources = [path, str(path), data, bytearray(data), Image.open(path), PHOTO]
    sources += [ImageRef(data, "a.tar: photo.png"), ImageRef(path, "photo")]
    for source in sources:
        assert np.array_equal(opened(source), PHOTO)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_return_their_pixels(format):
    data = encoded(
        Image.fromarray(PHOTO), format, **({"lossless": True} if format == "WEBP" else {})
    )
    assert np.array_equal(opened(data), PHOTO)


def test_opening_leaves_a_pil_image_as_it_was():
    image = Image.new("RGBA", (5, 3), (10, 20, 30, 0))
    open_image(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (10, 20, 30, 0)


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 1), (7, 5, 3), (7, 5, 4)])
def test_arrays_of_each_dtype_agree(shape):
    levels = RNG.integers(0, 256, shape, dtype=np.uint8)
    expected = opened(levels)
    assert expected.shape == (7, 5, 3)
    assert np.array_equal(opened(levels.astype(np.uint16) * 257), expected)
    for dtype in (np.float32, np.float64):
        assert np.array_equal(opened((levels / 255).astype(dtype)), expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 9, 8), np.uint8), r"array: expected an array \[H, W\].* found \[3, 9, 8\]"),
        (np.zeros((4,), np.uint8), r"found \[4\]"),
        (np.zeros((0, 4), np.uint8), "at least one pixel, found 0 × 4"),
        (np.full((4, 4), 255.0), "floats in 0 to 1, found 255 to 255"),
        (np.full((4, 4), np.nan), "floats in 0 to 1, found nan"),
        (np.zeros((4, 4), np.int64), "uint8, uint16 or float, found int64"),
        (np.zeros((4, 4), bool), "uint8, uint16 or float, found bool"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array, message):
    with pytest.raises(BadImage, match=message):
        open_image(array)


def test_sources_of_unknown_type_are_refused_by_type():
    with pytest.raises(BadImage, match=r"row 3: expected a path, bytes.* found Tensor"):
        open_image(torch.zeros(3, 4, 4), name="row 3")


# Damaged, dangerous and missing files.


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org/a.png",
        "https://x/y.jpg",
        "s3://bucket/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,iVBORw0KGgo=",
    ],
)
def test_addresses_are_refused_and_never_fetched(address):
    with pytest.raises(BadImage, match="expected a local file, found an address"):
        open_image(address)


def test_missing_empty_and_odd_paths_are_refused_by_name(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(BadImage, match=r"empty\.png: .* found a file of zero bytes"):
        open_image(tmp_path / "empty.png")
    with pytest.raises(BadImage, match=r"nowhere\.png: .* found nothing at this path"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(BadImage, match="found a directory"):
        open_image(tmp_path)
    with pytest.raises(BadImage, match="found a device or pipe"):
        open_image("/dev/zero")
    with pytest.raises(BadImage, match=r"readable file|nothing at this path"):
        open_image("a\0b.png")
    with pytest.raises(BadImage, match="shard 3: expected an encoded image, found zero bytes"):
        open_image(b"", name="shard 3")


def test_text_named_as_a_image_is_refused_with_its_first_bytes(tmp_path):
    (tmp_path / "notes.png").write_text("Dear reader, this is text.")
    with pytest.raises(BadImage, match=r"notes\.png: expected an image .*b'Dear reader,'"):
        open_image(tmp_path / "notes.png")


def test_formats_that_start_other_programs_are_never_tried():
    eps = encoded(Image.fromarray(PHOTO), "EPS")
    with pytest.raises(BadImage, match="found bytes that start with b'%!PS-Adobe"):
        open_image(eps)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated_files_of_each_format_are_refused(format, tmp_path):
    noise = RNG.integers(0, 256, (120, 90, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    for part in (0.02, 0.5, 0.9):
        path = tmp_path / f"cut.{format.lower()}"
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(BadImage, match=r"cut\.\w+: expected"):
            open_image(path)


def test_truncated_files_are_refused_even_where_pillow_is_told_to_fill_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    noise = RNG.integers(0, 256, (120, 90, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    with pytest.raises(BadImage, match="damaged or truncated"):
        open_image(data[: len(data) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_random_damage_gives_a_image_or_bad_image_and_nothing_else():
    for format in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"):
        data = encoded(Image.fromarray(PHOTO), format)
        for _ in range(60):
            broken = bytearray(data)
            for at in RNG.integers(0, len(data), 4):
                broken[at] = RNG.integers(0, 256)
            with warnings.catch_warnings(), contextlib.suppress(BadImage):
                warnings.simplefilter("ignore")
                assert open_image(bytes(broken), max_pixels=10**6).mode == "RGB"


@pytest.fixture
def decodes(monkeypatch):
    """The decodings that happened, observed at Pillow's one gate to its decoders."""
    seen = []
    load = ImageFile.ImageFile.load

    def observed(image):
        seen.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", observed)
    return seen


@pytest.mark.parametrize(("width", "height"), [(30000, 30000), (12000, 10000)])
def test_too_many_pixels_are_refused_from_the_header_alone(width, height, decodes, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(claimed_png(width, height))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for source in (path, path.read_bytes()):
            with pytest.raises(BadImage, match=rf"at most {MAX_PIXELS} pixels.*{width * height}"):
                open_image(source)
    assert decodes == []
    open_image(encoded(Image.fromarray(PHOTO)))
    assert set(decodes) == {(41, 23)}


def test_pixel_bound_is_inclusive_and_shows_both_numbers(decodes):
    data = encoded(Image.fromarray(PHOTO))
    for source in (data, Image.open(io.BytesIO(data)), PHOTO):
        with pytest.raises(BadImage, match="at most 942 pixels, found 23 × 41 = 943"):
            open_image(source, max_pixels=942)
    assert decodes == []
    assert opened(data, max_pixels=943).shape == (23, 41, 3)


# Colour, depth, transparency, orientation, frames.


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 120, 250)])
def test_transparent_pixels_show_the_background(background):
    rgba = Image.fromarray(np.dstack([PHOTO, np.zeros((23, 41), np.uint8)]))
    la = Image.new("LA", (6, 4), (90, 0))
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    sources = [rgba, encoded(rgba), encoded(rgba, "WEBP", lossless=True), la, encoded(la)]
    sources += [encoded(palette, transparency=1), encoded(palette, "GIF", transparency=1)]
    sources += [encoded(Image.new("L", (6, 4), 90), transparency=90)]
    sources += [encoded(Image.new("RGB", (6, 4), (1, 2, 3)), transparency=(1, 2, 3))]
    sources += [np.asarray(rgba)]
    for source in sources:
        assert (opened(source, background=background) == background).all()


def test_half_transparent_pixels_are_mixed_in_proportion():
    image = Image.new("RGBA", (3, 2), (100, 0, 200, 128))
    np.testing.assert_allclose(opened(image)[0, 0], [177, 127, 227], atol=1)
    image = Image.new("RGBA", (3, 2), (100, 0, 200, 255))
    assert opened(image)[0, 0].tolist() == [100, 0, 200]


def test_opaque_palettes_give_their_colours():
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 200, 10, 30])
    for source in (palette, encoded(palette), encoded(palette, "GIF")):
        assert opened(source)[0].tolist() == [[0, 0, 0], [200, 10, 30]]


def test_cmyk_converts_to_rgb():
    image = Image.new("CMYK", (4, 3), (0, 255, 255, 0))
    assert opened(encoded(image, "TIFF"))[0, 0].tolist() == [255, 0, 0]
    np.testing.assert_allclose(opened(encoded(image, "JPEG"))[0, 0], [255, 0, 0], atol=6)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_scales_to_8_bits(format):
    values = np.array([[0, 1, 128, 129, 257], [32768, 65278, 65407, 65534, 65535]], np.uint16)
    expected = np.rint(values * (255 / 65535)).astype(np.uint8)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    for source in (image, encoded(image, format), values, Image.fromarray(values.astype(np.int32))):
        assert np.array_equal(opened(source), np.dstack([expected] * 3))


def test_16_bit_grey_with_a_transparent_level_shows_the_background():
    data = encoded(Image.fromarray(np.array([[40000, 0]], np.uint16)))
    chunk = png_chunk(b"tRNS", struct.pack(">H", 40000))
    at = data.index(b"IDAT") - 4
    pixels = opened(data[:at] + chunk + data[at:], background=(9, 8, 7))
    assert pixels.tolist() == [[[9, 8, 7], [0, 0, 0]]]


def test_values_without_a_known_range_are_refused():
    with pytest.raises(BadImage, match="expected 8- or 16-bit values, found 32-bit floats"):
        open_image(encoded(Image.new("F", (3, 3), 0.5), "TIFF"))
    with pytest.raises(BadImage, match="0 to 65535, found 70000 to 70000"):
        open_image(Image.new("I", (3, 3), 70000))


def test_one_bit_images_become_black_and_white():
    bits = np.array([[True, False, True]])
    grey = Image.fromarray(bits)
    for source in (grey, encoded(grey), encoded(grey, "TIFF")):
        assert opened(source)[:, :, 0].tolist() == [[255, 0, 255]]


def test_one_pixel_is_a_image():
    pixel = Image.new("RGB", (1, 1), (1, 2, 3))
    for format in ("PNG", "BMP", "TIFF", "PPM"):
        assert opened(encoded(pixel, format)).tolist() == [[[1, 2, 3]]]
    assert opened(np.zeros((1, 1), np.uint8)).shape == (1, 1, 3)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}
"""What each EXIF orientation asks of the stored rows and columns."""


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied_once(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(Image.fromarray(PHOTO), format, exif=exif, **options)
    upright = open_image(data)
    assert np.array_equal(np.asarray(upright), TURNS[orientation](PHOTO))
    assert np.array_equal(opened(upright), np.asarray(upright))


def test_jpeg_orientation_turns_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = opened(encoded(Image.fromarray(PHOTO), "JPEG"))
    turned = opened(encoded(Image.fromarray(PHOTO), "JPEG", exif=exif))
    assert np.array_equal(turned, np.rot90(plain, -1))


def test_unreadable_exif_costs_the_orientation_alone(monkeypatch):
    def fail(image):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    with pytest.warns(UserWarning, match=r"a\.png: its EXIF block cannot be read"):
        assert np.array_equal(opened(encoded(Image.fromarray(PHOTO)), name="a.png"), PHOTO)


def test_metadata_does_not_leave_with_the_image():
    exif = Image.Exif()
    exif[0x010E] = "a description"
    assert open_image(encoded(Image.fromarray(PHOTO), "PNG", exif=exif)).info == {}


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_first_of_several_frames_is_taken_with_a_warning(format, tmp_path):
    frames = [Image.new("RGB", (9, 5), color) for color in ("red", "lime", "blue")]
    path = tmp_path / f"moving.{format.lower()}"
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(path, format, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserWarning, match=rf"moving\.{format.lower()}: holds 3 frames, the first"):
        assert (opened(path) == [255, 0, 0]).all()


def test_still_images_open_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
            open_image(encoded(Image.fromarray(PHOTO), format))


def test_names_of_refs_appear_in_messages():
    with pytest.raises(BadImage, match=r"train\.tar: 7\.png: expected"):
        open_image(ImageRef(b"junk junk junk", "train.tar: 7.png"))
    assert issubclass(BadImage, ValueError)
