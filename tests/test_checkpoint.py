"""Checkpoints on the disk: whole or not there, broken ones named, read on any number of ranks."""

import json
import multiprocessing
import os
import pickle
import resource
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from vlm.training.checkpoints import checkpoint
from vlm.training.checkpoints import format as checkpoint_format
from vlm.training.checkpoints.checkpoint import (
    CheckpointError,
    Checkpoints,
    Progress,
    list_checkpoints,
    share_of,
    state_of,
)
from vlm.weights import same_bits

IDENTITY = {"settings": {"rate": 1e-3}, "stage": {"steps": 9}, "mixture": {}, "data": {"0 a": "7"}}


def parts(seed, width=8, sharded=False):
    """A module with a frozen part, and its optimizer."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width), nn.Linear(width, 3))
    torch.manual_seed(100)
    for parameter in module[2].parameters():
        parameter.data.normal_()
        parameter.requires_grad_(False)
    if sharded:
        fully_shard(module)
    learning = [p for p in module.parameters() if p.requires_grad]
    return module, torch.optim.AdamW(learning, lr=1e-2, fused=True)


def step(module, optimizer):
    module(torch.linspace(-1, 1, 20).reshape(4, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def copied(module, optimizer):
    state = {name: tensor.detach() for name, tensor in state_of(module, optimizer).items()}
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()
        for name, t in state.items()
    }


def saved(folder, steps=(1, 2), **options):
    """A run's checkpoints after each of some steps, and the state at each."""
    module, optimizer = parts(0)
    states = {}
    with Checkpoints(folder, module, optimizer, IDENTITY, **options) as checkpoints:
        for done in steps:
            step(module, optimizer)
            states[done] = copied(module, optimizer)
            checkpoints.save(Progress(step=done, samples=4 * done))
    return states


def restored(folder, identity=IDENTITY, change=(), said=None, **options):
    module, optimizer = parts(1, **options)
    say = [].append if said is None else said.append
    progress = Checkpoints(folder, module, optimizer, identity, say=say).restore(change)
    return progress, copied(module, optimizer)


def test_state_is_restored_bit_by_bit_as_it_was_when_it_was_saved(tmp_path):
    """Weights that change while the checkpoint is written are not in it."""
    module, optimizer = parts(0)
    with Checkpoints(tmp_path, module, optimizer, IDENTITY) as checkpoints:
        step(module, optimizer)
        expected = copied(module, optimizer)
        checkpoints.save(Progress(step=1, samples=4, examples_skipped=["row 3: cut"]))
        for _ in range(5):
            step(module, optimizer)
    progress, found = restored(tmp_path)
    assert same_bits(found, expected)
    assert progress == Progress(step=1, samples=4, examples_skipped=["row 3: cut"])
    module, optimizer = parts(1)
    Checkpoints(tmp_path, module, optimizer, IDENTITY).restore()
    for _ in range(2):
        step(module, optimizer)
    again, twin = parts(0)
    for _ in range(3):
        step(again, twin)
    assert same_bits(copied(module, optimizer), copied(again, twin))


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_are_kept_and_nothing_else_is_left(tmp_path, keep):
    saved(tmp_path, (1, 2, 3, 4, 5), keep=keep)
    names = [f"step_{done:08d}" for done in range(6 - keep, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with pytest.raises(ValueError, match="at least one checkpoint, found 0"):
        saved(tmp_path, keep=0)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run.json", "manifest.json"])
@pytest.mark.parametrize("harm", [cut, flip, os.remove])
def test_broken_file_is_named_and_the_checkpoint_before_taken(tmp_path, name, harm):
    states = saved(tmp_path)
    newest = tmp_path / "step_00000002"
    harm(newest / name)
    said = []
    progress, found = restored(tmp_path, said=said)
    assert progress.step == 1
    assert same_bits(found, states[1])
    assert f"{newest}/" in said[0]
    assert name in said[0] or (name, harm) == ("manifest.json", flip)  # a name in it, perhaps
    assert "going on from step_00000001, so that 1 steps will be repeated" in said[0]
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000001", "broken_step_00000002"}


def test_run_without_a_whole_checkpoint_is_told_what_is_wrong_with_each(tmp_path):
    saved(tmp_path)
    cut(tmp_path / "step_00000001/__0_0.distcp")
    flip(tmp_path / "step_00000002/run.json")
    message = r"no checkpoint is whole: .*2/run\.json: expected SHA.*1/__0_0.distcp: expected \d+"
    with pytest.raises(CheckpointError, match=message):
        restored(tmp_path)
    assert len(list_checkpoints(tmp_path)) == 2


def test_what_a_kill_left_is_removed_and_said(tmp_path):
    saved(tmp_path)
    (tmp_path / ".step_00000003.part").mkdir()
    (tmp_path / ".step_00000003.part" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".step_00000001.old").mkdir()
    said = []
    assert restored(tmp_path, said=said)[0].step == 2
    part = tmp_path / ".step_00000003.part"
    assert said == [f"{part}: was being written when the run ended; removed"]
    assert sorted(tmp_path.iterdir()) == list_checkpoints(tmp_path)


def test_run_stopped_before_its_first_checkpoint_starts_afresh(tmp_path):
    assert restored(tmp_path / "none")[0] == Progress()


class SmallDisk:
    """Within, no file of this process can grow past some bytes: a write ends in its middle."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_write_that_fails_in_its_middle_leaves_the_one_before_whole(tmp_path):
    module, optimizer = parts(0, width=4000)
    checkpoints = Checkpoints(tmp_path, module, optimizer, IDENTITY)
    step(module, optimizer)
    expected = copied(module, optimizer)
    checkpoints.save(Progress(step=1))
    checkpoints.wait()
    with SmallDisk(100_000):
        checkpoints.save(Progress(step=2))
        checkpoints._join()
    assert checkpoints.failed
    for call in (checkpoints.wait, lambda: checkpoints.save(Progress(step=3))):
        message = r"step_00000002 could not be written: .*; the newest whole one is step_00000001"
        with pytest.raises(CheckpointError, match=message):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert same_bits(restored(tmp_path, width=4000)[1], expected)


def test_error_of_a_run_waits_for_the_checkpoint_that_is_being_written(tmp_path):
    module, optimizer = parts(0)
    step(module, optimizer)

    def fail():
        with Checkpoints(tmp_path, module, optimizer, IDENTITY) as checkpoints:
            checkpoints.save(Progress(step=1))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(list_checkpoints(tmp_path)) == 1


def test_other_library_versions_are_said(tmp_path, monkeypatch):
    saved(tmp_path)
    now = checkpoint.versions()
    monkeypatch.setattr(checkpoint, "versions", lambda: now | {"torch": "9.9"})
    said = []
    restored(tmp_path, said=said)
    assert said == [f"step_00000002 was written with torch {now['torch']}, this is 9.9"]


def test_other_weights_are_named(tmp_path):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match="frozen weights are not those of this model"):
        restored(tmp_path, width=9)
    module, optimizer = parts(0)
    module[0] = nn.Linear(6, 8)
    with pytest.raises(CheckpointError, match=r"0\.weight: expected \(8, 6\), found \(8, 5\)"):
        checkpoint.read_state(tmp_path / "step_00000002", module, optimizer)
    module[1].requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"do not learn here: \['weights.1.bias', 'weights.1"):
        checkpoint.read_state(tmp_path / "step_00000002", module, optimizer)


def test_fingerprint_is_of_the_weights_and_not_of_their_precision():
    module, _ = parts(0)
    before = checkpoint.fingerprint(module)
    module[2].to(torch.bfloat16)
    assert checkpoint.fingerprint(module) == before
    module[2].weight.data[0, 0] += 1
    assert checkpoint.fingerprint(module) != before


def test_fingerprint_counts_the_statistics_of_batch_norms():
    """Those of checkpoints from before it did are told by their form, and still hold."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    before, old = checkpoint.fingerprint(module), checkpoint.fingerprint(module, buffers=False)
    assert checkpoint.is_of(before, module)
    assert checkpoint.is_of(old, module)
    assert len(old) == 16
    module[1].running_var[0] = 2
    assert not checkpoint.is_of(before, module)
    assert checkpoint.is_of(old, module)
    module[0].weight[0, 0] += 1
    assert not checkpoint.is_of(old, module)
    assert not checkpoint.is_of("b" + old[1:], module)


def test_description_that_would_run_something_is_refused(tmp_path):
    """No pickle of a stranger's is run: not in `.metadata`, and nothing but tensors is stored."""
    saved(tmp_path)
    path = tmp_path / "step_00000002"
    (path / ".metadata").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(CheckpointError, match=r"\.metadata: expected a desc.* found posix.getcwd"):
        checkpoint_format.stored(path)


def test_ranks_share_out_what_all_have_alike():
    state = {f"w{i}": torch.zeros(size) for i, size in enumerate([100, 50, 30, 20, 7, 0])}
    shares = [share_of(state, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(state)
    sizes = [sum(t.nbytes for t in share.values()) for share in shares]
    assert sizes == [400, 228, 200]


# On two ranks: one launch computes all cases, tests look at what it found.


def on_rank(rank, folder, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, sharded in (("plain", False), ("sharded", True)):
        module, optimizer = parts(0, sharded=sharded)
        with Checkpoints(folder / name, module, optimizer, IDENTITY) as checkpoints:
            step(module, optimizer)
            checkpoints.save(Progress(step=1))
            step(module, optimizer)
            checkpoints.save(Progress(step=2))
            found[name] = copied(module, optimizer)
    for name, sharded in (("plain", False), ("sharded", True)):
        for source in ("one", "plain", "sharded"):
            module, optimizer = parts(1, sharded=sharded)
            said = []
            Checkpoints(folder / source, module, optimizer, IDENTITY, say=said.append).restore()
            found[name, "from", source] = copied(module, optimizer)
    module, optimizer = parts(0, width=4000)
    checkpoints = Checkpoints(folder / "full", module, optimizer, IDENTITY)
    for done in (1, 2):
        step(module, optimizer)
        with SmallDisk(10_000 if (rank, done) == (1, 2) else resource.RLIM_INFINITY):
            checkpoints.save(Progress(step=done))
            checkpoints._join()
    found["full"] = str(checkpoints._error)
    flip(folder / "one/step_00000002/run.json") if rank == 0 else None
    dist.barrier()
    module, optimizer = parts(1)
    said = []
    other = {**IDENTITY, "settings": {"rate": 2.0}} if rank == 0 else {}
    checkpoints = Checkpoints(folder / "one", module, optimizer, other, say=said.append)
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore()
    found["refused"] = str(error.value)
    found["progress"] = checkpoints.restore(("rate",)).step
    found["said"] = said
    torch.save(found, results / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def guarded(rank, folder, results):
    try:
        on_rank(rank, folder, results)
    except BaseException:
        (results / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    states = saved(folder / "one")
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=guarded, args=(rank, folder, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    said = "".join(path.read_text() for path in folder.glob("?.txt"))
    assert [process.exitcode for process in ranks] == [0, 0], said
    return folder, states, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_ranks_save_and_one_resumes(two):
    folder, states, found = two
    for name in ("plain", "sharded"):
        expected = found[0][name]
        for part, tensor in states[2].items():
            torch.testing.assert_close(expected[part], tensor, atol=1e-5, rtol=1e-4)
        assert same_bits(restored(folder / name)[1], expected)
        files = sorted((folder / name / "step_00000002").glob("*.distcp"))
        assert [path.name for path in files] == ["__0_0.distcp", "__1_0.distcp"]
        assert all(path.stat().st_size for path in files)


@pytest.mark.parametrize("form", ["plain", "sharded"])
@pytest.mark.parametrize("source", ["one", "plain", "sharded"])
def test_two_ranks_resume_what_one_or_two_saved(two, form, source):
    """Replicated or sharded, from replicated or sharded, to the bit."""
    _, states, found = two
    expected = states[2] if source == "one" else found[0][source]
    for rank in range(2):
        assert same_bits(found[rank][form, "from", source], expected)


def test_full_disk_of_one_rank_ends_all_with_its_message(two):
    folder, _, found = two
    for rank in range(2):
        said = found[rank]["full"]
        assert "step_00000002 could not be written" in said
        assert "the newest whole one is step_00000001" in said
    assert "process 1: " in found[0]["full"]
    assert [path.name for path in (folder / "full").iterdir()] == ["step_00000001"]


def test_first_rank_decides_what_all_go_on_from(two):
    _, _, found = two
    for rank in range(2):
        assert "rate: 0.001 then, 2.0 now" in found[rank]["refused"]
        assert found[rank]["progress"] == 1
    assert any("broken checkpoint" in line for line in found[0]["said"])
    assert found[1]["said"] == []


def test_manifest_holds_what_sha256sum_says(tmp_path):
    saved(tmp_path)
    folder = tmp_path / "step_00000002"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert files["run.json"] == checkpoint_format.checksum(folder / "run.json")
