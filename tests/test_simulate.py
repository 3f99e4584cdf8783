import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import encoder_decoders, tiny, training
from vlm.families.line_reader import layout as line_reader
from vlm.families.line_reader.batch import LineRow
from vlm.training.activation_checkpointing import checkpoint_activations
from vlm.training.memory.simulate import SimulatedStep
from vlm.training.objectives.contrastive import Contrast
from vlm.training.objectives.ctc import Transcribe
from vlm.training.objectives.next_token import NextToken
from vlm.training.stages import FROZEN, Stage
from vlm.training.state import build_state

pytestmark = pytest.mark.slow

ALL = (("*", 1e-3),)
ADAPTOR = (("adaptor.*", 1e-3), ("*", FROZEN))


def stage(rates):
    return Stage(name="t", rates=rates, steps=2, batch=4, micro_batch=4, warmup_steps=0)


def decoder_only(checkpointed=False, **more):
    model = training.model(**{"width": 64, "vocab": 2048, **more})
    if checkpointed:
        checkpoint_activations(model.module, ("text",))
    rows = [model.processor.encode(example) for example in training.examples()[:4]]
    return model.module, rows, NextToken(model.processor.pad_id)


def encoder_decoder():
    module = encoder_decoders.model()
    processor = encoder_decoders.processor(module)
    rows = encoder_decoders.rows(processor, "a line", "another line", "third")
    return module, rows, NextToken(processor.pad_id)


def contrastive(kind="sigmoid"):
    model = training.contrastive_model(kind)
    rows = [model.processor.encode(example) for example in training.pairs(4)]
    return model.module, rows, Contrast(kind)


def lines():
    module = line_reader.build("abc", width=64, layers=3, blocks=(1, 1)).module
    rows = [
        LineRow(name=f"l{i}", pixels=torch.randn(3, 32, 64 + 32 * (i % 2)), ids=(1, 2, 3))
        for i in range(4)
    ]
    return module, rows, Transcribe()


CASES = {
    "decoder-only": decoder_only,
    "decoder-only, checkpointed": partial(decoder_only, checkpointed=True),
    "decoder-only, eager attention": partial(decoder_only, kind="gemma2"),
    "encoder-decoder": encoder_decoder,
    "contrastive, sigmoid": contrastive,
    "contrastive, softmax": partial(contrastive, "softmax"),
    "line reader": lines,
}


class Books(TorchDispatchMode):
    """Storages of real tensors, from their making to their end."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakKeyDictionary()

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen[storage] = True
            self.change(storage.nbytes())
            weakref.finalize(storage, self.change, -storage.nbytes())

    def change(self, size):
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        return out


def held_in_truth(make, rates, dtype, micro_batches):
    """The most bytes that a real second step holds at a time."""
    module, rows, objective = make()
    state = build_state(module, stage(rates), dtype)
    parts = [objective.collate(rows) for _ in range(micro_batches)]
    for last in (False, True):
        books = Books()
        if last:
            moments = [t for kept in state.optimizer.state.values() for t in kept.values()]
            weights = [*module.parameters(), *module.buffers(), *state.copies.copies]
            batches = [getattr(batch, "groups", (batch,)) for batch in parts[0]]
            for tensor in [
                *weights,
                *moments,
                *(group.pixels for groups in batches for group in groups),
            ]:
                books.note(tensor)
        with torch.autograd.set_multithreading_enabled(False), books:
            state.learn(
                objective,
                [batch for part in parts for batch in part],
                dict.fromkeys(objective.totals, 1),
                lambda: torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            )
    return books.most


@pytest.mark.parametrize(
    ("case", "dtype", "micro_batches"),
    [
        *((case, torch.bfloat16, 2) for case in CASES),
        ("decoder-only", torch.bfloat16, 1),
        ("decoder-only", torch.float32, 1),
        ("line reader", torch.float32, 1),
    ],
)
def test_a_simulated_step_holds_what_a_real_one_does(case, dtype, micro_batches):
    make = CASES[case]
    module, rows, objective = make()
    simulated = SimulatedStep(module, stage(ALL), objective, dtype, gpu=False)
    step = simulated.run([rows] * micro_batches)
    assert step.peak.total == pytest.approx(
        held_in_truth(make, ALL, dtype, micro_batches), rel=0.01
    )


def test_a_step_of_the_adaptor_alone_holds_what_a_real_one_does():
    module, rows, objective = decoder_only()
    step = SimulatedStep(module, stage(ADAPTOR), objective, torch.bfloat16, gpu=False).run([rows])
    truth = held_in_truth(decoder_only, ADAPTOR, torch.bfloat16, 1)
    assert step.peak.total == pytest.approx(truth, rel=0.01)


def test_state_is_14_bytes_a_trained_and_2_a_frozen_parameter():
    """An fp32 master, its 16-bit copy and two moments; of frozen weights 16 bits alone."""
    module, rows, objective = decoder_only()
    trained = sum(p.numel() for p in module.adaptor.parameters())
    frozen = sum(p.numel() for p in module.parameters()) - trained
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    held = SimulatedStep(module, stage(ADAPTOR), objective, torch.bfloat16, False).run([rows]).peak
    assert held.weights == 6 * trained + 2 * frozen + buffers
    assert held.optimizer == pytest.approx(8 * trained, rel=0.01)
    assert held.gradients <= 4 * trained


def test_logits_are_counted_apart_and_go_with_the_scored_places():
    module, rows, objective = decoder_only(vocab=8192)
    scored = sum(int(row.scored[1:].sum()) for row in rows)
    passing = (
        SimulatedStep(module, stage(ADAPTOR), objective, torch.float32, False).run([rows]).passing
    )
    assert 0 < passing.logits <= 2 * 4 * scored * 8192


def test_operations_are_those_that_the_meter_counts_in_a_real_pass():
    from vlm.training.flops import flop_counter

    module, rows, objective = decoder_only()
    with flop_counter() as counter:
        objective.backward(
            module,
            objective.collate(rows),
            {"tokens": 1},
            lambda: torch.autocast("cpu", enabled=False),
        )
    simulated = SimulatedStep(module, stage(ALL), objective, torch.float32, gpu=False)
    assert simulated.run([rows], count=True).flops == counter.get_total_flops()


def test_gpus_keep_more_of_norms_than_cpus():
    held = []
    for gpu in (False, True):
        module, rows, objective = contrastive()
        simulated = SimulatedStep(module, stage(ALL), objective, torch.bfloat16, gpu)
        held.append(simulated.run([rows]).passing.activations)
    assert held[0] < held[1]


def test_simulation_takes_no_memory_for_wide_batches():
    """Thousands of images of rows that lie in memory once; what they hold grows evenly, as soon
    as the loss takes its places in parts. On GPUs, where norms take all places at once."""
    module, rows, objective = decoder_only()
    simulated = SimulatedStep(module, stage(ADAPTOR), objective, torch.bfloat16, gpu=True)
    few, many = (simulated.run([rows * times]).passing[3:] for times in (40, 200))
    assert sum(many) == pytest.approx(5 * sum(few), rel=0.01)


def test_packed_weights_are_refused():
    module, _, objective = decoder_only()
    module.adaptor.packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="packed in few bits cannot be planned"):
        SimulatedStep(module, stage(ALL), objective, torch.bfloat16, gpu=False)


def test_steps_without_images_are_simulated_too():
    rates = (("text.*", 1e-3), ("*", FROZEN))

    def documents():
        model = training.model()
        rows = [model.processor.encode(tiny.example("t", ("say it",), "words")) for _ in range(2)]
        return model.module, rows, NextToken(model.processor.pad_id)

    module, rows, objective = documents()
    step = SimulatedStep(module, stage(rates), objective, torch.bfloat16, gpu=False).run([rows])
    truth = held_in_truth(documents, rates, torch.bfloat16, 1)
    assert step.peak.total == pytest.approx(truth, rel=0.01)
