"""Our retrieval metric beside CLIP_benchmark's: the same recalls, time and memory, in one run.

    python eval/speed_retrieval.py
    python eval/speed_retrieval.py --large 200000

Embeddings are drawn from a seed: each text lies near its image, so that some are found and some are
not; in bf16 they are rounded to it, as a model that computes in it gives them, and both metrics
compute in fp32, as ours always does. CLIP_benchmark's metric is written out here from its
definition, for comparison only: all scores as one matrix, all right pairs as another, and for each
k the share of queries with a right candidate among their k best, by one-hot vectors of the k best
in batches of 64 queries.
Each variant runs in a process of its own, in turn, for several rounds. Reported are the medians
of its seconds and of the memory it takes at its peak beyond what the process held before, with the
embeddings; and the ratios, which alone carry over to other machines. Ours gives median ranks,
average precision and intervals in the same time.

With --large N ours runs alone on N images with a text each. The share is that of the fastest
product of fp32 matrices that the same process measures afterwards.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time

import numpy as np
import torch
from bench import Table, add_precision, child, chosen, in_turn, measure, medians, parse, parser_for
from torch import Tensor
from torch.nn import functional

from vlm.metrics.retrieval import retrieval
from vlm.precision import DTYPES

VARIANTS = ("ours", "clip_benchmark")
KS = (1, 5, 10)
TABLE = Table(
    columns={
        "seconds": ("seconds", "8.2f"),
        "taken MB": ("taken_mb", "9.0f"),
        "peak MB": ("peak_mb", "8.0f"),
    },
    ratios={"time": ("seconds", "6.1f"), "memory": ("taken_mb", "6.3f")},
    width=16,
    inverted=("time",),
)
PEER_BATCH = 64


def embeddings(
    images: int,
    captions: int,
    width: int,
    noise: float,
    seed: int,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows float32[N, U] and [M, U], rounded to `dtype`, and each text's image int64[M], in a
    shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    x = functional.normalize(torch.randn(images, width, generator=generator))
    owner = torch.randperm(images * captions, generator=generator) % images
    y = torch.randn(len(owner), width, generator=generator).mul_(noise / width**0.5)
    for start in range(0, len(owner), 1 << 14):  # no second copy of all rows
        part = slice(start, start + (1 << 14))
        y[part] = functional.normalize(y[part] + x[owner[part]])
    if dtype != torch.float32:
        x, y = x.to(dtype).float(), y.to(dtype).float()
    return x.to(device), y.to(device), owner.to(device)


def clip_benchmark(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """CLIP_benchmark's recalls, from the definition in its clip_benchmark/metrics/
    zeroshot_retrieval.py: `evaluate` after the encoding, `recall_at_k` and `batchify`."""
    scores = texts @ images.T
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[torch.arange(len(texts), device=texts.device), owner] = True

    def recall(scores: Tensor, right: Tensor, k: int) -> float:
        found = []
        for start in range(0, len(scores), PEER_BATCH):
            part, truth = scores[start : start + PEER_BATCH], right[start : start + PEER_BATCH]
            best = functional.one_hot(part.topk(k, dim=1).indices, num_classes=part.shape[1])
            hits = (best * truth[:, None]).sum((1, 2))
            found.append((hits / truth.sum(1)).cpu())
        return (torch.cat(found) > 0).float().mean().item()

    return {
        name: value
        for k in KS
        for name, value in (
            (f"text_to_image@{k}", recall(scores, right, k)),
            (f"image_to_text@{k}", recall(scores.T, right.T, k)),
        )
    }


def ours(images: Tensor, texts: Tensor, owner: Tensor, show: bool = False) -> dict[str, float]:
    """Our recalls, rounded to fp32 as CLIP_benchmark's mean is."""
    found = retrieval(images, texts, owner, ks=KS, show=show)
    return {
        f"{name}@{k}": float(np.float32(getattr(found, name).recall[k].share))
        for k in KS
        for name in ("text_to_image", "image_to_text")
    }


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def product_peak(width: int, device: str) -> float:
    """GFLOP/s of the fastest of some products of fp32 matrices of this width or square."""
    best, side = 0.0, 4096 if device == "cpu" else 16384
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    for rows, inner in ((side, width), (side // 2, side // 2)):
        x = torch.randn(rows, inner, device=device)
        y = torch.randn(inner, rows, device=device)
        out = torch.empty(rows, rows, device=device)
        for _ in range(6):
            synchronise(device)
            start = time.perf_counter()
            torch.mm(x, y, out=out)
            synchronise(device)
            best = max(best, 2e-9 * rows * rows * inner / (time.perf_counter() - start))
    return best


def run(variant: str, settings: argparse.Namespace) -> dict[str, float | dict[str, float]]:
    """One variant on one set: seconds, its memory in MB, GFLOP/s of the product, and recalls."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    count, captions = (
        (settings.large, 1) if settings.large else (settings.images, settings.captions)
    )
    device = settings.device
    dtype = DTYPES[settings.precision]
    data = embeddings(count, captions, settings.width, settings.noise, settings.seed, device, dtype)
    metric = (
        functools.partial(ours, show=bool(settings.large)) if variant == "ours" else clip_benchmark
    )

    def timed() -> dict[str, float]:
        recalls = metric(*data)
        synchronise(device)
        return recalls

    if device == "cpu":
        found = measure(timed)
    else:
        before = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        found = measure(timed)
        peak = torch.cuda.max_memory_allocated() / 2**20
        found = found._replace(taken_mb=peak - before, peak_mb=peak)
    work = 2e-9 * settings.width * len(data[0]) * len(data[1])
    return {
        "seconds": found.seconds,
        "taken_mb": found.taken_mb,
        "peak_mb": found.peak_mb,
        "gflops": work / found.seconds,
        "product_gflops": product_peak(settings.width, device),
        "recalls": found.value,
    }


def print_large(found: dict[str, float], settings: argparse.Namespace) -> None:
    count = settings.large
    print(f"{count} x {count}, width {settings.width}, on {settings.device}: ours alone")
    print(
        f"{found['seconds']:.1f} s, {found['gflops']:.0f} GFLOP/s of {found['product_gflops']:.0f} "
        f"measured for fp32 products: {found['gflops'] / found['product_gflops']:.0%}"
    )
    print(f"memory at its peak, with the embeddings: {found['peak_mb'] / 1024:.2f} GB")
    hours = found["seconds"] * (1e6 / count) ** 2 / 3600
    print(f"1M x 1M at the same rate: {hours:.2f} h")
    print(json.dumps(found["recalls"]))


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5, help="of each image")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--noise", type=float, default=8.0, help="how far texts lie from images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", type=int, metavar="N", help="ours alone on N images, N texts")
    add_precision(parser)
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    settings = parse(parser)
    if settings.only:
        print(json.dumps(run(settings.only, settings)))
        return
    chosen(settings, settings.device)
    if settings.large:
        print_large(child(settings, "ours"), settings)
        return
    found = in_turn(VARIANTS, settings.rounds, functools.partial(child, settings))
    recalls = [run["recalls"] for runs in found.values() for run in runs]
    print(f"{'recall':18} {'ours':>10} {'clip_benchmark':>15}")
    for name, value in recalls[0].items():
        print(f"{name:18} {value:10.7f} {recalls[-1][name]:15.7f}")
    same = all(values == recalls[0] for values in recalls)
    print("the same to the last digit" if same else "the recalls DIFFER")
    middle = medians(found)
    mine = middle["ours"]
    TABLE.print_head()
    TABLE.print_rows(middle)
    print("time: variant / ours, higher is better; memory: ours / variant, lower is better")
    print(
        f"ours: {mine['gflops']:.0f} GFLOP/s of {mine['product_gflops']:.0f} measured for fp32 "
        f"products: {mine['gflops'] / mine['product_gflops']:.0%}"
    )
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
