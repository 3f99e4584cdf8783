import dataclasses
import math
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch import nn

from tests import training
from vlm.families.contrastive.batch import collate_pairs
from vlm.training.activation_checkpointing import checkpoint_activations
from vlm.training.objectives.contrastive import Contrast
from vlm.training.stages import FROZEN, StageError, prepare

LOSSES = ("softmax", "sigmoid")
LOCKED = {
    "none": (),
    "image": ("tokenizer", "pool", "image_head"),
    "text": ("text", "text_head"),
    "both": ("tokenizer", "pool", "image_head", "text", "text_head"),
}


def wide_model(loss, locked=(), **options):
    """A tiny model in training mode, in fp64 so that equal is equal to many digits."""
    module = training.contrastive_model(loss, **options).module.train().double()
    for name in locked:
        module.get_submodule(name).requires_grad_(False)
    return module


@cache
def encoded():
    processor = training.contrastive_model().processor
    return [processor.encode(row) for row in training.pairs(8)]


def batches(sizes):
    """The same pairs, split; texts are padded to the longest of each part."""
    pairs = encoded()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [collate_pairs(pairs[start : start + size]) for start, size in zip(starts, sizes)]
    return [part.to("cpu", torch.float64) for part in parts]


def gradients(module):
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def step(loss, module, parts):
    share = Contrast(loss).backward(module, parts, {"pairs": 8}, nullcontext)
    return share, gradients(module)


def plain_step(loss, module, parts):
    """All passes with their activations kept, then one backward pass."""
    passes = [module(part) for part in parts]
    joined = [torch.cat(vectors) for vectors in zip(*passes)]
    share = Contrast(loss)._backward(module, type(passes[0])(*joined), parts)
    return share, gradients(module)


def assert_same(found, expected):
    (share, grads), (expected_share, expected_grads) = found, expected
    assert share == pytest.approx(expected_share, rel=1e-10)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        bound = 1e-9 * float(expected_grads[name].abs().max()) + 1e-14
        torch.testing.assert_close(grad, expected_grads[name], atol=bound, rtol=1e-7, msg=name)


@pytest.mark.parametrize("locked", LOCKED)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_the_same_for_every_split(loss, locked):
    """Of both towers, heads, scale and bias; a locked tower's embeddings need none."""
    module = wide_model(loss, LOCKED[locked])
    expected = plain_step(loss, module, batches([8]))
    learned = {name.split(".")[0] for name in expected[1]}
    assert learned == {
        *("tokenizer", "pool", "image_head", "text", "text_head"), "log_scale",
        *(["bias"] if loss == "sigmoid" else []),
    } - {*LOCKED[locked]}  # fmt: skip
    for sizes in ([8], [4, 4], [2, 2, 2, 2], [1] * 8, [3, 5]):
        assert_same(step(loss, module, batches(sizes)), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_second_pass_draws_the_dropout_of_the_first(loss):
    """Also that what is drawn afterwards is what it would have been without a second pass."""
    module = wide_model(loss, text="bert, class")
    module.pool = nn.Sequential(module.pool, nn.Dropout(0.3))
    parts = batches([3, 2, 3])
    results = []
    for run in (plain_step, step):
        torch.manual_seed(5)
        results.append((run(loss, module, parts), torch.rand(3)))
    (expected, drawn), (found, drawn_after) = results
    assert_same(found, expected)
    assert torch.equal(drawn, drawn_after)
    torch.manual_seed(6)
    assert step(loss, module, parts)[0] != expected[0]


@pytest.mark.parametrize("sizes", [[8], [4, 4]])
def test_recomputed_activations_give_the_same_gradients(sizes):
    module = wide_model("sigmoid", text="bert, class")
    results = []
    for recomputed in (False, True):
        if recomputed:
            checkpoint_activations(module, ("tokenizer", "text"))
        torch.manual_seed(5)
        results.append(step("sigmoid", module, batches(sizes)))
    assert_same(*reversed(results))


@pytest.mark.parametrize("locked", LOCKED)
def test_trial_reaches_what_learns(locked):
    """Its gradients are thrown away; it is there so that operations can be counted."""
    module = wide_model("softmax", LOCKED[locked])
    Contrast("softmax").trial(module, batches([4])[0], nullcontext)
    towers = {name for name, p in module.named_parameters() if p.requires_grad} - {"log_scale"}
    assert set(gradients(module)) == towers


def test_batch_holds_as_many_terms_as_pairs():
    (batch,) = batches([8])
    count = Contrast("softmax").count(batch)
    assert count.totals == {"pairs": 8}
    assert (count.samples, count.images, count.unscored) == (8, 8, 0)
    assert count.tokens == int(batch.valid.sum()) < count.positions == batch.ids.numel()


def moved(scale, by, trained=True):
    """The scale after a step that moved its logarithm."""
    module = wide_model("softmax")
    objective = Contrast("softmax")
    with torch.no_grad():
        module.log_scale.fill_(math.log(scale))
    module.log_scale.requires_grad_(trained)
    objective.backward(module, batches([4, 4]), 8, nullcontext)
    with torch.no_grad():
        module.log_scale += by
    objective.after_step(module)
    return pytest.approx(float(module.log_scale.detach().exp()), rel=1e-6)


def test_scale_stays_at_100_or_below():
    """One above, as published SigLIP models have (112), may fall and not rise; one that is not
    trained stays as it is."""
    assert moved(99.0, 0.5) == 100
    assert moved(50.0, 0.5) == 50 * math.exp(0.5)
    assert moved(112.0, 0.5) == 112
    assert moved(112.0, -0.05) == 112 * math.exp(-0.05)
    assert moved(112.0, 0.0, trained=False) == 112


def test_refused_embeddings_are_named_by_their_rows():
    """Of a later micro-batch too, and no row beside them."""
    module = wide_model("softmax")
    parts = batches([4, 4])
    parts[1].groups[0].pixels[2] = torch.nan
    with pytest.raises(StageError, match=r"images: rows \[6\] of 8 .* NaN .* are: \['p6'\]; where"):
        step("softmax", module, parts)


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="'softmax' or 'sigmoid', found 'triplet'"):
        Contrast("triplet")


@pytest.mark.parametrize("scalars", [FROZEN, 1e-3])
def test_scale_and_bias_stay_in_fp32(scalars):
    """Where all else that is frozen computes in bf16."""
    module = training.contrastive_model("sigmoid").module
    rates = (("log_scale", scalars), ("bias", scalars), ("text_head.*", 1e-3), ("*", FROZEN))
    prepare(module, dataclasses.replace(training.CONTRAST, rates=rates), torch.bfloat16)
    assert module.log_scale.dtype == module.bias.dtype == torch.float32
    assert next(module.tokenizer.parameters()).dtype == torch.bfloat16
