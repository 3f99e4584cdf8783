"""The loss over a large vocabulary beside transformers' own: same states, same head, one run.

    python eval/speed_loss.py

Places are rows of final states, of which a part is scored; the head has PaliGemma's 257,216 ids and
random weights. Three ways go from there to the gradient of the states and, where it learns, of the
head: transformers' (as its Llava and PaliGemma classes do: logits at every place, cast to fp32,
cross-entropy of shifted labels), our plain one (logits at scored places only) and ours in chunks.

First all three give loss and gradients in fp32 at a few places, which must agree to 1e-5. Then each
runs in the same precision in a process of its own, in turn, for several rounds. Reported are the
medians of seconds, of the processor's seconds (which other work on the machine changes less) and of
the peak memory of a pass forward and backward above that of states and head, and the ratios, which
alone carry over to other machines of the kind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch
from bench import Table, add_precision, child, chosen, in_turn, measure, medians, parser_for
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from vlm.losses.token import backward_state_losses, token_losses
from vlm.precision import DTYPES

VARIANTS = ("ours", "ours-plain", "transformers")
HEADS = ("frozen", "trainable")
TABLE = Table(
    columns={
        "s": ("seconds", "7.2f"),
        "cpu s": ("cpu_s", "7.2f"),
        "peak MB": ("peak_mb", "8.0f"),
        "loss": ("loss", "9.5f"),
    },
    ratios={
        "time": ("seconds", "5.2f"),
        "cpu": ("cpu_s", "5.2f"),
        "memory": ("peak_mb", "6.2f"),
    },
    width=13,
    lead=("head", 10),
)
ROWS = 8
TOLERANCE = 1e-5


def inputs(
    settings: argparse.Namespace, head: str, dtype: torch.dtype, places: int
) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """The head, states float[B, T, D], ids int64[B, T], and which are scored, bool[B, T]: the end
    of each row, unequal from row to row, as answers are."""
    torch.manual_seed(0)
    layer = nn.Linear(settings.width, settings.vocab, bias=False, dtype=dtype)
    nn.init.normal_(layer.weight, std=2 * settings.width**-0.5)
    layer.requires_grad_(head == "trainable")
    T = places // ROWS
    states = torch.randn(ROWS, T, settings.width).to(dtype).requires_grad_()
    ids = torch.randint(0, settings.vocab, (ROWS, T))
    shares = torch.linspace(0.5, 1.5, ROWS) * settings.scored
    answers = (shares * T).round().long().clamp(1, T - 1)
    return layer, states, ids, torch.arange(T) >= T - answers[:, None]


def passes(
    variant: str, layer: nn.Linear, states: Tensor, ids: Tensor, scored: Tensor
) -> Callable[[], float]:
    """One pass forward and backward, as a function that gives the mean loss."""
    labels, targets = ids.masked_fill(~scored, -100), ids[scored]

    def peer() -> float:
        loss = ForCausalLMLoss(layer(states), labels, layer.out_features)
        loss.backward()
        return float(loss.detach())

    def plain() -> float:
        logits = layer(states[:, :-1][scored[:, 1:]])
        loss = token_losses(logits, targets).sum() / len(targets)
        loss.backward()
        return float(loss.detach())

    def ours() -> float:
        chosen = states[:, :-1][scored[:, 1:]]
        losses = backward_state_losses(layer, chosen, targets, 1 / len(targets))
        return float(losses.sum()) / len(targets)

    return {"ours": ours, "ours-plain": plain, "transformers": peer}[variant]


def compare(settings: argparse.Namespace) -> float:
    """Prints the fp32 loss of each way and how far its gradients are from ours; the largest
    relative difference."""
    found = {}
    for variant in VARIANTS:
        layer, states, *rest = inputs(settings, "trainable", torch.float32, 16 * ROWS)
        found[variant] = passes(variant, layer, states, *rest)(), states.grad, layer.weight.grad
    worst = 0.0
    loss, *grads = found["ours"]
    for variant, (other, *others) in found.items():
        apart = [float((a - b).norm() / b.norm()) for a, b in zip(grads, others)]
        worst = max(worst, abs(loss - other) / other, *apart)
        print(
            f"fp32 loss {variant:12} {other:.6f}; gradients differ from ours by "
            f"{apart[0]:.1e} (states) and {apart[1]:.1e} (head)"
        )
    return worst


def figures(variant: str, head: str, settings: argparse.Namespace) -> dict[str, float]:
    """Median seconds and peak MB of a pass above what is there before it."""
    layer, states, *rest = inputs(settings, head, DTYPES[settings.precision], settings.places)
    run = passes(variant, layer, states, *rest)
    found = []
    for _ in range(settings.steps + 1):
        states.grad = layer.weight.grad = None
        found.append(measure(run))
    return {
        "seconds": statistics.median(each.seconds for each in found[1:]),
        "cpu_s": statistics.median(each.cpu_s for each in found[1:]),
        "peak_mb": max(each.taken_mb for each in found[1:]),
        "loss": found[-1].value,
    }


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--width", type=int, default=576, help="numbers in a state")
    parser.add_argument("--vocab", type=int, default=257_216, help="ids, PaliGemma's by default")
    parser.add_argument("--places", type=int, default=2048, help="places in a batch")
    parser.add_argument("--scored", type=float, default=0.25, help="share of them that is scored")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS)
    parser.add_argument("--steps", type=int, default=1, help="passes in each; one more goes before")
    add_precision(parser)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.only:
        print(json.dumps(figures(*settings.only, settings)))
        return
    chosen(settings)
    if compare(settings) > TOLERANCE:
        sys.exit("losses or gradients differ: speeds would mean nothing")
    print(
        f"{settings.precision}, {settings.places} places, {settings.scored:.0%} scored, "
        f"width {settings.width}, {settings.vocab} ids; time and memory: ours / variant, lower is "
        "better"
    )
    TABLE.print_head()
    for head in settings.heads:
        found = in_turn(
            VARIANTS, settings.rounds, lambda variant, head=head: child(settings, variant, head)
        )
        TABLE.print_rows(medians(found), head)


if __name__ == "__main__":
    main()
