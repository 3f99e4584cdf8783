"""From image files to normalised pixels.

`decode` opens untrusted images safely; `spec` resizes, crops or pads, and normalises them as a
model expects; `sources` reads that specification from the configurations of other libraries; `area`
gives each image a view of its own size, within limits of pixels.
"""

from vlm.pixels.decode import MAX_PIXELS, BadImage, image_size, open_image
from vlm.pixels.sources import (
    from_open_clip,
    from_timm,
    from_torchvision,
    from_transformers,
    pair_from_transformers,
    tile_from_transformers,
)
from vlm.pixels.spec import HALF, IMAGENET, OPENAI, PixelSpec, Statistics

__all__ = [
    "HALF",
    "IMAGENET",
    "MAX_PIXELS",
    "OPENAI",
    "BadImage",
    "PixelSpec",
    "Statistics",
    "from_open_clip",
    "from_timm",
    "from_torchvision",
    "from_transformers",
    "image_size",
    "open_image",
    "pair_from_transformers",
    "tile_from_transformers",
]
