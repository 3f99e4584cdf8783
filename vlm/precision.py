"""Which precision a device computes fast in, by measurement, and what kind of machine it is.

CPUs differ by a factor of a thousand in bf16: some have matrix units for it, and on those that
have AVX2 alone a product is many times slower in it than in fp32. So what computes is chosen by a
short probe: the three matrix products of a linear layer in a training step (outputs, gradients of
inputs, gradients of weights), in each dtype, on one thread, so that work beside it counts for both.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

SMALL = (64, 256, 256)
"""Rows, inputs and outputs of the first products of a probe: milliseconds where bf16 is slow."""
MEDIUM = (128, 512, 512)
LARGE = (512, 1024, 1024)
FASTER = 1.1
"""How many times as fast bf16 must be to be taken unasked, so that two runs on a machine that is
alike in both do not differ."""
SLOW = 4.0
"""Dtypes of which one is slower by this factor in small products need no larger ones."""
INSTRUCTIONS = (
    ("amx_bf16", "AMX-BF16"),
    ("avx512_bf16", "AVX512-BF16"),
    ("avx512_f", "AVX-512"),
    ("avx2", "AVX2"),
    ("sve_bf16", "SVE-BF16"),
    ("bf16", "NEON-BF16"),
    ("neon", "NEON"),
)
"""What `torch.cpu.get_capabilities` calls an instruction set, the widest first, and its name."""
WIDER = ("avx512", "avx10", "amx")
"""How the names of instruction sets wider than AVX2 begin."""
BOUNDS = {
    "ATEN_CPU_CAPABILITY": {"default": ("avx2", *WIDER, "sve"), "avx2": WIDER},
    "ONEDNN_MAX_CPU_ISA": {
        "sse41": ("avx", "amx"),
        "avx": ("avx2", "avx_", *WIDER),
        "avx2": ("avx_vnni", *WIDER),
        "avx2_vnni": ("avx_vnni_int", *WIDER),
        "avx2_vnni_2": WIDER,
        "avx512_core": ("avx512_vnni", "avx512_bf16", "avx512_fp16", "avx10", "amx"),
        "avx512_core_vnni": ("avx512_bf16", "avx512_fp16", "avx10", "amx"),
        "avx512_core_bf16": ("avx512_fp16", "avx10", "amx"),
        "avx512_core_fp16": ("amx",),
        "avx10_1_512": ("amx",),
    },
}
"""Environment variable, value -> how the names of the instruction sets begin that torch's own
kernels, or oneDNN's, are then kept from. Other values bound none of INSTRUCTIONS.
Source: torch `aten/src/ATen/native/DispatchStub.cpp`; oneDNN, "CPU Dispatcher Control"."""


def dtype_name(precision: Precision) -> str:
    """What `vlm.load` calls a precision.

    >>> dtype_name("auto"), dtype_name("bf16")
    ('auto', 'bfloat16')
    """
    return "auto" if precision == "auto" else str(DTYPES[precision]).removeprefix("torch.")


class PrecisionError(ValueError):
    """A precision that the device cannot compute in; the message names both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The precision of a run or a model on a device.

    name: "bf16" or "fp32". reason: why, for people, such as "AMD EPYC (AVX2): bf16 products at
    0.06x the speed of fp32". slower: how many times slower than fp32 bf16 is, where it is taken all
    the same; else None.
    """

    name: str
    reason: str
    slower: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def warning(self) -> str | None:
        """One line for a precision that is slow on the device; None where it is not."""
        if self.slower is None:
            return None
        return (
            f"computing in {self.name}, though this device multiplies {self.slower:.3g} times as "
            f"fast in fp32 ({self.reason})"
        )


def choose(asked: Precision, device: torch.device | str) -> Choice:
    """The precision to compute in on a device: what is asked for, or, for "auto", bf16 where the
    device multiplies faster in it, else fp32.

    Raises ValueError for another name, PrecisionError where the device cannot compute in it.
    """
    if asked not in ("auto", *DTYPES):
        raise ValueError(f"precision is one of auto, {', '.join(DTYPES)}, found {asked!r}")
    if asked == "fp32":
        return Choice(name="fp32", reason="as asked")
    device = torch.device(device)
    ratio, reason = speed_ratio(device, torch.bfloat16)
    if asked == "auto":
        return Choice(name="bf16" if ratio > FASTER else "fp32", reason=reason)
    if ratio == 0:
        raise PrecisionError(
            f"precision bf16: the device does not compute in it ({reason}); take fp32 or auto, for "
            "a run that is resumed with --change precision"
        )
    return Choice(name="bf16", reason=reason, slower=1 / ratio if ratio < 1 else None)


def speed_ratio(device: torch.device | str, dtype: torch.dtype) -> tuple[float, str]:
    """How many times as fast as in fp32 a device multiplies in a 16-bit dtype, and how that is
    known. 0.0 where it cannot compute in the dtype at all. Measured once for each device.

    NVIDIA GPUs are known: from compute capability 8.0 on they have units for both dtypes, from 7.0
    on for float16 alone. Every other device is measured.
    """
    return _speed_ratio(str(torch.device(device)), dtype)


@cache
def _speed_ratio(device: str, dtype: torch.dtype) -> tuple[float, str]:
    name = str(dtype).removeprefix("torch.").replace("bfloat16", "bf16")
    kind = torch.device(device).type
    if kind == "cuda" and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(device)
        least = 8 if dtype == torch.bfloat16 else 7
        known = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
        if major >= least:
            return 2.0, f"{known} has units for {name}"
        return 0.5, f"{known} has no units for {name}"
    try:
        seconds = _probe(torch.device(device), dtype)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return 0.0, f"{device_name(device)}: {str(error).strip().splitlines()[0][:120]}"
    ratio = seconds[torch.float32] / seconds[dtype]
    about = device_name(device)
    if kind == "cpu":
        about += f" ({instructions()})"
    return ratio, f"{about}: {name} products at {ratio:.2g}x the speed of fp32"


def _probe(device: torch.device, dtype: torch.dtype) -> dict[torch.dtype, float]:
    """Seconds of the products in fp32 and in `dtype`, the shortest of some rounds in turn, so that
    work beside it slows both. On a CPU on one thread, for several wait for each other where the
    cores are busy, which takes far longer than small products do."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        seconds = _rounds(device, dtype, SMALL, 4)
        if 1 / SLOW < seconds[dtype] / seconds[torch.float32] < SLOW:
            seconds = _rounds(device, dtype, MEDIUM, 4)
    finally:
        if device.type == "cpu":
            torch.set_num_threads(threads)
    return seconds


def _rounds(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], rounds: int
) -> dict[torch.dtype, float]:
    products = {kind: _products(device, kind, shape) for kind in (torch.float32, dtype)}
    best = dict.fromkeys(products, float("inf"))
    for number in range(rounds):
        for kind, run in products.items():
            best[kind] = min(best[kind], run())
        if number and max(best.values()) > SLOW * min(best.values()):
            break
    return best


def _products(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> Callable[[], float]:
    """What computes the three products of a linear layer once, and gives the seconds it took."""
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(size, generator=generator).to(device, dtype)
        for size in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )

    @torch.no_grad()
    def run() -> float:
        start = time.perf_counter()
        made = torch.nn.functional.linear(x, weight), grad @ weight, grad.t() @ x
        if device.type != "cpu":
            [product[0, 0].item() for product in made]  # waits for the device
        return time.perf_counter() - start

    return run


def gflops(device: torch.device | str, dtype: torch.dtype) -> float:
    """Billions of operations a second (a multiplication and an addition are two) of the three
    products of a linear layer in a training step, on all threads. Measured once for each dtype and
    number of threads; 0.0 where the device cannot compute in the dtype."""
    return _gflops(str(torch.device(device)), dtype, torch.get_num_threads())


@cache
def _gflops(device: str, dtype: torch.dtype, threads: int) -> float:
    try:
        for shape, enough in ((MEDIUM, 0.02), (LARGE, float("inf"))):
            run = _products(torch.device(device), dtype, shape)
            seconds = min(run() for _ in range(3))
            if seconds > enough:  # a larger one would take long, and tell no more
                break
        else:
            seconds = min(seconds, *(run() for _ in range(5)))
    except RuntimeError:
        return 0.0
    rows, inputs, outputs = shape
    return 3 * 2 * rows * inputs * outputs / seconds / 1e9


def cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What kind of machine a device is, for records of measurements: "device" (its name),
    "instructions" (of CPUs, as torch may use them), "cores" and "threads" of the CPU, and "gflops"
    by dtype, as `gflops` measures them."""
    values: dict[str, Any] = {"device": device_name(device)}
    if torch.device(device).type == "cpu":
        values["instructions"] = instructions()
    values |= {"cores": cores(), "threads": torch.get_num_threads()}
    measured = {
        str(dtype).removeprefix("torch."): round(gflops(device, dtype), 1)
        for dtype in DTYPES.values()
    }
    return values | {"gflops": measured}


def machine_line(device: torch.device | str = "cpu") -> str:
    """`machine` in one line, for people."""
    values = machine(device)
    rates = ", ".join(f"{name} {rate:,.3g}" for name, rate in values["gflops"].items())
    about = values["device"]
    if "instructions" in values:
        about += f", {values['instructions']}"
    return f"{about}, {values['cores']} cores, {values['threads']} threads; GFLOP/s: {rates}"


def device_name(device: torch.device | str) -> str:
    """The device's name as its maker gives it, such as "AMD EPYC" or "NVIDIA H200"."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name() if device.type == "cpu" else device.type


@cache
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def instructions() -> str:
    """The widest instruction set of the CPU that torch may use, bf16 units included, such as
    "AVX2"; ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA, which bound it, are honoured. Of one with
    none of INSTRUCTIONS, its architecture, such as "x86_64"."""
    return next((name for has, name in INSTRUCTIONS if supports(has)), platform.machine())


def supports(capability: str) -> bool:
    """Whether the CPU has an instruction set, as `torch.cpu.get_capabilities` calls it, and torch
    may use it: not where ATEN_CPU_CAPABILITY or ONEDNN_MAX_CPU_ISA, either of them, takes it
    away."""
    if capability.startswith(_taken_away()):
        return False
    return bool(torch.cpu.get_capabilities().get(capability, False))


def _taken_away() -> tuple[str, ...]:
    """How the names of instruction sets begin that the environment keeps torch from using."""
    return tuple(
        start
        for variable, bounds in BOUNDS.items()
        for start in bounds.get(os.environ.get(variable, "").lower(), ())
    )
