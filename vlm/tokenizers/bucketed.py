"""Image tokens at an image's own size: a SigLIP tower that finds positions by fractions.

A patch's row and column, as fractions of its view, are bucketed on the tower's square table of
positions, so that views of any size and aspect have positions without resizing the table (NaViT's
fractional coordinates; Idefics2's tower). A view of the table's own grid has the table's positions,
but for those that fp32 puts into a neighbouring bucket, as transformers has them too.

A patch counts only where all its pixels are real: of a view of H x W pixels, H // patch rows and
W // patch columns; what is left at the bottom and on the right is read by no patch. transformers
pads the images of a batch at the bottom and on the right and asks the same of each patch, by its
pixel mask; so an image has the same patches and positions alone, in a batch, and here, where views
of one pixel size come together and nothing is padded.

Shapes: V view, L image tokens per view, D width, H W pixel rows and columns, h w patch rows and
columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from vlm.compat.transformers import random_weights
from vlm.image_tokens import ImageTokenizer, ImageTokens
from vlm.pixels import PixelSpec
from vlm.tokenizers.encoders import ENCODERS
from vlm.tokenizers.parts import named_parts
from vlm.tokenizers.transformers import BOOKKEEPING

MODEL_TYPE = "siglip_vision_model"
ORDER = {
    "embed": ("embeddings.patch_embedding", "embeddings.position_embedding"),
    "blocks": ("encoder.layers",),
    "norm": ("post_layernorm",),
}
"""Part -> its modules in the tower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketedConfig:
    """What rebuilds a `BucketedTokenizer` without a download.

    vision_config: the tower's configuration, `model_type` included.
    pixel_spec: the preprocessing; views may be of any size of at least one patch.
    Raises ValueError for another tower, one whose table of positions is not a square, and views of
    less than a patch.
    """

    vision_config: dict[str, Any]
    pixel_spec: PixelSpec

    def __post_init__(self) -> None:
        kind = self.vision_config.get("model_type")
        if kind != MODEL_TYPE:
            raise ValueError(f"vision model_type must be {MODEL_TYPE!r}, found {kind!r}")
        sides = [self.vision_config[name] for name in ("image_size", "patch_size")]
        if not all(isinstance(side, int) for side in sides):
            raise ValueError(f"image_size and patch_size must be one number each, found {sides}")
        spec, patch_px = self.pixel_spec, sides[1]
        if spec.fit == "shrink" and spec.min_side_px < patch_px:
            raise ValueError(
                f"min_side_px of pixel_spec must be at least a patch of {patch_px}, found "
                f"{spec.min_side_px}"
            )


Config = BucketedConfig


class BucketedTokenizer(ImageTokenizer):
    """The normed output of a SigLIP tower, its positions bucketed by fractions of the view.

    Takes `backbone` over: a pooling head is removed from it, so that training finds no parameter
    without a gradient.

    backbone: transformers' SiglipVisionModel, finished.
    """

    def __init__(self, backbone: SiglipVisionModel, pixel_spec: PixelSpec) -> None:
        super().__init__()
        backbone.head, backbone.use_head = None, False
        values = backbone.config.to_dict() | {"vision_use_head": False}
        self.config = BucketedConfig(
            vision_config={key: values[key] for key in values.keys() - BOOKKEEPING},
            pixel_spec=pixel_spec,
        )
        self.pixel_spec = pixel_spec
        self.backbone = backbone
        self.dim = backbone.config.hidden_size

    def forward(self, pixels: Tensor) -> ImageTokens:
        """pixels: float[V, 3, H, W]. Tokens float[V, h * w, D], row by row.

        Raises ValueError for sides of less than one patch.
        """
        config, embeddings = self.backbone.config, self.backbone.embeddings
        patch_px, size_hw = config.patch_size, tuple(pixels.shape[-2:])
        grid_hw = size_hw[0] // patch_px, size_hw[1] // patch_px
        if not all(grid_hw):
            raise ValueError(f"expected at least one patch of {patch_px} pixels, found {size_hw}")
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        ids = bucketed_positions(grid_hw, config.image_size // patch_px).to(pixels.device)
        states = patches + embeddings.position_embedding(ids)
        states = self.backbone.encoder(inputs_embeds=states).last_hidden_state
        return ImageTokens(tokens=self.backbone.post_layernorm(states), grid_hw=grid_hw)

    def parts(self) -> dict[str, nn.Module]:
        return named_parts(self.backbone, ORDER)


def bucketed_positions(grid_hw: tuple[int, int], side: int) -> Tensor:
    """The number of each patch's position in a table of `side` x `side` positions, row by row:
    int64[h * w]. Computed on the CPU in fp32, by the source's own steps, since rounding decides
    where a fraction meets the border of a bucket.

    Source: transformers, `modeling_idefics2.py`, `Idefics2VisionEmbeddings.forward`.

    >>> bucketed_positions((2, 4), 4).tolist()
    [0, 1, 2, 3, 8, 9, 10, 11]
    """
    exact = {"dtype": torch.float32, "device": "cpu"}
    borders = torch.arange(1 / side, 1.0, 1 / side, **exact)
    rows, columns = (
        torch.bucketize(
            (torch.arange(count, **exact) * (torch.ones((), **exact) / count)).clamp(max=1 - 1e-6),
            borders,
            right=True,
        )
        for count in grid_hw
    )
    return (rows[:, None] * side + columns).flatten()


def build(config: BucketedConfig) -> BucketedTokenizer:
    """The tokenizer of `config` with random weights; downloads nothing."""
    vision_config = SiglipVisionConfig(**config.vision_config | {"vision_use_head": False})
    backbone = random_weights(SiglipVisionModel, vision_config, ENCODERS[MODEL_TYPE].attention)
    return BucketedTokenizer(backbone, config.pixel_spec)
