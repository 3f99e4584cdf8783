"""Kills a run again and again at random moments, goes on each time, and compares the end with a run
that was left alone.

    python eval/kill_resume.py --kills 100

A kill is SIGKILL to all processes of the run at once, as a scheduler or a machine short of memory
does: half of them at moments spread evenly over a run, half while a checkpoint is being written.
After each, every checkpoint that is called whole must hold what its checksums say, and none that
was there may be lost; at the end of a run metrics, weights and result must equal those of the run
that was left alone, to the bit. Runs are begun until the number of kills is reached, and the last
is finished.

The recipe is started by forking this process, which has imported everything, as a start of Python
would take most of the time. All other options are the recipe's own settings. Ends with exit code 1
where anything was lost or differs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: forks need one thread

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "recipes" / "line_reader.py"
SMALL = [
    *("--height-px", "16", "--width", "64", "--depth", "2", "--steps", "12", "--batch", "4"),
    *("--save-every", "1", "--eval-every", "4", "--held-out-rows", "8", "--threads", "1"),
]
"""Settings of the demo recipe for a run of seconds."""
LIMIT_S = 1800
"""How long a start of a run may take."""
TIMINGS = ("samples_per_s", "tokens_per_s", "gflops_per_s", "mfu", "data_wait")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is killed, and how often."""

    kills: int = 100
    """How many kills."""
    recipe: Path = DEMO
    """The recipe's file; other options are its settings, by default those of a run of seconds."""
    out: Path = Path("runs/kill_resume")
    """A folder for the runs; what lies there of an earlier check is removed."""
    seed: int = 0
    """Of the moments."""
    saving: float = 0.5
    """Share of the kills that wait for a checkpoint to be written."""


@dataclass
class Counts:
    """What was found. kills: in all; during_saves: those that left a checkpoint half written;
    before_first: those of a run that had no checkpoint yet; opened: whole checkpoints that were
    read after kills; lost, corrupted, differing: what is wrong, each named."""

    kills: int = 0
    during_saves: int = 0
    before_first: int = 0
    runs: int = 0
    opened: int = 0
    lost: list[str] = field(default_factory=list)
    corrupted: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return [*self.lost, *self.corrupted, *self.differing]


def main() -> None:
    settings, rest = tyro.cli(
        Settings, description=__doc__, return_unknown_args=True, args=sys.argv[1:]
    )
    small = SMALL if settings.recipe == DEMO else []
    counts, seconds = check(settings, [*small, *rest])
    print(
        f"kills {counts.kills}, of them {counts.during_saves} while a checkpoint was being written "
        f"and {counts.before_first} before the first; runs finished {counts.runs} (each takes "
        f"{seconds:.1f} s if left alone); whole checkpoints read after kills {counts.opened}, "
        f"corrupted {len(counts.corrupted)}, lost {len(counts.lost)}; differences to the run that "
        f"was left alone {len(counts.differing)}"
    )
    for fault in counts.faults:
        print(f"  {fault}", file=sys.stderr)
    sys.exit(bool(counts.faults))


def check(settings: Settings, options: list[str]) -> tuple[Counts, float]:
    """The counts, and the seconds that a run takes when it is left alone.

    Raises RuntimeError with what a run said that failed by itself.
    """
    warm_up()
    dice = random.Random(settings.seed)
    shutil.rmtree(settings.out, ignore_errors=True)
    settings.out.mkdir(parents=True)
    alone = settings.out / "alone"
    started = time.monotonic()
    saving_s = Attempt(settings.recipe, alone, options).finish()
    seconds = time.monotonic() - started
    counts = Counts()
    tqdm.monitor_interval = 0  # no thread of its own: forks need one thread
    progress = tqdm(total=settings.kills, desc="kills")
    while counts.kills < settings.kills:
        out = settings.out / f"run{counts.runs}"
        while counts.kills < settings.kills:
            attempt = Attempt(settings.recipe, out, options)
            moment = dice.random()
            if dice.random() < settings.saving:
                skip = dice.randrange(5)
                killed = attempt.kill_while_saving(skip, delay_s=moment * saving_s)
            else:
                killed = attempt.kill_after(moment * seconds)
            if not killed:
                break
            after_kill(attempt, counts)
            progress.update()
        else:
            Attempt(settings.recipe, out, options).finish()
        counts.runs += 1
        counts.differing += differences(alone, out)
        if out.name != "run0":
            shutil.rmtree(out)
    progress.close()
    return counts, seconds


def warm_up() -> None:
    """Imports what a run would, once for all of them, and leaves no thread behind."""
    import matplotlib
    import torch

    with contextlib.suppress(ImportError):  # of an extra, which runs go without where it is absent
        import torch.utils.tensorboard
    matplotlib.use("Agg")
    import matplotlib.pyplot

    torch.set_num_threads(1)


class Attempt:
    """One start of a run, in a group of processes of its own: it goes on where there is something
    to go on from."""

    def __init__(self, recipe: Path, out: Path, options: list[str]) -> None:
        self.checkpoints = out / "checkpoints"
        self.log = out.with_name(f"{out.name}.log")
        self.seen = writing(self.checkpoints)
        self.whole = whole(self.checkpoints)
        resumes = ["--resume"] if self.checkpoints.is_dir() else []
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _become(recipe, [*options, "--out", str(out), *resumes], self.log)
        self.code: int | None = None

    def ended(self) -> bool:
        """Whether it has come to its end by itself.

        Raises RuntimeError with its last lines where that was a fault.
        """
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            if time.monotonic() - self.started > LIMIT_S:
                os.killpg(self.pid, signal.SIGKILL)
                raise RuntimeError(f"a run took more than {LIMIT_S} s; see {self.log}")
            return False
        self.code = os.waitstatus_to_exitcode(status)
        if self.code:
            said = self.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"a run ended by itself with exit code {self.code}:\n{said}")
        return True

    def finish(self) -> float:
        """Waits for its end; gives the seconds that it took to write a checkpoint, on average."""
        looks = saving = 0
        begun: set[str] = set()
        started = time.monotonic()
        while not self.ended():
            there = writing(self.checkpoints)
            begun |= there
            saving += bool(there)
            looks += 1
            time.sleep(0.002)
        return (time.monotonic() - started) * saving / looks / max(1, len(begun))

    def kill_after(self, delay_s: float) -> bool:
        """Kills it `delay_s` seconds from now; whether it was still running."""
        end = time.monotonic() + delay_s
        while (left := end - time.monotonic()) > 0:
            if self.ended():
                return False
            time.sleep(min(left, 0.005))
        return self._kill()

    def kill_while_saving(self, skip: int, delay_s: float) -> bool:
        """Kills it up to `delay_s` after it has begun to write the checkpoint after `skip` others,
        and as soon as that one is whole; whether it was still running."""
        begun: set[str] = set()
        while len(begun) <= skip:
            if self.ended():
                return False
            begun |= {name for name in writing(self.checkpoints) if name not in self.seen}
            time.sleep(0.0002)
        end = time.monotonic() + delay_s
        while time.monotonic() < end and writing(self.checkpoints) - self.seen:
            time.sleep(0.0002)
        return self._kill()

    def _kill(self) -> bool:
        if self.ended():
            return False
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return True


def _become(recipe: Path, arguments: list[str], log: Path) -> None:
    """Turns this fork into a run of the recipe; does not return."""
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = [str(recipe), *arguments]
        runpy.run_path(str(recipe), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def writing(checkpoints: Path) -> set[str]:
    """The checkpoints that are being written, each by a name of its own."""
    try:
        return {f"{e.name} {e.inode()}" for e in os.scandir(checkpoints) if e.name[-5:] == ".part"}
    except FileNotFoundError:
        return set()


def whole(checkpoints: Path) -> list[Path]:
    from vlm.training.checkpoints.checkpoint import list_checkpoints

    return list_checkpoints(checkpoints)


def after_kill(attempt: Attempt, counts: Counts) -> None:
    """Looks at what a kill has left."""
    from vlm.training.checkpoints import format as checkpoint_format

    counts.kills += 1
    counts.during_saves += bool(writing(attempt.checkpoints) - attempt.seen)
    now = whole(attempt.checkpoints)
    counts.before_first += not now
    for path in now:
        counts.opened += 1
        counts.corrupted += checkpoint_format.faults(path)
    if attempt.whole and (not now or now[-1].name < attempt.whole[-1].name):
        counts.lost.append(f"{attempt.whole[-1]} was lost at kill {counts.kills}")


def differences(one: Path, other: Path) -> Iterator[str]:
    """What two finished runs do not have in common: lines of metrics, the result, weights."""
    lines = [
        [untimed(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, other)
    ]
    if len(lines[0]) != len(lines[1]):
        yield f"{other}: {len(lines[1])} lines of metrics, {len(lines[0])} in {one}"
    for a, b in zip(*lines):
        if a != b:
            yield f"{other}: step {b['step']} {b}, in {one} {a}"
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    results = [{k: v for k, v in result.items() if k != "minutes"} for result in results]
    if results[0] != results[1]:
        yield f"{other}: result {results[1]}, in {one} {results[0]}"
    for path in sorted((one / "model").rglob("*")):
        twin = other / "model" / path.relative_to(one / "model")
        if path.is_file() and (not twin.is_file() or twin.read_bytes() != path.read_bytes()):
            yield f"{twin}: other bytes than {path}"
    newest = [whole(run / "checkpoints")[-1] for run in (one, other)]
    for path in sorted(newest[0].glob("*.distcp")):
        if (newest[1] / path.name).read_bytes() != path.read_bytes():
            yield f"{newest[1] / path.name}: other bytes than {path}"


def untimed(line: dict) -> dict:
    """A line of metrics without how long things took."""
    return {key: value for key, value in line.items() if key not in TIMINGS}


if __name__ == "__main__":
    main()
