"""Contrastive vision-language models: an image and a text become two vectors of one space.

CLIP, SigLIP and LiT are of this family. The parts arrive finished. The loss is not here: it takes
the vectors, `log_scale` and `bias` (`vlm.losses.contrastive`).

Shapes: B example, V view, T text position, D width of a pooled vector, U shared embedding width,
N image, C text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.families.contrastive.batch import PairBatch
from vlm.image_tokens import ImageTokenizer, ViewGroup
from vlm.text.encoders import TextEncoder

SOFTMAX_SCALE = 1 / 0.07
"""Scale at the start of training with the softmax loss, without a bias. Source: CLIP, arXiv
2103.00020, section 2.5."""
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0
"""Scale and bias at the start of training with the sigmoid loss. Source: SigLIP, arXiv 2303.15343,
section 3.2."""


class Embedded(NamedTuple):
    """The two vectors of each example: float[B, U], unit norm, row b of both from example b."""

    images: Tensor
    texts: Tensor


class Contrastive(nn.Module):
    """Two towers: an image tokenizer with a pooling and a head, a text encoder with a head.

    pool: one of `vlm.pooling`. image_head, text_head: to the shared width; nn.Identity where the
        tower's vector has it already.
    scale: what cosines are multiplied by, learned as its logarithm in `log_scale`.
    bias: what is added to them, learned in `bias`; None for models of the softmax loss.
    Both are scalars in float32, whatever the towers compute in.
    Raises ValueError where a part does not fit the one before it.
    """

    family = "contrastive"
    through = ()
    """Parts that gradients pass through where they do not learn."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        pool: nn.Module,
        image_head: nn.Module,
        text: TextEncoder,
        text_head: nn.Module,
        *,
        scale: float,
        bias: float | None,
    ) -> None:
        super().__init__()
        widths = {
            "image_head": _width(image_head, pool.width(tokenizer), "image_head"),
            "text_head": _width(text_head, text.dim, "text_head"),
        }
        if len(set(widths.values())) != 1:
            raise ValueError(f"the two heads must end in one width, found {widths}")
        self.dim = widths["image_head"]
        self.tokenizer = tokenizer
        self.pool = pool
        self.image_head = image_head
        self.text = text
        self.text_head = text_head
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float32))
        given = None if bias is None else nn.Parameter(torch.tensor(bias, dtype=torch.float32))
        self.register_parameter("bias", given)

    def parts(self) -> dict[str, nn.Module]:
        """The components by name, as stages and start-up tables speak of them; `log_scale` and
        `bias` stand beside them."""
        return {
            "tokenizer": self.tokenizer,
            "pool": self.pool,
            "image_head": self.image_head,
            "text": self.text,
            "text_head": self.text_head,
        }

    def forward(self, batch: PairBatch) -> Embedded:
        """The vectors of a batch, float[B, U], unit norm."""
        images = self._embed_images(batch.groups, len(batch.ids))
        return Embedded(images, self.embed_texts(batch.ids, batch.valid))

    def embed_images(self, groups: Sequence[ViewGroup]) -> Tensor:
        """The vector of each example's image, float[B, U], unit norm, in the examples' order.

        Where an image has several views, it is the mean of theirs.
        Raises ValueError where there is no image.
        """
        if not groups:
            raise ValueError("expected the views of at least one image, found none")
        return self._embed_images(groups, 1 + max(int(g.owner[:, 0].max()) for g in groups))

    def embed_texts(self, ids: Tensor, valid: Tensor) -> Tensor:
        """The vector of each text, float[B, U], unit norm.

        ids: int64[B, T]; valid: bool[B, T], False at padding, which lies after the text.
        """
        return _unit(self.text_head(self.text(ids, valid)))

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """What each image and text score together, float[N, C]: cosine times scale, plus bias.

        images: float[N, U]; texts: float[C, U]; both unit norm. The softmax over texts (a model
        without bias) or the sigmoid (with bias) of it are probabilities.
        """
        scores = images @ texts.T * self.log_scale.exp()
        return scores if self.bias is None else scores + self.bias

    def _embed_images(self, groups: Sequence[ViewGroup], count: int) -> Tensor:
        views, examples = [], []
        for group in groups:
            images = self.tokenizer(group.pixels).owned_by(group.owner)
            views.append(self.image_head(self.pool(images)))
            examples.append(group.owner[:, 0])
        views_VU = _wide(torch.cat(views))
        # A mean's length is lost when it is brought to unit norm, so the sum will do.
        sums = views_VU.new_zeros(count, views_VU.shape[1])
        return _unit(sums.index_add(0, torch.cat(examples), views_VU))


def _unit(vectors: Tensor) -> Tensor:
    """The vectors at unit norm, in float32 or wider."""
    return F.normalize(_wide(vectors), dim=-1)


def _wide(vectors: Tensor) -> Tensor:
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def _width(head: nn.Module, width: int, name: str) -> int:
    """The width of what a head makes of vectors of `width`."""
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            if layer.in_features != width:
                raise ValueError(
                    f"{name}: expected a layer for vectors {width} wide, found one for "
                    f"{layer.in_features}"
                )
            width = layer.out_features
    return width
