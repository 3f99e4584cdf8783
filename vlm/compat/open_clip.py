"""Insides of open_clip that it does not export, tested with 3.3: the classes of its image towers
(`vlm.tokenizers.open_clip`, which takes them apart), and its defaults for images
(`vlm.pixels.sources`).

Beside these, the names of weights that its files have are relied on in
`vlm.systems.open_clip.key_map`."""

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import VisionTransformer

__all__ = ["ModifiedResNet", "PreprocessCfg", "TimmModel", "VisionTransformer"]
