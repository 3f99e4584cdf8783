"""Pairs as `vlm inspect-batch` shows them: images beside captions as they come back from ids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text
from torch import Tensor

from vlm.families.contrastive.batch import Pair, PairBatch, collate_pairs
from vlm.families.contrastive.processor import PairProcessor
from vlm.families.inspect import draw_first_images, padding, show_head, show_views


def show(rows: Sequence[Pair], processor: PairProcessor, console: Console) -> PairBatch:
    """Prints pairs as they are trained on: the size of each view, and the caption with the
    tokenizer's own first and end tokens, padding dim; gives the batch."""
    batch = collate_pairs(rows)
    for b, pair in enumerate(rows):
        valid = batch.valid[b]
        real = int(valid.sum())
        console.print()
        show_head(pair, f"{real} text tokens; {len(valid) - real} padding", console)
        console.print(caption_text(batch.ids[b], valid, processor))
        show_views(pair, console)
    return batch


def caption_text(ids: Tensor, valid: Tensor, processor: PairProcessor) -> Text:
    """One caption, decoded: ids int64[T], valid bool[T]."""
    text = Text()
    start = 0
    for real, run in groupby(valid.tolist()):
        length = len(list(run))
        piece = ids[start : start + length]
        start += length
        if real:
            said = processor.text_tokenizer.decode(piece, skip_special_tokens=False)
            text.append(said.replace("\n", "⏎"))
        else:
            text.append(padding(length))
    return text


draw = draw_first_images
