"""Image tokens at an image's own aspect ratio: SigLIP 2's native-resolution vision tower (NaFlex).

An image becomes as many whole patches as a budget allows, and the tower's position table is
resized to its grid. transformers pads the patches of a batch to one number and masks them; here
views of one pixel size come together, so that nothing is padded, nothing is masked, and positions
are resized once for all views. The tower's own forward runs. Its fixed-size sisters are of the
kind `transformers` (their `model_type` is siglip).

Shapes: V view, L image tokens per view, D width, H W pixel rows and columns, h w patch rows and
columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from vlm.compat.transformers import random_weights
from vlm.image_tokens import ImageTokenizer, ImageTokens
from vlm.pixels import PixelSpec, from_transformers
from vlm.tokenizers import cannot_load
from vlm.tokenizers.parts import named_parts
from vlm.tokenizers.transformers import BOOKKEEPING, OFFLINE

MODEL_TYPE = "siglip2_vision_model"
ORDER = {
    "embed": ("embeddings",),
    "blocks": ("encoder.layers",),
    "norm": ("post_layernorm",),
    "pool": ("head",),
}
"""Part -> its modules in the tower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NaflexConfig:
    """What rebuilds a `NaflexTokenizer` without a download.

    vision_config: the tower's configuration, `model_type` included, all its blocks counted.
    layer: which of the tower's hidden states, as transformers numbers them: 0 the embeddings, -1
        the last block's output.
    norm: whether tokens pass the tower's final layer norm, as `last_hidden_state` has.
    pooled: whether the attention pooling's vector is made too; needs all blocks and the norm.
    pixel_spec: the preprocessing. Fit "patches" keeps the image's aspect; any other fit gives
        all images one size, which must be whole patches.
    Raises ValueError for a tower, layer or combination that does not exist.
    """

    vision_config: dict[str, Any]
    layer: int
    norm: bool
    pooled: bool
    pixel_spec: PixelSpec

    def __post_init__(self) -> None:
        kind = self.vision_config.get("model_type")
        if kind != MODEL_TYPE:
            raise ValueError(f"vision model_type must be {MODEL_TYPE!r}, found {kind!r}")
        depth, spec = self.vision_config["num_hidden_layers"], self.pixel_spec
        if not -depth - 1 <= self.layer <= depth:
            raise ValueError(f"layer {self.layer} asked of a tower with {depth} blocks")
        patch_px = self.vision_config["patch_size"]
        if spec.fit == "patches" and spec.patch_px != patch_px:
            raise ValueError(
                f"the tower has patches of {patch_px} pixels, pixel_spec of {spec.patch_px}"
            )
        _grid(spec.size_hw, patch_px)
        if not self.pooled:
            return
        if not self.vision_config["vision_use_head"]:
            raise ValueError("pooled asked of a tower without a pooling (vision_use_head false)")
        if self.blocks != depth or not self.norm:
            raise ValueError(
                f"pooled is made from the normed output of all {depth} blocks: it needs layer -1 "
                f"and norm=True, found layer {self.layer} and norm={self.norm}"
            )

    @property
    def blocks(self) -> int:
        """The number of blocks that run."""
        return self.layer % (self.vision_config["num_hidden_layers"] + 1)


Config = NaflexConfig


class NaflexTokenizer(ImageTokenizer):
    """The patches of SigLIP 2's native-resolution tower as image tokens, without prefix tokens.

    Takes `backbone` over: blocks after `layer`, an unasked pooling head and an unasked final norm
    are removed from it, so that training finds no parameter without a gradient.

    backbone: transformers' Siglip2VisionModel, finished. The options are those of `NaflexConfig`.
    Raises ValueError for a combination that the tower cannot give.
    """

    def __init__(
        self,
        backbone: Siglip2VisionModel,
        pixel_spec: PixelSpec,
        *,
        layer: int,
        norm: bool,
        pooled: bool,
    ) -> None:
        super().__init__()
        values = backbone.config.to_dict()
        self.config = NaflexConfig(
            vision_config={key: values[key] for key in values.keys() - BOOKKEEPING},
            layer=layer,
            norm=norm,
            pooled=pooled,
            pixel_spec=pixel_spec,
        )
        self.pixel_spec = pixel_spec
        self.backbone = _prune(backbone, self.config)
        self.dim = backbone.config.hidden_size
        self.pooled_dim = self.dim if pooled else None

    def forward(self, pixels: Tensor) -> ImageTokens:
        """pixels: float[V, 3, H, W], sides of whole patches. Tokens float[V, h * w, D], row by row.

        Raises ValueError for sides that are not whole patches.
        """
        patch_px = self.backbone.config.patch_size
        grid_hw = _grid(tuple(pixels.shape[-2:]), patch_px)
        output = self.backbone(
            pixel_values=patchify(pixels, patch_px),
            pixel_attention_mask=None,  # all patches are real
            # One grid for all views: the embedding resizes its positions once and adds them to
            # each. On the CPU, as the sizes are read from it.
            spatial_shapes=torch.tensor([grid_hw]),
        )
        return ImageTokens(
            tokens=output.last_hidden_state,
            grid_hw=grid_hw,
            pooled=output.pooler_output if self.config.pooled else None,
        )

    def parts(self) -> dict[str, nn.Module]:
        return named_parts(self.backbone, ORDER)


def patchify(pixels: Tensor, patch_px: int) -> Tensor:
    """The patches of each view as vectors, row by row: float[V, 3, H, W] to
    float[V, h * w, patch_px * patch_px * 3], in which a pixel's three channels lie together.

    Source: transformers, `siglip2/image_processing_siglip2.py`, `convert_image_to_patches`.

    >>> patchify(torch.arange(12.0).reshape(1, 3, 2, 2), 2).int().tolist()
    [[[0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]]
    """
    V, channels, H, W = pixels.shape
    h, w = H // patch_px, W // patch_px
    patches = pixels.reshape(V, channels, h, patch_px, w, patch_px).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(V, h * w, patch_px * patch_px * channels)


def build(config: NaflexConfig) -> NaflexTokenizer:
    """The tokenizer of `config` with random weights; downloads nothing."""
    vision_config = Siglip2VisionConfig(**config.vision_config)
    backbone = random_weights(Siglip2VisionModel, vision_config, "sdpa")
    return NaflexTokenizer(
        backbone, config.pixel_spec, layer=config.layer, norm=config.norm, pooled=config.pooled
    )


def load(
    id: str,
    *,
    norm: bool,
    pooled: bool,
    prefix: Literal["drop", "keep"] = "drop",
    layer: int = -1,
    size_hw: tuple[int, int] | None = None,
) -> NaflexTokenizer:
    """The tokenizer with the weights of a hub id or local folder, in float32.

    A folder of a whole Siglip2Model gives its vision tower.
    prefix: what other kinds do with tokens before the grid; this tower has none.
    size_hw: a box of pixels that has as many patches as an image may become: (512, 512) allows
        1024 patches of 16 pixels (other numbers: `vlm.pixels.spec.box_of_patches`). None keeps the
        folder's `max_num_patches`, which transformers' Siglip2Processor ignores.
    Raises OSError where folder or hub give nothing, ValueError for a model of another type and for
    weights that the folder lacks.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(id)
        processor = transformers.AutoImageProcessor.from_pretrained(id)
    except Exception as error:  # each client raises its own kinds
        raise cannot_load(id, "transformers", OFFLINE, error) from error
    config = getattr(config, "vision_config", config)
    if config.model_type != MODEL_TYPE:
        raise ValueError(f"{id}: expected model_type {MODEL_TYPE!r}, found {config.model_type!r}")
    try:
        backbone, report = Siglip2VisionModel.from_pretrained(
            id,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as error:
        raise cannot_load(id, "transformers", OFFLINE, error) from error
    spec = from_transformers(processor)
    spec = spec if size_hw is None else spec.with_size(size_hw)
    tokenizer = NaflexTokenizer(backbone.eval(), spec, layer=layer, norm=norm, pooled=pooled)
    kept = {name for name, _ in tokenizer.backbone.named_parameters()}
    wrong = sorted(kept & {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if wrong:
        raise ValueError(f"{id}: the folder lacks these weights, or has other shapes: {wrong}")
    return tokenizer


def _grid(size_hw: tuple[int, int], patch_px: int) -> tuple[int, int]:
    """Patch rows and columns of a view of `size_hw` pixels."""
    (h, odd_h), (w, odd_w) = (divmod(side, patch_px) for side in size_hw)
    if odd_h or odd_w or not (h and w):
        raise ValueError(f"expected pixels in whole patches of {patch_px}, found {size_hw}")
    return h, w


def _prune(backbone: Siglip2VisionModel, config: NaflexConfig) -> Siglip2VisionModel:
    """`backbone` without the modules that the asked outputs never use."""
    del backbone.encoder.layers[config.blocks :]
    if not config.norm:
        backbone.post_layernorm = nn.Identity()
    if not config.pooled:
        backbone.head, backbone.use_head = None, False
    return backbone
