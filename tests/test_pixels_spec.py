"""Laws of PixelSpec, on images and targets that are not square."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.config import from_dict, to_dict
from vlm.geometry import Resize
from vlm.pixels import HALF, IMAGENET, MAX_PIXELS, OPENAI, BadImage, PixelSpec, open_image

RNG = np.random.default_rng(0)


def photo(rows: int, columns: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (rows, columns, 3), dtype=np.uint8))


def spec(fit: str = "stretch", **changes) -> PixelSpec:
    values = {"size_hw": (32, 48), "resample": "bilinear", "mean": HALF.mean, "std": HALF.std}
    return PixelSpec(fit=fit, **(values | changes))


SPECS = {
    "stretch": spec(resample="bicubic", backend="pil"),
    "stretch_and_crop": spec(resize_hw=(40, 53), half_px="half_even"),
    "crop": spec("crop", resize_hw=(36, 36), half_px="floor", mean=OPENAI.mean),
    "crop_covering": spec("crop", rounding="half_even_ratio"),
    "pad": spec("pad", pad_rgb=(127, 1, 255), min_side_px=5),
    "pad_after": spec(
        "pad", rounding="half_up", anchor="top_left", pad_rgb=None, mean=IMAGENET.mean
    ),
}
EACH_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
SIZES = [(50, 90), (90, 50), (11, 17), (61, 7), (1, 1), (32, 48), (300, 2), (33, 47)]


@EACH_SPEC
@pytest.mark.parametrize("size_hw", SIZES)
def test_every_image_gives_one_view_of_the_promised_size(spec, size_hw):
    image = photo(*size_hw)
    views = spec(image)
    assert [tuple(view.shape[1:]) for view in views] == list(spec.view_sizes(size_hw))
    assert views[0].dtype == torch.float32
    assert views[0].is_contiguous()
    assert spec.resize_u8(image).dtype == torch.uint8


@EACH_SPEC
@pytest.mark.parametrize("size_hw", SIZES)
def test_resize_record_returns_boxes_to_the_image(spec, size_hw):
    record = spec.resize_record(size_hw)
    assert isinstance(record, Resize)
    assert (record.input_hw, record.output_hw) == (size_hw, spec.size_hw)
    boxes = np.array([[0, 0, size_hw[1], size_hw[0]], [0.2, 0.5, 0.9, 0.7]])
    np.testing.assert_allclose(record.invert_boxes(record.boxes(boxes)), boxes, atol=1e-9)


@EACH_SPEC
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("size_hw", [(120, 200), (200, 120), (16, 21), (21, 16)])
def test_resize_record_points_at_where_the_pixels_went(spec, backend, size_hw):
    """A white block on black is found, in the view, where the record sends its box."""
    spec = replace(spec, backend=backend, resample="bilinear", pad_rgb=(0, 0, 0))
    H, W = size_hw
    box = np.array([W * 0.4, H * 0.35, W * 0.65, H * 0.6]).round()
    x0, y0, x1, y1 = box.astype(int)
    levels = np.zeros((H, W, 3), np.uint8)
    levels[y0:y1, x0:x1] = 255
    mass = spec.resize_u8(Image.fromarray(levels))[0].double().numpy()
    ys, xs = np.mgrid[: mass.shape[0], : mass.shape[1]] + 0.5
    centre = [(xs * mass).sum() / mass.sum(), (ys * mass).sum() / mass.sum()]
    expected = spec.resize_record(size_hw).boxes(box[None])[0]
    np.testing.assert_allclose(centre, (expected[:2] + expected[2:]) / 2, atol=0.15)
    area = np.prod(expected[2:] - expected[:2])
    np.testing.assert_allclose(mass.sum() / 255, area, rtol=0.05)


@EACH_SPEC
def test_spec_survives_json(spec):
    assert from_dict(PixelSpec, to_dict(spec)) == spec
    with pytest.raises(ValueError, match="unknown keys"):
        from_dict(PixelSpec, to_dict(spec) | {"colour": 1})


@EACH_SPEC
def test_unnormalise_returns_the_pixels(spec):
    image = photo(50, 90)
    assert torch.equal(spec.unnormalise(torch.stack(spec(image)))[0], spec.resize_u8(image))
    far = torch.tensor([-1e3, 1e3]).repeat(3, 1)[:, None]
    assert spec.unnormalise(far)[0].tolist() == [[0, 255]]


def test_normalising_maps_levels_to_the_units_of_mean_and_std():
    image = Image.new("RGB", (48, 32), (255, 0, 51))
    (view,) = spec(mean=(0.5, 0.25, 0.2), std=(0.5, 0.5, 0.1))(image)
    torch.testing.assert_close(view[:, 3, 5], torch.tensor([1.0, -0.5, 0.0]))


def test_covering_truncates_the_long_side():
    """127 * 32 / 64 = 63.5 gives 63."""
    crop = spec("crop", size_hw=(32, 32))
    assert crop.resize_record((61, 113)).scale_xy == (59 / 113, 32 / 61)
    assert crop.resize_record((113, 61)).scale_xy == (32 / 61, 59 / 113)
    assert crop.resize_record((64, 127)).scale_xy == (63 / 127, 0.5)


@pytest.mark.parametrize("rounding", ["truncate", "half_even", "half_even_ratio", "half_up"])
@pytest.mark.parametrize("size_hw", SIZES)
def test_covering_a_box_leaves_no_padding_and_fitting_in_it_no_cropping(size_hw, rounding):
    corners = [[0, 0, size_hw[1], size_hw[0]]]
    covering = spec("crop", rounding=rounding).resize_record(size_hw).boxes(corners).round(6)[0]
    assert (covering[:2] <= 0).all()
    assert (covering[2:] >= [48, 32]).all()
    fitting = spec("pad", rounding=rounding).resize_record(size_hw).boxes(corners).round(6)[0]
    assert (fitting[:2] >= 0).all()
    assert (fitting[2:] <= [48, 32]).all()


def test_padding_has_its_colour_and_the_image_its_place():
    white = Image.new("RGB", (10, 20), (255, 255, 255))
    view = spec("pad", size_hw=(16, 16), pad_rgb=(1, 2, 3)).resize_u8(white)
    assert view[:, 0, :4].unique(dim=1).tolist() == [[1], [2], [3]]
    assert (view[:, :, 4:12] == 255).all()
    view = spec("pad", size_hw=(16, 16), pad_rgb=(1, 2, 3), anchor="top_left").resize_u8(white)
    assert (view[:, :, :8] == 255).all()
    assert view[:, :, 8:].flatten(1).unique(dim=1).tolist() == [[1], [2], [3]]


def test_padding_after_normalising_is_zero():
    padded = spec("pad", size_hw=(16, 16), anchor="top_left", pad_rgb=None, mean=IMAGENET.mean)
    (view,) = padded(Image.new("RGB", (10, 20), (255, 255, 255)))
    assert (view[:, :, 8:] == 0).all()
    assert (view[:, :, :8] > 0.5).all()


def test_small_images_are_padded_by_a_crop_that_does_not_reach():
    crop = spec("crop", size_hw=(9, 6), resize_hw=(4, 4))
    view = crop.resize_u8(Image.new("RGB", (5, 4), (255, 255, 255)))
    assert view[0].bool().any(1).tolist() == [False] * 2 + [True] * 4 + [False] * 3
    view = replace(crop, half_px="floor").resize_u8(Image.new("RGB", (5, 4), (255, 255, 255)))
    assert view[0].bool().any(1).tolist() == [False] * 3 + [True] * 4 + [False] * 2


def test_sides_are_never_thinner_than_the_minimum():
    thin = spec("pad", size_hw=(32, 32), min_side_px=5)
    assert thin.resize_record((300, 2)).scale_xy == (2.5, 32 / 300)
    assert spec("pad").resize_record((3000, 1)).scale_xy[0] == 1.0


def test_with_size_scales_the_box_and_keeps_the_rest():
    small = spec("crop", size_hw=(224, 224), resize_hw=(256, 256), half_px="floor")
    large = small.with_size((448, 336))
    assert (large.size_hw, large.resize_hw) == ((448, 336), (512, 384))
    assert large.with_size((224, 224)) == small
    assert spec().with_size((64, 16)).resize_hw is None


def test_nearest_neighbours_agree_between_backends():
    image = photo(37, 53)
    ours, pillow = (spec(resample="nearest", backend=name) for name in ("torchvision", "pil"))
    assert torch.equal(ours.resize_u8(image), pillow.resize_u8(image))


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
def test_backends_differ_by_few_grey_levels(resample):
    image = open_image(np.kron(RNG.integers(0, 256, (9, 14, 3)), np.ones((8, 8, 1))).astype("u1"))
    views = [spec(resample=resample, backend=b).resize_u8(image) for b in ("torchvision", "pil")]
    assert (views[0].int() - views[1].int()).abs().max() <= 2


def test_images_of_another_mode_are_refused():
    with pytest.raises(ValueError, match="mode RGB, as open_image gives, found RGBA"):
        spec()(Image.new("RGBA", (4, 4)))


def test_strips_that_would_grow_without_bound_are_refused():
    crop = spec("crop", size_hw=(224, 224))
    with pytest.raises(BadImage, match=rf"at most {MAX_PIXELS}.*1 × 9000.*224 × 2016000"):
        crop(Image.new("RGB", (9000, 1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fit": "squeeze"},
            "fit must be one of stretch, crop, pad, patches, height, page, shrink, found",
        ),
        ({"resample": "cubic"}, "resample must be one of nearest.* found 'cubic'"),
        ({"backend": "cv2"}, "backend must be one of .* found 'cv2'"),
        ({"rounding": "up"}, "rounding must be one of .* found 'up'"),
        ({"size_hw": (0, 4)}, r"size_hw must be \(rows, columns\), both positive, found \(0, 4\)"),
        ({"size_hw": 224}, "size_hw must be .* found 224"),
        ({"resize_hw": (2.5, 4)}, "resize_hw must be .* found"),
        ({"min_side_px": 0}, "min_side_px must be a positive integer, found 0"),
        ({"mean": (0.5, 0.5)}, r"mean must be three finite numbers, found \(0.5, 0.5\)"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive, found"),
        ({"pad_rgb": (0, 0, 256)}, "pad_rgb must be three integers in 0 to 255, found"),
    ],
)
def test_specs_refuse_bad_values_and_show_them(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**({"fit": "stretch"} | changes))


def line_spec(longest_px):
    """Lines of 32 rows and at most so many columns."""
    half = (0.5,) * 3
    return PixelSpec(
        size_hw=(32, longest_px), fit="height", patch_px=4, resample="bilinear", mean=half, std=half
    )


@pytest.mark.parametrize("size_hw", [(24, 96), (40, 900), (5, 20_000), (300, 20), (1, 1)])
def test_lines_get_their_height_and_about_their_aspect(size_hw):
    line = line_spec(2048)
    ((H, W),) = line.view_sizes(size_hw)
    assert H == 32
    assert W % 4 == 0
    wanted = min(max(4, size_hw[1] * 32 / size_hw[0]), 2048)
    assert pytest.approx(wanted, rel=0.11, abs=4) == W
    (view,) = line(Image.new("RGB", size_hw[::-1], "white"))
    assert view.shape == (3, H, W)
    record = line.resize_record(size_hw)
    assert record.scale_xy == (W / size_hw[1], 32 / size_hw[0])


def test_lines_come_in_few_widths():
    line = line_spec(16384)
    widths = {line.view_sizes((32, columns))[0][1] for columns in range(128, 1025)}
    assert len(widths) == 13
    assert {line.view_sizes((32, width))[0][1] for width in widths} == widths


@pytest.mark.parametrize("changes", [{"patch_px": None}, {"size_hw": (32, 1023)}, {"patch_px": 0}])
def test_lines_need_whole_patches_of_columns(changes):
    values = dict(size_hw=(32, 1024), fit="height", patch_px=4, resample="bilinear")
    with pytest.raises(ValueError, match="under fit 'height'"):
        PixelSpec(**values | changes, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [
        ((30, 45), (30, 45)),  # smaller than the box: as it is
        ((300, 200), (100, 66)),
        ((90, 400), (22, 100)),
        ((600, 90), (100, 20)),  # the least side, whatever the aspect
        ((3, 500), (20, 100)),
        ((9, 7), (20, 20)),
        ((100, 100), (100, 100)),
    ],
)
def test_shrunk_images_keep_their_aspect_down_to_the_least_side(size_hw, expected):
    shrink = spec("shrink", size_hw=(100, 100), min_side_px=20)
    assert shrink.view_sizes(size_hw) == (expected,)
    (view,) = shrink(photo(*size_hw))
    assert view.shape == (3, *expected)
    record = shrink.resize_record(size_hw)
    assert record.output_hw == expected
    assert record.offset_xy == (0, 0)
    corner = record.boxes([[0, 0, size_hw[1], size_hw[0]]])[0]
    np.testing.assert_allclose(corner, [0, 0, expected[1], expected[0]])


@pytest.mark.parametrize("changes", [{"size_hw": (90, 100)}, {"min_side_px": 101}])
def test_shrunk_images_need_a_square_box_above_the_least_side(changes):
    with pytest.raises(ValueError, match=r"a square of at least min_side_px .* under fit 'shrink'"):
        spec("shrink", **({"size_hw": (100, 100)} | changes))
