"""What `vlm plan` says of a step's memory, beside what steps really take on this machine's CPU.

    python eval/plan_memory.py

For each case, of every family that trains here, a step is simulated without data (see
`vlm.training.memory.simulate`), and two steps are carried out in a fresh process by the same
objective and training state as `fit`'s, in the same precision. Measured is the
process's peak resident memory during the second step, above what it held before the model was
built, when a small model of the same kind had already run once, so that libraries and their
compiled kernels are not counted. glibc is told to give back what is freed at once: so the figure
is what is held, not what the allocator kept.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench import (
    add_precision,
    autocast,
    child,
    chosen,
    parse,
    parser_for,
    peak_mb,
    ratio,
    reset_peak,
    resident_mb,
)
from speed_training import llava, ours_from
from torch import nn

from vlm.families.contrastive.batch import Pair
from vlm.families.decoder_only.batch import IMAGE, Row
from vlm.families.line_reader import layout as line_reader
from vlm.families.line_reader.batch import LineRow
from vlm.precision import DTYPES
from vlm.systems import scratch
from vlm.training.memory.simulate import SimulatedStep
from vlm.training.objectives.base import Objective
from vlm.training.objectives.contrastive import Contrast
from vlm.training.objectives.ctc import Transcribe
from vlm.training.objectives.next_token import NextToken
from vlm.training.stages import FROZEN, Stage
from vlm.training.state import build_state

CHARACTERS = "".join(map(chr, range(33, 127)))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its rows and how it is trained. small: the same, far smaller, to warm up with."""

    make: Callable[[bool], tuple[nn.Module, list[Any], Objective]]
    rates: tuple[tuple[str, float | None], ...] = (("*", 1e-4),)
    micro_batches: int = 1

    @property
    def stage(self) -> Stage:
        return Stage(name="plan", rates=self.rates, steps=2, batch=8, micro_batch=8, warmup_steps=0)


def decoder_only(small: bool, vocabulary: int = 16384, answer: int = 96) -> tuple:
    """A SigLIP and a Llama of a fifth of the demo's size, rows of an image and text."""
    width, layers = (64, 1) if small else (384, 8)
    vocabulary = 512 if small else vocabulary
    vision = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                  num_attention_heads=width // 64, image_size=224, patch_size=16)  # fmt: skip
    text = dict(vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
                num_hidden_layers=layers, num_attention_heads=width // 64, pad_token_id=2,
                num_key_value_heads=width // 64, tie_word_embeddings=True)  # fmt: skip
    module = ours_from(llava(vision, text, image_id=vocabulary - 1))
    count, image_tokens = (1, 196) if small else (8, 196)
    rows = []
    for number in range(count):
        length = 20 + answer - number  # unequal, as captions are
        ids = torch.full((image_tokens + length,), IMAGE)
        ids[image_tokens:] = torch.randint(3, vocabulary - 1, (length,))
        scored = torch.zeros(len(ids), dtype=torch.bool)
        scored[image_tokens + 20 :] = True
        views = ((torch.randn(3, 224, 224), (0, 0)),)
        rows.append(Row(name=f"row {number}", ids=ids, scored=scored, views=views))
    return module, rows, NextToken(2)


def contrastive(small: bool) -> tuple:
    """A SigLIP from scratch, images with captions."""
    width, depth, count = (64, 1, 2) if small else (384, 6, 32)
    sizes = scratch.ScratchConfig(
        image_px=128, patch_px=8, width=width, depth=depth, text_width=width, text_depth=depth,
        length=32, embed_width=width,
    )  # fmt: skip
    module = scratch.build(sizes, "sigmoid", 0).module
    rows = [
        Pair(
            name=f"row {number}",
            ids=torch.randint(3, 1000, (8 + number % 16,)),
            views=[(torch.randn(3, 128, 128), (0, 0))],
        )
        for number in range(count)
    ]
    return module, rows, Contrast("sigmoid")


def lines(small: bool) -> tuple:
    """A line reader, lines of two widths."""
    width, layers, count = (64, 1, 2) if small else (384, 8, 24)
    module = line_reader.build(CHARACTERS, width=width, layers=layers).module
    rows = [
        LineRow(
            name=f"row {number}",
            pixels=torch.randn(3, 32, 512 + 256 * (number % 2)),
            ids=(1, 2, 3) * 8,
        )
        for number in range(count)
    ]
    return module, rows, Transcribe()


ADAPTOR = (("adaptor.*", 1e-3), ("*", FROZEN))
CASES = {
    "decoder-only, adaptor": Case(make=decoder_only, rates=ADAPTOR),
    "decoder-only, all": Case(make=decoder_only),
    "decoder-only, all, 2 micro-batches": Case(make=decoder_only, micro_batches=2),
    "decoder-only, vocabulary of 128k": Case(
        make=lambda small: decoder_only(small, 131072), rates=ADAPTOR
    ),
    "contrastive, all": Case(make=contrastive),
    "contrastive, all, 2 micro-batches": Case(make=contrastive, micro_batches=2),
    "line reader, all": Case(make=lines),
}


def parts(rows: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """The rows in `count` equal micro-batches."""
    size = len(rows) // count
    return [rows[number * size : (number + 1) * size] for number in range(count)]


def planned_mb(case: Case, dtype: torch.dtype) -> float:
    """The peak of a simulated step in MB."""
    module, rows, objective = case.make(False)
    simulated = SimulatedStep(module, case.stage, objective, dtype, gpu=False)
    return simulated.run(parts(rows, case.micro_batches)).peak.total / 2**20


def given_back_mb() -> float:
    """The process's resident memory in MB, what the allocator can give back given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_mb()


def learn(case: Case, dtype: torch.dtype, small: bool, before_last: Callable[[], None]) -> None:
    """Two steps as `fit` makes them; calls `before_last` between them."""
    module, rows, objective = case.make(small)
    state = build_state(module, case.stage, dtype)
    count = 1 if small else case.micro_batches
    batches = [batch for part in parts(rows, count) for batch in objective.collate(part)]
    del rows
    totals = dict.fromkeys(objective.totals, 100)
    for last in (False, True):
        if last:
            before_last()
        state.learn(objective, batches, totals, lambda: autocast(dtype))


def measured_mb(name: str, dtype: torch.dtype) -> float:
    """The peak of a real step in this process, in MB above what it held before the model."""
    learn(CASES[name], dtype, True, lambda: None)
    before = given_back_mb()
    learn(CASES[name], dtype, False, lambda: (given_back_mb(), reset_peak()))
    return peak_mb() - before


def main() -> None:
    parser = parser_for(__doc__, rounds=False)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    add_precision(parser)
    parser.add_argument("--only", choices=list(CASES), help=argparse.SUPPRESS)
    settings = parse(parser)
    if settings.only:
        print(json.dumps(measured_mb(settings.only, DTYPES[settings.precision])))
        return
    dtype = chosen(settings).dtype
    give_back = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_ARENA_MAX": "1"}
    print(f"{'case':36} {'planned MB':>11} {'measured MB':>12} {'difference':>11}")
    for name in settings.cases:
        planned = planned_mb(CASES[name], dtype)
        found = child(settings, name, env=give_back)
        print(
            f"{name:36} {planned:11.0f} {found:12.0f} {ratio(planned, found) - 1:+11.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
