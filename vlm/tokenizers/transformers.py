"""Image tokens from a vision encoder of transformers.

Covers SigLIP and fixed-size SigLIP 2, CLIP, ViT, DeiT, BEiT, DINOv2 (with and without registers),
Donut's Swin, CvT, TimeSformer and SAM's image encoder. The encoder's own forward runs; SAM's, which
refuses other sizes, is run step by step with its position table resized. Encoders of other types
are refused by name.

TimeSformer encodes videos; here an image is a video of one frame (`vlm.tokenizers.timesformer`).

Shapes: V view, L image tokens per view, D width, H W pixel rows and columns, h w patch rows and
columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.compat.transformers import random_weights
from vlm.image_tokens import ImageTokenizer, ImageTokens, pixel_hw
from vlm.kernels import encoder_attention as attention
from vlm.pixels import PixelSpec, from_transformers
from vlm.tokenizers import cannot_load, timesformer
from vlm.tokenizers.encoders import ENCODERS, Encoder
from vlm.tokenizers.parts import named_parts

OFFLINE = (
    "give the path of a folder made by save_pretrained, or fill the hub's cache beforehand and "
    "set HF_HUB_OFFLINE=1."
)
BOOKKEEPING = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
}
"""Keys of a transformers configuration that describe no architecture."""

attention.register()  # at import, so that a process that unpickles a tokenizer knows it too


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformersConfig:
    """What rebuilds a `TransformersTokenizer` without a download.

    vision_config: the encoder's configuration, `model_type` included, all its blocks counted.
    layer: which of the encoder's hidden states, as transformers numbers them: 0 the embeddings,
        -1 the last block's output, -2 the one before it (LLaVA's choice); Swin and CvT count
        stages, and CvT has no embeddings before its first.
    prefix: "drop" or "keep" the class, distillation and register tokens.
    norm: whether tokens pass the encoder's closing module: its final layer norm (SAM: its neck).
        SigLIP, ViT and DINOv2 give `last_hidden_state` with it, CLIP without.
    pooled: whether the encoder's pooled vector is made too; needs all blocks.
    pixel_spec: the preprocessing.
    Raises ValueError for an encoder, layer or combination that does not exist.
    """

    vision_config: dict[str, Any]
    layer: int
    prefix: Literal["drop", "keep"]
    norm: bool
    pooled: bool
    pixel_spec: PixelSpec

    def __post_init__(self) -> None:
        kind = self.vision_config.get("model_type")
        if kind not in ENCODERS:
            raise ValueError(f"vision model_type {kind!r} is not one of {', '.join(ENCODERS)}")
        if self.prefix not in ("drop", "keep"):
            raise ValueError(f"prefix must be 'drop' or 'keep', found {self.prefix!r}")
        depth = self.depth
        if not -depth - 1 <= self.layer <= depth:
            raise ValueError(f"layer {self.layer} asked of an encoder with {depth} blocks")
        if self.encoder.form == "maps" and self.blocks == 0:
            raise ValueError(f"layer 0 asked of {kind}, which has nothing before its first stage")
        if not self.pooled:
            return
        if ENCODERS[kind].pool is None:
            raise ValueError(f"pooled asked of {kind}, which has no pooling")
        if self.blocks != depth:
            raise ValueError(f"pooled needs all {depth} blocks, layer {self.layer} ends earlier")
        if ENCODERS[kind].norms_tokens and not self.norm:
            raise ValueError(f"pooled of {kind} is made from normed tokens: it needs norm=True")

    @property
    def encoder(self) -> Encoder:
        """How the encoder's class names what we need."""
        return ENCODERS[self.vision_config["model_type"]]

    @property
    def depth(self) -> int:
        """The number of blocks that the encoder has, or of stages."""
        depth = self.vision_config[self.encoder.depth]
        return depth if isinstance(depth, int) else len(depth)

    @property
    def blocks(self) -> int:
        """The number of blocks that run."""
        return self.layer % (self.depth + 1)

    @property
    def halvings(self) -> int:
        """How often the grid of patches is halved, and the width doubled."""
        return min(self.blocks, self.depth - 1) if self.encoder.form == "stages" else 0


Config = TransformersConfig


class TransformersTokenizer(ImageTokenizer):
    """The hidden states of a transformers vision encoder as image tokens.

    Takes `backbone` over: blocks after `layer`, an unasked pooling head, an unasked final norm and
    mask tokens are removed from it, so that training finds no parameter without a gradient.
    Positions are resized to any grid of at least one patch, the encoder's own way; pixels beyond
    the last whole patch are unused (384 / 14 uses 378).

    backbone: one of the classes in `ENCODERS`, finished. The options are those of
        `TransformersConfig`.
    Raises ValueError for a combination that the encoder cannot give.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pixel_spec: PixelSpec,
        *,
        layer: int,
        prefix: Literal["drop", "keep"],
        norm: bool,
        pooled: bool,
    ) -> None:
        super().__init__()
        if backbone.config.model_type == "timesformer":
            timesformer.take_one_frame(backbone)
        values = backbone.config.to_dict()
        self.config = TransformersConfig(
            vision_config={key: values[key] for key in values.keys() - BOOKKEEPING},
            layer=layer,
            prefix=prefix,
            norm=norm,
            pooled=pooled,
            pixel_spec=pixel_spec,
        )
        self.pixel_spec = pixel_spec
        self.prefix_tokens = self.config.encoder.prefix(backbone.config)
        self.backbone = _prune(backbone, self.config)
        self.dim = self._width(backbone.config)
        if pooled:
            width = getattr(backbone.config, "pooler_output_size", None)
            pool_argument = self.config.encoder.pool_argument
            self.pooled_dim = width if pool_argument and width else backbone.config.hidden_size

    def forward(self, pixels: Tensor) -> ImageTokens:
        """pixels: float[V, 3, H, W]. Tokens float[V, L, D], the grid row by row after any prefix.

        Raises ValueError where positions cannot be resized for the pixels.
        """
        encoder = self.config.encoder
        if encoder.form == "steps":
            return self._sam_tokens(pixels)
        if encoder.form == "stages":
            return self._stage_tokens(pixels)
        if encoder.form == "maps":
            return self._map_tokens(pixels)
        resizes = self._resizes(pixels)
        if encoder.form == "frames":
            output = self.backbone(timesformer.one_frame_videos(self.backbone.config, pixels))
        else:
            arguments = {"interpolate_pos_encoding": resizes} if encoder.resize_argument else {}
            output = self.backbone(pixels, **arguments)
        tokens = output.last_hidden_state
        if self.config.norm and not encoder.norms_tokens:
            tokens = self.backbone.get_submodule(encoder.norm)(tokens)
        if self.config.prefix == "drop":
            tokens = tokens[:, self.prefix_tokens :]
        patch_h, patch_w = _pair(self.backbone.config.patch_size)
        return ImageTokens(
            tokens=tokens,
            grid_hw=(pixels.shape[-2] // patch_h, pixels.shape[-1] // patch_w),
            pooled=output.pooler_output if self.config.pooled else None,
        )

    def parts(self) -> dict[str, nn.Module]:
        encoder = self.config.encoder
        order = {
            "embed": encoder.embed,
            "pre_norm": (encoder.pre_norm,),
            "blocks": (encoder.blocks,),
            "norm": () if encoder.norm is None else (encoder.norm,),
        }
        if encoder.pool not in (None, "class"):
            order["pool"] = (encoder.pool,)
        return named_parts(self.backbone, order)

    def _width(self, config: transformers.PreTrainedConfig) -> int:
        """Width of the tokens of an encoder of `config`."""
        form = self.config.encoder.form
        if form == "stages":
            return config.embed_dim * 2**self.config.halvings
        if form == "maps":
            return config.embed_dim[self.config.blocks - 1]
        if form == "steps" and self.config.norm:
            return config.output_channels
        return config.hidden_size

    def _resizes(self, pixels: Tensor) -> bool:
        """Whether positions must be resized; the encoders can do so from a square table only."""
        native_hw = _pair(self.backbone.config.image_size)
        resizes = pixel_hw(pixels) != native_hw
        always = not self.config.encoder.resize_argument
        if (resizes or always) and native_hw[0] != native_hw[1]:
            raise ValueError(f"positions made for {native_hw} pixels are not square: no resizing")
        return resizes

    def _map_tokens(self, pixels: Tensor) -> ImageTokens:
        output = self.backbone(pixels)
        map_VDhw, before = output.last_hidden_state, output.cls_token_value
        tokens = map_VDhw.flatten(2).transpose(1, 2)
        if before is not None and self.config.prefix == "keep":
            tokens = torch.cat([before, tokens], dim=1)
        return ImageTokens(tokens=tokens, grid_hw=(map_VDhw.shape[-2], map_VDhw.shape[-1]))

    def _stage_tokens(self, pixels: Tensor) -> ImageTokens:
        """Raises ValueError for pixels of which a stage's grid is smaller than its windows, where
        the encoder would shrink these, for good, and then find no positions for them."""
        patch_hw = _pair(self.backbone.config.patch_size)
        grid_hw = tuple(-(-side // patch) for side, patch in zip(pixel_hw(pixels), patch_hw))
        window, stages = self.backbone.config.window_size, self.config.blocks
        grids = [tuple(-(-side // 2**i) for side in grid_hw) for i in range(self.config.depth)]
        least = min((min(grid) for grid in grids[:stages]), default=window)
        if least < window:
            side = window * 2 ** (stages - 1) * max(patch_hw)
            raise ValueError(
                f"windows of {window} patches need pixels of at least {side} a side, found "
                f"{pixel_hw(pixels)}"
            )
        with _own_windows(self.backbone):
            tokens = self.backbone(pixels).last_hidden_state
        return ImageTokens(tokens=tokens, grid_hw=grids[self.config.halvings])

    def _sam_tokens(self, pixels: Tensor) -> ImageTokens:
        encoder = self.backbone.vision_encoder
        for x_VhwE in sam_states(encoder, pixels):  # noqa: B007 - the last one stays
            pass
        grid_hw = (x_VhwE.shape[1], x_VhwE.shape[2])
        if self.config.norm:
            x_VhwE = encoder.neck(x_VhwE).permute(0, 2, 3, 1)
        return ImageTokens(tokens=x_VhwE.flatten(1, 2), grid_hw=grid_hw)


@contextmanager
def _own_windows(backbone: nn.Module) -> Iterator[None]:
    """Windows and shifts stay as they were made: where a grid is one window, a layer stops shifting
    and keeps to that for all later images, larger ones too."""
    layers = [m for m in backbone.modules() if hasattr(m, "set_shift_and_window_size")]
    had = [(layer.shift_size, layer.window_size) for layer in layers]
    try:
        yield
    finally:
        for layer, (shift, window) in zip(layers, had):
            layer.shift_size, layer.window_size = shift, window


def sam_states(encoder: nn.Module, pixels: Tensor) -> Iterator[Tensor]:
    """The states of SAM's image encoder, float[V, h, w, E]: the embeddings, then what each block
    gives; its position table is resized bicubically where needed.

    encoder: transformers' SamVisionEncoder, which itself refuses other sizes.
    """
    x_VhwE = encoder.patch_embed.projection(pixels).permute(0, 2, 3, 1)
    if encoder.pos_embed is not None:
        positions, grid_hw = encoder.pos_embed, tuple(x_VhwE.shape[1:3])
        if tuple(positions.shape[1:3]) != grid_hw:
            positions = positions.permute(0, 3, 1, 2).float()
            positions = F.interpolate(positions, grid_hw, mode="bicubic", align_corners=False)
            positions = positions.permute(0, 2, 3, 1).to(x_VhwE.dtype)
        x_VhwE = x_VhwE + positions
    yield x_VhwE
    for block in encoder.layers:
        x_VhwE = block(x_VhwE)
        yield x_VhwE


def build(config: TransformersConfig) -> TransformersTokenizer:
    """The tokenizer of `config` with random weights; downloads nothing."""
    encoder_class = getattr(transformers, config.encoder.class_name)
    vision_config = encoder_class.config_class(**config.vision_config)
    arguments = {"add_pooling_layer": config.pooled} if config.encoder.pool_argument else {}
    backbone = random_weights(encoder_class, vision_config, config.encoder.attention, **arguments)
    return TransformersTokenizer(
        backbone,
        config.pixel_spec,
        layer=config.layer,
        prefix=config.prefix,
        norm=config.norm,
        pooled=config.pooled,
    )


def load(
    id: str,
    *,
    prefix: Literal["drop", "keep"],
    norm: bool,
    pooled: bool,
    layer: int = -1,
    size_hw: tuple[int, int] | None = None,
) -> TransformersTokenizer:
    """The tokenizer with the weights of a hub id or local folder, in float32.

    A folder of a whole model (CLIP, SigLIP, SAM) gives its vision encoder.
    size_hw: pixels that images are brought to; None keeps the folder's own size.
    Raises OSError where folder or hub give nothing, ValueError for an encoder that is not in
    `ENCODERS` and for weights that the folder lacks.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(id)
        processor = transformers.AutoImageProcessor.from_pretrained(id)
    except Exception as error:  # each client raises its own kinds
        raise cannot_load(id, "transformers", OFFLINE, error) from error
    config = getattr(config, "vision_config", config)
    if config.model_type not in ENCODERS:
        raise ValueError(f"{id}: model_type {config.model_type!r} is not of {', '.join(ENCODERS)}")
    encoder = ENCODERS[config.model_type]
    try:
        backbone, report = getattr(transformers, encoder.class_name).from_pretrained(
            id,
            config=config,
            dtype=torch.float32,
            attn_implementation=encoder.attention,
            output_loading_info=True,
            **({"add_pooling_layer": pooled} if encoder.pool_argument else {}),
        )
    except Exception as error:
        raise cannot_load(id, "transformers", OFFLINE, error) from error
    spec = from_transformers(processor)
    tokenizer = TransformersTokenizer(
        backbone.eval(),
        spec if size_hw is None else spec.with_size(size_hw),
        layer=layer,
        prefix=prefix,
        norm=norm,
        pooled=pooled,
    )
    kept = {name for name, _ in tokenizer.backbone.named_parameters()}
    wrong = sorted(kept & {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if wrong:
        raise ValueError(f"{id}: the folder lacks these weights, or has other shapes: {wrong}")
    return tokenizer


def _prune(backbone: nn.Module, config: TransformersConfig) -> nn.Module:
    """`backbone` without the modules that the asked outputs never use."""
    encoder = config.encoder
    blocks = backbone.get_submodule(encoder.blocks)
    del blocks[config.blocks :]
    if not config.norm and not config.pooled and encoder.norm is not None:
        backbone.set_submodule(encoder.norm, nn.Identity())
    if not config.pooled and encoder.pool not in (None, "class"):
        setattr(backbone, encoder.pool, None)
        if hasattr(backbone, "use_head"):
            backbone.use_head = False
    embed = getattr(backbone, "embeddings", None)
    if getattr(embed, "mask_token", None) is not None:
        embed.mask_token = None
    return backbone


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
