"""Held-out figures during training: caption loss with the right image and with a wrong one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from tqdm import tqdm

from vlm.data.collate import collate
from vlm.data.sources.base import Source
from vlm.inference.engine import image_gain
from vlm.inference.tasks import Model


def image_gain_on(
    model: Model,
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
    was_training = [(part, part.training) for part in module.modules()]
    module.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    starts = range(0, len(rows), batch_size)
    mine = [
        s
        for i, s in enumerate(starts)
        if i % accelerator.num_processes == accelerator.process_index
    ]
    for start in tqdm(
        mine, desc="held out", leave=False, disable=not accelerator.is_main_process or len(mine) < 4
    ):
        encoded = [model.processor.encode(source[row]) for row in rows[start : start + batch_size]]
        batch = collate(encoded, model.processor.pad_id).to(accelerator.device)
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
    for part, mode in was_training:
        part.training = mode
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
