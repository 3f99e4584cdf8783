"""open_clip's weights beside ours, in two columns.

A row has open_clip's name, our `Contrastive`'s, and how one becomes the other: most weights only
change their name, projections are transposed, and queries, keys and values lie in one matrix or in
several. Values never change, so that every row is read in both directions bit for bit.

In names a star is the layer's number; braces stand for several weights, in the order of their
rows; a name that ends in a dot or an underscore goes on with both "weight" and "bias".

Source: open_clip 3.3, `transformer.py` and `model.py`; timm, `vision_transformer.py` and
`attention_pool.py`; transformers, `clip` and `siglip`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from braceexpand import braceexpand
from torch import Tensor


class Kind(NamedTuple):
    """How weights of one row become each other: published tensors to ours (`read`) and back."""

    read: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    write: Callable[[Sequence[Tensor]], Sequence[Tensor]]


def _restack(*shares: int) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Rows of all tensors in one order, cut into parts that are to each other as `shares`."""

    def restack(tensors: Sequence[Tensor]) -> list[Tensor]:
        whole = torch.cat(list(tensors))
        unit = len(whole) // sum(shares)
        return [part.clone() for part in whole.split([unit * share for share in shares])]

    return restack


def _transpose(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.T.contiguous() for tensor in tensors]


SAME = Kind(list, list)
TRANSPOSED = Kind(_transpose, _transpose)
"""open_clip multiplies vectors with its projections from the left, torch's linear layers from the
right."""
QKV = Kind(_restack(1, 1, 1), _restack(3))
"""One matrix of queries, keys and values, in this order, beside three."""
Q_KV = Kind(_restack(3), _restack(1, 2))
"""Queries, then keys and values, beside one matrix of all."""
TABLE = Kind(lambda tensors: [tensors[0][0]], lambda tensors: [tensors[0][None]])
"""Positions with a leading axis of one, beside a table."""

Map = Sequence[tuple[str, str, Kind]]


class Row(NamedTuple):
    """One row of a map, written out."""

    published: tuple[str, ...]
    ours: tuple[str, ...]
    kind: Kind


def expand(rows: Map, layers: int, prefix: str = "") -> list[Row]:
    """Rows with the layer number filled in, weight and bias apart, `prefix` before open_clip's."""
    expanded = []
    for published, ours, kind in rows:
        for layer in range(layers) if "*" in ours else [None]:
            for leaf in ("weight", "bias") if ours.endswith((".", "_")) else ("",):
                sides = (
                    tuple(name.replace("*", str(layer)) + leaf for name in braceexpand(side))
                    for side in (prefix + published, ours)
                )
                expanded.append(Row(*sides, kind))
    return expanded


_BLOCK: Map = [
    ("ln_1.", "layer_norm1.", SAME),
    ("attn.in_proj_", "self_attn.{q,k,v}_proj.", QKV),
    ("attn.out_proj.", "self_attn.out_proj.", SAME),
    ("ln_2.", "layer_norm2.", SAME),
    ("mlp.c_fc.", "mlp.fc1.", SAME),
    ("mlp.c_proj.", "mlp.fc2.", SAME),
]

_TEXT_MAP: Map = [
    ("token_embedding.weight", "text.backbone.embeddings.token_embedding.weight", SAME),
    ("positional_embedding", "text.backbone.embeddings.position_embedding.weight", SAME),
    *(
        (f"transformer.resblocks.*.{published}", f"text.backbone.encoder.layers.*.{ours}", kind)
        for published, ours, kind in _BLOCK
    ),
    ("ln_final.", "text.backbone.final_layer_norm.", SAME),
]
"""After "text." where the model has `custom_text`."""

CLIP_VISION_MAP: Map = [
    ("visual.class_embedding", "tokenizer.backbone.embeddings.class_embedding", SAME),
    ("visual.conv1.weight", "tokenizer.backbone.embeddings.patch_embedding.weight", SAME),
    (
        "visual.positional_embedding",
        "tokenizer.backbone.embeddings.position_embedding.weight",
        SAME,
    ),
    ("visual.ln_pre.", "tokenizer.backbone.pre_layrnorm.", SAME),
    *(
        (
            f"visual.transformer.resblocks.*.{published}",
            f"tokenizer.backbone.encoder.layers.*.{ours}",
            kind,
        )
        for published, ours, kind in _BLOCK
    ),
    ("visual.ln_post.", "tokenizer.backbone.post_layernorm.", SAME),
    ("visual.proj", "image_head.weight", TRANSPOSED),
]

_TRUNK_BLOCK: Map = [
    ("norm1.", "layer_norm1.", SAME),
    ("attn.qkv.", "self_attn.{q,k,v}_proj.", QKV),
    ("attn.proj.", "self_attn.out_proj.", SAME),
    ("norm2.", "layer_norm2.", SAME),
    ("mlp.fc1.", "mlp.fc1.", SAME),
    ("mlp.fc2.", "mlp.fc2.", SAME),
]

SIGLIP_VISION_MAP: Map = [
    (f"visual.trunk.{published}", f"tokenizer.backbone.{ours}", kind)
    for published, ours, kind in [
        ("patch_embed.proj.", "embeddings.patch_embedding.", SAME),
        ("pos_embed", "embeddings.position_embedding.weight", TABLE),
        *((f"blocks.*.{p}", f"encoder.layers.*.{ours}", kind) for p, ours, kind in _TRUNK_BLOCK),
        ("norm.", "post_layernorm.", SAME),
        ("attn_pool.latent", "head.probe", SAME),
        ("attn_pool.{q,kv}.", "head.attention.in_proj_", Q_KV),
        ("attn_pool.proj.", "head.attention.out_proj.", SAME),
        ("attn_pool.norm.", "head.layernorm.", SAME),
        ("attn_pool.mlp.fc1.", "head.mlp.fc1.", SAME),
        ("attn_pool.mlp.fc2.", "head.mlp.fc2.", SAME),
    ]
]

MAPS: dict[str, tuple[Map, Map]] = {
    "clip": (
        CLIP_VISION_MAP,
        [*_TEXT_MAP, ("text_projection", "text_head.weight", TRANSPOSED)],
    ),
    "siglip": (
        SIGLIP_VISION_MAP,
        [*_TEXT_MAP, ("text_projection.", "text.backbone.head.", SAME)],
    ),
}
"""System -> maps of the image and of the text tower, read in both directions."""
