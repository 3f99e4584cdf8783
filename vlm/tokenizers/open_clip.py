"""Image tokens from an image tower of open_clip.

Covers its own vision transformer (class token, average or attention pooling), its modified ResNet
and its towers around timm. Tokens are patches before pooling and projection; `pooled` is what the
model's `encode_image` gives. These towers are made for one pixel size, which may be any and need
not be square; other sizes are refused.

Shapes: V view, L image tokens per view, D width, U shared embedding width, H W pixel rows and
columns, h w patch rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import open_clip
import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.compat.open_clip import ModifiedResNet, TimmModel, VisionTransformer
from vlm.image_tokens import ImageTokenizer, ImageTokens, pixel_hw
from vlm.pixels import PixelSpec, from_open_clip
from vlm.tokenizers import cannot_load
from vlm.tokenizers import timm as timm_kind
from vlm.tokenizers.parts import named_parts, registration_order

OFFLINE = (
    "give the path of a weights file after the colon ('ViT-B-32:/path/to.safetensors'), name a "
    "folder as 'local-dir:/path', or fill the hub's cache beforehand and set HF_HUB_OFFLINE=1."
)
RESNET_STRIDE = 32
"""Pixels per grid step of ModifiedResNet's last level."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenClipConfig:
    """What rebuilds an `OpenClipTokenizer` without a download.

    vision_cfg: open_clip's `vision_cfg`, its image_size brought to pixel_spec's size when built.
    embed_dim: U, width of the projection.
    quick_gelu: whether the tower uses QuickGELU, as OpenAI's weights do.
    layer: block (ModifiedResNet: stage 0 to 4, timm: level) that gives the tokens; -1 the last.
    prefix: "drop" or "keep" the class token.
    norm: whether tokens pass the tower's final norm.
    pooled: whether the projected embedding is made too; needs layer -1.
    pixel_spec: the preprocessing.
    """

    vision_cfg: dict[str, Any]
    embed_dim: int
    quick_gelu: bool
    layer: int
    prefix: Literal["drop", "keep"]
    norm: bool
    pooled: bool
    pixel_spec: PixelSpec

    def __post_init__(self) -> None:
        if self.prefix not in ("drop", "keep"):
            raise ValueError(f"prefix must be 'drop' or 'keep', found {self.prefix!r}")
        unknown = sorted(set(self.vision_cfg) - set(CLIPVisionCfg.__dataclass_fields__))
        if unknown:
            raise ValueError(f"vision_cfg has keys that open_clip does not know: {unknown}")


Config = OpenClipConfig


class OpenClipTokenizer(ImageTokenizer):
    """The patch features of an open_clip image tower as image tokens.

    Takes `visual` over: what the asked outputs never use is removed from it.

    visual: a VisionTransformer, ModifiedResNet or TimmModel of open_clip, finished and made for
        `pixel_spec.size_hw`. The options are those of `OpenClipConfig`.
    Raises ValueError for a combination that the tower cannot give.
    """

    def __init__(
        self,
        visual: nn.Module,
        pixel_spec: PixelSpec,
        *,
        vision_cfg: dict[str, Any],
        embed_dim: int,
        quick_gelu: bool,
        layer: int,
        prefix: Literal["drop", "keep"],
        norm: bool,
        pooled: bool,
    ) -> None:
        super().__init__()
        self.config = OpenClipConfig(
            vision_cfg=vision_cfg,
            embed_dim=embed_dim,
            quick_gelu=quick_gelu,
            layer=layer,
            prefix=prefix,
            norm=norm,
            pooled=pooled,
            pixel_spec=pixel_spec,
        )
        self.pixel_spec = pixel_spec
        self.pooled_dim = embed_dim if pooled else None
        if isinstance(visual, TimmModel):
            self._take_timm(visual)
        elif isinstance(visual, ModifiedResNet):
            self._take_resnet(visual)
        elif isinstance(visual, VisionTransformer):
            self._take_vit(visual)
        else:
            raise ValueError(
                "expected a VisionTransformer, ModifiedResNet or TimmModel of open_clip, found "
                f"{type(visual).__name__}"
            )
        self.visual = visual

    def _take_vit(self, visual: VisionTransformer) -> None:
        self.layer = self._layer(len(visual.transformer.resblocks))
        self.dim = visual.conv1.out_channels
        if self.config.norm and visual.attn_pool is not None:
            raise ValueError("a tower with attention pooling norms what it pooled: take norm=False")
        if not self.config.pooled:
            visual.prune_intermediate_layers([self.layer], prune_norm=not self.config.norm)
            visual.attn_pool = visual.attn_pool_contrastive = None

    def _take_resnet(self, visual: ModifiedResNet) -> None:
        self.layer = self._layer(5)
        stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        self.dim = (
            stages[self.layer - 1][-1].bn3.num_features if self.layer else visual.conv3.out_channels
        )
        if self.config.norm:
            raise ValueError("ModifiedResNet has no final norm: take norm=False")
        if not self.config.pooled:
            visual.attnpool = None
            for unused in range(self.layer + 1, 5):
                setattr(visual, f"layer{unused}", nn.Identity())

    def _take_timm(self, visual: TimmModel) -> None:
        norm = self.config.norm
        self.layer = timm_kind.take_level(visual.trunk, self.config.layer, norm)
        width = timm_kind.level_width(visual.trunk, self.layer)
        self.dim = visual.trunk.num_features if norm else width
        if self.config.pooled and not norm:
            raise ValueError("a tower around timm pools its final features: it needs norm=True")
        if not self.config.pooled:
            timm_kind.prune(visual.trunk, self.layer, norm, self.pixel_spec.size_hw)
            visual.head = nn.Identity()

    def _layer(self, count: int) -> int:
        """`layer` counted from 0."""
        if not -count <= self.config.layer < count:
            raise ValueError(f"layer {self.config.layer} asked of a tower with {count}")
        if self.config.pooled and self.config.layer % count != count - 1:
            raise ValueError(f"pooled needs all {count} layers, found layer {self.config.layer}")
        return self.config.layer % count

    def forward(self, pixels: Tensor) -> ImageTokens:
        """pixels: float[V, 3, H, W] of `pixel_spec.size_hw`. Tokens float[V, L, D], row by row;
        pooled float[V, U], not brought to unit length.

        Raises ValueError for another pixel size.
        """
        if pixel_hw(pixels) != self.pixel_spec.size_hw:
            raise ValueError(
                f"expected pixels of {self.pixel_spec.size_hw}, found {pixel_hw(pixels)}"
            )
        config = self.config
        if isinstance(self.visual, TimmModel):
            tokens, grid_hw, final = timm_kind.features(
                self.visual.trunk, pixels, level=self.layer, prefix=config.prefix, norm=config.norm
            )
            pooled = (
                self.visual.head(self.visual.trunk.forward_head(final)) if config.pooled else None
            )
            return ImageTokens(tokens=tokens, grid_hw=grid_hw, pooled=pooled)
        is_vit = isinstance(self.visual, VisionTransformer)
        output = self.visual.forward_intermediates(
            pixels,
            indices=[self.layer],
            normalize_intermediates=config.norm,
            intermediates_only=not config.pooled,
            output_extra_tokens=is_vit and config.prefix == "keep",
        )
        (map_VDhw,) = output["image_intermediates"]
        before = output.get("image_intermediates_prefix", [])
        return ImageTokens(
            tokens=torch.cat([*before, map_VDhw.flatten(2).transpose(1, 2)], dim=1),
            grid_hw=(map_VDhw.shape[-2], map_VDhw.shape[-1]),
            pooled=output.get("image_features"),
        )

    def parts(self) -> dict[str, nn.Module]:
        if not isinstance(self.visual, VisionTransformer):
            if not isinstance(self.visual, TimmModel):
                return named_parts(self.visual, registration_order(self.visual))
            trunk = registration_order(self.visual.trunk)
            order = {
                f"trunk.{name}": tuple(f"trunk.{path}" for path in paths)
                for name, paths in trunk.items()
            }
            return named_parts(self.visual, order | {"pool": ("head",)})
        return named_parts(
            self.visual,
            {
                "embed": ("conv1", "class_embedding", "positional_embedding"),
                "pre_norm": ("ln_pre",),
                "blocks": ("transformer.resblocks",),
                "norm": ("ln_post",),
                "pool": ("attn_pool", "attn_pool_contrastive", "proj"),
            },
        )


def build(config: OpenClipConfig) -> OpenClipTokenizer:
    """The tokenizer of `config` with random weights; downloads nothing."""
    vision_cfg = config.vision_cfg | {"timm_model_pretrained": False}
    # The public class builds both towers: its text tower is made as small as it can be.
    smallest = CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1)
    model = open_clip.CLIP(config.embed_dim, vision_cfg, smallest, quick_gelu=config.quick_gelu)
    return _tokenizer(model.visual, config)


def load(
    id: str,
    *,
    prefix: Literal["drop", "keep"],
    norm: bool,
    pooled: bool,
    layer: int = -1,
    size_hw: tuple[int, int] | None = None,
) -> OpenClipTokenizer:
    """The tokenizer with an open_clip model's weights, in float32: "ViT-B-32:laion2b_s34b_b79k",
    "ViT-B-32:/path/to/weights.safetensors", "hf-hub:owner/name" or "local-dir:/path".

    size_hw: pixels that images are brought to, positions resized; None keeps the model's own.
    Raises OSError where the weights cannot be had, ValueError where `id` names none, or names
    weights trained with the other GELU.
    """
    name, colon, tag = id.rpartition(":")
    if not colon:
        raise ValueError(f"expected 'architecture:weights' or 'local-dir:/path', found {id!r}")
    if name in ("hf-hub", "local-dir"):
        name, tag = id, None
    try:
        model_cfg = open_clip.get_model_config(name)
    except Exception as error:  # each client raises its own kinds
        raise cannot_load(id, "open_clip", OFFLINE, error) from error
    if model_cfg is None:
        raise ValueError(f"open_clip has no architecture {name!r}; open_clip.list_models() has all")
    quick_gelu = model_cfg.get("quick_gelu", False)
    trained = (open_clip.get_pretrained_cfg(name, tag) or {}) if tag else {}
    if trained and trained.get("quick_gelu", False) != quick_gelu:
        raise ValueError(
            f"{id}: weights trained with quick_gelu={not quick_gelu}, architecture with "
            f"{quick_gelu}; names with and without '-quickgelu' differ in this"
        )
    try:
        model = open_clip.create_model(name, pretrained=tag, require_pretrained=True)
    except Exception as error:
        raise cannot_load(id, "open_clip", OFFLINE, error) from error
    spec = from_open_clip(model.visual.preprocess_cfg)
    config = OpenClipConfig(
        vision_cfg=model_cfg["vision_cfg"],
        embed_dim=model_cfg["embed_dim"],
        quick_gelu=quick_gelu,
        layer=layer,
        prefix=prefix,
        norm=norm,
        pooled=pooled,
        pixel_spec=spec if size_hw is None else spec.with_size(tuple(size_hw)),
    )
    return _tokenizer(model.visual.eval(), config)


def _tokenizer(visual: nn.Module, config: OpenClipConfig) -> OpenClipTokenizer:
    resize_tower(visual, config.pixel_spec.size_hw)
    return OpenClipTokenizer(
        visual,
        config.pixel_spec,
        vision_cfg=config.vision_cfg,
        embed_dim=config.embed_dim,
        quick_gelu=config.quick_gelu,
        layer=config.layer,
        prefix=config.prefix,
        norm=config.norm,
        pooled=config.pooled,
    )


def resize_tower(visual: nn.Module, size_hw: tuple[int, int]) -> None:
    """Makes an open_clip tower ready for images of `size_hw`, its positions resized in place:
    bicubically and antialiased, as open_clip resizes them (source: its `resize_pos_embed`)."""
    side = visual.image_size
    native_hw = (side, side) if isinstance(side, int) else tuple(side)
    if native_hw == tuple(size_hw):
        return
    if isinstance(visual, TimmModel):
        visual.set_input_size(tuple(size_hw))
        return
    resnet = isinstance(visual, ModifiedResNet)
    steps_px = (RESNET_STRIDE, RESNET_STRIDE) if resnet else visual.patch_size
    old_hw, new_hw = (
        tuple(side // step for side, step in zip(hw, steps_px)) for hw in (native_hw, size_hw)
    )
    owner = visual.attnpool if resnet else visual
    table = owner.positional_embedding
    grid = table[1:].reshape(1, *old_hw, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, new_hw, mode="bicubic", antialias=True, align_corners=False)
    resized = torch.cat([table[:1], grid.permute(0, 2, 3, 1).flatten(1, 2)[0]]).detach()
    owner.positional_embedding = nn.Parameter(resized, requires_grad=table.requires_grad)
    visual.image_size = tuple(size_hw)
    if not resnet:
        visual.grid_size = new_hw
