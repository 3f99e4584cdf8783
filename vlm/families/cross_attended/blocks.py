"""Gated cross-attention: a block that a decoder layer has before it, and that reads the memory.

A block adds two branches to the states of text positions, attention to the image tokens that each
position sees and a feed-forward layer, each behind a gate that starts at 0: a fresh block leaves
the language model as it is. It computes at the positions that see an image alone, so that the
others get exactly nothing, and for runs of positions that see the same tokens, without a mask.

Shapes: B row, T text position, N text position of all rows, P packed image tokens, D width,
A head, K key/value head, F features per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.compat.transformers import GradientCheckpointingLayer
from vlm.families.cross_attended.memory import MemoryView, Run
from vlm.resampler import GatedFeedForward


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedBlockConfig:
    """One gated cross-attention block; all blocks of a model are alike.

    width: of the language model. memory_width: of the image tokens. eps: of the norms.
    norm: "rms" or "layer". qk_norm: whether queries and keys are normed per head (RMS).
    gate: "scalar", one number, or "vector", one for each of the width; tanh of it is the gate.
    mlp: "swiglu", or "gelu", two layers with GELU between; without biases, as all linear layers.
    Raises ValueError where heads are no multiple of kv_heads.
    """

    width: int
    memory_width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    eps: float
    norm: Literal["rms", "layer"] = "rms"
    qk_norm: bool = True
    gate: Literal["scalar", "vector"] = "scalar"
    mlp: Literal["swiglu", "gelu"] = "swiglu"

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, found {self.heads} and {self.kv_heads}"
            )


class RMSNorm(nn.Module):
    """x over its root mean square, which is computed in fp32, times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class GeluMLP(nn.Module):
    """down(gelu(up(x))), without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class GatedBlock(GradientCheckpointingLayer):
    """Gated cross-attention and a gated feed-forward layer.

    Sources: Flamingo (arXiv 2204.14198), section 3.2; Llama 3 (arXiv 2407.21783), section 7.2;
    transformers, `MllamaCrossAttentionDecoderLayer`, `IdeficsGatedCrossAttentionLayer`.
    """

    def __init__(self, config: GatedBlockConfig) -> None:
        super().__init__()
        self.config = config
        D, F_ = config.width, config.head_width
        norm = RMSNorm if config.norm == "rms" else nn.LayerNorm
        self.attention_norm = norm(D, eps=config.eps)
        self.q_proj = nn.Linear(D, config.heads * F_, bias=False)
        self.k_proj = nn.Linear(config.memory_width, config.kv_heads * F_, bias=False)
        self.v_proj = nn.Linear(config.memory_width, config.kv_heads * F_, bias=False)
        self.o_proj = nn.Linear(config.heads * F_, D, bias=False)
        self.q_norm = RMSNorm(F_, config.eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(F_, config.eps) if config.qk_norm else nn.Identity()
        self.mlp_norm = norm(D, eps=config.eps)
        inner = config.mlp_width
        gated = config.mlp == "swiglu"
        self.mlp = GatedFeedForward(D, inner, D) if gated else GeluMLP(D, inner)
        gate = 1 if config.gate == "scalar" else D
        self.attention_gate = nn.Parameter(torch.zeros(gate))
        self.mlp_gate = nn.Parameter(torch.zeros(gate))

    def forward(self, hidden: Tensor, view: MemoryView) -> Tensor:
        """The states float[B, T, D] that the decoder layer after it is to take.

        hidden: float[B, T, D]. view: what its positions see.
        """
        runs = list(view.runs)
        reading = [run for run in runs if run.first < run.last]
        feeding = [run for run in runs if run.feeds]
        x = hidden.flatten(0, 1)
        x = change(x, reading, lambda part: self._attend(part, reading, view))
        x = change(x, feeding, self._feed)
        return x.view_as(hidden)

    def _attend(self, x: Tensor, runs: Sequence[Run], view: MemoryView) -> Tensor:
        """float[N, D] of the positions of `runs`, end to end, with what they read."""
        key, value = self._keys_values(view)
        heads = (self.config.heads, self.config.head_width)
        query = self.q_norm(self.q_proj(self.attention_norm(x)).unflatten(-1, heads))
        query = query.to(value.dtype)
        queries = query.split([run.stop - run.start for run in runs]) if runs else ()
        valid = view.memory.valid
        # What nobody reads stays part of the graph: processes that share weights call alike.
        read = [query[:0] + (key[:0] + value[:0]).repeat_interleave(self._groups, 1)]
        for run, own in zip(runs, queries):
            seen = slice(run.first, run.last)
            mask = None if valid is None or not run.masked else valid[seen]
            read.append(attend(own, key[seen], value[seen], mask))
        return _gated(x, self.attention_gate, self.o_proj(torch.cat(read).flatten(1)))

    def _feed(self, x: Tensor) -> Tensor:
        return _gated(x, self.mlp_gate, self.mlp(self.mlp_norm(x)))

    @property
    def _groups(self) -> int:
        return self.config.heads // self.config.kv_heads

    def _keys_values(self, view: MemoryView) -> tuple[Tensor, Tensor]:
        """Keys and values float[P, K, F] of the memory, those that the view keeps where it does."""
        if view.kept is not None and self in view.kept:
            return view.kept[self]
        heads = (self.config.kv_heads, self.config.head_width)
        tokens = view.memory.tokens
        value = self.v_proj(tokens).unflatten(-1, heads)
        key = self.k_norm(self.k_proj(tokens).unflatten(-1, heads)).to(value.dtype)
        if view.kept is not None:
            view.kept[self] = key, value
        return key, value


def _gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return x + (gate.tanh() * branch).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention float[N, A, F] of positions that all see the same tokens.

    query: float[N, A, F]. key, value: float[P, K, F]. mask: bool[P], False at tokens that none
    sees; None where all see all.
    """
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    if mask is not None:  # torch has slow kernels alone for fewer key heads with a mask
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        mask = mask.expand(query.shape[2], -1)
    few = key.shape[1] != query.shape[1]
    read = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=few)
    return read[0].transpose(0, 1)


def change(x: Tensor, runs: Sequence[Run], function: Callable[[Tensor], Tensor]) -> Tensor:
    """float[N, D] with the positions of `runs`, which are in order, replaced by what `function`
    gives of them, end to end; the others are as they were.

    >>> x = torch.arange(4.0)[:, None]
    >>> runs = [Run(1, 2, 0, 1, feeds=True), Run(3, 4, 0, 1, feeds=True)]
    >>> change(x, runs, lambda part: 10 * part)[:, 0].tolist()
    [0.0, 10.0, 2.0, 30.0]
    """
    lengths = [run.stop - run.start for run in runs]
    if sum(lengths) == len(x):
        return function(x)
    changed = function(torch.cat([x[:0], *(x[run.start : run.stop] for run in runs)]))
    pieces, at = [changed[:0]], 0
    for run, part in zip(runs, changed.split(lengths) if lengths else ()):
        pieces += [x[at : run.start], part]
        at = run.stop
    return torch.cat([*pieces, x[at:]])
