"""The harness of the benchmarks: precision and machine, fresh processes, peak memory, tables.

A figure tells nothing without the machine that it was measured on: CPUs differ by a factor of a
thousand in bf16. So every benchmark takes `--precision`, computes on both sides in what it chooses,
and prints the CPU or GPU, its instructions, cores and threads and its measured speed by dtype.

A script measures each variant in processes of its own: `child` starts the script again with its own
options and `--only VARIANT`, and reads the JSON that it prints. Variants take turns for several
rounds; reported are medians, and ratios of the first variant's to the others', which alone carry
over to other machines of the kind.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from vlm.precision import Choice, Precision, choose, machine_line
from vlm.renamed import require_new_names

STATUS = Path("/proc/self/status")
Figures = dict[str, Any]


def parser_for(about: str | None, rounds: bool = True) -> argparse.ArgumentParser:
    """A benchmark's parser. about: the script's docstring. rounds: whether it has `--rounds`."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    if rounds:
        parser.add_argument("--rounds", type=int, default=3, help="processes of each variant")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options on the command line; one of an earlier version ends the program with one line
    that names the one of today."""
    settings, rest = parser.parse_known_args()
    try:
        require_new_names(rest, vars(settings))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return settings


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


def command(settings: argparse.Namespace, *only: Any, **changed: Any) -> list[str]:
    """The command line of this script with `--only` and the same options.

    changed: options that differ; None and False leave one out.

    >>> command(argparse.Namespace(steps=4, only=None, profile=True), "ours", steps=2)[2:]
    ['--steps', '2', '--profile', '--only', 'ours']
    """
    words = [sys.executable, sys.argv[0]]
    for name, value in (vars(settings) | changed).items():
        if name == "only" or value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return [*words, "--only", *map(str, only)]


def child(
    settings: argparse.Namespace, *only: Any, env: Mapping[str, str] | None = None, **changed: Any
) -> Any:
    """What the last line that `command` prints says, as JSON; env: variables besides this
    process's. Ends this process where the other one fails, whose error stands above."""
    words = command(settings, *only, **changed)
    done = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, env=os.environ | (env or {}), check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turn(
    variants: Sequence[str], rounds: int, measure: Callable[[str], Figures]
) -> dict[str, list[Figures]]:
    """Figures of each variant, a round of all after the other."""
    found: dict[str, list[Figures]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            found[variant].append(measure(variant))
    return found


def medians(found: Mapping[str, Sequence[Figures]]) -> dict[str, Figures]:
    """The median of each number over the rounds, by variant.

    >>> medians({"ours": [{"s": 1.0, "kind": "a"}, {"s": 3.0, "kind": "a"}, {"s": 2.0}]})
    {'ours': {'s': 2.0}}
    """
    return {
        variant: {
            key: statistics.median(run[key] for run in runs if key in run)
            for key, value in runs[0].items()
            if isinstance(value, (int, float))
        }
        for variant, runs in found.items()
    }


class Table(NamedTuple):
    """Medians of variants, a row each, beside ratios of the first variant's.

    columns: heading -> (figure, format such as "10.2f"). ratios: heading -> (figure, format), the
    first variant's figure over the row's. inverted: headings of ratios the other way round.
    width: of the variants' names. lead: heading and width of a column before them.
    """

    columns: dict[str, tuple[str, str]]
    ratios: dict[str, tuple[str, str]]
    width: int = 18
    inverted: tuple[str, ...] = ()
    lead: tuple[str, int] | None = None

    def print_head(self) -> None:
        words = [f"{'variant':{self.width}}"]
        words += [f"{head:>{_width(form)}}" for head, (_, form) in self.columns.items()]
        words += [f"{head:>{_width(form) + 1}}" for head, (_, form) in self.ratios.items()]
        print(" ".join([*self._lead(self.lead[0] if self.lead else ""), *words]))

    def print_rows(self, found: Mapping[str, Figures], lead: str = "") -> None:
        first = next(iter(found.values()))
        for variant, figures in found.items():
            words = [f"{variant:{self.width}}"]
            words += [f"{figures[key]:{form}}" for key, form in self.columns.values()]
            for head, (key, form) in self.ratios.items():
                a, b = first[key], figures[key]
                words.append(f"{ratio(b, a) if head in self.inverted else ratio(a, b):{form}}x")
            print(" ".join([*self._lead(lead), *words]), flush=True)

    def _lead(self, text: str) -> list[str]:
        return [f"{text:{self.lead[1]}}"] if self.lead else []


STEPS = Table(
    columns={
        "samples/s": ("samples_per_s", "10.2f"),
        "peak MB": ("peak_mb", "9.0f"),
        "loss": ("loss", "8.4f"),
    },
    ratios={"speed": ("samples_per_s", "6.2f"), "memory": ("peak_mb", "6.2f")},
)
"""Of training steps: samples/s, peak memory, loss."""


def ratio(a: float, b: float) -> float:
    """a / b; no number where nothing was measured for b."""
    return a / b if b else math.nan


def _width(form: str) -> int:
    return int(form.partition(".")[0])


def reset_peak() -> None:
    """Forgets the process's peak memory so far, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """The process's peak resident memory in MB, since `reset_peak` where the system can."""
    if STATUS.exists():
        return _status_mb("VmHWM")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def resident_mb() -> float:
    """The process's resident memory in MB; its peak so far where the system does not tell."""
    return _status_mb("VmRSS") if STATUS.exists() else peak_mb()


def _status_mb(key: str) -> float:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


class Measured(NamedTuple):
    """One call. seconds, cpu_s: on the clock, and of this process on all cores. taken_mb: peak
    memory above what was held before; peak_mb: of the whole process. value: what the call gave."""

    seconds: float
    cpu_s: float
    taken_mb: float
    peak_mb: float
    value: Any


def measure(call: Callable[[], Any]) -> Measured:
    """Time and peak memory of one call."""
    gc.collect()
    before = resident_mb()
    reset_peak()
    start, worked = time.perf_counter(), time.process_time()
    value = call()
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - worked
    peak = peak_mb()
    return Measured(seconds, cpu_s, peak - before, peak, value)


class Repeated(NamedTuple):
    """Calls in a row. seconds: their median, the first skipped. peak_mb: of the process over all
    of them. values: what each gave."""

    seconds: float
    peak_mb: float
    values: list[Any]


def repeat(call: Callable[[], Any], count: int) -> Repeated:
    """`count` timed calls, after one that is not timed."""
    gc.collect()
    reset_peak()
    seconds, values = [], []
    for _ in range(count + 1):
        start = time.perf_counter()
        values.append(call())
        seconds.append(time.perf_counter() - start)
    return Repeated(statistics.median(seconds[1:]), peak_mb(), values)
