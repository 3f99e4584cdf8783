"""Image tokens from the classification networks of torchvision.

A network is cut before its head: the last feature map, row by row, is the tokens. Torchvision
registers the children of its networks in the order in which they run, so that the layers up to the
last one of `LAST_LAYER` are the features; their names, and with them the keys of torchvision's
weights, stay. Vision transformers, whose features are a sequence, have a class of their own.
Detection, segmentation, video and quantized networks are refused by name.

Shapes: V view, L image tokens per view, D width, H W pixel rows and columns, h w patch rows and
columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import models

from vlm.image_tokens import ImageTokenizer, ImageTokens, meta_pixels, meta_twin, pixel_hw
from vlm.pixels import HALF, IMAGENET, PixelSpec, from_torchvision
from vlm.tokenizers import cannot_load
from vlm.tokenizers.parts import named_parts, registration_order

LAST_LAYER = {
    models.AlexNet: "features",
    models.ConvNeXt: "features",
    models.DenseNet: "features",
    models.EfficientNet: "features",
    models.GoogLeNet: "inception5b",
    models.Inception3: "Mixed_7c",
    models.MaxVit: "blocks",
    models.MNASNet: "layers",
    models.MobileNetV2: "features",
    models.MobileNetV3: "features",
    models.RegNet: "trunk_output",
    models.ResNet: "layer4",
    models.ShuffleNetV2: "conv5",
    models.SqueezeNet: "features",
    models.SwinTransformer: "permute",
    models.VGG: "features",
}
"""Class of a network -> the last child before its pooling and classifier, which gives a map of
float[V, D, h, w]."""
AUXILIARY = ("aux1", "aux2", "AuxLogits")
"""Children that are no layers: classifiers beside GoogLeNet's and Inception's, for training."""
NEW_NETWORK_ARGS = {
    "googlenet": {"init_weights": True, "aux_logits": False},
    "inception_v3": {"init_weights": True, "aux_logits": False},
}
"""Network -> what torchvision wants to be told where it makes random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchvisionConfig:
    """What rebuilds a `TorchvisionTokenizer` without a download.

    name: torchvision's name of the network, such as "resnet50"; `torchvision.models.list_models`.
    model_args: arguments for `torchvision.models.get_model`, such as image_size of a "vit_b_16".
    prefix: "drop" or "keep" the class token of a vision transformer; other networks have none.
    pixel_spec: the preprocessing.
    Raises ValueError for a name that is no classification network of torchvision.
    """

    name: str
    model_args: dict[str, Any]
    prefix: Literal["drop", "keep"]
    pixel_spec: PixelSpec

    def __post_init__(self) -> None:
        _require_known(self.name)
        if self.prefix not in ("drop", "keep"):
            raise ValueError(f"prefix must be 'drop' or 'keep', found {self.prefix!r}")


Config = TorchvisionConfig


class TorchvisionTokenizer(ImageTokenizer):
    """The last feature map of a torchvision network as image tokens, row by row.

    Takes the layers of `network` over and leaves its head behind. Vision transformers and MaxViT
    are made for one pixel size and refuse others. BatchNorm is left as it is.

    network: from `torchvision.models.get_model(name, **model_args)`.
        The options are those of `TorchvisionConfig`.
    Raises ValueError for a network of another class, and for a `pixel_spec` whose images it cannot
    take.
    """

    def __init__(
        self,
        network: nn.Module,
        pixel_spec: PixelSpec,
        *,
        name: str,
        model_args: dict[str, Any],
        prefix: Literal["drop", "keep"],
    ) -> None:
        super().__init__()
        self.config = TorchvisionConfig(
            name=name, model_args=model_args, prefix=prefix, pixel_spec=pixel_spec
        )
        self.pixel_spec = pixel_spec
        self.fixed_hw = fixed_size(network)
        self.backbone = feature_layers(network)
        self.dim = self._width()

    def forward(self, pixels: Tensor) -> ImageTokens:
        """pixels: float[V, 3, H, W]. Tokens float[V, L, D], the grid row by row after a class token
        that is kept.

        Raises ValueError for another size than that of a network that has one.
        """
        self._require_size(pixel_hw(pixels))
        features = self.backbone(pixels)
        if isinstance(self.backbone, VisionTransformerLayers):
            tokens = features if self.config.prefix == "keep" else features[:, 1:]
            return ImageTokens(tokens=tokens, grid_hw=self.backbone.grid_hw)
        grid_hw = (features.shape[-2], features.shape[-1])
        return ImageTokens(tokens=features.flatten(2).transpose(1, 2), grid_hw=grid_hw)

    def parts(self) -> dict[str, nn.Module]:
        if isinstance(self.backbone, VisionTransformerLayers):
            embed = ("conv_proj", "class_token", "encoder.pos_embedding")
            order = {"embed": embed, "blocks": ("encoder.layers",), "norm": ("encoder.ln",)}
            return named_parts(self.backbone, order)
        return named_parts(self.backbone, registration_order(self.backbone))

    def _require_size(self, size_hw: tuple[int, int]) -> None:
        if self.fixed_hw not in (None, size_hw):
            raise ValueError(
                f"{self.config.name} was made for {self.fixed_hw} pixels, found {size_hw}; change "
                "model_args: image_size of a vision transformer, input_size of MaxViT"
            )

    def _width(self) -> int:
        """Width of the tokens, found on the meta device, where networks refuse what is too small.

        No attribute of the networks tells it, and heads hide it: AlexNet's reads 36 cells at once.
        """
        size_hw = self.pixel_spec.size_hw
        self._require_size(size_hw)
        dtype = next(self.backbone.parameters()).dtype
        try:
            with torch.no_grad():
                features = meta_twin(self.backbone)(meta_pixels(size_hw, dtype))
        except RuntimeError as error:
            raise ValueError(
                f"{self.config.name} cannot take images of {size_hw} pixels: {error}"
            ) from error
        return features.shape[-1 if features.ndim == 3 else 1]


class VisionTransformerLayers(nn.Module):
    """Torchvision's vision transformer up to its closing norm: class token, then patches, as
    float[V, 1 + h * w, D] on `grid_hw`."""

    def __init__(self, network: models.VisionTransformer) -> None:
        super().__init__()
        self.class_token = network.class_token
        self.conv_proj = network.conv_proj
        self.encoder = network.encoder
        side = network.image_size // network.patch_size
        self.grid_hw = (side, side)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv_proj(pixels).flatten(2).transpose(1, 2)
        return self.encoder(torch.cat([self.class_token.expand(len(patches), -1, -1), patches], 1))


class ImageNetToHalf(nn.Module):
    """Pixels normalised by ImageNet's statistics, as if by mean and deviation 0.5: what GoogLeNet
    and Inception do first where their weights came from TensorFlow (`transform_input`)."""

    def forward(self, pixels: Tensor) -> Tensor:
        channels = [
            pixels[:, c : c + 1] * (IMAGENET.std[c] / HALF.std[c])
            + (IMAGENET.mean[c] - HALF.mean[c]) / HALF.std[c]
            for c in range(3)
        ]
        return torch.cat(channels, dim=1)


def feature_layers(network: nn.Module) -> nn.Module:
    """The layers of a torchvision network before its head, under its own names: one module that
    gives float[V, D, h, w], of a vision transformer float[V, 1 + h * w, D].

    Raises ValueError for a network of a class that `LAST_LAYER` lacks.
    """
    if isinstance(network, models.VisionTransformer):
        return VisionTransformerLayers(network)
    if type(network) not in LAST_LAYER:
        known = ", ".join(cls.__name__ for cls in (*LAST_LAYER, models.VisionTransformer))
        raise ValueError(f"expected a network of {known}, found {type(network).__name__}")
    layers = nn.Sequential()
    if getattr(network, "transform_input", False):
        layers.add_module("transform_input", ImageNetToHalf())
    for name, child in network.named_children():
        if name not in AUXILIARY:
            is_list = isinstance(child, nn.ModuleList)
            layers.add_module(name, nn.Sequential(*child) if is_list else child)
        if name == LAST_LAYER[type(network)]:
            break
    if isinstance(network, models.DenseNet):
        layers.add_module("relu", nn.ReLU(inplace=True))  # its forward calls it as a function
    return layers


def fixed_size(network: nn.Module) -> tuple[int, int] | None:
    """Pixel rows and columns of a network that is made for one size; None for the others."""
    if isinstance(network, models.VisionTransformer):
        return network.image_size, network.image_size
    if isinstance(network, models.MaxVit):
        stride = 2 ** (1 + len(network.blocks))  # the stem halves, and every block
        rows, columns = network.blocks[-1].grid_size
        return rows * stride, columns * stride
    return None


def build(config: TorchvisionConfig) -> TorchvisionTokenizer:
    """The tokenizer of `config` with random weights; downloads nothing."""
    model_args = NEW_NETWORK_ARGS.get(config.name, {}) | config.model_args
    return _tokenizer(models.get_model(config.name, weights=None, **model_args), config)


def load(
    id: str,
    *,
    prefix: Literal["drop", "keep"],
    size_hw: tuple[int, int] | None = None,
    model_args: dict[str, Any] | None = None,
) -> TorchvisionTokenizer:
    """The tokenizer with weights of torchvision, as "resnet50:IMAGENET1K_V2" or "resnet50:DEFAULT",
    and the preprocessing that they were evaluated with.

    size_hw: pixels that images are brought to; None keeps those of the weights.
    model_args: more arguments for `torchvision.models.get_model`.
    Raises ValueError for names that torchvision lacks, OSError where the weights cannot be had.
    """
    name, _, weights_name = id.partition(":")
    _require_known(name)
    weights = models.get_model_weights(name).__members__
    if weights_name not in weights:
        raise ValueError(
            f"expected 'network:weights', such as '{name}:DEFAULT', found {id!r}; the weights of "
            f"{name} are {', '.join(weights)}"
        )
    chosen, model_args = weights[weights_name], dict(model_args or {})
    try:
        network = models.get_model(name, weights=chosen, progress=False, **model_args)
    except OSError as error:  # urllib's errors are OSErrors
        offline = (
            f"put {chosen.url}, fetched elsewhere, into the folder hub/checkpoints of $TORCH_HOME, "
            "which is ~/.cache/torch where it is not set."
        )
        raise cannot_load(id, "torchvision", offline, error) from error
    # What torchvision takes from the weights rather than from its arguments.
    taken = {key: getattr(network, key, None) for key in ("image_size", "transform_input")}
    spec = from_torchvision(chosen.transforms())
    config = TorchvisionConfig(
        name=name,
        model_args=model_args | {key: value for key, value in taken.items() if value},
        prefix=prefix,
        pixel_spec=spec if size_hw is None else spec.with_size(tuple(size_hw)),
    )
    return _tokenizer(network.eval(), config)


def _require_known(name: str) -> None:
    if name not in models.list_models(module=models):
        raise ValueError(
            f"torchvision has no classification network {name!r}; "
            "torchvision.models.list_models(module=torchvision.models) has all"
        )


def _tokenizer(network: nn.Module, config: TorchvisionConfig) -> TorchvisionTokenizer:
    return TorchvisionTokenizer(
        network,
        config.pixel_spec,
        name=config.name,
        model_args=config.model_args,
        prefix=config.prefix,
    )
