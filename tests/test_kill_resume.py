import random

import pytest

from eval import kill_resume
from tests.pages import DEJAVU


@pytest.mark.slow
def test_killed_runs_end_as_the_one_that_was_left_alone(tmp_path):
    """Kills while training and while a checkpoint is written; nothing is lost or differs."""
    lines = f":fonts={DEJAVU}:kind=clean:longest=6"
    options = [*kill_resume.SMALL, "--steps", "4", "--save-every", "1", "--eval-every", "2"]
    options += ["--held-out-rows", "2", "--workers", "0", "--train", f"lines:99:seed=1{lines}"]
    options += ["--held-out", f"lines:2:seed=2{lines}:split=validation"]
    settings = kill_resume.Settings(kills=3, out=tmp_path, seed=1, saving=0.7)
    counts, _ = kill_resume.check(settings, options)
    assert counts.faults == []
    assert counts.kills == 3
    assert counts.runs >= 1


def test_what_differs_is_named(tmp_path):
    for name, loss in (("one", 1.0), ("other", 1.0 + 2**-40)):
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(
            f'{{"step": 1, "loss": {loss!r}, "samples_per_s": {random.random()}}}\n'
        )
        (folder / "result.json").write_text(f'{{"cer": 0.5, "minutes": {random.random()}}}')
        (folder / "model" / "model.safetensors").write_bytes(name[:1].encode())
        step = folder / "checkpoints" / "step_00000001"
        step.mkdir(parents=True)
        (step / "__0_0.distcp").write_bytes(b"same")
    said = list(kill_resume.differences(tmp_path / "one", tmp_path / "other"))
    assert len(said) == 1
    assert "step 1" in said[0]
    (tmp_path / "other/model/model.safetensors").write_bytes(b"different")
    assert len(list(kill_resume.differences(tmp_path / "one", tmp_path / "other"))) == 2
