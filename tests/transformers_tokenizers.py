"""Tiny image tokenizers of transformers."""

from tests.tokenizer_laws import spec
from vlm.tokenizers.transformers import TransformersConfig

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
}
SAM = {"output_channels": 8, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 32}


def tiny(model_type, size_hw=(64, 64), *, layer=-1, prefix="drop", norm=True, pooled=False, **more):
    vision_config = TINY | {"model_type": model_type} | more
    if model_type == "sam_vision_model":
        vision_config = vision_config | SAM
    return TransformersConfig(
        vision_config=vision_config,
        layer=layer,
        prefix=prefix,
        norm=norm,
        pooled=pooled,
        pixel_spec=spec(*size_hw),
    )
