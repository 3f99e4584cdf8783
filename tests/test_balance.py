"""Rows of a step dealt out by what they cost: all of them, to nobody twice."""

import dataclasses
import random

import pytest
import torch

from tests import tiny, towers, training
from tests.runs import launch, lines
from vlm.data.example import BadRow, Example, Skipped, Turn
from vlm.data.mixture import StepSampler
from vlm.families.decoder_only.module import DecoderOnly
from vlm.image_tokens import pixel_shape
from vlm.pixels import BadImage
from vlm.pixels.image_ref import ImageRef
from vlm.tokenizers.tiles import TilesTokenizer
from vlm.training.base_settings import deciding
from vlm.training.flop_cost import FlopCost, flop_cost_of
from vlm.training.flops import flop_counter
from vlm.training.loading.balance import Costs, Dealt, deal, deal_step
from vlm.training.loading.loader import micro_batch_loader
from vlm.training.objectives.next_token import NextToken
from vlm.training.runs.decoder_only_settings import FromParts
from vlm.training.stages import FROZEN

BATCH, MICRO, STEPS = 32, 4, 3


def unequal(count, seed=0):
    """Costs like those of rows with one to nine views and texts of any length."""
    dice = random.Random(seed)
    return [dice.choice((1, 1, 1, 2, 9)) * 1000 + int(dice.paretovariate(1.5) * 100)
            for _ in range(count)]  # fmt: skip


COSTS = unequal(BATCH * STEPS)


class Numbers:
    """Rows that are their own numbers."""

    def __getitem__(self, number):
        return number


def taken(ranks, cost=COSTS.__getitem__, start_step=0, micro_batch=MICRO):
    """The rows of each micro-batch of each rank, as each works them out by itself."""
    found = []
    for rank in range(ranks):
        sampler = StepSampler(BATCH, micro_batch, rank, ranks, start_step, STEPS)
        dealt = Dealt(Numbers(), cost, sampler)
        found.append([[dealt[number] for number in numbers] for numbers in sampler])
    return found


def loads(parts):
    return [sum(COSTS[number] for micro in own for number in micro) for own in parts]


def in_step(step, found):
    """The micro-batches of one step, of each rank."""
    per_step = len(found[0]) // STEPS
    return [own[step * per_step : (step + 1) * per_step] for own in found]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_row_of_a_step_is_dealt_once_and_ranks_get_like_work(ranks):
    plain_deal = [list(StepSampler(BATCH, MICRO, rank, ranks, 0, STEPS)) for rank in range(ranks)]
    for step in range(STEPS):
        found, plain = in_step(step, taken(ranks)), in_step(step, plain_deal)
        rows = sorted(number for own in found for micro in own for number in micro)
        assert rows == list(range(step * BATCH, (step + 1) * BATCH))
        assert {len(micro) for own in found for micro in own} == {MICRO}
        mean = sum(loads(found)) / ranks
        assert max(loads(found)) < max(loads(plain))
        assert max(loads(found)) < 1.12 * mean


def test_micro_batches_of_a_rank_are_alike_and_the_dearest_comes_first():
    for own in in_step(0, taken(2)):
        costs = [sum(COSTS[number] for number in micro) for micro in own]
        assert costs == sorted(costs, reverse=True)
        dearest = max(COSTS[number] for micro in own for number in micro)
        assert costs[0] < sum(costs) / len(costs) + dearest / 2


def test_a_run_that_goes_on_deals_as_it_would_have():
    """A deal depends on its step alone."""
    for whole, rest in zip(taken(2), taken(2, start_step=1)):
        assert whole[len(whole) // STEPS :] == rest


def test_rows_are_measured_once_for_a_step():
    asked = []

    def cost(number):
        asked.append(number)
        return COSTS[number]

    sampler = StepSampler(BATCH, MICRO, 1, 2, 0, STEPS)
    dealt = Dealt(Numbers(), cost, sampler)
    for numbers in sampler:
        assert len({dealt[number] for number in numbers}) == MICRO
    assert asked == list(range(BATCH * STEPS))


def test_a_row_of_unknown_cost_counts_as_an_average_one():
    known = [9, 9, 1, 1, 1, 1]
    sampler = StepSampler(8, 4, 0, 2, 0, 1)
    costs = [*known, None, None]
    dealt = Dealt(Numbers(), costs.__getitem__, sampler)
    usual = sum(known) // len(known)
    assert [dealt[n] for n in range(8)] == deal_step([*known, usual, usual], 2, 1)
    nothing = Dealt(Numbers(), lambda _: None, sampler)
    assert sorted(nothing[n] for n in range(8)) == list(range(8))


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_part_is_near_the_best_that_there_is(seed):
    """Within a third of the dearest row of the mean, with rows enough for that."""
    costs = unequal(64, seed)
    parts = deal(costs, 4)
    largest = max(sum(costs[n] for n in part) for part in parts)
    assert largest <= sum(costs) / 4 + max(costs) / 3
    assert {len(part) for part in parts} == {16}


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="5 costs cannot be dealt out in 2 parts"):
        deal([1] * 5, 2)


def tiled():
    """A tiny model whose images take one to five views."""
    inner = towers.transformers_tower("siglip_vision_model", (32, 48))
    return towers.composed(TilesTokenizer(inner, max_tiles=4, thumbnail=True))


def rows(seed=0):
    """Images of unequal sizes, several in a row or none, answers of unequal lengths."""
    sizes = [(30, 90), (64, 64), (200, 40), (9, 17)]
    examples = [
        tiny.example(f"r{i}", (None, "what?"), "word " * (1 + i), (tiny.image(i, size_hw),))
        for i, size_hw in enumerate(sizes)
    ]
    pair = tuple(tiny.image(i, size_hw) for i, size_hw in enumerate(sizes[:2]))
    return [
        *examples,
        tiny.example("pair", (None, "and", None, "differ?"), "yes", pair),
        tiny.example("text", ("say it",), "long answer"),
        Example("document", (Turn("text", ("all of it " * 9,)),)),
    ]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (tiny.decoder_only, {}),
        (tiled, {}),
        (tiled, {"max_tokens": 60, "overflow": "shrink"}),
        (tiled, {"max_tokens": 60, "overflow": "drop"}),
    ],
    ids=["one view", "tiles", "cut", "dropped"],
)
def test_a_measured_row_is_the_encoded_one_without_values(model, options):
    processor = tiny.processor(model(), **options)
    cut = 0
    for example in rows():
        measured, encoded = processor.measure(example), processor.encode(example)
        if isinstance(encoded, Skipped):
            assert measured == encoded
            cut += 1
            continue
        cut += encoded.cut
        assert torch.equal(measured.ids, encoded.ids)
        assert torch.equal(measured.scored, encoded.scored)
        for name in ("name", "layout", "boxes", "cut"):
            assert getattr(measured, name) == getattr(encoded, name)
        shapes = [
            [(pixel_shape(pixels), owner) for pixels, owner in row.views]
            for row in (measured, encoded)
        ]
        assert shapes[0] == shapes[1]
        assert all(pixels.is_meta for pixels, _ in measured.views)
    assert bool(cut) == bool(options)


def test_images_are_measured_by_their_headers(tmp_path):
    path = tmp_path / "cut.jpg"
    tiny.image(0, (300, 200)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    processor = tiny.processor(tiled())
    example = tiny.example("cut", images=(ImageRef(path, "cut.jpg"),), content=(None, "what?"))
    assert len(processor.measure(example).views) == len(processor.pixel_spec.view_sizes((300, 200)))
    with pytest.raises(BadImage, match=r"cut: .*damaged"):
        processor.encode(example)
    path.write_bytes(b"nothing")
    with pytest.raises(BadImage, match=r"cut: cut\.jpg: expected an image"):
        processor.measure(example)


def test_a_row_that_cannot_be_read_has_no_cost_and_is_named_where_it_is_read():
    """It fails, or is skipped, on the rank that it is dealt to, as without a deal."""
    chosen = training.model()
    examples = training.pairs(8, unread=(5,))
    data = training.in_order(examples)
    costs = Costs(data, chosen.processor, FlopCost().of_row)
    assert [costs(n) is None for n in range(8)] == [n == 5 for n in range(8)]
    for policy in ("raise", "skip"):
        data.on_bad_row = policy
        micros = []
        for rank in range(2):
            sampler = StepSampler(8, 2, rank, 2, 0, 1)
            objective = NextToken(chosen.processor.pad_id)
            given = data, chosen.processor, sampler, objective, 0, FlopCost().of_row
            micros += list(micro_batch_loader(*given))
        failed = [micro.failed for micro in micros if micro.failed]
        skipped = [item.name for micro in micros for item in micro.skipped]
        names = sorted(n for micro in micros for b in micro.batches for n in b.names)
        assert names == [f"p{n}" for n in range(8) if n != 5]
        if policy == "raise":
            assert isinstance(failed[0], BadRow)
            assert "p5" in str(failed[0])
        else:
            assert skipped == ["p5"]


def test_deal_does_not_depend_on_the_number_of_workers():
    chosen = training.model()
    data = training.dataset(training.examples())
    cost = flop_cost_of(chosen.module, training.STAGE.rates)
    found = []
    for workers in (0, 2):
        sampler = StepSampler(8, 2, 1, 2, 0, 2)
        objective = NextToken(chosen.processor.pad_id, cost=cost)
        loader = micro_batch_loader(
            data, chosen.processor, sampler, objective, workers, cost.of_row
        )
        found.append([[b.names for b in micro.batches] for micro in loader])
    assert found[0] == found[1]


def test_a_row_that_does_not_fit_the_context_costs_nothing():
    chosen = training.model()
    chosen.processor.max_tokens = 30
    costs = Costs(training.in_order(training.examples()), chosen.processor, FlopCost().of_row)
    assert costs(9) == costs(12) == 0


ALL = (("*", 1e-3),)


@pytest.mark.parametrize("model", [tiny.decoder_only, tiled], ids=["one view", "tiles"])
def test_work_is_what_torch_counts(model):
    """Of a whole pass forward and backward, but for what a tiny model's norms and masks take."""
    module = model()
    processor = tiny.processor(module)
    encoded = [processor.encode(example) for example in rows()]
    objective = NextToken(processor.pad_id, pack=10**6, cost=flop_cost_of(module, ALL))
    (batch,) = objective.collate(encoded)
    with flop_counter() as counter:
        objective.trial(module, batch, torch.enable_grad)
    assert objective.count(batch).cost == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_work_of_a_batch_is_that_of_its_rows():
    module = tiled()
    processor = tiny.processor(module)
    cost = flop_cost_of(module, ALL)
    encoded = [processor.encode(example) for example in rows()]
    alone = [cost.of_row(processor.measure(example)) for example in rows()]
    assert alone == [cost.of_row(row) for row in encoded]
    (packed,) = NextToken(processor.pad_id, pack=10**6).collate(encoded)
    assert cost.of_batch(packed) == sum(alone)
    padded = NextToken(processor.pad_id).collate(encoded)
    assert sum(map(cost.of_batch, padded)) > sum(alone)
    assert FlopCost().of_row(encoded[0]) == len(encoded[0].ids)


def test_what_is_frozen_costs_less():
    module = tiny.decoder_only()
    parts = ("tokenizer", "adaptor", "text")
    costs = {
        learns: flop_cost_of(
            module, tuple((f"{p}.*", 1e-3 if p in learns else FROZEN) for p in parts)
        )
        for learns in (("adaptor",), ("adaptor", "text"), parts)
    }
    bridge, joint, whole = costs.values()
    assert joint.position * 2 == bridge.position * 3 == whole.position * 2
    pixels = torch.empty(3, 8, 12)
    assert bridge.view(pixels) == joint.view(pixels) < whole.view(pixels)
    assert flop_cost_of(module, ALL, views=False).view is None


@pytest.mark.parametrize("name", towers.MORE_TOWERS)
def test_views_of_every_kind_are_counted(name):
    module = towers.composed(towers.MORE_TOWERS[name]())
    assert isinstance(module, DecoderOnly)
    cost = flop_cost_of(module.bfloat16(), ALL)
    for pixels, _ in tiny.processor(module).measure(rows()[0]).views:
        assert cost.view(pixels) > 0


def test_balance_is_a_setting_that_decides_nothing_that_is_learned(tmp_path):
    given = FromParts(out=tmp_path, steps=1, batch=1)
    assert not given.balance
    assert deciding(given) == deciding(dataclasses.replace(given, balance=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of runs on two processes, one after another in one launch."""
    out = tmp_path_factory.mktemp("two")
    stage = {"rates": [["*", 1e-2]], "micro_batch": 1}
    runs = {
        "plain": {"stage": stage},
        "balanced": {"stage": stage, "balance": True, "workers": 1},
        "sharded": {"stage": stage, "balance": True, "pack": 60, "shard": "all"},
    }
    done = launch(out, 2, runs=runs)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same run as one process."""
    stage = dataclasses.replace(training.STAGE, rates=(("*", 1e-2),))
    return training.train(tmp_path_factory.mktemp("one"), stage)[2]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["balanced", "sharded"])
def test_two_processes_with_dealt_rows_follow_one(two, one, run):
    """The same losses and gradients, whoever reads a row."""
    for a, b in zip(one, lines(two / run), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert (b["batch"], b["scored"], b["samples"]) == (a["batch"], a["scored"], a["samples"])


@pytest.mark.slow
def test_balance_is_logged_and_better_than_without(two, one):
    assert {line["balance"] for line in one} == {1.0}
    plain, dealt = (
        [line["balance"] for line in lines(two / name)] for name in ("plain", "balanced")
    )
    assert all(0 < value <= 1 for value in plain + dealt)
    assert sum(dealt) > sum(plain)
