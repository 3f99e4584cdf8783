"""Floating-point operations, counted by torch's own counter, with what it leaves out: attention
fused for CPUs."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from vlm.compat.torch import CPU_ATTENTION, CPU_ATTENTION_BACKWARD


def flop_counter() -> FlopCounterMode:
    """A counter of the operations done within it; `get_total_flops` gives them.

    Fused attention counts as torch counts it on GPUs: two products forward, and backward five, of
    which one makes the scores again, those of later positions that a position does not see too.
    That of `vlm.kernels.attention` counts by the products that it makes, which leave out most of
    those.
    """
    return FlopCounterMode(
        display=False,
        custom_mapping={
            CPU_ATTENTION: _forward,
            CPU_ATTENTION_BACKWARD: _backward,
        },
    )


def _forward(query: tuple, key: tuple, value: tuple, *_: Any, **more: Any) -> int:
    return _product(query, key) + _product(query, value)


def _backward(grad: tuple, query: tuple, key: tuple, value: tuple, *_: Any, **more: Any) -> int:
    return 3 * _product(query, key) + 2 * _product(query, value)


def _product(query: tuple, key: tuple) -> int:
    """Operations of one product of every query with every key; shapes (view, head, position,
    width), where several query heads may share one of the key."""
    return 2 * prod(query[:-1]) * key[-2] * key[-1]
