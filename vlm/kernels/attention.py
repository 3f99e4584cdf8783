"""Attention by whole products, for bf16 on CPUs with instructions for it but no matrix tiles (AMX).

torch's fused attention there computes scores in parts that are too small for its products, backward
more so than forward. For the few hundred positions of an image or of an example, a product for many
heads at once, a softmax and one more product take half its time. The backward pass computes the
shares again, as the fused one does, so that nothing is kept beside what went in. In fp32 the fused
attention is the faster one, forward and backward.

Scores are rounded to 16 bits before the softmax, as in transformers' `eager` attention; keys, once
scaled, too.

Shapes: V view or example, H query head, h key head, L position, F width of queries and keys, G
width of values, q query of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.compat.torch import softmax_backward
from vlm.precision import supports

MOST_POSITIONS, MOST_CAUSAL = 1024, 512
"""Longest runs for which it gains; longer ones, where a position sees only earlier ones, are as
fast in torch's small parts."""
QUERIES = 128
"""Queries of a block where a position sees only earlier ones, so that few scores are made in
vain."""
_disabled: ContextVar[bool] = ContextVar("disabled", default=False)


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Within, what runs on a CPU goes the way that it goes on a GPU."""
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def gains(query: Tensor, longest: int, *, causal: bool = False) -> bool:
    """Whether attention by whole products is the faster one for queries like these, in runs of at
    most `longest` positions."""
    return (
        query.dtype == torch.bfloat16
        and on_cpu(query)
        and longest <= (MOST_CAUSAL if causal else MOST_POSITIONS)
        and _has_instructions()
    )


def on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is worked on as on a CPU: it lies there, and not within `as_on_gpus`."""
    return tensor.device.type == "cpu" and not _disabled.get()


@cache
def _has_instructions() -> bool:
    """Whether the CPU multiplies bf16 by instructions of its own, and without tiles. Where it has
    none, whole products in bf16 are as slow as all others, and the fused attention's are not."""
    return (supports("avx512_bf16") or supports("bf16")) and not supports("amx_bf16")


def whole_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    causal: bool = False,
    lengths: tuple[int, ...] | None = None,
) -> Tensor:
    """float[V, L, H, G]: what each query reads.

    query: float[V, H, L, F]; key: float[V, h, L, F]; value: float[V, h, L, G]; h divides H.
    scale: of the scores. causal: whether a position sees itself and earlier ones alone. lengths: of
    runs that lie end to end in each of the V and do not see each other; None for one run.
    """
    runs = (query.shape[2],) if lengths is None else lengths
    return _WholeProducts.apply(query, key, value, scale, causal, runs)


class _WholeProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, causal, runs):
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.causal, ctx.runs = scale, causal, runs
        V, H, L, _ = query.shape
        read = query.new_empty(V, L, H, value.shape[3])
        later = _later(query, runs) if causal else None
        for view, start, stop in _runs(V, runs):
            keys, values = key[view, :, start:stop] * scale, value[view, :, start:stop]
            for first, last, _, shares in _shares(query[view, :, start:stop], keys, later):
                part = torch.bmm(shares, values[:, : shares.shape[2]])
                read[view, start + first : start + last] = _by_position(part, H)
        return read

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        # Each gradient lies position by position, as the projections after it want theirs.
        by_query, by_key, by_value = (
            x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value)
        )
        H, h = query.shape[1], key.shape[1]
        later = _later(query, ctx.runs) if ctx.causal else None
        for view, start, stop in _runs(query.shape[0], ctx.runs):
            run = slice(start, stop)
            keys, values = key[view, :, run] * ctx.scale, value[view, :, run]
            of_keys = of_values = None
            for first, last, queries, shares in _shares(query[view, :, run], keys, later):
                block = slice(start + first, start + last)
                seen = shares.shape[2]
                out = _by_head(grad[view, block], h)
                by_share = torch.bmm(out, values[:, :seen].transpose(1, 2))
                by_score = softmax_backward(by_share, shares)
                by_query[view, block] = _by_position(torch.bmm(by_score, keys[:, :seen]), H)
                found_keys = torch.bmm(by_score.transpose(1, 2), queries)
                found_values = torch.bmm(shares.transpose(1, 2), out)
                if last - first == stop - start:  # the only block
                    of_keys, of_values = found_keys, found_values
                    continue
                if of_keys is None:
                    of_keys = torch.zeros_like(keys, dtype=torch.float32)
                    of_values = torch.zeros_like(values, dtype=torch.float32)
                of_keys[:, :seen] += found_keys
                of_values[:, :seen] += found_values
            by_key[view, run] = of_keys.mul_(ctx.scale).transpose(0, 1)
            by_value[view, run] = of_values.transpose(0, 1)
        return (*(x.transpose(1, 2) for x in (by_query, by_key, by_value)), None, None, None)


def _runs(views: int, lengths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """The view, first position and position after the last of every run."""
    for view in range(views):
        start = 0
        for length in lengths:
            yield view, start, start + length
            start += length


def _shares(
    query: Tensor, key: Tensor, later: Tensor | None
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Of one run, block by block: its first query and the one after its last, the queries
    float[h, H / h * q, F], and what share of each key they read, float[h, H / h * q, keys seen].

    query: float[H, L, F]; key: float[h, L, F], scaled. later: what is added to the scores of a
    block's own positions (see `_later`); None where all positions are seen.
    """
    H, L, F = query.shape
    h = key.shape[0]
    keys = key.transpose(1, 2)
    size = L if later is None else QUERIES
    for first in range(0, L, size):
        last = min(first + size, L)
        queries = query[:, first:last].reshape(h, H // h * (last - first), F)
        seen = L if later is None else last
        scores = torch.bmm(queries, keys[:, :, :seen])
        if later is not None:
            by_position = scores.view(h, H // h, last - first, seen)
            by_position[..., first:] += later[: last - first, : last - first]
        yield first, last, queries, torch.softmax(scores, -1)


def _later(query: Tensor, runs: tuple[int, ...]) -> Tensor:
    """float[q, q] for the largest block: 0 for a position itself and earlier ones, minus infinity
    for later ones."""
    side = min(QUERIES, max(runs))
    return query.new_full((side, side), float("-inf")).triu_(1)


def _by_position(read: Tensor, heads: int) -> Tensor:
    """float[q, H, F] of float[h, H / h * q, F]."""
    return read.view(heads, -1, read.shape[2]).transpose(0, 1)


def _by_head(grad: Tensor, heads: int) -> Tensor:
    """float[h, H / h * q, F] of float[q, H, F]."""
    return grad.transpose(0, 1).reshape(heads, -1, grad.shape[2])
