"""How fast a step was: samples and real tokens a second, and the share of the machine's peak.

Floating-point operations are counted, not estimated from a formula: torch's own counter runs over
one extra pass of the first micro-batch, forward and backward, and the count is scaled by what
the objective says that a pass's cost goes by: operations reckoned by `vlm.training.work`, or pairs.
"""

from __future__ import annotations

import time

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


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The device's peak in operations a second, and where the figure comes from: the data sheet
    for a GPU that is listed (bf16), else the best of a few large matrix products."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if known in name:
                return tflops * 1e12, f"{known} data sheet"
    side = 4096 if device.type == "cuda" else 1536
    a = torch.ones(side, side, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best, f"measured {str(dtype).removeprefix('torch.')} matrix product"


class Meter:
    """Counts work between two readings.

    peak: the device's operations a second; ranks: processes that share the work.
    """

    def __init__(self, peak: float, ranks: int) -> None:
        self.peak = peak * ranks
        self.flops_per_work: float | None = None
        self.start = time.perf_counter()
        self.samples = self.tokens = self.positions = self.work = 0
        self.waited = 0.0

    def count_flops(self, run, work: int) -> None:
        """Runs `run()` under torch's counter; `work` is what its cost goes by."""
        with flop_counter() as counter:
            run()
        self.flops_per_work = counter.get_total_flops() / max(work, 1)

    def add(self, samples: int, tokens: int, positions: int, work: int, waited: float) -> None:
        """samples, real (unpadded) stream places, places computed, what the cost goes by, seconds
        waited for data."""
        self.samples += samples
        self.tokens += tokens
        self.positions += positions
        self.work += work
        self.waited += waited

    def read(self) -> dict[str, float]:
        """Rates since the last reading: samples_per_s, tokens_per_s, mfu and data_wait (shares of
        peak and of time), utilisation (real places / places computed)."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        flops = (self.flops_per_work or 0.0) * self.work
        rates = {
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "mfu": flops / seconds / self.peak,
            "data_wait": self.waited / seconds,
            "utilisation": self.tokens / max(self.positions, 1),
        }
        self.start = time.perf_counter()
        self.samples = self.tokens = self.positions = self.work = 0
        self.waited = 0.0
        return rates
