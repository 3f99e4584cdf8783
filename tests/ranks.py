"""One of several processes of a run: `python -m tests.ranks CASE`, with RANK and WORLD_SIZE set."""

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vlm.training.base_settings import BaseSettings
from vlm.training.memory import preflight
from vlm.training.runs import launch


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """A run of nothing."""

    out: Path = Path("runs/nothing")
    batch: int = 4
    steps: int = 2


def run(case, settings):
    rank = int(os.environ["RANK"])
    if case == "crowded":
        from tests import contrastive_runs

        preflight.memory_for = lambda device, module: (2**40, 2**20)[rank]
        contrastive_runs.run(Path(os.environ["OUT"]), **contrastive_runs.TINY)
    if case == "unlike":
        settings = replace(settings, clip=1.0 + rank, seed=rank)
    accelerator, share, _ = launch.accelerator_for(settings)
    print(f"share {share}, shard {launch.sharding_of(settings, accelerator)}", flush=True)
    torch.distributed.barrier()
    if case == "dies" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "dies":
        while True:
            accelerator.reduce(torch.ones(1), "sum")


if __name__ == "__main__":
    case = sys.argv.pop()
    launch.start(Settings, lambda settings: run(case, settings))
