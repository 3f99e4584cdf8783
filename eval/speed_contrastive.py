"""Contrastive training beside open_clip's own model, loss and step: same weights, same batch.

    python eval/speed_contrastive.py

ViT-B/32 with random weights, softmax loss, batch 64, captions of 6 to 24 tokens. First both give
their loss in fp32, which must agree to 1e-4. Then each variant trains in a process of its own, in
turn, for several rounds: ours with the state, objective and optimizer of `fit`; open_clip with its
model, `ClipLoss` and AdamW as its training script has them. In bf16 its precisions are `amp_bf16`
(fp32 weights under autocast) and `pure_bf16` (bf16 weights, its fastest, which loses small
updates), in fp32 there is `fp32` alone. Reported are the medians of samples/s and of the process's
peak memory while it trains (without building the model), and the ratios, which alone carry over to
other machines of the kind.

Where ours gains: open_clip's text tower computes all 77 positions of every caption; in a causal
tower read at the end token those after it change nothing, and ours stops at the batch's longest.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial

import open_clip
import torch
from bench import (
    STEPS,
    add_precision,
    autocast,
    child,
    chosen,
    in_turn,
    medians,
    parse,
    parser_for,
    repeat,
)
from torch import Tensor

from vlm.families.contrastive.batch import PairBatch
from vlm.families.contrastive.module import Contrastive
from vlm.image_tokens import ViewGroup
from vlm.losses.contrastive import softmax_loss
from vlm.pixels import OPENAI, PixelSpec
from vlm.precision import DTYPES
from vlm.systems import clip
from vlm.systems.open_clip import config as open_clip_config
from vlm.systems.open_clip import layout as open_clip_layout
from vlm.training.objectives.contrastive import Contrast
from vlm.training.stages import Stage
from vlm.training.state import build_state

VARIANTS = {
    "bf16": ("ours", "open_clip-amp_bf16", "open_clip-pure_bf16"),
    "fp32": ("ours", "open_clip-fp32"),
}
ARCHITECTURE = "ViT-B-32"
BATCH = 64
BEGIN, END = 49406, 49407


def peer(seed: int = 0) -> open_clip.CLIP:
    """open_clip's model with random weights, in fp32."""
    torch.manual_seed(seed)
    return open_clip.create_model(ARCHITECTURE, pretrained=None)


def ours_from(model: open_clip.CLIP) -> Contrastive:
    """Our model with the same weights."""
    cfg = open_clip.get_model_config(ARCHITECTURE)
    values = open_clip_config.clip_config(cfg)
    side = cfg["vision_cfg"]["image_size"]
    spec = PixelSpec(
        size_hw=(side, side), fit="crop", resample="bicubic", mean=OPENAI.mean, std=OPENAI.std
    )
    vision = values["vision_config"] | {"model_type": "clip_vision_model"}
    text = values["text_config"] | {"model_type": "clip_text_model"}
    module = clip.compose(vision, text, values["projection_dim"], spec)
    module.load_state_dict(open_clip_layout.to_ours(model.state_dict(), cfg))
    return module


def batches(count: int = BATCH, length: int = 77, seed: int = 1) -> tuple[PairBatch, Tensor]:
    """One batch for both: ours, and the ids that open_clip reads; pixels are those of ours."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [6 + (i * 18) // max(count - 1, 1) for i in range(count)]
    theirs = torch.zeros(count, length, dtype=torch.long)
    for row, words in zip(theirs, lengths):
        row[:words] = torch.randint(300, BEGIN, (words,), generator=generator)
        row[0], row[words - 1] = BEGIN, END
    ours = theirs[:, : max(lengths)].clone()
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ours[~valid] = END
    pixels = torch.randn(count, 3, 224, 224, generator=generator)
    owner = torch.tensor([[row, 0, 0] for row in range(count)])
    names = tuple(f"row {row}" for row in range(count))
    groups = (ViewGroup(pixels=pixels, owner=owner),)
    return PairBatch(ids=ours, valid=valid, groups=groups, names=names), theirs


def losses(count: int = 8) -> tuple[float, float]:
    """The fp32 loss of one batch: ours, open_clip's."""
    model = peer().eval()
    module = ours_from(model).eval()
    ours, theirs = batches(count)
    with torch.no_grad():
        mine = softmax_loss(*module(ours), module.log_scale)
        images, texts, scale = model(ours.groups[0].pixels, theirs)
        return float(mine), float(open_clip.ClipLoss()(images, texts, scale))


def train(variant: str, steps: int, dtype: torch.dtype) -> dict[str, float]:
    """Trains all weights; samples/s (median step), peak memory of the process in MB, last loss."""
    model = peer()
    ours, theirs = batches()
    if variant == "ours":
        module = ours_from(model)
        del model
        stage = Stage(
            name="speed", rates=(("*", 1e-4),), steps=steps, batch=BATCH, micro_batch=BATCH,
            warmup_steps=0, weight_decay=0.2, betas=(0.9, 0.98), clip=math.inf,
        )  # fmt: skip
        state = build_state(module, stage, dtype)
        learn = partial(
            state.learn, Contrast("softmax"), [ours], {"pairs": BATCH}, partial(autocast, dtype)
        )
    else:
        pixels = ours.groups[0].pixels
        pure = variant.endswith("pure_bf16")
        if pure:
            model.to(torch.bfloat16)
            pixels = pixels.bfloat16()
        model.train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
        )
        criterion = open_clip.ClipLoss()

        def learn() -> float:
            with autocast(torch.float32 if pure else dtype):
                images, texts, scale = model(pixels, theirs)
                loss = criterion(images, texts, scale)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

    trained = repeat(learn, steps - 1)
    return {
        "samples_per_s": BATCH / trained.seconds,
        "peak_mb": trained.peak_mb,
        "loss": trained.values[-1],
    }


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument(
        "--steps", type=int, default=4, help="steps in each; the first is not timed"
    )
    add_precision(parser)
    parser.add_argument("--only", choices=sum(VARIANTS.values(), ()), help=argparse.SUPPRESS)
    settings = parse(parser)
    if settings.only:
        print(json.dumps(train(settings.only, settings.steps, DTYPES[settings.precision])))
        return
    chosen(settings)
    variants = VARIANTS[settings.precision]
    mine, theirs = losses()
    difference = abs(mine - theirs)
    print(f"fp32 loss: ours {mine:.6f}, open_clip {theirs:.6f}, difference {difference:.1e}")
    if difference > 1e-4:
        sys.exit("the losses differ: speeds would mean nothing")
    found = in_turn(variants, settings.rounds, partial(child, settings))
    table = STEPS._replace(width=20)
    table.print_head()
    table.print_rows(medians(found))
    print("speed: ours / variant, higher is better; memory: ours / variant, lower is better")


if __name__ == "__main__":
    main()
