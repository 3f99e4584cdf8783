"""Folders of tiny parts and models, as their libraries write them."""

import torch
import transformers

from tests import tiny
from tests.contrastive_models import model, text_tokenizer
from vlm.families.contrastive.model import ContrastiveModel
from vlm.families.contrastive.processor import PairProcessor

ENCODERS = {
    "siglip": (
        transformers.SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            image_size=64, patch_size=16,
        ),
        transformers.SiglipVisionModel,
        transformers.SiglipImageProcessor(size={"height": 64, "width": 64}),
        16,
    ),
    "dinov2": (
        transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
        ),
        transformers.Dinov2Model,
        transformers.BitImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}
        ),
        16,
    ),
    "clip": (
        transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
            image_size=56, patch_size=14,
        ),
        transformers.CLIPVisionModel,
        transformers.CLIPImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        16,
    ),
}  # fmt: skip


def write_parts(folder, encoder, text):
    """A tiny image encoder and language model as the hub would give them: what `vision` and `text`
    are then."""
    config, model_class, image_processor, _ = ENCODERS[encoder]
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder / "vision")
    image_processor.save_pretrained(folder / "vision")
    tiny.text_model(text).save_pretrained(folder / "text")
    tiny.text_tokenizer().save_pretrained(folder / "text")
    return f"transformers:{folder / 'vision'}", str(folder / "text")


def public(image="mean", text="bert, class", **options):
    """A tiny composed model that reads bytes."""
    module = model(image, text, **options)
    processor = PairProcessor(
        text_tokenizer(), module.tokenizer.pixel_spec, length=12, pad_to_length=False
    )
    return ContrastiveModel(module=module, processor=processor)
