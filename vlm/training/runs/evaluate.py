"""Held-out figures during training: caption loss with the right image and with a wrong one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from tqdm import tqdm

from vlm.data.sources.base import Source
from vlm.families.decoder_only.batch import Batch, collate
from vlm.families.decoder_only.generate import answer_losses, image_gain
from vlm.families.decoder_only.model import DecoderOnlyModel


def image_gain_on(
    model: DecoderOnlyModel,
    source: Source,
    rows: Sequence[int],
    accelerator: Accelerator,
    batch_size: int = 16,
) -> dict[str, float]:
    """The image gain on rows of a source: how much a caption's own image helps to predict it.

    Wrong images are those of the neighbour in a batch of `batch_size` consecutive rows; the
    batches are dealt out to ranks, so that the figure is the same on any number of ranks.
    Returns right and wrong (mean loss of a caption in nats, its end token included), gain
    (wrong - right), gain_se (its standard error), captions (how many), loss (right, per token).
    """
    module = model.module
    sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    for batch in _batches(model, source, rows, accelerator, batch_size):
        with accelerator.autocast():
            right, wrong = (t.double() for t in image_gain(module, batch))
        paired = ~wrong.isnan()
        gain = (wrong - right)[paired]
        sums += torch.stack(
            [
                right[paired].sum(),
                wrong[paired].sum(),
                gain.square().sum(),
                paired.sum().double(),
                batch.scored[paired].sum().double(),
            ]
        )
    right, wrong, squares, count, tokens = accelerator.reduce(sums, "sum").tolist()
    if not count:
        raise ValueError(f"{source.name}: no two held-out rows with images to compare")
    gain = (wrong - right) / count
    variance = max(squares / count - gain**2, 0.0) * count / max(count - 1, 1)
    return {
        "right": right / count,
        "wrong": wrong / count,
        "gain": gain,
        "gain_se": math.sqrt(variance / count),
        "captions": int(count),
        "loss": right / tokens,
    }


def text_loss_on(
    model: DecoderOnlyModel,
    source: Source,
    rows: Sequence[int],
    accelerator: Accelerator,
    batch_size: int = 8,
) -> float:
    """The mean loss over the scored tokens of rows, in nats, the same on any number of ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in _batches(model, source, rows, accelerator, batch_size):
        with accelerator.autocast():
            losses = answer_losses(model.module, batch)
        sums += torch.stack([losses.double().sum(), batch.scored.sum().double()])
    loss, tokens = accelerator.reduce(sums, "sum").tolist()
    return loss / tokens


def _batches(
    model: DecoderOnlyModel,
    source: Source,
    rows: Sequence[int],
    accelerator: Accelerator,
    batch_size: int,
) -> Iterator[Batch]:
    """This rank's share of the rows as batches on its device; in evaluation mode meanwhile."""
    was_training = [(part, part.training) for part in model.module.modules()]
    model.module.eval()
    starts = range(0, len(rows), batch_size)
    mine = starts[accelerator.process_index :: accelerator.num_processes]
    quiet = not accelerator.is_main_process or len(mine) < 4
    for start in tqdm(mine, desc="held out", leave=False, disable=quiet):
        encoded = [model.processor.encode(source[row]) for row in rows[start : start + batch_size]]
        yield collate(encoded, model.processor.pad_id).to(accelerator.device)
    for part, mode in was_training:
        part.training = mode
