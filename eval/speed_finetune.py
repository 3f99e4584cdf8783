"""Fine-tuning steps beside transformers' own class of a published system: same weights, same rows.

    OMP_NUM_THREADS=2 python eval/speed_finetune.py --tower frozen full [--layers 2]

Cases are published geometries with random weights: SmolVLM-256M (SigLIP-B/16-512 tiles,
SmolLM2-135M). Rows are unequal: text alone, images of one to five views, two images. transformers'
class gets them from a collator as its documentation has it: padded to the longest, with images of
zeros up to the most views, and as labels all ids but those of padding and image tokens; ours packs
them, with the state and step of `fit`. Adaptor and language model learn, and the image tokenizer
with --tower full. First both give their loss in fp32, which must agree to 1e-4. Then each variant
trains in a process of its own, in turn, for several rounds: transformers' class in bf16 under
autocast with fp32 weights. Where the tower is frozen, ours trains with a token cache too, as from
the second epoch on. Reported are the medians of samples/s and of the process's peak memory while it
trains (without building the model), and the ratios.

--layers keeps so few layers of both models, for machines on which a step takes minutes: the loss
over the vocabulary then takes a larger share of a step than it does in the whole model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

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
from finetune_cases import CASES, PAD, Case
from speed_training import require_same, step_of_fit, step_of_peer
from torch import Tensor, nn

from vlm.families.decoder_only.batch import Row, collate
from vlm.losses.token import token_losses
from vlm.precision import DTYPES
from vlm.training.stages import FROZEN

OURS, CACHED, PEER = "ours", "ours, tokens kept", "transformers"
RATES = {
    "frozen": (("adaptor.*", 1e-4), ("text.*", 1e-4), ("*", FROZEN)),
    "full": (("*", 1e-4),),
}
"""What of the tower learns -> what learns, at which rate."""


def losses(case: Case, layers: int | None) -> tuple[float, float]:
    """The fp32 loss of the rows: ours, transformers'."""
    peer = case.peer(layers)
    rows = case.rows(peer)
    batch = collate(rows, PAD)
    with torch.no_grad():
        mine = token_losses(case.ours(peer)(batch), batch.targets).mean()
        return float(mine), float(peer(**case.inputs(peer, rows)).loss)


def train(variant: str, case: Case, tower: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Trains; samples/s (median step), peak memory in MB, and the first loss."""
    dtype = DTYPES[settings.precision]
    peer = case.peer(settings.layers)
    rows = case.rows(peer)
    if variant == PEER:
        step = step_of_transformers(case, peer, rows, tower, dtype)
    else:
        step, _ = step_of_fit(case.ours(peer), rows, RATES[tower], dtype, variant == CACHED)
    del peer
    trained = repeat(step, settings.steps - 1)
    return {
        "samples_per_s": len(rows) / trained.seconds,
        "peak_mb": trained.peak_mb,
        "loss": trained.values[0],
    }


def step_of_transformers(
    case: Case, peer: nn.Module, rows: list[Row], tower: str, dtype: torch.dtype
) -> Callable[[], float]:
    """A step as a training loop over transformers' own class makes it."""
    peer.train()
    peer.get_submodule(case.tower).requires_grad_(tower == "full")
    peer.get_submodule(case.adaptor).requires_grad_(True)
    inputs = case.inputs(peer, rows)

    def loss() -> Tensor:
        with autocast(dtype):
            return peer(**inputs).loss

    return step_of_peer(peer, loss)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tower", nargs="+", default=["frozen"], choices=sorted(RATES))
    parser.add_argument("--layers", type=int, help="layers of each model; by default all")
    parser.add_argument(
        "--steps", type=int, default=4, help="steps in each; the first is not timed"
    )
    add_precision(parser)
    parser.add_argument("--only", choices=(OURS, CACHED, PEER), help=argparse.SUPPRESS)
    settings = parse(parser)
    for name, least in (("steps", 2), ("layers", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            parser.error(f"--{name}: expected at least {least}, found {value}")
    if settings.only:
        (name,), (tower,) = settings.cases, settings.tower
        print(json.dumps(train(settings.only, CASES[name], tower, settings)))
        return
    chosen(settings)
    for name in settings.cases:
        case = CASES[name]
        cut = "all layers" if settings.layers is None else f"{settings.layers} layers of each alone"
        print(f"\n{case.said}; {cut}")
        require_same(*losses(case, settings.layers), "transformers")
        for tower in settings.tower:
            print(f"\nimage tokenizer {tower}")
            variants = (OURS, PEER, CACHED) if tower == "frozen" else (OURS, PEER)
            measured = partial(child, settings, cases=[name], tower=[tower])
            STEPS.print_head()
            STEPS.print_rows(medians(in_turn(variants, settings.rounds, measured)))
    print("speed: ours / variant, higher is better; memory: ours / variant, lower is better")


if __name__ == "__main__":
    main()
