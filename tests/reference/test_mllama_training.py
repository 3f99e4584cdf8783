"""A published cross-attention tower's run, however it is split: losses and gradients stay."""

import pytest
import torch

from tests import training
from tests.reference import tiny_idefics, tiny_mllama
from tests.runs import launch, lines

RATES = {"rates": [["*", 1e-3]], "clip": 1e9, "steps": 2}
ONE = {
    "one": {"parts": 1},
    "accumulation": {"parts": 4},
    "packed, accumulation": {"parts": 2, "pack": 400},
}
TWO = {
    "2 sharded": {"parts": 1, "shard": "all"},
    "2 sharded, packed, accumulation": {"parts": 2, "shard": "all", "pack": 400},
}
TINY = {"mllama": tiny_mllama, "idefics": tiny_idefics}


def options(folder, processes, parts, **more):
    stage = RATES | {"micro_batch": 4 // processes // parts}
    return {"folder": str(folder), "stage": stage, "gradients": True, **more}


@pytest.mark.slow
def test_losses_and_gradients_do_not_depend_on_the_split(tmp_path):
    """Images of several sizes, two in a row and none; the second of two processes has batches
    without an image."""
    runs = {}
    for kind, tiny in TINY.items():
        folder = tmp_path / kind
        tiny.write_folder(folder / "model")
        for name, way in ONE.items():
            (folder / name).mkdir()
            training.run_one(folder / name, options(folder / "model", 1, **way))
        for name, way in TWO.items():
            (folder / name).mkdir()
            runs[f"{kind}/{name}"] = options(folder / "model", 2, **way)
    done = launch(tmp_path, 2, runs=runs)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in TINY:
        one = tmp_path / kind / "one"
        history, gradients = lines(one), torch.load(one / "gradients_0.pt")
        assert len(history) == RATES["steps"]
        for name in (*ONE, *TWO):
            for a, b in zip(history, lines(tmp_path / kind / name), strict=True):
                assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), (kind, name)
            its = torch.load(tmp_path / kind / name / "gradients_0.pt")
            assert its.keys() == gradients.keys()
            away = sum((its[key] - gradients[key]).square().sum() for key in gradients)
            whole = sum(grad.square().sum() for grad in gradients.values())
            assert (away / whole).sqrt() < 1e-5, (kind, name)
