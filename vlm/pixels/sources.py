"""PixelSpecs read from the configurations of transformers, timm, torchvision and open_clip.

Each reader takes the source's own object, so that no number is copied by hand, and refuses what a
PixelSpec cannot say, naming the class and the field. The libraries are imported only when used.
Longer than most files here: a reader for each class, all of them over the same few helpers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vlm.pixels.spec import CHOICES, PixelSpec, box_of_patches

if TYPE_CHECKING:
    import open_clip
    from transformers import BaseImageProcessor

_STEPS = (
    "process_image",
    "resize",
    "center_crop",
    "rescale",
    "normalize",
    "rescale_and_normalize",
    "pad",
    "_preprocess",
)
"""What a transformers image processor may override; one that does follows rules of its own."""

_SIZE_KEYS = (
    "height",
    "width",
    "shortest_edge",
    "longest_edge",
    "max_height",
    "max_width",
    "min_pixels",
    "max_pixels",
)


def from_transformers(processor: BaseImageProcessor) -> PixelSpec:
    """The preprocessing of a transformers image processor, of either backend.

    Taken are the processors that follow their backend's own steps (CLIP, SigLIP and the fixed-size
    SigLIP 2, ViT, DeiT, and BiT, which DINOv2 uses, among others), SAM's, DeepSeek-VL's, Donut's,
    ConvNeXt's (which CvT uses), VideoMAE's (which TimeSformer uses; of one frame), Idefics2's of
    images that are not cut in quarters (fit "shrink"), and the
    native-resolution SigLIP 2's (fit "patches": its view, cut into patches row by row, row
    and column of a patch before its channels, is the processor's `pixel_values`).
    Raises ValueError that names the class, the field, and its value.
    Source: transformers 5.23, `image_processing_backends.py`.
    """
    base, shared = _shared(processor)
    name = type(processor).__name__
    special = _SPECIAL.get(name.removesuffix("Pil"))
    if special is not None:
        return special(processor, shared)
    if name.removesuffix("Pil") == _HYBRID:
        raise ValueError(f"{name}: gives two images; read both with pair_from_transformers")
    own = [
        step for step in _STEPS if getattr(type(processor), step, 0) is not getattr(base, step, 0)
    ]
    if own:
        raise ValueError(
            f"{name}: its own {', '.join(own)} cannot be expressed; expected the "
            f"{shared['backend']} backend's steps, or one of {', '.join(_SPECIAL)}"
        )
    return _standard(processor, shared)


def pair_from_transformers(processor: BaseImageProcessor) -> tuple[PixelSpec, PixelSpec]:
    """The high-resolution and the low-resolution preprocessing of DeepSeek-VL 7B.

    The second takes the image that the first gives before normalising (`resize_u8`), not the
    original. Raises ValueError for any other processor.
    Source: transformers, `DeepseekVLHybridImageProcessor._preprocess`.
    """
    if type(processor).__name__.removesuffix("Pil") != _HYBRID:
        raise ValueError(
            f"{type(processor).__name__}: expected {_HYBRID}, the processor of two images"
        )
    _, shared = _shared(processor)
    high = {
        "resample": _resample_name(processor, "high_res_resample"),
        **_statistics(processor, "high_res_image_mean", "high_res_image_std"),
    }
    return (
        _deepseek_vl(processor, shared | high, prefix="high_res_"),
        _deepseek_vl(processor, shared),
    )


def tile_from_transformers(processor: BaseImageProcessor, side_px: int) -> PixelSpec:
    """The preprocessing of one square view of an image processor that cuts images into tiles by
    rules of its own: stretched to `side_px`, with the processor's filter, backend and statistics.

    Raises ValueError that names the class, the field, and its value.
    """
    _, shared = _shared(processor)
    return PixelSpec(size_hw=(side_px, side_px), fit="stretch", **shared)


def _shared(processor: Any) -> tuple[type, dict]:
    """The backend's class, and the fields of a PixelSpec that every processor states alike."""
    from vlm.compat.transformers import resizing_backends

    bases = resizing_backends()
    backend = next((name for name in bases if isinstance(processor, bases[name])), None)
    if backend is None:
        raise ValueError(
            f"{type(processor).__name__}: expected an image processor of the torchvision or the "
            "PIL backend"
        )
    _expect(processor, "do_resize", True)
    _expect(processor, "do_rescale", True)
    if not math.isclose(processor.rescale_factor, 1 / 255, rel_tol=1e-6):
        raise _cannot(processor, "rescale_factor", "1 / 255")
    return bases[backend], {
        "resample": _resample_name(processor, "resample"),
        "backend": backend,
        # transformers' two backends disagree on the odd pixel of a padded side.
        "half_px": "truncate" if backend == "torchvision" else "floor",
        **_statistics(processor, "image_mean", "image_std"),
    }


def _statistics(processor: Any, mean: str, std: str) -> dict:
    if not processor.do_normalize:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return {"mean": _three(getattr(processor, mean)), "std": _three(getattr(processor, std))}


def _standard(processor: Any, shared: dict) -> PixelSpec:
    """Resize, centre crop, normalise: the backends' own steps."""
    if getattr(processor, "do_pad", None):
        raise _cannot(processor, "do_pad", "no padding of this processor")
    size = _size(processor, "size")
    crops = bool(getattr(processor, "do_center_crop", None))
    crop = _size(processor, "crop_size") if crops else None
    if crops and set(crop) != {"height", "width"}:
        raise _cannot(processor, "crop_size", "height and width")
    if set(size) == {"height", "width"}:
        resize_hw = (size["height"], size["width"])
        size_hw = (crop["height"], crop["width"]) if crops else resize_hw
        return PixelSpec(size_hw=size_hw, fit="stretch", resize_hw=resize_hw, **shared)
    if set(size) != {"shortest_edge"}:
        raise _cannot(processor, "size", "height and width, or shortest_edge")
    if not crops:
        raise _cannot(processor, "do_center_crop", "True where size is a shortest_edge")
    size_hw = (crop["height"], crop["width"])
    return PixelSpec(size_hw=size_hw, fit="crop", resize_hw=(size["shortest_edge"],) * 2, **shared)


def _sam(processor: Any, shared: dict) -> PixelSpec:
    """Long side to size, halves up; zeros below and to the right after normalising.

    Source: transformers, `SamImageProcessor._get_preprocess_shape`.
    """
    _expect(processor, "do_pad", True)
    if getattr(processor, "do_center_crop", None):
        raise _cannot(processor, "do_center_crop", "False")
    size, pad = _size(processor, "size"), _size(processor, "pad_size")
    if set(size) != {"longest_edge"}:
        raise _cannot(processor, "size", "longest_edge")
    size_hw = (pad["height"], pad["width"])
    if size["longest_edge"] > min(size_hw):
        raise _cannot(processor, "pad_size", f"at least the longest edge {size['longest_edge']}")
    return PixelSpec(
        size_hw=size_hw,
        fit="pad",
        resize_hw=(size["longest_edge"],) * 2,
        rounding="half_up",
        anchor="top_left",
        pad_rgb=None,
        **shared,
    )


def _deepseek_vl(processor: Any, shared: dict, prefix: str = "") -> PixelSpec:
    """Long side to size, halves to even, at least `min_size`; centred on a colour.

    Source: transformers, `DeepseekVLImageProcessor.resize` and `pad_to_square`.
    """
    _expect(processor, "do_pad", True)
    size = _size(processor, f"{prefix}size")
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise _cannot(processor, f"{prefix}size", "height and width, both equal")
    colour = getattr(processor, f"{prefix}background_color")
    return PixelSpec(
        size_hw=(size["height"], size["width"]),
        fit="pad",
        rounding="half_even",
        min_side_px=processor.min_size,
        # A lone number colours the first channel only.
        pad_rgb=(colour, 0, 0) if isinstance(colour, int) else tuple(colour),
        # Unlike its crops, the PIL backend's padding puts the odd pixel below and to the right.
        **(shared | {"half_px": "truncate"}),
    )


def _siglip2(processor: Any, shared: dict) -> PixelSpec:
    """As many whole patches as `max_num_patches` allows, in the image's own aspect.

    The number is the image processor's own, that of its folder. transformers' Siglip2Processor,
    which joins it to a tokenizer, calls it with 256 whatever the folder says, unless it is given
    `max_num_patches` at call time.
    Source: transformers, `Siglip2ImageProcessor` and `Siglip2Processor.images_kwargs`.
    """
    box = box_of_patches(processor.max_num_patches, processor.patch_size)
    return PixelSpec(size_hw=box, fit="patches", patch_px=processor.patch_size, **shared)


def _idefics2(processor: Any, shared: dict) -> PixelSpec:
    """The long side to at most `longest_edge`, then each side to at least `shortest_edge`; what
    pads the images of a batch is no part of a view.

    Source: transformers, `Idefics2ImageProcessor.resize`.
    """
    _expect(processor, "do_image_splitting", False)
    size = _size(processor, "size")
    if set(size) != {"shortest_edge", "longest_edge"}:
        raise _cannot(processor, "size", "shortest_edge and longest_edge")
    return PixelSpec(
        size_hw=(size["longest_edge"],) * 2,
        fit="shrink",
        min_side_px=size["shortest_edge"],
        **shared,
    )


def _donut(processor: Any, shared: dict) -> PixelSpec:
    """The short side to the box's short side, shrunk to fit, centred on black before normalising.

    Source: transformers, `DonutImageProcessor`.
    """
    for field in ("do_thumbnail", "do_pad"):
        _expect(processor, field, True)
    if getattr(processor, "do_center_crop", None):
        raise _cannot(processor, "do_center_crop", "False")
    size = _size(processor, "size")
    if set(size) != {"height", "width"}:
        raise _cannot(processor, "size", "height and width")
    return PixelSpec(
        size_hw=(size["height"], size["width"]),
        fit="page",
        turn=bool(processor.do_align_long_axis),
        # Unlike its crops, the PIL backend's padding puts the odd pixel below and to the right.
        **(shared | {"half_px": "truncate"}),
    )


def _convnext(processor: Any, shared: dict) -> PixelSpec:
    """Below 384 the short side to size / crop_pct, then a centred crop; from 384 on a stretch.

    Source: transformers, `ConvNextImageProcessor.resize`.
    """
    if getattr(processor, "do_center_crop", None):
        raise _cannot(processor, "do_center_crop", "False")
    size = _size(processor, "size")
    if set(size) != {"shortest_edge"}:
        raise _cannot(processor, "size", "shortest_edge")
    side = size["shortest_edge"]
    if side >= 384:
        return PixelSpec(size_hw=(side, side), fit="stretch", **shared)
    box = int(side / processor.crop_pct)
    return PixelSpec(size_hw=(side, side), fit="crop", resize_hw=(box, box), **shared)


_HYBRID = "DeepseekVLHybridImageProcessor"
_SPECIAL = {
    "SamImageProcessor": _sam,
    "LlavaImageProcessor": _standard,  # its own step alone is padding, which is refused
    "DeepseekVLImageProcessor": _deepseek_vl,
    "Siglip2ImageProcessor": _siglip2,
    "DonutImageProcessor": _donut,
    "Idefics2ImageProcessor": _idefics2,
    "ConvNextImageProcessor": _convnext,
    # A processor of videos, which treats each frame by the backend's own steps.
    "VideoMAEImageProcessor": _standard,
}


def from_timm(data_config: Mapping[str, Any]) -> PixelSpec:
    """The evaluation preprocessing of timm, from `timm.data.resolve_model_data_config(model)`.

    Raises ValueError that names the field and its value.
    Source: timm, `data/transforms_factory.py`, `transforms_imagenet_eval`.
    """
    known = {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}
    if set(data_config) != known:
        raise ValueError(
            f"timm data config: expected the keys {sorted(known)}, found {sorted(data_config)}"
        )
    channels, *size_hw = data_config["input_size"]
    mode, resample = data_config["crop_mode"], data_config["interpolation"]
    if channels != 3:
        raise ValueError(f"timm data config: input_size must have 3 channels, found {channels}")
    if resample not in CHOICES["resample"]:
        raise ValueError(f"timm data config: interpolation {resample!r} cannot be expressed")
    mean, std = _three(data_config["mean"]), _three(data_config["std"])
    box_hw = tuple(math.floor(side / data_config["crop_pct"]) for side in size_hw)
    shared = {
        "size_hw": tuple(size_hw),
        "resize_hw": box_hw,
        "resample": resample,
        "backend": "pil",
        "mean": mean,
        "std": std,
        "half_px": "half_even",
    }
    if mode == "squash":
        return PixelSpec(fit="stretch", **shared)
    if mode == "border":
        fill = tuple(round(255 * value) for value in mean)
        return PixelSpec(fit="pad", rounding="half_even_ratio", pad_rgb=fill, **shared)
    if mode == "center":
        # timm takes torchvision's short-edge resize for square boxes and its own for the others.
        rounding = "truncate" if box_hw[0] == box_hw[1] else "half_even_ratio"
        return PixelSpec(fit="crop", rounding=rounding, **shared)
    raise ValueError(
        f"timm data config: crop_mode must be center, squash or border, found {mode!r}"
    )


def from_torchvision(transforms: Any) -> PixelSpec:
    """The evaluation preprocessing of torchvision's classification weights, from
    `weights.transforms()`, for images as Pillow opens them.

    Raises ValueError that names the field and its value.
    Source: torchvision, `transforms/_presets.py`, `ImageClassification`.
    """
    name = type(transforms).__name__
    fields = ("crop_size", "resize_size", "interpolation", "mean", "std")
    missing = [field for field in fields if not hasattr(transforms, field)]
    if missing:
        raise ValueError(f"{name}: expected torchvision's ImageClassification, without {missing}")
    resample = transforms.interpolation.value
    if resample not in CHOICES["resample"]:
        raise ValueError(f"{name}: interpolation {resample!r} cannot be expressed")
    sides = (list(transforms.crop_size), list(transforms.resize_size))
    if any(len(side) != 1 for side in sides):
        raise ValueError(
            f"{name}: crop_size and resize_size must be one side each, found {sides[0]}, {sides[1]}"
        )
    return PixelSpec(
        size_hw=tuple(sides[0] * 2),
        fit="crop",
        resize_hw=tuple(sides[1] * 2),
        resample=resample,
        backend="pil",
        mean=_three(transforms.mean),
        std=_three(transforms.std),
        half_px="half_even",
    )


def from_open_clip(preprocess_cfg: open_clip.transform.PreprocessCfg | Mapping) -> PixelSpec:
    """The evaluation preprocessing of open_clip, from a model's `visual.preprocess_cfg`.

    Keys that a mapping lacks take open_clip's defaults. Raises ValueError that names the field.
    Source: open_clip, `transform.py`, `image_transform`.
    """
    from vlm.compat.open_clip import PreprocessCfg

    given = preprocess_cfg if isinstance(preprocess_cfg, Mapping) else asdict(preprocess_cfg)
    config = asdict(PreprocessCfg())
    if not set(given) <= set(config):
        raise ValueError(
            f"open_clip preprocess_cfg: unknown keys {sorted(set(given) - set(config))}, known "
            f"are {sorted(config)}"
        )
    config |= given
    if config["mode"] != "RGB":
        raise ValueError(f"open_clip preprocess_cfg: mode must be RGB, found {config['mode']!r}")
    # For evaluation open_clip reads "random" as bicubic.
    resample = {"random": "bicubic"}.get(config["interpolation"], config["interpolation"])
    if resample not in ("bilinear", "bicubic"):
        raise ValueError(f"open_clip preprocess_cfg: interpolation {resample!r} is unknown")
    size = config["size"]
    size_hw = (size, size) if isinstance(size, int) else tuple(size)
    shared = {
        "size_hw": size_hw,
        "resample": resample,
        "backend": "pil",
        "mean": _three(config["mean"]),
        "std": _three(config["std"]),
        "half_px": "half_even",
    }
    mode = config["resize_mode"]
    if mode == "squash":
        return PixelSpec(fit="stretch", **shared)
    if mode == "longest":
        fill = (config["fill_color"],) * 3
        return PixelSpec(fit="pad", rounding="half_even_ratio", pad_rgb=fill, **shared)
    if mode == "shortest":
        if size_hw[0] == size_hw[1]:
            return PixelSpec(fit="crop", **shared)
        # Its resize for a box that is not square is always bicubic, whatever the field says.
        shared["resample"] = "bicubic"
        return PixelSpec(fit="crop", rounding="half_even_ratio", **shared)
    raise ValueError(
        f"open_clip preprocess_cfg: resize_mode must be shortest, longest or squash, found {mode!r}"
    )


def _cannot(processor: Any, field: str, expected: str) -> ValueError:
    return ValueError(
        f"{type(processor).__name__}: {field} must be {expected}, found "
        f"{getattr(processor, field, None)!r}"
    )


def _expect(processor: Any, field: str, value: bool) -> None:
    if getattr(processor, field, None) is not value:
        raise _cannot(processor, field, str(value))


def _size(processor: Any, field: str) -> dict[str, int]:
    """The parts of a size that are set."""
    size = getattr(processor, field, None)
    if size is None:
        raise _cannot(processor, field, "a size")
    found = {key: size.get(key) for key in _SIZE_KEYS}
    return {key: value for key, value in found.items() if value is not None}


def _resample_name(processor: Any, field: str) -> str:
    from PIL import Image

    name = Image.Resampling(getattr(processor, field)).name.lower()
    if name not in CHOICES["resample"]:
        raise _cannot(processor, field, f"one of {', '.join(CHOICES['resample'])}")
    return name


def _three(values: Any) -> tuple[float, float, float]:
    return (float(values),) * 3 if isinstance(values, (int, float)) else tuple(map(float, values))
