"""Image tokens from any backbone of timm: plain and pyramid transformers, and convolutional nets.

timm's `forward_intermediates` gives both the final features and a channels-first map of a level,
so rows and columns are known and never guessed. The layout of the final features is timm's own
statement: three axes are a sequence with `num_prefix_tokens` tokens before the grid, four axes are
channels-last where the backbone's `output_fmt` says "NHWC", and channels-first elsewhere.

Shapes: V view, L image tokens per view, D width, H W pixel rows and columns, h w patch rows and
columns.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from vlm.image_tokens import ImageTokenizer, ImageTokens, meta_twin
from vlm.pixels import PixelSpec, from_timm
from vlm.tokenizers import cannot_load
from vlm.tokenizers.parts import named_parts, registration_order

OFFLINE = (
    "name a folder of a timm model as 'local-dir:/path', or fill the hub's cache beforehand and "
    "set HF_HUB_OFFLINE=1."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimmConfig:
    """What rebuilds a `TimmTokenizer` without a download.

    name: timm's name of the architecture, such as "vit_base_patch16_224".
    model_args: arguments for `timm.create_model`, such as img_size or dynamic_img_size.
    level: feature level as timm counts them, a block of a plain ViT, a stage of others; -1 last.
    prefix: "drop" or "keep" the class, distillation and register tokens.
    norm: whether tokens are the final features, after all that the backbone puts after its last
        level: a norm, in some convolutional nets a wider convolution. The last level only.
    pooled: whether the backbone's own head pools the final features too; needs norm=True.
    pixel_spec: the preprocessing.
    Raises ValueError for a combination that does not exist.
    """

    name: str
    model_args: dict[str, Any]
    level: int
    prefix: Literal["drop", "keep"]
    norm: bool
    pooled: bool
    pixel_spec: PixelSpec

    def __post_init__(self) -> None:
        if self.prefix not in ("drop", "keep"):
            raise ValueError(f"prefix must be 'drop' or 'keep', found {self.prefix!r}")
        if self.pooled and not self.norm:
            raise ValueError("pooled is made from the final features: it needs norm=True")


Config = TimmConfig


class TimmTokenizer(ImageTokenizer):
    """The features of a timm backbone as image tokens, row by row.

    Takes `backbone` over: levels after `level`, an unasked head and an unasked final norm are
    removed from it.
    A backbone of fixed size refuses others; give it `dynamic_img_size` or `img_size` when it is
    made. BatchNorm is left as it is.

    backbone: from `timm.create_model(name, num_classes=0, **model_args)`.
        The options are those of `TimmConfig`.
    Raises ValueError for a level that the backbone lacks.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pixel_spec: PixelSpec,
        *,
        name: str,
        model_args: dict[str, Any],
        level: int,
        prefix: Literal["drop", "keep"],
        norm: bool,
        pooled: bool,
    ) -> None:
        super().__init__()
        self.config = TimmConfig(
            name=name,
            model_args=model_args,
            level=level,
            prefix=prefix,
            norm=norm,
            pooled=pooled,
            pixel_spec=pixel_spec,
        )
        self.pixel_spec = pixel_spec
        self.level = take_level(backbone, level, norm)
        self.dim = backbone.num_features if norm else level_width(backbone, self.level)
        self.pooled_dim = backbone.head_hidden_size if pooled else None
        if not pooled:
            prune(backbone, self.level, norm, pixel_spec.size_hw)
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> ImageTokens:
        """pixels: float[V, 3, H, W]. Tokens float[V, L, D], the grid row by row after any prefix.

        Raises ValueError where the final features hold no patch tokens (PiT).
        """
        # Convolutions of pixels that lie channel by channel are 3 to 8 times slower on CPUs.
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        options = {"level": self.level, "prefix": self.config.prefix, "norm": self.config.norm}
        tokens, grid_hw, final = features(self.backbone, pixels, **options)
        pooled = self.backbone.forward_head(final, pre_logits=True) if self.config.pooled else None
        return ImageTokens(tokens=tokens, grid_hw=grid_hw, pooled=pooled)

    def parts(self) -> dict[str, nn.Module]:
        return named_parts(self.backbone, registration_order(self.backbone))


def build(config: TimmConfig) -> TimmTokenizer:
    """The tokenizer of `config` with random weights; downloads nothing."""
    backbone = timm.create_model(config.name, num_classes=0, **config.model_args)
    return _tokenizer(backbone, config)


def load(
    id: str,
    *,
    prefix: Literal["drop", "keep"],
    pooled: bool,
    norm: bool = True,
    level: int = -1,
    size_hw: tuple[int, int] | None = None,
    model_args: dict[str, Any] | None = None,
) -> TimmTokenizer:
    """The tokenizer with timm's pretrained weights: a timm name such as
    "vit_base_patch16_224.augreg_in21k", "hf-hub:owner/name" or "local-dir:/path".

    size_hw: pixels that images are brought to; None keeps the backbone's own. A backbone of
        fixed size is made for it, its positions resized as the weights are read.
    model_args: more arguments for `timm.create_model`.
    Raises OSError where the weights cannot be had.
    """
    wanted = {"img_size": size_hw} if size_hw else {}
    try:
        # The arguments that a folder or hub repository was saved with are among the result.
        model_args = timm.models.resolve_model_input_args(id, wanted, **(model_args or {}))
        for key in ("model_name", "pretrained_cfg", "pretrained_model_args", "num_classes"):
            model_args.pop(key, None)
        backbone = timm.create_model(id, pretrained=True, num_classes=0, **model_args)
    except Exception as error:  # each client raises its own kinds
        raise cannot_load(id, "timm", OFFLINE, error) from error
    spec = from_timm(timm.data.resolve_model_data_config(backbone))
    config = TimmConfig(
        name=backbone.pretrained_cfg["architecture"],
        model_args=model_args,
        level=level,
        prefix=prefix,
        norm=norm,
        pooled=pooled,
        pixel_spec=spec if size_hw is None else spec.with_size(tuple(size_hw)),
    )
    return _tokenizer(backbone.eval(), config)


def features(
    backbone: nn.Module, pixels: Tensor, *, level: int, prefix: str, norm: bool
) -> tuple[Tensor, tuple[int, int], Tensor | None]:
    """One pass of a timm backbone over float[V, 3, H, W]: the tokens float[V, L, D] of `level`
    (counted from 0; with `norm` the final features), their grid, and the final features in timm's
    own layout, None without `norm`.

    Raises ValueError where no patch tokens, or not the asked prefix tokens, can be had.
    """
    count = prefix_count(backbone)
    arguments = {"indices": [level]}
    if prefix == "keep" and not norm and count:
        known = inspect.signature(backbone.forward_intermediates).parameters
        if "return_prefix_tokens" not in known:
            raise ValueError(f"{type(backbone).__name__} keeps no prefix tokens before its norm")
        arguments["return_prefix_tokens"] = True
    if not norm:
        (taken,) = backbone.forward_intermediates(
            pixels, intermediates_only=True, stop_early=True, **arguments
        )
        map_VDhw, *before = taken if isinstance(taken, (tuple, list)) else (taken,)
        tokens = map_VDhw.flatten(2).transpose(1, 2)
        return torch.cat([*before, tokens], dim=1), tuple(map_VDhw.shape[-2:]), None
    final, (map_VDhw,) = backbone.forward_intermediates(pixels, **arguments)
    if not isinstance(final, Tensor):
        raise ValueError(
            f"{type(backbone).__name__} ends in several streams of features; take norm=False"
        )
    if final.ndim == 4:
        if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
            return final.flatten(1, 2), (final.shape[1], final.shape[2]), final
        return final.flatten(2).transpose(1, 2), (final.shape[2], final.shape[3]), final
    grid_hw = (map_VDhw.shape[-2], map_VDhw.shape[-1])
    if final.shape[1] != count + grid_hw[0] * grid_hw[1]:
        raise ValueError(
            f"the final features of {type(backbone).__name__} have {final.shape[1]} tokens, "
            f"expected {count} before a grid of {grid_hw}; take norm=False"
        )
    return final if prefix == "keep" else final[:, count:], grid_hw, final


def prefix_count(backbone: nn.Module) -> int:
    """Number of tokens before the grid in a backbone's final features, as timm states it; VOLO,
    which does not, has the one class token that its closing blocks of class attention make."""
    stated = getattr(backbone, "num_prefix_tokens", None)
    if stated is not None:
        return stated
    return int(getattr(backbone, "post_network", None) is not None)


def take_level(backbone: nn.Module, level: int, norm: bool) -> int:
    """`level` counted from 0. Raises ValueError where the backbone lacks it, or cannot norm it."""
    levels = len(backbone.feature_info)
    if not -levels <= level < levels:
        raise ValueError(f"level {level} asked of a backbone with {levels} levels")
    if norm and level % levels != levels - 1:
        raise ValueError(f"norm=True needs the last of {levels} levels, found level {level}")
    return level % levels


def level_width(backbone: nn.Module, level: int) -> int:
    """Channels of a level, as timm's feature information states them."""
    return backbone.feature_info[level]["num_chs"]


def prune(backbone: nn.Module, level: int, norm: bool, size_hw: tuple[int, int]) -> None:
    """Removes what the tokens of `level`, for pixels of `size_hw`, never use.

    Without `norm` timm's own pruning does. It would take closing convolutions and class attention
    too, so with `norm` the children are kept that a backward pass on the meta device reaches.
    """
    if not norm:
        backbone.prune_intermediate_layers([level], prune_norm=True, prune_head=True)
        return
    twin = meta_twin(backbone).requires_grad_(True)
    dtype = next(twin.parameters()).dtype
    pixels = torch.empty(1, 3, *size_hw, device="meta", dtype=dtype)
    tokens, _, _ = features(twin, pixels, level=level, prefix="keep", norm=True)
    tokens.sum().backward()
    for name, child in twin.named_children():
        parameters = list(child.parameters())
        if parameters and all(parameter.grad is None for parameter in parameters):
            setattr(backbone, name, nn.Identity())


def _tokenizer(backbone: nn.Module, config: TimmConfig) -> TimmTokenizer:
    return TimmTokenizer(
        backbone,
        config.pixel_spec,
        name=config.name,
        model_args=config.model_args,
        level=config.level,
        prefix=config.prefix,
        norm=config.norm,
        pooled=config.pooled,
    )
