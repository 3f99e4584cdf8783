"""An encoder-decoder model of any image tokenizer and any text decoder with cross-attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    TrOCRConfig,
)

from vlm import adaptors
from vlm.adaptors import adaptor_config
from vlm.families.encoder_decoder.model import EncoderDecoderModel
from vlm.families.encoder_decoder.module import EncoderDecoder
from vlm.families.encoder_decoder.processor import LineProcessor
from vlm.families.published_files import open_part
from vlm.image_tokens import ImageTokenizer
from vlm.systems.pretrained import load_vision
from vlm.text import decoders as text_decoders
from vlm.vocabulary import ids_of


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSizes:
    """A decoder from scratch, of TrOCR's shape: post-norm, GELU, learned positions, tied head.

    length: the most ids of a row. Raises ValueError for sizes below 1, and where the heads do not
    divide the width.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    length: int
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "mlp_width", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.width}")


def build(
    *,
    vision: str | ImageTokenizer,
    text: str | DecoderSizes,
    text_tokenizer: Any = None,
    adaptor: str = "linear",
    adaptor_depth: int = 1,
    size_hw: tuple[int, int] | None = None,
    vision_layer: int = -1,
    prefix: str = "drop",
    max_tokens: int | None = None,
    overflow: str = "drop",
    seed: int = 0,
) -> EncoderDecoderModel:
    """An encoder-decoder model from a pretrained image tokenizer and a text decoder.

    vision: an image tokenizer, or its name as `vlm.systems.pretrained.load_vision` takes it:
        "kind:id", a model's folder, "demo".
    text: a hub id or folder of a pretrained text model, to which cross-attention is added with
        fresh weights, as TrOCR's decoder began from RoBERTa's; or the sizes of one from scratch.
    text_tokenizer: a fast tokenizer of transformers, a hub id or a folder; None takes that of
        `text`. Rows of a pretrained decoder's tables are not changed: it must have as many.
    adaptor: "identity", "linear", "mlp", "pixel_shuffle", "resampler" or "perceiver".
    prefix: "drop" or "keep" the class token and its like, which TrOCR attends to.
    max_tokens: the longest row; None takes the decoder's positions.
    seed: of all fresh weights; the global generator is left as it is.
    Raises ValueError for parts that do not fit, OSError where weights cannot be had.
    """
    if text_tokenizer is None:
        if isinstance(text, DecoderSizes):
            raise ValueError("text_tokenizer: a decoder from scratch needs one, found None")
        text_tokenizer = text
    if isinstance(text_tokenizer, (str, Path)):
        text_tokenizer = open_part(AutoTokenizer, Path(text_tokenizer))
    start_id, end_id, pad_id = ids_of(text_tokenizer)
    image_tokenizer = vision
    if not isinstance(vision, ImageTokenizer):
        image_tokenizer = load_vision(vision, size_hw, vision_layer, prefix=prefix)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(text, DecoderSizes):
            sizes = _scratch(text, len(text_tokenizer), start_id, end_id, pad_id)
            decoder = text_decoders.build(sizes)
        else:
            decoder = load_decoder(text)
        width = text_decoders.memory_width(decoder.config)
        bridge = (
            {"kind": "identity", "width": width}
            if adaptor == "identity"
            else adaptor_config(
                adaptor,
                in_width=image_tokenizer.dim,
                out_width=width,
                depth=adaptor_depth,
                ratio=2,
                queries=64,
            )
        )
        module = EncoderDecoder(image_tokenizer, adaptors.build(bridge), decoder)
    rows = decoder.get_input_embeddings().weight.shape[0]
    if len(text_tokenizer) > rows:
        raise ValueError(
            f"text_tokenizer: expected at most {rows} ids, the rows of the decoder's table, found "
            f"{len(text_tokenizer)}; grow it with vlm.vocabulary.grow, or train one from scratch"
        )
    positions = text_decoders.positions_of(decoder.config)
    processor = LineProcessor(
        text_tokenizer,
        image_tokenizer.pixel_spec,
        start_ids=(start_id,),
        end_id=end_id,
        pad_id=pad_id,
        max_tokens=positions if max_tokens is None else max_tokens,
        overflow=overflow,
    )
    return EncoderDecoderModel(
        module=module.eval(),
        processor=processor,
        end_ids=(end_id,),
        max_new_tokens=(processor.max_tokens or 257) - 1,
    )


def load_decoder(name: str) -> torch.nn.Module:
    """A pretrained text model as a decoder, in float32: causal, with cross-attention, whose weights
    are fresh where the folder has none.

    name: a hub id or folder of a BERT-like, GPT-2-like, mBART or TrOCR text model.
    Raises OSError where it cannot be had; ValueError where its class has no cross-attention, or the
    folder lacks weights of the text model itself.
    """
    try:
        values = AutoConfig.from_pretrained(name, trust_remote_code=False)
        values.is_decoder, values.add_cross_attention = True, True
        text, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=values,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"text {name!r}: expected a folder or hub id of a text model that can be a decoder "
            f"({reason})"
        ) from error
    text_decoders.require_cross_attention(text)
    head = {id(p) for p in text_decoders.head_of(text).parameters()}
    missing = [
        key
        for key in report["missing_keys"]
        if not any(word in key.lower() for word in ("crossattention", "cross_attn", "encoder_attn"))
        and id(text.get_parameter(key)) not in head
    ]
    wrong = [key[0] for key in report["mismatched_keys"]]
    if missing or wrong:
        raise ValueError(
            f"text {name!r}: the folder lacks weights of the text model: {missing}; of other "
            f"shapes: {wrong}"
        )
    return text_decoders.prepared(text)


def _scratch(
    sizes: DecoderSizes, vocabulary: int, start_id: int, end_id: int, pad_id: int
) -> TrOCRConfig:
    return TrOCRConfig(
        vocab_size=vocabulary,
        d_model=sizes.width,
        decoder_layers=sizes.depth,
        decoder_attention_heads=sizes.heads,
        decoder_ffn_dim=sizes.mlp_width,
        max_position_embeddings=sizes.length,
        dropout=sizes.dropout,
        decoder_start_token_id=start_id,
        bos_token_id=start_id,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )
