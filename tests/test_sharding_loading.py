"""Sharding a model that lies in a file: no process has the whole of it in memory."""

import gc
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM

from tests import tiny
from vlm.families.decoder_only.module import DecoderOnly
from vlm.training.sharding import mesh_for, shard_module
from vlm.training.stages import Stage, choose_trained
from vlm.weights import load_weights, read_weights, save_weights

RANKS = 2
STAGE = Stage(
    name="all",
    rates=(("tokenizer.*", None), ("*", 1e-3)),
    steps=1,
    batch=RANKS,
    micro_batch=1,
    warmup_steps=0,
)
CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=24,
    num_attention_heads=4,
)


def empty_model():
    """A language model of 25 million weights with a tiny image tokenizer, without weights."""
    small = tiny.decoder_only(width=CONFIG.hidden_size)
    with init_empty_weights(include_buffers=False):
        return DecoderOnly(small.tokenizer, small.adaptor, LlamaForCausalLM(CONFIG)).eval()


def own_memory():
    """Bytes of this process that are no mapped file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


class Peak:
    """The most memory of its own that the process has while the block runs, beyond what it had."""

    def __enter__(self):
        gc.collect()
        self.before, self.most, self.done = own_memory(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(5e-4):
            self.most = max(self.most, own_memory() - self.before)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.most = max(self.most, own_memory() - self.before)


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    module = empty_model()
    device = torch.device("cpu")
    mesh = mesh_for("all", device)
    with Peak() as sharded:
        load_weights(module, read_weights(Path(folder)), where=folder)
        choose_trained(module, STAGE)
        shard_module(module, mesh, torch.bfloat16, device)
    kept = sum(p.to_local().nbytes for p in module.parameters())
    found = {"most": sharded.most, "kept": kept, "weights": dict(module.named_parameters())}
    found["weights"] = {name: p.detach().full_tensor() for name, p in found["weights"].items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory as Linux tells it")
def test_no_process_has_the_whole_model_in_memory(tmp_path, monkeypatch):
    """Weights lie in their mapped file until a block is taken; a rank keeps its half, in fp32."""
    small = tiny.decoder_only(width=CONFIG.hidden_size)
    text = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    save_weights(DecoderOnly(small.tokenizer, small.adaptor, text), tmp_path)
    block = sum(p.numel() for p in text.model.layers[0].parameters()) * 4
    whole = sum(p.numel() for p in text.parameters()) * 4
    # Freed memory goes back at once: what the allocator keeps between blocks is not counted.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=RANKS)
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert 0.9 * found["kept"] < found["most"] < found["kept"] + 2 * block < 0.8 * whole
        for name, weight in text.named_parameters():
            assert torch.equal(found["weights"][f"text.{name}"], weight.float())
