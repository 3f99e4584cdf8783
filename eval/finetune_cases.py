"""Published geometries that `speed_finetune.py` compares: transformers' class, ours with its
weights, unequal rows, and what a collator makes of them for transformers' class."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from vlm.families.decoder_only.batch import IMAGE, Row, collate
from vlm.families.decoder_only.image_layout import ImageLayout, Span, StreamLayout
from vlm.families.decoder_only.module import DecoderOnly
from vlm.pixels import HALF, PixelSpec
from vlm.pixels.area import AreaSpec
from vlm.systems import qwen2_vl, smolvlm
from vlm.systems.published import KeyMap, first_names, published_name

PAD = 2


class Case(NamedTuple):
    """A published geometry.

    said: what it is. peer: transformers' model in fp32, of so many layers in each part; None: of
    all. ours: our model with its weights. rows: unequal ones. inputs: transformers' arguments of
    rows. tower, adaptor: paths of its image encoder, and of its adaptor, which may lie within.
    """

    said: str
    peer: Callable[[int | None], nn.Module]
    ours: Callable[[nn.Module], DecoderOnly]
    rows: Callable[[nn.Module], list[Row]]
    inputs: Callable[[nn.Module, list[Row]], dict[str, Tensor]]
    tower: str
    adaptor: str


def with_weights_of(peer: nn.Module, module: DecoderOnly, key_map: KeyMap) -> DecoderOnly:
    """A module with the weights of transformers' model."""
    state, _ = first_names(peer.state_dict(), key_map, (), "transformers")
    module.load_state_dict(
        {key: state[published_name(key, key_map)] for key in module.state_dict()}
    )
    return module.eval()


def random_ids(peer: nn.Module, count: int, generator: torch.Generator) -> Tensor:
    """Ids of text, int64[count], none of them padding or the last of the vocabulary."""
    most = peer.config.text_config.vocab_size - 1
    return torch.randint(PAD + 1, most, (count,), generator=generator)


def padded_inputs(rows: list[Row], image_id: int) -> dict[str, Tensor]:
    """Rows padded to the longest; as labels all ids but those of padding and image tokens."""
    batch = collate(rows, PAD)
    return {
        "input_ids": batch.ids.masked_fill(batch.ids == IMAGE, image_id),
        "attention_mask": batch.valid.long(),
        "labels": batch.ids.masked_fill(~batch.scored, -100),
    }


SMOLVLM_VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                      num_attention_heads=12, image_size=512, patch_size=16)  # fmt: skip
SMOLVLM_TEXT = dict(model_type="llama", vocab_size=49280, hidden_size=576, intermediate_size=1536,
                    num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
                    max_position_embeddings=8192, pad_token_id=PAD)  # fmt: skip
SMOLVLM_SHUFFLE = 4
"""Source: config.json of HuggingFaceTB/SmolVLM-256M-Instruct."""
SMOLVLM_ROWS = (((), 120), ((1,), 12), ((3,), 40), ((5,), 24), ((3, 3), 60))
"""Views of each image of a row, and ids of its text."""


def smolvlm_peer(layers: int | None, seed: int = 0) -> SmolVLMForConditionalGeneration:
    """transformers' SmolVLM-256M with random weights."""
    torch.manual_seed(seed)
    few = {} if layers is None else {"num_hidden_layers": layers}
    config = SmolVLMConfig(
        vision_config=SMOLVLM_VISION | few,
        text_config=SMOLVLM_TEXT | few,
        image_token_id=SMOLVLM_TEXT["vocab_size"] - 1,
        scale_factor=SMOLVLM_SHUFFLE,
        tie_word_embeddings=False,
    )
    return SmolVLMForConditionalGeneration._from_config(config, dtype=torch.float32).eval()


def smolvlm_ours(peer: SmolVLMForConditionalGeneration) -> DecoderOnly:
    """Our model with the weights of transformers'."""
    side = peer.config.vision_config.image_size
    tile = PixelSpec(
        size_hw=(side, side), fit="stretch", resample="lanczos", mean=HALF.mean, std=HALF.std
    )
    module = smolvlm.compose(peer.config, tile, long_px=4 * side)
    return with_weights_of(peer, module, smolvlm.KEY_MAP)


def smolvlm_rows(peer: SmolVLMForConditionalGeneration, seed: int = 1) -> list[Row]:
    """Rows of random ids and pixels, two ids before each view and one after an image, where its
    marks stand; all ids are scored but those of image tokens."""
    generator = torch.Generator().manual_seed(seed)
    vision = peer.config.vision_config
    side = vision.image_size
    tokens = (side // vision.patch_size) ** 2 // peer.config.scale_factor**2
    rows = []
    for number, (images, count) in enumerate(SMOLVLM_ROWS):
        parts, views = [random_ids(peer, 4, generator)], []
        for image, of_image in enumerate(images):
            for view in range(of_image):
                parts += [random_ids(peer, 2, generator), torch.full((tokens,), IMAGE)]
                pixels = torch.randn(3, side, side, generator=generator)
                views.append((pixels, (image, view)))
            parts.append(random_ids(peer, 1, generator))
        ids = torch.cat([*parts, random_ids(peer, count, generator)])
        rows.append(Row(name=f"row {number}", ids=ids, scored=ids != IMAGE, views=tuple(views)))
    return rows


def smolvlm_inputs(peer: SmolVLMForConditionalGeneration, rows: list[Row]) -> dict[str, Tensor]:
    """What transformers' processor and the collator of its documentation make of rows: images of
    zeros up to the most views."""
    most, side = max(len(row.views) for row in rows), peer.config.vision_config.image_size
    pixels = torch.zeros(len(rows), most, 3, side, side)
    for number, row in enumerate(rows):
        for view, (seen, _) in enumerate(row.views):
            pixels[number, view] = seen
    real = torch.tensor([[view < len(row.views) for view in range(most)] for row in rows])
    return padded_inputs(rows, peer.config.image_token_id) | {
        "pixel_values": pixels,
        "pixel_attention_mask": real[..., None, None].expand(-1, -1, side, side),
    }


QWEN_VISION = dict(depth=8, embed_dim=640, num_heads=8, mlp_ratio=4, patch_size=14,
                   spatial_merge_size=2, temporal_patch_size=2)  # fmt: skip
QWEN_TEXT = dict(vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=12,
                 num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
                 rope_parameters={"rope_type": "default", "rope_theta": 1000000.0,
                                  "mrope_section": [8, 12, 12]},
                 bos_token_id=None, eos_token_id=None, pad_token_id=PAD)  # fmt: skip
"""Qwen2-VL's structure and width of a head, with SmolLM2-135M's sizes."""
QWEN_ROWS = (((), 160), (((8, 12),), 12), (((20, 6),), 40), (((24, 18),), 24),
             (((4, 30), (12, 12)), 60))  # fmt: skip
"""Rows and columns of tokens of each image of a row, and ids of its text."""


def qwen_peer(layers: int | None, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """transformers' Qwen2-VL with random weights."""
    torch.manual_seed(seed)
    few = {} if layers is None else {"num_hidden_layers": layers}
    vision = QWEN_VISION | {"hidden_size": QWEN_TEXT["hidden_size"]}
    config = Qwen2VLConfig(
        vision_config=vision | ({} if layers is None else {"depth": layers}),
        text_config=QWEN_TEXT | few,
        image_token_id=QWEN_TEXT["vocab_size"] - 1,
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration._from_config(config, dtype=torch.float32).eval()


def qwen_ours(peer: Qwen2VLForConditionalGeneration) -> DecoderOnly:
    """Our model with the weights of transformers'."""
    vision = peer.config.vision_config
    block_px = vision.patch_size * vision.spatial_merge_size
    block = PixelSpec(
        size_hw=(block_px, block_px),
        fit="stretch",
        resample="bicubic",
        mean=HALF.mean,
        std=HALF.std,
    )
    spec = AreaSpec(block=block, min_pixels=block_px**2, max_pixels=1000 * block_px**2)
    peer.config.text_config.tie_word_embeddings = peer.config.tie_word_embeddings
    return with_weights_of(peer, qwen2_vl.compose(peer.config, spec), qwen2_vl.KEY_MAP)


def qwen_rows(peer: Qwen2VLForConditionalGeneration, seed: int = 1) -> list[Row]:
    """Rows of random ids and pixels, an id before and after each image; all ids are scored but
    those of image tokens."""
    generator = torch.Generator().manual_seed(seed)
    vision = peer.config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    rows = []
    for number, (grids, count) in enumerate(QWEN_ROWS):
        parts, views, layouts = [random_ids(peer, 4, generator)], [], []
        for image, (h, w) in enumerate(grids):
            parts += [torch.full((h * w,), IMAGE), random_ids(peer, 2, generator)]
            pixels = torch.randn(3, h * side, w * side, generator=generator)
            views.append((pixels, (image, 0)))
            span = Span(length=h * w, grid_hw=(h, w))
            layouts.append(ImageLayout(pieces=(span,), encoded=h * w))
        ids = torch.cat([*parts, random_ids(peer, count, generator)])
        rows.append(
            Row(
                name=f"row {number}",
                ids=ids,
                scored=ids != IMAGE,
                views=tuple(views),
                layout=StreamLayout(images=tuple(layouts), position_numbers=3),
            )
        )
    return rows


def qwen_inputs(peer: Qwen2VLForConditionalGeneration, rows: list[Row]) -> dict[str, Tensor]:
    """What transformers' processor and the collator of its documentation make of rows: patches of
    all images, block by block, each for two frames."""
    vision = peer.config.vision_config
    p, m, t = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    patches, grids = [], []
    for pixels in (pixels for row in rows for pixels, _ in row.views):
        _, H, W = pixels.shape
        parts = pixels.reshape(3, H // (m * p), m, p, W // (m * p), m, p)
        parts = parts.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
        patches.append(parts.expand(-1, -1, -1, -1, -1, t, -1, -1).flatten(0, 3).flatten(1))
        grids.append([1, H // p, W // p])
    inputs = padded_inputs(rows, peer.config.image_token_id)
    return inputs | {
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (inputs["input_ids"] == peer.config.image_token_id).int(),
    }


CASES = {
    "smolvlm": Case(
        "SmolVLM-256M: SigLIP-B/16-512 tiles, pixel shuffle by 4, SmolLM2-135M",
        smolvlm_peer,
        smolvlm_ours,
        smolvlm_rows,
        smolvlm_inputs,
        "model.vision_model",
        "model.connector",
    ),
    "qwen2_vl": Case(
        "Qwen2-VL, small: ViT at native size, 8 layers 640 wide, Qwen2, 12 layers 576 wide",
        qwen_peer,
        qwen_ours,
        qwen_rows,
        qwen_inputs,
        "model.visual",
        "model.visual.merger",
    ),
}
