"""Tiny random image towers of each library, and models around them."""

import torch

from tests import tiny
from vlm import adaptors
from vlm.families.decoder_only.batch import collate
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly
from vlm.losses.token import token_losses
from vlm.pixels import PixelSpec

SPEC = PixelSpec(
    size_hw=(32, 48), fit="stretch", resample="bilinear", backend="pil",
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip


def timm_vit(name="vit_tiny_patch16_224", size_hw=(32, 48), **args):
    from vlm.tokenizers import timm

    arguments = {"img_size": size_hw, "depth": 2, "embed_dim": 24, "num_heads": 2, **args}
    return timm.build(
        timm.TimmConfig(
            name=name, model_args=arguments, level=-1, prefix="drop", norm=True, pooled=False,
            pixel_spec=SPEC.with_size(size_hw),
        )
    )  # fmt: skip


def timm_net(name, **args):
    from vlm.tokenizers import timm

    return timm.build(
        timm.TimmConfig(
            name=name, model_args=args, level=-1, prefix="drop", norm=False, pooled=False,
            pixel_spec=SPEC.with_size((64, 64)),
        )
    )  # fmt: skip


def transformers_tower(model_type, size_hw=(32, 32), **more):
    from transformers import CONFIG_MAPPING

    from vlm.tokenizers import transformers as kind

    config = CONFIG_MAPPING[model_type](
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=16, **more,
    )  # fmt: skip
    values = {k: v for k, v in config.to_dict().items() if k not in kind.BOOKKEEPING}
    return kind.build(
        kind.TransformersConfig(
            vision_config=values, layer=-1, prefix="drop", norm=True, pooled=False,
            pixel_spec=SPEC.with_size(size_hw),
        )
    )  # fmt: skip


def open_clip_tower(**more):
    from vlm.tokenizers import open_clip

    cfg = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32, **more}
    return open_clip.build(
        open_clip.OpenClipConfig(
            vision_cfg=cfg, embed_dim=16, quick_gelu=False, layer=-1, prefix="drop",
            norm=not isinstance(cfg["layers"], list), pooled=False,
            pixel_spec=SPEC.with_size((32, 32)),
        )
    )  # fmt: skip


TOWERS = {
    "timm ViT": timm_vit,
    "SigLIP": lambda: transformers_tower("siglip_vision_model"),
    "DINOv2": lambda: transformers_tower("dinov2", mlp_ratio=2),
    "EfficientNet": lambda: timm_net("tf_efficientnet_lite0"),
}


MORE_TOWERS = {
    **TOWERS,
    "open_clip": lambda: open_clip_tower(),
    "Swin": lambda: timm_net(
        "swin_tiny_patch4_window7_224", img_size=64, embed_dim=24, depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 2),
    ),
    "ConvNeXt": lambda: timm_net("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    "SAM": lambda: transformers_tower(
        "sam_vision_model", output_channels=12, global_attn_indexes=[1], window_size=2, mlp_dim=32
    ),
}  # fmt: skip


def composed(tower, **text):
    """A tiny model around a tower."""
    language = tiny.text_model(**text)
    torch.manual_seed(0)
    bridge = adaptors.build(
        dict(
            kind="mlp",
            in_width=tower.dim,
            out_width=language.config.hidden_size,
            depth=2,
            hidden_width=32,
        )
    )
    return DecoderOnly(tower, bridge, language).eval()


def model(module):
    """The public model around a module."""
    processor = tiny.processor(module)
    return DecoderOnlyModel(module=module, processor=processor, stop_ids=(processor.end_id,))


def batch_for(module, count=2):
    """Rows with an image each."""
    processor = tiny.processor(module)
    examples = [tiny.example(f"r{i}", images=(tiny.image(i),)) for i in range(count)]
    return collate([processor.encode(example) for example in examples], processor.pad_id)


def loss_of(module, batch):
    return token_losses(module(batch), batch.targets).sum()
