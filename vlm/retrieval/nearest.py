"""The nearest of many vectors, by faiss: exactly, or among clusters, with a measured recall.

Shapes: N vector or query, U width.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from vlm.compat.extras import needs

RECALL = 0.95
"""Share of the nearest ten that clusters must give, with their own vectors as queries."""
SAMPLE = 256
"""Vectors that this share is measured on."""
CLUSTER = 39
"""Fewest vectors to a cluster: with less faiss warns that clusters are ill-founded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """What an approximate search gives up: for a query `probes` of `clusters` clusters are
    searched, which finds the share `recall` of the nearest ten, measured with vectors of the index
    as queries. Queries of another kind, texts among images, can find fewer."""

    clusters: int
    probes: int
    recall: float


def unit_vectors(given, dim: int, names: Sequence[str] | None = None) -> np.ndarray:
    """Vectors, a tensor or an array [N, `dim`], as float32[N, U] of unit norm.

    Raises ValueError showing another shape, or naming rows that have no direction (NaN, infinite,
    zero): by `names`, or by number.
    """
    vectors = torch.as_tensor(given).detach().float().cpu().contiguous().numpy()
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"expected vectors [N, {dim}], found {list(vectors.shape)}")
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))[:8]
    if len(wrong):
        rows = [f"row {i}" if names is None else names[i] for i in wrong]
        raise ValueError(f"expected vectors with a direction, found zero or not finite: {rows}")
    if np.abs(norms - 1).max(initial=0) > 1e-5:  # others stay as they are to the bit
        vectors = vectors / norms[:, None]
    return vectors


def engine_of(vectors: np.ndarray, approximate: bool):
    """An index of faiss whose rows are vectors float32[N, U] of unit norm: one that compares each
    of them, with None, or one of clusters, with what they give up."""
    if approximate:
        return _clustered(vectors)
    engine = faiss_library().IndexFlatIP(vectors.shape[1])
    engine.add(vectors)
    return engine, None


def _clustered(vectors: np.ndarray):
    """Clusters, as many of them probed as RECALL needs."""
    faiss = faiss_library()
    N, U = vectors.shape
    clusters = max(1, min(round(4 * math.sqrt(N)), N // CLUSTER))
    engine = faiss.IndexIVFFlat(faiss.IndexFlatIP(U), U, clusters, faiss.METRIC_INNER_PRODUCT)
    engine.train(vectors)
    engine.add(vectors)
    sample = vectors[:: -(-N // SAMPLE)]
    nearest = min(11, N)  # each image is its own nearest
    true, _ = faiss.knn(sample, vectors, nearest, faiss.METRIC_INNER_PRODUCT)
    least = true[:, -1:] - 1e-6
    engine.nprobe = 1
    while True:
        scores, _ = engine.search(sample, nearest)
        found = (scores >= least).sum(1) - 1
        recall = float(found.mean() / max(nearest - 1, 1)) if N > 1 else 1.0
        if recall >= RECALL or engine.nprobe == clusters:
            return engine, Clusters(clusters=clusters, probes=engine.nprobe, recall=recall)
        engine.nprobe = min(2 * engine.nprobe, clusters)


@cache
def faiss_library() -> ModuleType:
    """faiss, imported when it is first used, after torch.

    On macOS torch and faiss-cpu each bring an OpenMP of their own, and two of them end a program
    (faiss-wheels issue 73): there faiss keeps to one thread.
    """
    apple = sys.platform == "darwin"
    if apple:
        os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")
    with needs("retrieval"):
        import faiss

    if apple:
        faiss.omp_set_num_threads(1)
    return faiss


def open_engine(path: Path):
    """The file of an index of faiss, mapped into memory. Raises ValueError saying what is wrong
    with it."""
    faiss = faiss_library()
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2][:200]
        raise ValueError(f"{path}: expected a whole file of vectors, found: {reason}") from error


def search(engine, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of at least k vectors to each query: inner products float32[N, k], falling,
    and their rows int64[N, k], the lower first where products are equal."""
    scores, rows = engine.search(queries, k)
    short = (rows < 0).any(1)
    if short.any():  # the clusters that were probed hold less than k
        every = faiss_library().SearchParametersIVF(nprobe=engine.nlist)
        scores[short], rows[short] = engine.search(queries[short], k, params=every)
    order = np.lexsort((rows, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
