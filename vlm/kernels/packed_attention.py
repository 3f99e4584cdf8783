"""Attention within the examples of a packed row, for the language models of transformers.

These models take their attention, and the masks for it, by name from two registries. While a packed
row is read they take ours: masks of each example alone, made by the model's own rule (causal,
sliding, chunked), and attention example by example. So nothing is computed or held for pairs of
positions of two examples. Modules take ours again where a checkpoint computes them anew; all other
reading goes by the model's own attention. A model that runs flash attention keeps it, since that
reads the bounds of examples by itself.

Refused are models that mix positions by more than attention: a convolution or a recurrence goes
over the bounds of examples, whatever the attention does.

Shapes: S example, T position of the packed row, L position of one example, H query head, h key
head, D width, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from vlm.compat.torch import has_forward_pre_hook
from vlm.compat.transformers import (
    GradientCheckpointingLayer,
    attention_of,
    has_recurrence,
    sdpa_mask,
    set_attention,
    takes_attention,
)
from vlm.kernels.attention import gains, whole_products

NAME = "vlm_segments"
"""The name of our attention and its masks in transformers' registries."""
LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layers that mix positions by attention alone, as configurations name them (`layer_types`)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segments:
    """The examples of a packed row, and what a position of each sees.

    bounds: int32[S + 1], as in `vlm.families.decoder_only.batch.Batch`; lengths: the positions of
    each example.
    prefix: how many first positions of each example see each other; 0 where none does.
    masks: bool[1, 1, L, L] of each example, rows see columns; None where it is plainly causal.
        Empty before a model has said its rule.
    """

    bounds: Tensor
    lengths: tuple[int, ...]
    prefix: tuple[int, ...]
    masks: tuple[Tensor | None, ...] = ()


_reading: ContextVar[Segments] = ContextVar("_reading")
_own: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
"""Module at work on a packed row -> the name of its own attention."""


def require_segments(text: nn.Module) -> None:
    """Raises ValueError saying why a language model cannot keep the examples of a packed row apart,
    where it cannot."""
    config = text.config.get_text_config()
    others = sorted(set(getattr(config, "layer_types", None) or ()) - LAYERS)
    if not takes_attention(text) or not _choosing(text):
        why = "does not take its attention from transformers' registry"
    elif others or has_recurrence(text):
        why = f"mixes positions by more than attention ({', '.join(others) or 'a recurrence'})"
    else:
        return
    raise ValueError(
        f"{type(text).__name__} {why}, so examples in one packed row would see each other; leave "
        "--pack out"
    )


def read_segments(
    text: nn.Module,
    vectors: Tensor,
    positions: Tensor,
    bounds: Tensor,
    prefix: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """A language model's final states float[1, T, D] of a packed row.

    vectors: float[1, T, D]. positions: int64[1, T] or int64[3, 1, T], from 0 in each example.
    bounds: int32[S + 1], as in `vlm.families.decoder_only.batch.Batch`. prefix: int64[S], how many
    first positions of each example see each other; None where none does. more: keywords of the
    decoder.
    Raises ValueError as `require_segments` does, and for a prefix with flash attention.
    """
    require_segments(text)
    decoder = text.get_decoder()
    lengths = tuple(bounds.diff().tolist())
    options: dict[str, Any] = {
        "inputs_embeds": vectors,
        "position_ids": positions,
        "use_cache": False,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        **more,
    }
    if "flash" in (attention_of(decoder.config) or ""):
        if prefix is not None:
            raise ValueError(
                "flash attention cannot read a prefix at once; load the language model with "
                'attn_implementation="sdpa", or leave --pack out'
            )
        return decoder(**options).last_hidden_state
    first = (0,) * len(lengths) if prefix is None else tuple(prefix.tolist())
    for module in _choosing(decoder):
        if not has_forward_pre_hook(module, _enter):
            module.register_forward_pre_hook(_enter, with_kwargs=True)
            module.register_forward_hook(_leave, always_call=True)
    with _making_masks(decoder.config, Segments(bounds=bounds, lengths=lengths, prefix=first)):
        return decoder(**options).last_hidden_state


def segment_masks(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    *, device: torch.device | str, **rule: Any,
) -> Segments:  # fmt: skip
    """What each position of the packed row that is being read sees, by the rule of the model: the
    arguments of transformers' mask functions, of `sdpa_mask` for one."""
    row = _reading.get()
    rule |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    masks: list[Tensor | None] = []
    start = 0
    for L, prefix in zip(row.lengths, row.prefix):
        mask = sdpa_mask(1, L, L, q_offset=start, kv_offset=start, device=device, **rule)
        positions = torch.arange(L, device=device)
        mask = mask | (torch.maximum(positions[:, None], positions) < prefix)
        plain = torch.equal(mask[0, 0], positions[:, None] >= positions)
        masks.append(None if plain else mask)
        start += L
    return Segments(bounds=row.bounds, lengths=row.lengths, prefix=row.prefix, masks=tuple(masks))


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Segments,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within each example of a packed row: (float[1, T, H, d], None), the form of
    transformers' attention functions.

    query: float[1, H, T, d]; key, value: float[1, h, T, d]. attention_mask: what each position
    sees. softcap: scores s become softcap * tanh(s / softcap), as in Gemma 2. s_aux: float[H], the
    score of one more position, which all see and which has no value, as in gpt-oss.
    Raises ValueError for a model that adds a bias to its scores.
    """
    if position_bias is not None:
        raise ValueError(
            f"{type(module).__name__} adds a bias to its scores, which packed rows do not have; "
            "leave --pack out"
        )
    row, by_hand = attention_mask, softcap is not None or s_aux is not None
    plain = not by_hand and all(mask is None for mask in row.masks)
    gqa = key.shape[1] != query.shape[1]
    if plain and not dropout and _has_varlen(query, value):
        longest = max(row.lengths)
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        out = varlen_attn(
            query, key, value, row.bounds, row.bounds, longest, longest,
            scale=scaling, window_size=(-1, 0), enable_gqa=gqa,
        )  # fmt: skip
        return out[None], None
    if plain and not dropout and gains(query, max(row.lengths), causal=True):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return whole_products(query, key, value, scale, causal=True, lengths=row.lengths), None
    if gqa and not plain:  # with a mask, torch has slow kernels alone for fewer key heads
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    outs = []
    for q, k, v, mask in zip(*(x.split(row.lengths, 2) for x in (query, key, value)), row.masks):
        if by_hand:
            out = attend_by_hand(q, k, v, mask, dropout, scaling, softcap, s_aux)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, mask, dropout,
                is_causal=mask is None, scale=scaling, enable_gqa=k.shape[1] != q.shape[1],
            )  # fmt: skip
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1), None


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, segment_masks)


def attend_by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """The attention float[1, H, L, d] of one example, where scores are more than products.

    query, key, value: float[1, H, L, d]; mask: bool[1, 1, L, L], None for a causal one; the others
    as in `segment_attention`.
    """
    L = query.shape[2]
    if mask is None:
        mask = torch.ones(L, L, dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[None, :, None, None].expand(1, -1, L, 1)], dim=-1)
    shares = scores.softmax(-1, dtype=torch.float32)[..., :L].to(value.dtype)
    return F.dropout(shares, dropout) @ value


def _has_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether torch's own attention of unequal lengths, which is flash attention's, takes these."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@contextmanager
def _making_masks(config: PreTrainedConfig, row: Segments) -> Iterator[None]:
    """Within, the model of this configuration makes masks for this row."""
    own = attention_of(config)
    token = _reading.set(row)
    set_attention(config, NAME)
    try:
        yield
    finally:
        set_attention(config, own)
        _reading.reset(token)


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]


def _choosing(decoder: nn.Module) -> list[nn.Module]:
    """The modules in blocks that may choose an attention, which is by a configuration of theirs."""
    inner = (module for block in _blocks(decoder) for module in block.modules())
    return [m for m in inner if isinstance(getattr(m, "config", None), PreTrainedConfig)]


def _enter(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
    """Gives a module our attention where it is given our masks."""
    if any(isinstance(given, Segments) for given in (*arguments, *options.values())):
        _own[module] = attention_of(module.config)
        set_attention(module.config, NAME)


def _leave(module: nn.Module, arguments: tuple, out: Any) -> None:
    """Gives a module its own attention back, also where it failed or was left early."""
    if module in _own:
        set_attention(module.config, _own.pop(module))
