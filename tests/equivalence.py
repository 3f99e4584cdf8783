"""One run, however it is split: `python -m tests.equivalence` prints README's table of it.

Each family, and a tiny published system of each kind of image layout, trains as one process on one
micro-batch a step, and again in other ways: the losses of all steps and the gradients of the first
step that a way makes, in fp32, are held against those.
"""

import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch

from tests import training
from tests.reference import tiny_idefics, tiny_idefics2, tiny_mllama, tiny_qwen2_vl
from tests.runs import launch, lines

EVERY = {"rates": [["*", 1e-3]], "clip": 1e9}
FAMILIES = {
    "decoder-only": {"split_by_kind": True},
    "cross-attended": {"family": "cross_attended", "split_by_kind": True},
    "encoder-decoder": {"family": "encoder_decoder"},
    "contrastive": {"loss": "softmax"},
}
"""Options of a tiny run; rows of unequal length, where images stand in or beside a text stream with
rows of text alone."""
SYSTEMS = {
    "Qwen2.5-VL": partial(tiny_qwen2_vl.write_folder, kind="qwen2_5_vl"),
    "Idefics2": tiny_idefics2.write_folder,
    "Mllama": tiny_mllama.write_folder,
    "Idefics v1": partial(tiny_idefics.write_folder, kind="instruct"),
}
"""What writes a tiny folder of a published system; its rows hold images of several sizes, two in
one, and none."""
STREAMS = {"decoder-only": 60, "cross-attended": 60, **dict.fromkeys(SYSTEMS, 400)}
"""Columns with a text stream -> the positions of a packed row."""
BATCH = dict.fromkeys((*FAMILIES, *SYSTEMS), 4) | {"contrastive": 8}
RESUMED_AT = 3


def ways(family, processes, folder):
    """The options of each way in which `processes` processes run a family or a system, by its name.
    folder: holds the systems' folders."""
    batch, found = BATCH[family], {}
    own = FAMILIES.get(family) or {"folder": str(folder / family)}

    def way(name, parts, **more):
        stage = EVERY | {"micro_batch": batch // processes // parts}
        found[name] = own | {"stage": stage, "gradients": True} | more

    if processes == 1:
        way("one", 1, save_every=RESUMED_AT, keep=9)
        way("accumulation 2", 2)
        way("accumulation 4", 4)
        if family in STREAMS:
            way("packed", 1, pack=STREAMS[family])
            way("packed, accumulation 2", 2, pack=STREAMS[family])
        way("resumed", 1, resume=True)
        return found
    way(f"{processes} replicas", 1)
    way(f"{processes} sharded", 1, shard="all")
    if processes == 2:
        way("2 sharded, accumulation 2", 2, shard="all")
        if family in STREAMS:
            way("2 sharded, packed", 1, shard="all", pack=STREAMS[family])
            way("2 replicas, balanced", 1, balance=True)
    if processes == 4:
        way("2 x 2 sharded by machine", 1, shard="node", machine_of=2)
    way(f"resumed on {processes}, sharded", 1, shard="all", resume=True)
    return found


def differences(out, processes=(1, 2, 4), columns=tuple(BATCH), only=None):
    """(column, way, largest relative difference of a loss, of the gradients) for each way, run in
    the folder `out`. The gradients' is the norm of the difference over the norm. only: names of
    ways; None takes all."""
    folder = out / "folders"
    for system in SYSTEMS.keys() & columns:
        SYSTEMS[system](folder / system)
    for count in processes:
        runs = {f"{f}/{name}": o for f in columns for name, o in ways(f, count, folder).items()
                if only is None or name in ("one", *only)}  # fmt: skip
        for name, options in runs.items():
            if options.get("resume"):
                _copy_checkpoint(out / name.split("/")[0] / "one", out / name)
            (out / name).mkdir(parents=True, exist_ok=True)
        if count == 1:
            for name, options in runs.items():
                training.run_one(out / name, options)
                if name.endswith("/one"):
                    _copy_checkpoint(out / name, out / name.replace("/one", "/resumed"))
        else:
            for column in columns:
                its = {name: o for name, o in runs.items() if name.startswith(f"{column}/")}
                done = launch(out, count, runs=its)
                assert done.returncode == 0, done.stderr[-3000:]
        for name in runs:
            if not name.endswith("/one"):
                family, way = name.split("/")
                yield family, way, *_compared(out / family / "one", out / name)


def _copy_checkpoint(one, to):
    found = one / "checkpoints" / f"step_{RESUMED_AT:08d}"
    if found.is_dir():
        (to / "checkpoints").mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(found), str(to / "checkpoints")], check=True)


def _compared(one, other):
    expected = {line["step"]: line["loss"] for line in lines(one)}
    found = {line["step"]: line["loss"] for line in lines(other)}
    assert found
    loss = max(abs(value / expected[step] - 1) for step, value in found.items())
    first = min(found)
    a = torch.load(one / f"gradients_{first - 1}.pt")
    b = torch.load(other / "gradients_0.pt")
    assert a.keys() == b.keys()
    gap = sum((a[name] - b[name]).double().square().sum() for name in a).sqrt()
    return loss, float(gap / sum(grad.double().square().sum() for grad in a.values()).sqrt())


def table(rows):
    """Markdown: a line for each way, a column for each family and system; loss, then gradients."""
    cells: dict[str, dict[str, str]] = {}
    for family, way, loss, gradients in rows:
        cells.setdefault(way, {})[family] = f"{loss:.0e}, {gradients:.0e}"
    text = [f"| run as | {' | '.join(BATCH)} |", f"| --- |{' ---: |' * len(BATCH)}"]
    for way, found in cells.items():
        text.append(f"| {way} | {' | '.join(found.get(family, '') for family in BATCH)} |")
    return "\n".join(text)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(table(differences(Path(folder))))
