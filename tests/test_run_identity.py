"""What decides what a run learns: data that changed are noticed, changes are named or refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests import tiny, training
from vlm.data.example import Turn
from vlm.data.mixture import Mixture, MixtureDataset
from vlm.data.sources import ListSource, open_source
from vlm.training.base_settings import BaseSettings, deciding
from vlm.training.checkpoints.format import CheckpointError
from vlm.training.checkpoints.run_identity import differences, fingerprint, run_identity

SETTINGS = BaseSettings(out=Path("run"), steps=1, batch=1)
ROW = {"image": "a.png", "caption": "a cat"}


def rows(path, count=40, **changes):
    tiny.image().save(path.parent / "a.png")
    values = [ROW | {"caption": f"cat {i:03}"} for i in range(count)]
    for at, caption in changes.items():
        values[int(at[1:])]["caption"] = caption
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return open_source(str(path))


def test_fingerprint_changes_with_the_data_and_not_with_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    before = fingerprint(rows(path))
    assert before.startswith("40 rows, rows.jsonl:1 to rows.jsonl:40, ")
    assert fingerprint(rows(path)) == before
    assert fingerprint(rows(path, count=41)) != before
    assert fingerprint(rows(path, r0="dog 000")) != before  # a row that is read
    assert fingerprint(rows(path, r1="a longer text")) != before  # seen by the file's size
    (tmp_path / "a.png").write_bytes(b"cut")
    source = open_source(str(path))
    other = fingerprint(source)
    rows(path)
    assert fingerprint(source) != other


def test_fingerprint_of_rows_that_are_made_reads_what_they_say():
    assert fingerprint(open_source("scenes:9:seed=1")) == fingerprint(
        open_source("scenes:9:seed=1")
    )
    drawn = fingerprint(open_source("scenes:9:seed=1")).rpartition(", ")[2]
    assert drawn != fingerprint(open_source("scenes:9:seed=2")).rpartition(", ")[2]
    texts = [fingerprint(open_source(f"python:{split}")) for split in ("train", "val")]
    assert texts[0] != texts[1]


def test_rows_that_cannot_be_read_do_not_stop_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows(path)
    path.write_text(path.read_text().replace('"caption": "cat 000"', '"caption": ["cat",7]'))
    assert fingerprint(open_source(str(path))).startswith("40 rows")


def identity(rate=1e-3, steps=6, names=("r0", "r1")):
    import dataclasses

    source = ListSource([tiny.example(name) for name in names], "tiny")
    data = MixtureDataset([source], Mixture([source], seed=0))
    stage = dataclasses.replace(training.STAGE, steps=steps)
    return run_identity({"rate": rate, "steps": steps, "out": Path("x")}, stage, data)


def test_same_run_differs_in_nothing():
    old = json.loads(json.dumps(identity()))
    assert differences(old, identity(), (), Path("step")) == []


def test_all_that_differs_is_listed_and_refused_unless_named():
    old, new = identity(), identity(rate=1.0, steps=8, names=("r0", "r2"))
    with pytest.raises(CheckpointError) as error:
        differences(old, new, (), Path("step_1"))
    said = str(error.value)
    assert "rate: 0.001 then, 1.0 now; steps: 6 then, 8 now; data.0 tiny: '2 rows" in said
    assert "data.0 tiny: '2 rows, r0 to r1, " in said
    assert said.endswith("name what may differ: --change rate steps data")
    with pytest.raises(
        CheckpointError, match=r"of another run: data\.0 tiny.*--change rate steps da"
    ):
        differences(old, new, ("rate", "steps"), Path("step_1"))
    assert len(differences(old, new, ("rate", "steps", "data"), Path("step_1"))) == 3
    with pytest.raises(CheckpointError, match=r"\['lr'\] name no setting"):
        differences(old, new, ("lr",), Path("step_1"))


def test_changed_setting_is_said_once_with_what_follows_from_it():
    old, new = identity(), identity(rate=1.0)
    new["stage"] = new["stage"] | {"rates": [["adaptor.*", 1.0]], "warmup_steps": 3}
    (line,) = differences(old, new, ("rate",), Path("step_1"))
    assert line == "rate: 0.001 then, 1.0 now (so stage.rates, stage.warmup_steps differ too)"
    assert differences(identity(), identity(steps=8), ("steps",), Path("step_1")) == [
        "steps: 6 then, 8 now"
    ]
    assert len(differences(old, new, ("rate", "stage"), Path("step_1"))) == 3  # asked for by name


def test_runs_of_earlier_versions_go_on():
    """What came later decides nothing where it says what was done before it."""
    assert repr(Turn("user", (None, "what?"))) == "Turn(role='user', content=(None, 'what?'))"
    assert "scored=False" in repr(Turn("assistant", ("a",), scored=False))
    assert not {"bad_boxes", "ignore_keys"} & deciding(SETTINGS).keys()
    stricter = dataclasses.replace(SETTINGS, bad_boxes="skip", ignore_keys=("tools",))
    assert deciding(stricter).items() >= {"bad_boxes": "skip", "ignore_keys": ["tools"]}.items()
