"""The vision encoders of transformers that can be image tokenizers, as data: what each class calls
its blocks, its norm and its pooling. A new encoder is one entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vlm.kernels import WHOLE_PRODUCTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """How one class of transformers names what we need; paths are dotted.

    pool: the module that makes the pooled vector; "class" where it is the normed class token;
        None where there is none. `pool_argument`: whether the class takes `add_pooling_layer`.
    norms_tokens: whether `last_hidden_state` has passed `norm`; a class without a closing norm
        gives its last state as it is, whether that is asked for or not.
    resize_argument: whether positions are resized only when `interpolate_pos_encoding` is given.
    depth: key of the configuration that tells the number of blocks, or lists something for each.
    form: what the class gives and takes. "sequence": any prefix tokens, then a token for each whole
        patch. "frames": the same of a video. "stages": each of its blocks but the last ends with
        half the grid and twice the width; pixels are padded to whole patches, and positions are
        relative, in windows. "maps": each of its blocks gives a map of the width in `embed_dim`,
        and a class token beside it where `cls_token` says so. "steps": SAM, run step by step.
    attention: the fastest implementation that the class has.
    prefix: number of tokens before the grid, from the configuration.
    """

    class_name: str
    embed: tuple[str, ...] = ("embeddings",)
    pre_norm: str = "pre_layrnorm"
    blocks: str
    norm: str | None
    pool: str | None
    pool_argument: bool = False
    norms_tokens: bool = True
    resize_argument: bool = True
    depth: str = "num_hidden_layers"
    form: Literal["sequence", "frames", "stages", "maps", "steps"] = "sequence"
    attention: str = "sdpa"
    prefix: Callable[[Any], int]


ENCODERS = {
    "siglip_vision_model": Encoder(
        class_name="SiglipVisionModel",
        blocks="encoder.layers",
        norm="post_layernorm",
        pool="head",
        attention=WHOLE_PRODUCTS,
        prefix=lambda config: 0,
    ),
    "clip_vision_model": Encoder(
        class_name="CLIPVisionModel",
        blocks="encoder.layers",
        norm="post_layernorm",
        pool="class",
        norms_tokens=False,
        attention=WHOLE_PRODUCTS,
        prefix=lambda config: 1,
    ),
    "vit": Encoder(
        class_name="ViTModel",
        blocks="layers",
        norm="layernorm",
        pool="pooler",
        pool_argument=True,
        attention=WHOLE_PRODUCTS,
        prefix=lambda config: 1,
    ),
    "deit": Encoder(
        class_name="DeiTModel",
        blocks="layers",
        norm="layernorm",
        pool="pooler",
        pool_argument=True,
        attention=WHOLE_PRODUCTS,
        prefix=lambda config: 2,
    ),
    "beit": Encoder(
        class_name="BeitModel",
        blocks="layers",
        norm="layernorm",
        pool="pooler",
        pool_argument=True,
        resize_argument=False,
        prefix=lambda config: 1,
    ),
    "donut-swin": Encoder(
        class_name="DonutSwinModel",
        blocks="encoder.layers",
        norm=None,
        pool=None,
        pool_argument=True,
        resize_argument=False,
        depth="depths",
        form="stages",
        attention="eager",
        prefix=lambda config: 0,
    ),
    "dinov2": Encoder(
        class_name="Dinov2Model",
        blocks="encoder.layer",
        norm="layernorm",
        pool="class",
        resize_argument=False,
        attention=WHOLE_PRODUCTS,
        prefix=lambda config: 1,
    ),
    "dinov2_with_registers": Encoder(
        class_name="Dinov2WithRegistersModel",
        blocks="encoder.layer",
        norm="layernorm",
        pool="class",
        resize_argument=False,
        attention=WHOLE_PRODUCTS,
        prefix=lambda config: 1 + config.num_register_tokens,
    ),
    "sam_vision_model": Encoder(
        class_name="SamVisionModel",
        embed=("vision_encoder.pos_embed", "vision_encoder.patch_embed"),
        blocks="vision_encoder.layers",
        norm="vision_encoder.neck",
        pool=None,
        form="steps",
        prefix=lambda config: 0,
    ),
    "cvt": Encoder(
        class_name="CvtModel",
        blocks="encoder.stages",
        norm=None,
        pool=None,
        resize_argument=False,
        depth="depth",
        form="maps",
        attention="eager",
        prefix=lambda config: int(config.cls_token[-1]),
    ),
    "timesformer": Encoder(
        class_name="TimesformerModel",
        blocks="encoder.layer",
        norm="layernorm",
        pool=None,
        resize_argument=False,
        form="frames",
        attention="eager",
        prefix=lambda config: 1,
    ),
}
"""`model_type` of a vision configuration -> its encoder."""
