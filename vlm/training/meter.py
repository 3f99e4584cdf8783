"""How fast a step was: samples and real tokens a second, operations a second, and, of devices whose
peak is known, the share of it (MFU).

Floating-point operations are counted, not estimated from a formula: torch's own counter runs over
one extra pass of the first micro-batch, forward and backward, and the count is scaled by what
the objective says that a pass's cost goes by: operations reckoned by `vlm.training.flop_cost`, or
pairs.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from vlm.training.flops import flop_counter

PEAK_TFLOPS = {  # dense bf16, from each maker's data sheet
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "4090": 165.0,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's peak in operations a second, by its maker's data sheet; None where none is known
    (CPUs, other GPUs, fp32): a peak that is measured beside other work, or in products of another
    shape, may be below what a step reaches, and a share of it above 100 %."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if known in name:
                return tflops * 1e12
    return None


class Meter:
    """Counts what was done between two readings.

    peak: the device's operations a second, None where it is not known; ranks: processes that share
    a step, each on a device of its own.
    """

    def __init__(self, peak: float | None, ranks: int) -> None:
        self.peak = None if peak is None else peak * ranks
        self.flops_per_cost: float | None = None
        self.start = time.perf_counter()
        self.samples = self.tokens = self.positions = self.cost = 0
        self.waited = 0.0

    def count_flops(self, run, cost: int) -> None:
        """Runs `run()` under torch's counter. cost: of the pass, as the objective counts it."""
        with flop_counter() as counter:
            run()
        self.flops_per_cost = counter.get_total_flops() / max(cost, 1)

    def add(self, samples: int, tokens: int, positions: int, cost: int, waited: float) -> None:
        """samples, real (unpadded) positions of the stream, positions computed, cost as the
        objective counts it, seconds waited for data."""
        self.samples += samples
        self.tokens += tokens
        self.positions += positions
        self.cost += cost
        self.waited += waited

    def read(self) -> dict[str, float]:
        """Rates since the last reading: samples_per_s, gflops_per_s (of all ranks), mfu (share of
        the peak, where it is known), data_wait (share of the time), and where there is a stream of
        text tokens_per_s and utilisation (real positions / positions computed).

        >>> meter = Meter(peak=None, ranks=1)
        >>> meter.add(samples=2, tokens=0, positions=0, cost=2, waited=0.0)
        >>> sorted(meter.read())
        ['data_wait', 'gflops_per_s', 'samples_per_s']
        """
        seconds = max(time.perf_counter() - self.start, 1e-9)
        flops = (self.flops_per_cost or 0.0) * self.cost
        rates = {
            "samples_per_s": self.samples / seconds,
            "gflops_per_s": flops / seconds / 1e9,
            **({} if self.peak is None else {"mfu": flops / seconds / self.peak}),
            "data_wait": self.waited / seconds,
        }
        if self.positions:
            rates["tokens_per_s"] = self.tokens / seconds
            rates["utilisation"] = self.tokens / self.positions
        self.start = time.perf_counter()
        self.samples = self.tokens = self.positions = self.cost = 0
        self.waited = 0.0
        return rates


def device_use(figures: dict[str, Any]) -> str:
    """The use of the device, of a reading, for people: MFU, or operations a second where the peak
    is not known.

    >>> device_use({"gflops_per_s": 61.2}), device_use({"gflops_per_s": 4e5, "mfu": 0.41})
    ('61 GFLOP/s', 'MFU 41%')
    """
    if "mfu" in figures:
        return f"MFU {figures['mfu']:.0%}"
    rate = figures["gflops_per_s"]
    return f"{rate:,.0f} GFLOP/s" if rate >= 10 else f"{rate:.2g} GFLOP/s"
