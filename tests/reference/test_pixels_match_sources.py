"""PixelSpecs give the very pixels of transformers, timm and open_clip.

Images are photographs that are not square (on square images, side rounding, centring
and the order of rows and columns cannot go wrong visibly), landscape and portrait, odd-sided,
larger and smaller than the target. Before normalising the values must be *equal*, not only within
one grey level; after it they may differ by float32 rounding.
"""

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from vlm.pixels import (
    HALF,
    IMAGENET,
    OPENAI,
    from_open_clip,
    from_timm,
    from_transformers,
    pair_from_transformers,
)

timm_data = pytest.importorskip("timm.data")
transformers = pytest.importorskip("transformers")

NORMALISED_TOLERANCE = 1e-6
"""The sources divide by 255 before or after the statistics; float32 keeps values near 2."""


def images() -> dict[str, Image.Image]:
    coffee, cat = skimage.data.coffee(), skimage.data.chelsea()
    arrays = {
        "coffee": coffee,
        "cat_portrait": np.ascontiguousarray(cat.transpose(1, 0, 2)),
        "cat_crop": cat[11:262, 30:167],
        "coffee_crop": coffee[100:197, 40:391],
        "small": cat[100:163, 120:241],
        "small_portrait": coffee[200:311, 300:352],
        "strip": coffee[200:223, 20:577],
        "square": cat[:300, :300],
    }
    return {name: Image.fromarray(array) for name, array in arrays.items()}


IMAGES = images()
EACH_IMAGE = pytest.mark.parametrize("image", IMAGES.values(), ids=list(IMAGES))

PROCESSORS = {
    "clip": ("CLIPImageProcessor", {}),
    "clip_336": ("CLIPImageProcessor", {"size": 336, "crop_size": 336}),
    "clip_odd_target": (
        "CLIPImageProcessor",
        {"size": 128, "crop_size": {"height": 161, "width": 75}},
    ),
    "siglip": ("SiglipImageProcessor", {}),
    "siglip2_fixed": (
        "SiglipImageProcessor",
        {"size": {"height": 256, "width": 256}, "resample": 2},
    ),
    "siglip_not_square": ("SiglipImageProcessor", {"size": {"height": 112, "width": 224}}),
    "vit": ("ViTImageProcessor", {}),
    "vit_lanczos": ("ViTImageProcessor", {"resample": 1}),
    "vit_nearest": ("ViTImageProcessor", {"resample": 0}),
    "trocr": ("ViTImageProcessor", {"size": {"height": 384, "width": 384}}),
    "deit": (
        "DeiTImageProcessor",
        {"image_mean": list(IMAGENET.mean), "image_std": list(IMAGENET.std)},
    ),
    "dinov2": (
        "BitImageProcessor",
        {
            "size": {"shortest_edge": 256},
            "image_mean": list(IMAGENET.mean),
            "image_std": list(IMAGENET.std),
        },
    ),
    "convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "crop_pct": 0.9}),
    "convnext_384": ("ConvNextImageProcessor", {}),
    "sam": ("SamImageProcessor", {}),
    "sam_small": (
        "SamImageProcessor",
        {"size": {"longest_edge": 200}, "pad_size": {"height": 224, "width": 256}},
    ),
    "deepseek_vl": (
        "DeepseekVLImageProcessor",
        {"resample": 2, "image_mean": list(HALF.mean), "image_std": list(HALF.std)},
    ),
    "deepseek_vl_1024": (
        "DeepseekVLImageProcessor",
        {"size": {"height": 1024, "width": 1024}},
    ),
    "deepseek_vl_even": (
        "DeepseekVLImageProcessor",
        {"size": {"height": 230, "width": 230}, "min_size": 61},
    ),
}


def processor_of(kind: str, backend: str):
    name, settings = PROCESSORS[kind]
    return getattr(transformers, name + {"torchvision": "", "pil": "Pil"}[backend])(**settings)


def assert_same_pixels(spec, image, raw, normalised):
    """raw: the source's values before normalising; normalised: after it; both [3, H, W]."""
    record = spec.resize_record((image.height, image.width))
    ours = spec.resize_u8(image)
    assert ours.dtype == torch.uint8
    assert tuple(ours.shape[1:]) == spec.size_hw == record.output_hw == tuple(raw.shape[1:])
    if spec.pad_rgb is None:  # SAM pads after normalising: compare the image alone
        _, _, x, y = record.boxes([[0, 0, image.width, image.height]])[0].round().astype(int)
        ours, raw = ours[:, :y, :x], raw[:, :y, :x]
    assert int((ours.int() - raw.round().int()).abs().max()) == 0
    (view,) = spec(image)
    assert view.dtype == torch.float32
    torch.testing.assert_close(view, normalised, rtol=0, atol=NORMALISED_TOLERANCE)


@EACH_IMAGE
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_spec_of_a_transformers_processor_equals_it(kind, backend, image):
    """Greatest difference before normalising: 0 grey levels, on both backends."""
    processor = processor_of(kind, backend)
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
    normalised = processor(image, return_tensors="pt")
    assert_same_pixels(
        from_transformers(processor), image, raw.pixel_values[0], normalised.pixel_values[0]
    )


@EACH_IMAGE
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_spec_of_a_video_processor_equals_its_one_frame(backend, image):
    """Greatest difference before normalising: 0 grey levels."""
    name = "VideoMAEImageProcessor" + {"torchvision": "", "pil": "Pil"}[backend]
    processor = getattr(transformers, name)()
    raw = processor([image], do_rescale=False, do_normalize=False, return_tensors="pt")
    normalised = processor([image], return_tensors="pt")
    assert_same_pixels(
        from_transformers(processor),
        image,
        raw.pixel_values[0, 0],
        normalised.pixel_values[0, 0],
    )


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("hw", [(128, 5), (7, 128), (3, 128)])
def test_sam_rounds_half_a_pixel_up(hw, backend):
    """At long side 64 a side of 5 becomes 2.5, which SAM takes as 3 and DeepSeek-VL as 2."""
    processor = processor_of("sam_small", backend)
    processor.size, processor.pad_size = {"longest_edge": 64}, {"height": 64, "width": 64}
    image = IMAGES["coffee"].resize(hw[::-1])
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
    spec = from_transformers(processor)
    height, width = raw.reshaped_input_sizes[0].tolist()
    assert spec.resize_record(hw).scale_xy == (width / hw[1], height / hw[0])
    assert min(height, width) == (min(hw) + 1) // 2


@EACH_IMAGE
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_pair_of_specs_of_the_hybrid_processor_equals_it(backend, image):
    """DeepSeek-VL 7B, low resolution made from high; greatest difference: 0 grey levels."""
    name = "DeepseekVLHybridImageProcessor" + {"torchvision": "", "pil": "Pil"}[backend]
    processor = getattr(transformers, name)(
        size={"height": 96, "width": 96},
        high_res_size={"height": 250, "width": 250},
        resample=2,
        image_mean=list(HALF.mean),
        image_std=list(HALF.std),
    )
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
    normalised = processor(image, return_tensors="pt")
    high, low = pair_from_transformers(processor)
    assert_same_pixels(
        high, image, raw.high_res_pixel_values[0], normalised.high_res_pixel_values[0]
    )
    first = Image.fromarray(high.resize_u8(image).permute(1, 2, 0).numpy())
    assert_same_pixels(low, first, raw.pixel_values[0], normalised.pixel_values[0])
    assert (high.mean, low.mean) == (OPENAI.mean, HALF.mean)


def timm_config(size_hw, interpolation, crop_pct, crop_mode="center", statistics=IMAGENET):
    return {
        "input_size": (3, *size_hw),
        "interpolation": interpolation,
        "mean": statistics.mean,
        "std": statistics.std,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }


TIMM = {
    "vit": timm_config((224, 224), "bicubic", 0.9, statistics=HALF),
    "resnet": timm_config((224, 224), "bilinear", 0.875),
    "siglip": timm_config((256, 256), "bicubic", 1.0, "squash", HALF),
    "squash_and_crop": timm_config((224, 192), "bicubic", 0.95, "squash"),
    "dinov2": timm_config((518, 518), "bicubic", 1.0),
    "not_square": timm_config((160, 221), "bilinear", 0.9),
    "border": timm_config((224, 224), "bicubic", 1.0, "border", OPENAI),
    "border_and_crop": timm_config((181, 224), "lanczos", 0.9, "border"),
}


@EACH_IMAGE
@pytest.mark.parametrize("kind", TIMM)
def test_spec_of_a_timm_data_config_equals_its_transform(kind, image):
    """Greatest difference before normalising: 0 grey levels."""
    config = TIMM[kind]
    raw = timm_data.create_transform(**config, is_training=False, normalize=False)(image)
    normalised = timm_data.create_transform(**config, is_training=False)(image)
    assert_same_pixels(from_timm(config), image, raw, normalised)


def test_spec_of_a_timm_model_equals_its_transform():
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    config = timm_data.resolve_model_data_config(model)
    for image in IMAGES.values():
        raw = timm_data.create_transform(**config, is_training=False, normalize=False)(image)
        normalised = timm_data.create_transform(**config, is_training=False)(image)
        assert_same_pixels(from_timm(config), image, raw, normalised)


OPEN_CLIP = {
    "vit_b_32": {"size": 224},
    "siglip": {
        "size": (256, 256),
        "mean": HALF.mean,
        "std": HALF.std,
        "resize_mode": "squash",
    },
    "squash_not_square": {"size": (112, 224), "resize_mode": "squash", "interpolation": "random"},
    "longest": {"size": 224, "resize_mode": "longest", "fill_color": 128},
    "shortest_not_square": {"size": (160, 221), "interpolation": "bilinear"},
}


@EACH_IMAGE
@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_spec_of_an_open_clip_config_equals_its_transform(kind, image):
    """Greatest difference before normalising: 0 grey levels."""
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.transform.PreprocessCfg(**OPEN_CLIP[kind])
    transform = open_clip.transform.image_transform_v2(config, is_train=False)
    transform.transforms, normalise = transform.transforms[:-1], transform.transforms[-1]
    raw = transform(image)
    spec = from_open_clip(config)
    assert spec == from_open_clip(OPEN_CLIP[kind])
    assert_same_pixels(spec, image, raw * 255, normalise(raw))


def test_side_rounding_follows_each_source_at_its_rare_ties():
    """Sizes found by search where the sources' float expressions fall on different sides of a
    half: transformers multiplies by a scale, timm divides by its inverse."""
    for hw in [(105, 192), (51, 68), (9, 144), (35, 1792), (49, 84)]:
        for size_hw in (hw, hw[::-1]):
            image = Image.new("RGB", size_hw[::-1], (10, 200, 30))
            for side in (224, 518, 384):
                config = timm_config((side, side), "bilinear", 1.0, "border", OPENAI)
                raw = timm_data.create_transform(**config, is_training=False, normalize=False)
                assert torch.equal(from_timm(config).resize_u8(image), raw(image))
                size = {"height": side, "width": side}
                processor = transformers.DeepseekVLImageProcessor(size=size)
                raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
                ours = from_transformers(processor).resize_u8(image)
                assert torch.equal(ours, raw.pixel_values[0].to(torch.uint8))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Idefics3ImageProcessor", {}, r"Idefics3ImageProcessor: its own resize, pad, _preprocess"),
        ("DeepseekVLHybridImageProcessor", {}, "read both with pair_from_transformers"),
        ("PoolFormerImageProcessor", {}, "PoolFormerImageProcessor: its own resize"),
        ("ConvNextImageProcessor", {"do_center_crop": True}, "do_center_crop must be False"),
        ("CLIPImageProcessor", {"do_resize": False}, "do_resize must be True, found False"),
        ("CLIPImageProcessor", {"do_center_crop": False}, "do_center_crop must be True"),
        ("CLIPImageProcessor", {"rescale_factor": 1 / 127.5}, "rescale_factor must be 1 / 255"),
        (
            "ViTImageProcessor",
            {"size": {"shortest_edge": 256, "longest_edge": 300}},
            "ViTImageProcessor: size must be height and width, or shortest_edge, found",
        ),
        ("ViTImageProcessor", {"resample": 4}, "resample must be one of nearest, bilinear"),
        ("SamImageProcessor", {"do_pad": False}, "do_pad must be True, found False"),
    ],
)
def test_processors_beyond_a_spec_are_refused_by_class_and_field(name, settings, message):
    with pytest.raises(ValueError, match=message):
        from_transformers(getattr(transformers, name)(**settings))


def test_pairs_are_read_from_the_hybrid_processor_alone():
    with pytest.raises(ValueError, match="CLIPImageProcessor: expected DeepseekVLHybrid"):
        pair_from_transformers(transformers.CLIPImageProcessor())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_mode": "weird"}, "crop_mode must be center, squash or border, found 'weird'"),
        ({"interpolation": "random"}, "interpolation 'random' cannot be expressed"),
        ({"input_size": (1, 28, 28)}, "input_size must have 3 channels, found 1"),
        ({"naflex": True}, "expected the keys .* found .*naflex"),
    ],
)
def test_timm_configs_beyond_a_spec_are_refused_by_field(change, message):
    with pytest.raises(ValueError, match=message):
        from_timm(TIMM["vit"] | change)


def test_open_clip_configs_beyond_a_spec_are_refused_by_field():
    with pytest.raises(ValueError, match=r"unknown keys \['sise'\]"):
        from_open_clip({"sise": 224})
    with pytest.raises(ValueError, match=r"resize_mode must be .* found 'weird'"):
        from_open_clip({"resize_mode": "weird"})
