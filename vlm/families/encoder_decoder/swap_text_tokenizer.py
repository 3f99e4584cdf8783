"""Another text tokenizer for an encoder-decoder model, such as one for another script."""

from __future__ import annotations

from typing import Any

import torch

from vlm.families.encoder_decoder.model import EncoderDecoderModel
from vlm.families.encoder_decoder.processor import LineProcessor
from vlm.text import decoders as text_decoders
from vlm.vocabulary import ids_of


def with_tokenizer(
    model: EncoderDecoderModel, text_tokenizer: Any, seed: int = 0
) -> EncoderDecoderModel:
    """The same model for another text tokenizer, such as one for another script: rows of tokens
    that both have keep what they learned, the others are fresh; start, end and pad ids are the new
    tokenizer's. The model itself is changed; what it could write before is lost.

    text_tokenizer: a fast tokenizer of transformers. seed: of fresh rows.
    Raises ValueError where it has no token to end with, and where the decoder counts its positions
    from the pad id, which is another one then.
    """
    start_id, end_id, pad_id = ids_of(text_tokenizer)
    _require_pad(model.module.text, pad_id)
    old, new = model.processor.text_tokenizer.get_vocab(), text_tokenizer.get_vocab()
    kept = [(id, old[token]) for token, id in new.items() if token in old]
    text, count = model.module.text, len(text_tokenizer)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        tables = [text.get_input_embeddings().weight]
        output = text.get_output_embeddings()
        if output is not None and output.weight is not tables[0]:
            tables.append(output.weight)
        fresh = [_rows_for(table, kept, count) for table in tables]
        bias = getattr(output, "bias", None)  # BERT's head has one number for each token
        if bias is not None:
            bias = _rows_for(bias[:, None], kept, count)[:, 0]
        text.resize_token_embeddings(count, mean_resizing=False)
        table = text.get_input_embeddings()
        if table.padding_idx is not None:  # the row that gets no gradient
            table.padding_idx = pad_id
        weights = [table.weight]
        if len(fresh) > 1:
            weights.append(text.get_output_embeddings().weight)
        for target, rows in zip(weights, fresh, strict=True):
            target.copy_(rows)
        if bias is not None:
            text.get_output_embeddings().bias.copy_(bias)
    for name, id in (
        ("decoder_start_token_id", start_id),
        ("bos_token_id", start_id),
        ("eos_token_id", end_id),
        ("pad_token_id", pad_id),
    ):
        setattr(text.config, name, id)
    processor = LineProcessor(
        text_tokenizer,
        model.processor.pixel_spec,
        start_ids=(start_id,),
        end_id=end_id,
        pad_id=pad_id,
        max_tokens=model.processor.max_tokens,
        overflow=model.processor.overflow,
    )
    return EncoderDecoderModel(
        module=model.module,
        processor=processor,
        end_ids=(end_id,),
        max_new_tokens=model.max_new_tokens,
        generation=model.generation,
        reads=model.reads,
    )


def _require_pad(text: torch.nn.Module, pad_id: int) -> None:
    """Raises ValueError where a decoder with another pad id would give its tokens other positions,
    as RoBERTa's and TrOCR's sinusoidal ones are counted from after it."""
    own = text.config.pad_token_id
    sinusoidal = any(isinstance(m, text_decoders.SinusoidalPositions) for m in text.modules())
    if (text_decoders.first_position(text) or sinusoidal) and pad_id != own:
        raise ValueError(
            f"text_tokenizer: {type(text).__name__} counts positions from its pad id, expected a "
            f"tokenizer that pads with the id {own} too, found {pad_id}"
        )


def _rows_for(table: torch.Tensor, kept: list[tuple[int, int]], count: int) -> torch.Tensor:
    """`count` rows: those of `kept`, pairs of new and old ids; the rest around the mean."""
    spread = table.std(0, keepdim=True)
    rows = table.mean(0, keepdim=True) + spread * torch.randn(count, table.shape[1]).to(table)
    if kept:
        new, old = (torch.tensor(ids) for ids in zip(*kept))
        rows[new] = table[old]
    return rows
