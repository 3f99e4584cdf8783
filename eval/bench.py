"""What the benchmarks share: the precision that both sides compute in, and the kind of machine.

A figure tells nothing without the machine that it was measured on: CPUs differ by a factor of a
thousand in bf16. So every benchmark takes `--precision`, computes on both sides in what it chooses,
and prints the CPU or GPU, its instructions, cores and threads and its measured speed by dtype.
"""

from __future__ import annotations

import argparse
import sys
from typing import get_args

import torch

from vlm.precision import Choice, Precision, choose, machine_line


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Gives a benchmark the option `--precision`."""
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="auto",
        help="what both sides compute in; auto: bf16 where the device multiplies faster in it",
    )


def chosen(settings: argparse.Namespace, device: str = "cpu") -> Choice:
    """The precision of a benchmark. Prints it, why, and the machine's kind; `settings.precision`
    is its name from then on, so that every process of the benchmark computes in it."""
    choice = choose(settings.precision, device)
    print(f"machine: {machine_line(device)}")
    print(f"precision: {choice.name} ({choice.reason})", flush=True)
    if choice.warning() is not None:
        print(f"warning: {choice.warning()}", file=sys.stderr)
    settings.precision = choice.name
    return choice


def autocast(dtype: torch.dtype) -> torch.autocast:
    """What a step computes in on a CPU: bf16 under autocast, fp32 as it is."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
