"""Memory of the contrastive losses beside open_clip's: against the batch, and against the ranks.

    python eval/loss_memory.py --out runs/loss_memory                 # 1k to 64k pairs, one process
    python eval/loss_memory.py --out runs/loss_memory --ranks 1 2 4   # gloo processes instead

Embeddings, and with them the products of open_clip's losses, are of one precision on both sides.
Every figure is the peak resident memory of a fresh process during one forward and backward pass,
above what it held before with the embeddings made: so it counts the embeddings' gradients and all
that the loss needs besides. glibc is told to give back what is freed at once, for both sides, so
that the figure is what is held and not what the allocator happened to keep. A point of open_clip's
whose logits would not fit is not run; its estimate, by the square of the batch, is written beside
the reason and drawn hollow.

With --ranks the batch of each process is fixed (--local-batch), and the figure is that of the rank
that needs most; open_clip's sigmoid loss runs beside ours with its default exchange. Ours needs
four times the embeddings of one tower in the backward pass, and in the forward pass a few blocks
and twice the embeddings, on several ranks three times. So one rank needs as much as many once the
embeddings outweigh the blocks; below that, two need a little more than one, and four as much as
two.

Writes batch.json and batch.png, or ranks.json and ranks.png, into --out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist
import torch.multiprocessing
from bench import add_precision, child, chosen, measure, parser_for
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vlm.losses.contrastive import sigmoid_loss, softmax_loss
from vlm.precision import DTYPES, machine

matplotlib.use("Agg")
from matplotlib import pyplot

LOSSES = ("softmax", "sigmoid")
SIDES = ("ours", "open_clip")
MATRICES, MATRICES_PER_RANK = 2, 3
"""Matrices of logits, local batch squared, that open_clip's losses hold at once, and how many
more for each rank: about what is measured, used where no smaller point was."""


def loss_of(side: str, loss: str, rank: int = 0, ranks: int = 1) -> Callable[..., Tensor]:
    """A function of images, texts, log_scale and bias."""
    if side == "ours":
        if loss == "softmax":
            return lambda images, texts, log_scale, bias: softmax_loss(images, texts, log_scale)
        return sigmoid_loss
    from open_clip.loss import ClipLoss, SigLipLoss

    if loss == "softmax":
        peer = ClipLoss(rank=rank, world_size=ranks)
        return lambda images, texts, log_scale, bias: peer(images, texts, log_scale.exp())
    peer = SigLipLoss(rank=rank, world_size=ranks)
    return lambda images, texts, log_scale, bias: peer(images, texts, log_scale.exp(), bias)


def figures(
    call: Callable[..., Tensor], batch: int, width: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, float]:
    """One forward and backward pass: peak MB above the state before, MB of the whole process at its
    peak, seconds, and the loss. dtype: of the embeddings."""

    def tensors(count: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        vectors = [F.normalize(torch.randn(count, width, generator=generator)) for _ in range(2)]
        scalars = torch.tensor(math.log(10)), torch.tensor(-10.0)
        return [t.requires_grad_() for t in (*(x.to(dtype) for x in vectors), *scalars)]

    call(*tensors(64)).backward()  # what torch sets up once is not the loss's
    inputs = tensors(batch)

    def both_passes() -> float:
        value = call(*inputs)
        value.backward()
        return float(value.detach())

    found = measure(both_passes)
    return {
        "peak_mb": found.taken_mb,
        "process_mb": found.peak_mb,
        "seconds": found.seconds,
        "value": found.value,
    }


def available_mb() -> float:
    """Memory that the system can give now, in MB; all there is where it does not tell."""
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":") for line in info.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) / 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


def against_batch(settings: argparse.Namespace) -> list[dict]:
    """A point for each side, loss and batch: measured, or skipped with an estimate."""
    plan = [(batch, loss, side) for batch in settings.batches for loss in LOSSES for side in SIDES]
    points: list[dict] = []
    for batch, loss, side in tqdm(plan, desc="points", unit="point"):
        point = {"side": side, "loss": loss, "batch": batch}
        if side == "open_clip":
            needed, room = estimate(points, loss, batch, settings.precision), available_mb()
            if needed > settings.room * room:
                reason = f"needs about {needed:.0f} MB, {room:.0f} MB are available"
                tqdm.write(f"open_clip {loss} at {batch} is skipped: {reason}")
                points.append({**point, "skipped": reason, "estimated_mb": needed})
                continue
        points.append({**point, **child(settings, side, loss, batch)})
    return points


def estimate(points: list[dict], loss: str, batch: int, precision: str) -> float:
    """MB that open_clip needs: by the square of the batch from its largest point so far."""
    known = [p for p in points if p["side"] == "open_clip" and p["loss"] == loss]
    if not known:
        return (MATRICES + MATRICES_PER_RANK) * DTYPES[precision].itemsize * batch**2 / 2**20
    last = max(known, key=lambda point: point["batch"])
    peak = last.get("peak_mb", last.get("estimated_mb"))
    return peak * (batch / last["batch"]) ** 2


def against_ranks(settings: argparse.Namespace) -> list[dict]:
    """A point for each side, loss and number of ranks: the rank that needs most."""
    plan = [
        (ranks, side, loss)
        for ranks in settings.ranks
        for side, loss in (("ours", "sigmoid"), ("ours", "softmax"), ("open_clip", "sigmoid"))
    ]
    points = []
    for ranks, side, loss in tqdm(plan, desc="points", unit="point"):
        point = {"side": side, "loss": loss, "ranks": ranks, "local_batch": settings.local_batch}
        if side == "open_clip":
            matrices = MATRICES + MATRICES_PER_RANK * ranks
            size = DTYPES[settings.precision].itemsize * settings.local_batch**2
            needed, room = matrices * size / 2**20, available_mb()
            if ranks * needed > settings.room * room:
                reason = f"{ranks} x {needed:.0f} MB are needed, {room:.0f} MB are available"
                points.append({**point, "skipped": reason, "estimated_mb": needed})
                continue
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                measure_rank,
                (ranks, folder, side, loss, settings),
                nprocs=ranks,
            )
            found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
        points.append(
            {
                **point,
                **{key: max(each[key] for each in found) for key in found[0]},
                "each": found,
            }
        )
    return points


def measure_rank(
    rank: int, ranks: int, folder: str, side: str, loss: str, settings: argparse.Namespace
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    call, dtype = loss_of(side, loss, rank, ranks), DTYPES[settings.precision]
    found = figures(call, settings.local_batch, settings.width, dtype, seed=rank)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def growth(points: list[dict]) -> float:
    """The power of the batch by which memory grows, between the two largest measured batches."""
    measured = sorted((p["batch"], p["peak_mb"]) for p in points if p.get("peak_mb", 0) > 0)[-2:]
    if len(measured) < 2:
        return math.nan
    (few, low), (many, high) = measured
    return math.log(high / low) / math.log(many / few)


def series(points: list[dict], side: str, loss: str) -> list[dict]:
    return [point for point in points if point["side"] == side and point["loss"] == loss]


def draw_batches(points: list[dict], settings: argparse.Namespace, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for side, colour in zip(SIDES, ("tab:blue", "tab:orange")):
        for loss, line, mark in zip(LOSSES, ("-", "--"), ("o", "s")):
            every = series(points, side, loss)
            measured = [p for p in every if "peak_mb" in p]
            skipped = [p for p in every if "skipped" in p]
            axes.plot(
                [p["batch"] for p in measured], [p["peak_mb"] for p in measured],
                line, marker=mark, color=colour, label=f"{side}, {loss}" if measured else None,
            )  # fmt: skip
            axes.plot(
                [p["batch"] for p in skipped], [p["estimated_mb"] for p in skipped],
                linestyle="none", marker=mark, color=colour, fillstyle="none",
                label=f"{side}, {loss}: estimated, not run" if skipped else None,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("pairs in the batch")
    axes.set_ylabel("peak memory of forward and backward pass, MB")
    axes.set_title(f"Contrastive losses, one process, width {settings.width}, {settings.precision}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def draw_ranks(points: list[dict], settings: argparse.Namespace, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for side, loss, colour in (
        ("ours", "sigmoid", "tab:blue"),
        ("ours", "softmax", "tab:cyan"),
        ("open_clip", "sigmoid", "tab:orange"),
    ):
        every = series(points, side, loss)
        measured = [p for p in every if "peak_mb" in p]
        skipped = [p for p in every if "skipped" in p]
        axes.plot(
            [p["ranks"] for p in measured], [p["peak_mb"] for p in measured],
            marker="o", color=colour, label=f"{side}, {loss}" if measured else None,
        )  # fmt: skip
        axes.plot(
            [p["ranks"] for p in skipped], [p["estimated_mb"] for p in skipped],
            linestyle="none", marker="o", color=colour, fillstyle="none",
            label=f"{side}, {loss}: estimated, not run" if skipped else None,
        )  # fmt: skip
    axes.set_xticks(sorted({p["ranks"] for p in points}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("gloo processes")
    axes.set_ylabel("peak memory of one rank, forward and backward pass, MB")
    axes.set_title(
        f"Contrastive losses, {settings.local_batch} pairs on each rank, width {settings.width}, "
        f"{settings.precision}"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = parser_for(__doc__, rounds=False)
    parser.add_argument("--out", type=Path, help="folder for figures and plot")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[2**k for k in range(10, 17)], help="pairs"
    )
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of gloo processes, instead")
    parser.add_argument("--local-batch", type=int, default=16384, help="pairs on each rank")
    parser.add_argument("--width", type=int, default=512, help="numbers in an embedding")
    parser.add_argument(
        "--room", type=float, default=0.8, help="share of available memory that a point may need"
    )
    add_precision(parser)
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.only:
        side, loss, batch = settings.only
        dtype = DTYPES[settings.precision]
        print(json.dumps(figures(loss_of(side, loss), int(batch), settings.width, dtype)))
        return
    if settings.out is None:
        parser.error("--out is needed: the folder for figures and plot")
    chosen(settings)
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**18))  # read as a process starts
    settings.out.mkdir(parents=True, exist_ok=True)
    settings.batches.sort()
    about = {
        "width": settings.width,
        "precision": settings.precision,
        "torch": torch.__version__,
        "machine": machine(),
    }
    if settings.ranks:
        points = against_ranks(settings)
        draw_ranks(points, settings, settings.out / "ranks.png")
        (settings.out / "ranks.json").write_text(json.dumps({**about, "points": points}, indent=1))
        print(
            f"{'side':10} {'loss':8} {'ranks':>6} {'peak MB':>9} {'of first':>9} {'process MB':>11}"
        )
        for point in points:
            head = f"{point['side']:10} {point['loss']:8} {point['ranks']:6}"
            if "skipped" in point:
                print(f"{head} skipped: {point['skipped']}")
                continue
            first = series(points, point["side"], point["loss"])[0]
            print(
                f"{head} {point['peak_mb']:9.0f} "
                f"{point['peak_mb'] / first['peak_mb']:8.3f}x {point['process_mb']:11.0f}"
            )
        return
    points = against_batch(settings)
    draw_batches(points, settings, settings.out / "batch.png")
    (settings.out / "batch.json").write_text(json.dumps({**about, "points": points}, indent=1))
    print(f"{'side':10} {'loss':8} {'batch':>7} {'peak MB':>9} {'seconds':>8} {'value':>10}")
    for point in points:
        head = f"{point['side']:10} {point['loss']:8} {point['batch']:7}"
        if "skipped" in point:
            print(f"{head} skipped: {point['skipped']}")
        else:
            print(f"{head} {point['peak_mb']:9.0f} {point['seconds']:8.2f} {point['value']:10.5f}")
    for side in SIDES:
        for loss in LOSSES:
            power = growth(series(points, side, loss))
            print(f"{side} {loss}: memory grows by the batch to the power {power:.2f}")


if __name__ == "__main__":
    main()
