"""Idefics3, SmolVLM and SmolVLM2: tagged SigLIP tiles, read by a LLaMA-shaped model.

The long side of an image is brought to a size, both sides up to whole tiles; tiles follow row by
row, each after a tag of its row and column, then the whole image. Tokens of a tile are joined in
blocks (pixel shuffle) and go through one linear map without bias: 64 (SmolVLM 256M and 500M), 81
(2.2B) or 169 (Idefics3) tokens a view. SmolVLM's tags are special tokens, Idefics3's plain text,
which the text tokenizer decides. SmolVLM2 reads videos too (`vlm.data.example.Video`): their frames
are single views, each after its time; what takes frames from a file is left to the caller.

The number of image tokens follows from the layout alone; transformers takes views that are zero all
over for padding.

Parameters by pattern, for stages: "tokenizer.*" (SigLIP), "adaptor.*", "text.*".

Source: arXiv 2408.12637 (Idefics3), 2504.05299 (SmolVLM); transformers, `idefics3` and `smolvlm`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    AutoVideoProcessor,
    GenerationConfig,
    PreTrainedConfig,
)

from vlm import adaptors
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly, ImageLayouts
from vlm.families.decoder_only.processor import Processor
from vlm.families.decoder_only.timed_frames import TimedFrames
from vlm.families.decoder_only.view_order import Tagged
from vlm.families.published_files import open_part, read_reference
from vlm.pixels import PixelSpec, tile_from_transformers
from vlm.systems.compose import context_of
from vlm.systems.published import (
    KeyMap,
    first_names,
    listed_banned_ids,
    listed_stop_ids,
    published_name,
    read_json,
    save_decoder_only,
    use_published_template,
)
from vlm.tokenizers import edge_tiles
from vlm.tokenizers import transformers as encoders
from vlm.weights import load_weights, read_weights

SOURCE = "arXiv 2408.12637, 2504.05299; HuggingFaceM4/Idefics3-*, HuggingFaceTB/SmolVLM* on the hub"

CAPTION_PROMPT = "Can you describe this image?"
"""Source: the card of HuggingFaceTB/SmolVLM-Instruct."""

MARK, WHOLE, TILE = "<fake_token_around_image>", "<global-img>", "<row_{row}_col_{column}>"
"""Before each tag and at an image's end; the tag of the whole image; that of a tile.
Source: transformers, `processing_idefics3.py`."""

SIGLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)


def load(folder: Path, values: dict[str, Any]) -> DecoderOnlyModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    where = str(folder)
    config, text_tokenizer = open_part(AutoConfig, folder), open_part(AutoTokenizer, folder)
    reader = open_part(AutoImageProcessor, folder)
    state, unused = first_names(read_weights(folder), KEY_MAP, (), where)
    text_config = config.text_config
    text_config.tie_word_embeddings = config.tie_word_embeddings
    side_px, long_px = _sides(config, reader, where)
    with init_empty_weights(include_buffers=False):
        tile = tile_from_transformers(reader, side_px)
        module = compose(config, tile, long_px, bool(reader.do_image_splitting))
    module.text.tie_weights()  # making parameters empty unties them
    load_weights(module, state, where, lambda key: published_name(key, KEY_MAP))
    module.text.generation_config = GenerationConfig()
    image_mark = getattr(text_tokenizer, "image_token", "<image>")
    template = use_published_template(text_tokenizer, folder, image_mark)
    views = Tagged(
        mark=getattr(text_tokenizer, "fake_image_token", MARK),
        tile=TILE,
        whole=getattr(text_tokenizer, "global_image_token", WHOLE),
    )
    processor = Processor(
        text_tokenizer,
        module.tokenizer.pixel_spec,
        ImageLayouts(module.tokenizer, module.adaptor, views),
        max_tokens=context_of(module.text),
        image_mark=image_mark,
        template=template,
        frames=_frames(folder, views, side_px) if values["model_type"] == "smolvlm" else None,
    )
    _require_length(processor, folder)
    return DecoderOnlyModel(
        module=module.eval(),
        processor=processor,
        stop_ids=listed_stop_ids(folder, processor),
        banned_ids=listed_banned_ids(folder, processor, views.mark),
        caption_prompt=CAPTION_PROMPT,
        reference=read_reference(folder, values["model_type"], unused),
    )


def save(model: DecoderOnlyModel, folder: Path) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with what has
    changed since (weights, dtype, vocabulary).

    Raises ValueError for weights that the layout cannot represent.
    """
    save_decoder_only(model, folder, KEY_MAP)


def _sides(config: PreTrainedConfig, reader, where: str) -> tuple[int, int]:
    """The side of a tile, and the longest side of an image. Raises ValueError where the model's and
    the image processor's differ."""
    vision = config.vision_config
    side_px, long_px = reader.max_image_size["longest_edge"], reader.size["longest_edge"]
    if side_px != vision.image_size or long_px is None:
        raise ValueError(
            f"{where}: expected tiles of {vision.image_size} pixels, as the vision encoder has "
            f"positions for, and a longest edge; found {side_px} and {reader.size}"
        )
    _require_own_positions(vision.image_size // vision.patch_size, where)
    return side_px, long_px


def compose(
    config: PreTrainedConfig, tile: PixelSpec, long_px: int, splits: bool = True
) -> DecoderOnly:
    """The model of a configuration, with random weights.

    tile: preprocessing of one view. long_px, splits: as in `vlm.tokenizers.edge_tiles`.
    """
    vision, width = config.vision_config, config.text_config.hidden_size
    tower = encoders.build(
        encoders.TransformersConfig(
            vision_config={name: getattr(vision, name) for name in SIGLIP_FIELDS}
            | {"model_type": "siglip_vision_model", "vision_use_head": False},
            layer=-1,
            prefix="drop",
            norm=True,
            pooled=False,
            pixel_spec=tile,
        )
    )
    tokenizer = edge_tiles.EdgeTilesTokenizer(tower, long_px=long_px, splits=splits)
    adaptor = adaptors.build(
        {
            "kind": "pixel_shuffle",
            "in_width": tokenizer.dim,
            "out_width": width,
            "ratio": config.scale_factor,
            "depth": 1,
            "hidden_width": width,
            "bias": False,
        }
    )
    return DecoderOnly(tokenizer, adaptor, AutoModelForCausalLM.from_config(config.text_config))


def _frames(folder: Path, views: Tagged, side_px: int) -> TimedFrames:
    """How the folder's video processor brings frames to pixels. Raises ValueError where it gives
    them another size than a longest edge first, or frames of another side than `side_px`."""
    reader = open_part(AutoVideoProcessor, folder)
    long_px, found_px = reader.size["longest_edge"], reader.max_image_size["longest_edge"]
    if long_px is None or found_px != side_px:
        raise ValueError(
            f"{folder}: expected a longest edge of video frames, and frames of {side_px} pixels, "
            f"as the vision encoder has positions for; found {reader.size} and {found_px}"
        )
    tile = tile_from_transformers(reader, side_px)
    spec = edge_tiles.EdgeTilesSpec(tile=tile, long_px=long_px, splits=False)
    return TimedFrames(pixel_spec=spec, mark=views.mark, whole=views.whole)


def _require_own_positions(side: int, where: str) -> None:
    """Raises ValueError for a grid of `side` x `side` patches in which transformers' class gives
    some patch another's position: it finds each by a division in fp32, which is exact for the
    published 24, 26, 27 and 32, and not for 25, say. SigLIP's own class gives each its own.

    Source: transformers, `modeling_idefics3.py`, `Idefics3VisionEmbeddings.forward`.
    """
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    starts = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
    found = torch.bucketize(starts.clamp(max=1 - 1e-6), bounds, right=True).tolist()
    if found != list(range(side)):
        raise ValueError(
            f"{where}: expected a grid in which each patch has a position of its own, found "
            f"{side} x {side} patches, of which transformers' class gives some another's"
        )


def _require_length(processor: Processor, folder: Path) -> None:
    """Raises ValueError where the folder's processor writes another number of image tokens for a
    view than the model gives."""
    said = read_json(folder / "processor_config.json").get("image_seq_len")
    found = processor.layout_for(processor.pixel_spec.tile.size_hw).spans[-1].length
    if said not in (None, found):
        raise ValueError(
            f"{folder}: the processor writes {said} image tokens for a view, the model gives "
            f"{found}"
        )


KEY_MAP: KeyMap = [
    ("model.vision_model.", "tokenizer.inner.backbone."),
    ("model.connector.modality_projection.proj.", "adaptor.mlp.0."),
    ("model.text_model.", "text.model."),
    ("lm_head.", "text.lm_head."),
]
"""(published prefix, our prefix), read in both directions."""
