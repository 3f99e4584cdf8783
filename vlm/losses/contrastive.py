"""Contrastive losses of paired unit vectors, over the global batch of all ranks, in bounded memory.

Logits are exp(log_scale) * images @ texts.T (+ bias), one for each image and text of the global
batch, N pairs. They are made a block at a time and never kept: value and gradients come out of the
same sweep in the forward pass, and what waits for the backward pass is one gradient for each
embedding, as much for many blocks as for one. The backward pass computes nothing but a product
with the incoming gradient, and exchanges nothing.

On several ranks the texts travel in a ring: each rank keeps its images, sees every rank's texts in
turn, and hands them on with what it adds to them (their gradients; for the softmax their
log-sum-exps), until they are home. So every block is computed on one rank alone, once a sweep, and
a rank holds its own shard and one visiting shard, however many ranks there are; nothing is
gathered. Ranks may hold different numbers of pairs.

Every rank gets the value of the global loss. Its gradients are its share: those of its own
embeddings are whole, and those of log_scale, bias and all weights after the embeddings become
whole when they are SUMMED over ranks; a trainer that averages them divides by the ranks too often.

Embeddings may come from anywhere, detached ones included: for gradient caching (arXiv 2101.06983)
take the gradients of detached embeddings of the whole batch by ordinary autograd, and hand them to
a second pass of the towers in parts.

Shapes: B pair of this rank, U shared embedding width, R row (image) and C column (text) of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vlm.losses.ring import Ring, exchange_reports

BLOCK, BLOCK_GPU = 1024, 4096
"""Rows and columns of a block: its fp32 logits are 4 MB, which stay in a CPU's cache, or 64 MB on
other devices, where many small products would wait for their launch."""

UNIT_TOLERANCE = 1e-2
"""How far a norm may be from 1: bf16 rounds a unit vector by less; one never normalised is off by
more."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class RefusedRows(ValueError):
    """Embeddings that are no unit vectors; `rows` of this rank's, from 0."""

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.rows = rows


def softmax_loss(
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    *,
    block: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean negative log-probability, in nats, of an image's own text among all texts of the global
    batch and of a text's own image among all images: the mean of both directions (InfoNCE).

    images, texts: float[B, U], unit norm; row i of each is a pair; B may differ from rank to rank.
    log_scale: float[], the natural logarithm of what multiplies the cosines.
    block: rows and columns of the logits that exist at a time; None: `BLOCK` on a CPU, `BLOCK_GPU`
    elsewhere. It bounds memory and changes no more than the last digits.
    group: the ranks that share the batch; None: all, where torch.distributed is initialised.
    Returns float[], fp32 (fp64 for fp64 embeddings), the same on every rank. Products are taken in
    the embeddings' dtype (autocast is not asked), all else in fp32: pass fp32 embeddings where the
    rounding of bf16 cosines, times the scale, matters.
    Raises ValueError, on every rank, naming the rows that are not finite, zero, or not of unit
    norm, the shapes that differ, or the rank without a pair.

    >>> eye = torch.eye(3)
    >>> round(float(softmax_loss(eye, eye, torch.tensor(0.0))), 4)  # -log(e / (e + 2))
    0.5514

    Source: arXiv 2103.00020, figure 3.
    """
    return _loss(_softmax, images, texts, (log_scale,), block, group)


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    block: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Negative log-likelihood, in nats, of telling pairs from non-pairs: summed over all images and
    texts of the global batch and divided by its number of pairs.

    bias: float[], added to every logit. All else is as in `softmax_loss`.

    >>> eye = torch.eye(3)
    >>> round(float(sigmoid_loss(eye, eye, torch.tensor(0.0), torch.tensor(0.0))), 4)
    1.6996

    Source: arXiv 2303.15343, algorithm 1 (its mean over images, z = 1 on the diagonal, else -1).
    """
    return _loss(_sigmoid, images, texts, (log_scale, bias), block, group)


def _loss(sweep, images, texts, scalars, block, group) -> Tensor:
    """The value that `sweep` computes, with the gradients that it computes beside it."""
    needed = [torch.is_grad_enabled() and t.requires_grad for t in (images, texts, *scalars)]
    wanted = _Wanted(needed[0], needed[1], any(needed[2:]))
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        ring, wanted = _meet(images, texts, scalars, wanted, block, group)
        dtype = torch.promote_types(images.dtype, texts.dtype)
        value, gradients = sweep(
            ring,
            images.detach().to(dtype),
            texts.detach().to(dtype),
            *(float(scalar) for scalar in scalars),
            wanted=wanted,
        )
    return _Known.apply(value, gradients, images, texts, *scalars)


class _Known(torch.autograd.Function):
    """A value whose gradients are known already, in the order of its inputs."""

    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming):
        # Kept in fp32 until the incoming gradient, a loss scale for fp16, has lifted them.
        given = [
            (incoming * gradient).to(dtype) if needed else None
            for gradient, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[2:]
            )
        ]
        return None, None, *given


class _Wanted(NamedTuple):
    """Which gradients are wanted: of images, of texts, of log_scale or bias."""

    images: bool
    texts: bool
    scalars: bool


def _softmax(ring: Ring, images: Tensor, texts: Tensor, log_scale: float, *, wanted: _Wanted):
    """Two sweeps: log-sum-exps of all rows and columns, then gradients from them."""
    scale = math.exp(log_scale)
    lse_images, lse_texts, matched, kept = _log_sum_exps(ring, images, texts, scale)
    total = (lse_images - matched).sum() + (lse_texts[: len(texts)] - matched).sum()
    value = ring.total(total) / (2 * sum(ring.sizes))
    if not any(wanted):
        return value, (None,) * 3
    sums = _Sums(ring, images, wanted)
    carried = [lse_texts, *sums.travelling]
    for rows, pairs, t_CU, lse_C, *sums_CU in ring.blocks(len(images), texts, carried):
        cosines_RC = (images[rows] @ t_CU.T).to(sums.dtype) if kept is None else kept
        logits_RC = cosines_RC * scale
        slopes_RC = (logits_RC - lse_images[rows, None]).exp_()
        slopes_RC += logits_RC.sub_(lse_C).exp_()
        if pairs:
            slopes_RC.diagonal().sub_(2)
        sums.add(rows, images[rows], t_CU, cosines_RC, slopes_RC, sums_CU)
        del cosines_RC, logits_RC, slopes_RC  # before the next block's are made
    return value, sums.times(scale / (2 * sum(ring.sizes)))


def _log_sum_exps(
    ring: Ring, images: Tensor, texts: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Log-sum-exps of all logits of an image, float[B], and of a text, float[largest B]; the logits
    of pairs, float[B]; and the cosines where one block holds them all, float[B, B], else None."""
    dtype = _wide(images.dtype)
    lse_images = images.new_full((len(images),), -math.inf, dtype=dtype)
    lse_texts = images.new_full((max(ring.sizes),), -math.inf, dtype=dtype)
    matched = torch.empty_like(lse_images)
    kept = None
    for rows, pairs, t_CU, lse_C in ring.blocks(len(images), texts, [lse_texts]):
        cosines_RC = (images[rows] @ t_CU.T).to(dtype)
        logits_RC = cosines_RC * scale
        lse_R = lse_images[rows]
        torch.logaddexp(lse_R, logits_RC.logsumexp(1), out=lse_R)
        torch.logaddexp(lse_C, logits_RC.logsumexp(0), out=lse_C)
        if pairs:
            matched[rows] = logits_RC.diagonal()
        if ring.is_one_block:
            kept = cosines_RC
        del cosines_RC, logits_RC
    return lse_images, lse_texts, matched, kept


def _sigmoid(
    ring: Ring, images: Tensor, texts: Tensor, log_scale: float, bias: float, *, wanted: _Wanted
):
    """One sweep. A margin is a logit, negated for a pair: its loss is softplus(margin)."""
    scale = math.exp(log_scale)
    sums = _Sums(ring, images, wanted)
    total = images.new_zeros((), dtype=sums.dtype)
    for rows, pairs, t_CU, *sums_CU in ring.blocks(len(images), texts, sums.travelling):
        cosines_RC = (images[rows] @ t_CU.T).to(sums.dtype)
        margins_RC = (cosines_RC * scale).add_(bias)
        if pairs:
            margins_RC.diagonal().neg_()
        total += _sum_of_softplus(margins_RC)
        if any(wanted):
            slopes_RC = margins_RC.sigmoid_()
            if pairs:
                slopes_RC.diagonal().neg_()
            sums.add(rows, images[rows], t_CU, cosines_RC, slopes_RC, sums_CU)
            del slopes_RC
        del cosines_RC, margins_RC  # before the next block's are made
    value = ring.total(total) / sum(ring.sizes)
    if not any(wanted):
        return value, (None,) * 4
    return value, sums.times(scale / sum(ring.sizes), 1 / sum(ring.sizes))


class _Sums:
    """Sums over blocks of slopes (the loss by a logit, up to a factor that all blocks share) times
    what the logit depends on: texts for images, images for texts, cosines for log_scale."""

    def __init__(self, ring: Ring, images: Tensor, wanted: _Wanted) -> None:
        self.dtype = _wide(images.dtype)
        self.images = torch.zeros_like(images, dtype=self.dtype) if wanted.images else None
        self.texts = ring.buffer(images, self.dtype).zero_() if wanted.texts else None
        self.scalars = images.new_zeros(2, dtype=self.dtype) if wanted.scalars else None
        self.own = len(images)

    @property
    def travelling(self) -> list[Tensor]:
        return [] if self.texts is None else [self.texts]

    def add(
        self,
        rows: slice,
        x_RU: Tensor,
        t_CU: Tensor,
        cosines_RC: Tensor,
        slopes_RC: Tensor,
        texts_CU: Sequence[Tensor],
    ) -> None:
        if self.scalars is not None:
            self.scalars[0] += torch.vdot(slopes_RC.view(-1), cosines_RC.view(-1))
            self.scalars[1] += slopes_RC.sum()
        slopes_RC = slopes_RC.to(x_RU.dtype)
        if self.images is not None:
            _add_product(self.images[rows], slopes_RC, t_CU)
        for sums_CU in texts_CU:
            _add_product(sums_CU, slopes_RC.T, x_RU)

    def times(self, factor: float, *factors: float) -> tuple[Tensor | None, ...]:
        """The sums of images, of texts (this rank's, float[B, U]) and of cosines, times `factor`,
        and of slopes times a second, if there is one."""
        texts = None if self.texts is None else self.texts[: self.own]
        vectors = [None if sums is None else sums.mul_(factor) for sums in (self.images, texts)]
        if self.scalars is None:
            return *vectors, *(None for _ in (factor, *factors))
        return *vectors, *(total * by for total, by in zip(self.scalars, (factor, *factors)))


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    if sums.dtype == a.dtype:
        sums.addmm_(a, b)
    else:
        sums += a @ b


def _sum_of_softplus(x: Tensor) -> Tensor:
    """The sum of log(1 + exp(x)), exact to the last digits also where every term is tiny.

    On a CPU torch's log1p takes as long as the product that made x, ten times longer than its
    log. So: log(1 + e) = log(u) + log(1 + r / u), where u is 1 + e as rounded and r what the
    rounding took; r / u is below half a last digit of 1, so log(1 + r / u) is r / u.
    """
    if x.device.type != "cpu":
        return F.softplus(x, threshold=80).sum()
    e = x.abs().neg_().exp_()
    u = e + 1
    r = e.sub_(u.sub_(1))
    r.div_(u.add_(1))
    return r.add_(u.log_()).sum() + torch.clamp(x, min=0, out=u).sum()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _meet(images, texts, scalars, wanted, block, group) -> tuple[Ring, _Wanted]:
    """The ring of the ranks, and which gradients any of them wants, so that all take part in making
    them. Raises ValueError on all ranks if one has found a fault, so that none waits for it."""
    fault, rows = _fault(images, texts, scalars, block), []
    if not fault:
        fault, rows = _refused(images, texts)
    if block is None:
        block = BLOCK if images.device.type == "cpu" else BLOCK_GPU
    if fault:
        mine = [1] + 7 * [0]
    else:
        dtype = DTYPES.index(torch.promote_types(images.dtype, texts.dtype))
        mine = [0, len(images), images.shape[1], dtype, block, *wanted]
    rank, reports = exchange_reports(mine, images.device, group)
    faulty, sizes, widths, dtypes, blocks, *wanting = zip(*reports)
    if fault:
        message = fault if len(reports) == 1 else f"rank {rank}: {fault}"
        raise RefusedRows(message, rows) if rows else ValueError(message)
    if any(faulty):
        raise ValueError(f"rank {faulty.index(1)} refused its embeddings; see its message")
    if 0 in sizes:
        raise ValueError(
            f"rank {sizes.index(0)} has no pair (pairs of the ranks: {list(sizes)}); "
            "every rank needs one or more"
        )
    for name, values in (
        ("embedding width", widths),
        ("dtype", [DTYPES[number] for number in dtypes]),
        ("block", blocks),
    ):
        if len(set(values)) > 1:
            raise ValueError(f"{name} must be the same on all ranks, found {list(values)}")
    return Ring(rank, list(sizes), block, group), _Wanted(*map(any, wanting))


def _fault(images: Tensor, texts: Tensor, scalars: Sequence[Tensor], block: int | None) -> str:
    """What is wrong with the input of this rank; empty if nothing is. An empty batch is left to the
    comparison of ranks."""
    if block is not None and block < 1:
        return f"block is a number of rows, 1 or more, found {block}"
    for name, scalar in zip(("log_scale", "bias"), scalars):
        if scalar.ndim:
            return f"{name} is a tensor without dimensions, found shape {list(scalar.shape)}"
    if images.ndim != 2 or images.shape != texts.shape:
        return (
            "images and texts are float[B, U] of one shape, row i of each a pair; found "
            f"{list(images.shape)} and {list(texts.shape)}"
        )
    for name, embeddings in (("images", images), ("texts", texts)):
        if embeddings.dtype not in DTYPES:
            return f"{name} are of a floating dtype, found {embeddings.dtype}"
    return ""


def _refused(images: Tensor, texts: Tensor) -> tuple[str, list[int]]:
    """What is wrong with embeddings that are no unit vectors, and in which rows; empty if nothing
    is."""
    for name, embeddings in (("images", images), ("texts", texts)):
        norms = torch.linalg.vector_norm(embeddings, dim=1, dtype=_wide(embeddings.dtype))
        wrong = ~((norms - 1).abs() <= UNIT_TOLERANCE)  # true of NaN too
        if wrong.any():
            blame, rows = _blame(norms, wrong)
            return f"{name}: {blame}", rows
    return "", []


def _blame(norms: Tensor, wrong: Tensor) -> tuple[str, list[int]]:
    """Says of the worst kind of wrong norms what it is; the rows that are."""
    kinds = (
        (~norms.isfinite(), "hold NaN or infinity"),
        (norms == 0, "are zero, and have no direction"),
        (wrong, "are not of unit norm"),
    )
    found, what = next((found, what) for found, what in kinds if found.any())
    rows = found.nonzero().flatten().tolist()
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    seen = ", ".join(f"{norm:.4g}" for norm in norms[rows[:8]].tolist())
    norms_seen = f" (norms {seen})" if found is wrong else ""
    return f"rows {rows[:8]}{more} of {len(norms)} {what}{norms_seen}", rows
