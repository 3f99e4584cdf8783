"""Donut: a Swin's tokens as the memory of mBART's decoder, which writes documents as tagged text.

A prompt such as `<s_cord-v2>` says what is asked, and stands where other decoders have their start
id; what is written turns into JSON. Images are brought to the short side of the page, shrunk to
fit and centred on black, before normalising; some folders turn those that lie across the page.
`<unk>` is never written. Converted folders normalise by half, though the authors' code did by
ImageNet's statistics: the folder is followed.

Folders are those of transformers' `VisionEncoderDecoderModel`. Its `forced_eos_token_id` is not
applied: a text that is cut at the limit has no end.

Source: arXiv 2111.15664; github.com/clovaai/donut; transformers, `donut`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import MBartConfig

from vlm.families.encoder_decoder.model import EncoderDecoderModel
from vlm.families.encoder_decoder.module import EncoderDecoder
from vlm.families.encoder_decoder.processor import LineProcessor
from vlm.ocr.tagged_text import TAG
from vlm.pixels import HALF, PixelSpec
from vlm.systems import trocr

SOURCE = "arXiv 2111.15664; naver-clova-ix/donut-* on the hub"
KIND = "donut"

PROMPTS = {
    "cord": "<s_cord-v2>",
    "cord-v1": "<s_cord>",
    "class": "<s_rvlcdip>",
    "answer": "<s_docvqa><s_question>{question}</s_question><s_answer>",
    "ticket": "<s_zhtrainticket>",
    "read": "<s_synthdog>",
}
"""Task -> prompt of the published models. All have the token of "read", the text of a page, which
they were trained on first. Source: github.com/clovaai/donut, README; transformers,
`convert_donut_to_pytorch.py`."""

SIZES = {
    "base": trocr.Size(
        vision={
            "model_type": "donut-swin",
            "image_size": [2560, 1920],
            "patch_size": 4,
            "embed_dim": 128,
            "depths": [2, 2, 14, 2],
            "num_heads": [4, 8, 16, 32],
            "window_size": 10,
            "layer_norm_eps": 1e-5,
        },
        text={
            "vocab_size": 57525,
            "d_model": 1024,
            "decoder_layers": 4,
            "decoder_attention_heads": 16,
            "decoder_ffn_dim": 4096,
            "encoder_layers": 12,
            "max_position_embeddings": 1536,
            "scale_embedding": True,
            "add_final_layer_norm": True,
            "is_decoder": True,
            "add_cross_attention": True,
        },
    )
}
"""Source: config.json of naver-clova-ix/donut-base."""

PAGE = PixelSpec(
    size_hw=(2560, 1920), fit="page", resample="bilinear", mean=HALF.mean, std=HALF.std
)


def build(size: str) -> EncoderDecoder:
    """A published size with random weights; under `torch.device("meta")`, shapes alone.

    Raises ValueError naming the sizes.
    """
    if size not in SIZES:
        raise ValueError(f"Donut size {size!r} is not one of {', '.join(SIZES)}")
    sizes = SIZES[size]
    return trocr.compose(sizes.vision, MBartConfig(**sizes.text), PAGE).eval()


def load(folder: Path, values: dict[str, Any]) -> EncoderDecoderModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    model = trocr.load(folder, values)
    model.processor.prompt_starts = True
    unknown = model.processor.text_tokenizer.unk_token_id
    banned = () if unknown is None else (unknown,)
    return replace(
        model,
        reads="pages",
        prompt=page_prompt(model.processor),
        banned=tuple(dict.fromkeys((*model.banned, *banned))),
        reference=replace(model.reference, model_type=KIND),
    )


save = trocr.save


def page_prompt(processor: LineProcessor) -> str | None:
    """The prompt of PROMPTS that a folder's model was trained on: the one that begins with its
    start id, else the first that begins with a token of its vocabulary. None where its start id is
    the prompt of another task, or nothing tells."""
    tokenizer = processor.text_tokenizer
    start = tokenizer.convert_ids_to_tokens(processor.start_ids[0])
    known = {start} if TAG.fullmatch(start) else tokenizer.get_vocab()
    return next((p for p in PROMPTS.values() if TAG.match(p)[0] in known), None)
