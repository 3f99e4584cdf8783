"""Rows that stand for a run's, and the estimated peak memory of its steps."""

import pytest
import torch

from tests import tiny, training
from vlm.data.mixture import Mixture, MixtureDataset
from vlm.data.sources import ListSource
from vlm.families.decoder_only.batch import IMAGE
from vlm.training.memory.estimate import Estimate, rows_of_run
from vlm.training.memory.simulate import Held, SimulatedStep, StepMemory
from vlm.training.objectives.contrastive import Contrast
from vlm.training.objectives.next_token import NextToken
from vlm.training.stages import Stage

STAGE = Stage(name="t", rates=(("*", 1e-3),), steps=2, batch=4, micro_batch=4, warmup_steps=0)


def estimate(group=1, ranks=1, pack=None, chosen=None):
    model = training.model()
    rows = chosen or [model.processor.encode(example) for example in training.examples()]
    objective = NextToken(model.processor.pad_id, pack)
    simulated = SimulatedStep(model.module, STAGE, objective, torch.bfloat16, gpu=True)
    return Estimate(simulated, rows, ranks, group)


def lengths(rows):
    return [len(row.ids) for row in rows]


def test_sharding_divides_state_by_its_group_and_holds_blocks_whole():
    whole, sharded = estimate(ranks=64), estimate(group=64, ranks=64)
    trained = sum(p.numel() for p in sharded.simulated.trained)
    held = sharded.held(2, 1)
    assert held.optimizer == 8 * trained // 64
    module = sharded.simulated.module
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    blocks = list(module.text.model.layers)
    rest = count(module.text) - sum(map(count, blocks))
    assert count(module) == sum(map(count, (module.tokenizer, module.adaptor, module.text)))
    largest = max(map(count, (*blocks, module.tokenizer, module.adaptor)))
    assert sharded.gathered == 2 * (rest + 2 * largest)
    assert held.gradients == 4 * trained // 64 + (2 + 4) * max(rest, largest)
    assert held.weights == 4 * trained // 64 + sharded.gathered
    assert held.weights + held.optimizer < sum(whole.held(2, 1)[:3])


def test_ranks_that_exchange_gradients_hold_all_in_fp32_and_a_bucket():
    one, many = estimate(), estimate(ranks=2)
    step = StepMemory(Held(1, 2, 3, 4, 5), Held(0, 0, 0, 0, 0), None)
    trained = sum(p.numel() for p in many.simulated.trained)
    assert one._whole(step) == step.peak
    assert many._whole(step) == Held(1, 4 * trained, 3, 4 * trained, 0)


def test_memory_goes_by_the_heaviest_rows_and_tokens_by_all():
    """Some of the longest are text alone here, so that those with images are simulated too."""
    found = estimate()
    longest, imaged = found._heaviest(3)
    assert lengths(longest) == sorted(lengths(found.rows), reverse=True)[:3]
    assert not all(row.views for row in longest)
    assert all(row.views for row in imaged)
    assert [len(rows) for rows in found._heaviest(40)] == [40, 40]
    mean = sum(lengths(found.rows)) / len(found.rows)
    assert found.tokens_per_example == pytest.approx(mean)
    alone = max(estimate(chosen=rows).held(3, 1).total for rows in (longest, imaged))
    assert found.held(3, 1).total == pytest.approx(alone, rel=0.05)


def test_rows_of_one_kind_are_simulated_once():
    found = estimate()
    found.rows = [row for row in found.rows if row.views]
    assert len(found._heaviest(4)) == 1


def test_packs_are_filled_as_the_rows_fill_them():
    found = estimate()
    pack = max(lengths(found.rows)) + 20
    packed = estimate(pack=pack)
    for rows in packed._heaviest(50):
        room = pack - sum(lengths(rows))
        assert 0 <= room < min(lengths(found.rows))
    (first, *_) = packed._heaviest(2)
    assert len(first) <= 2
    alone = estimate(pack=max(lengths(found.rows)) - 1)
    assert lengths(alone._heaviest(50)[0]) == [max(lengths(found.rows))]


@pytest.mark.slow
def test_packs_hold_no_more_for_more_rows():
    found = estimate(pack=200)
    assert found.held(50, 1).total == pytest.approx(found.held(100, 1).total, rel=0.05)
    assert found.held(50, 1).total > found.held(1, 1).total


def test_a_contrast_keeps_the_embeddings_of_waiting_micro_batches():
    model = training.contrastive_model("sigmoid")
    rows = [model.processor.encode(example) for example in training.pairs(4)]
    simulated = SimulatedStep(model.module, STAGE, Contrast("sigmoid"), torch.bfloat16, gpu=False)
    found = Estimate(simulated, rows)
    more = found.held(2, 102).activations - found.held(2, 2).activations
    assert more == 200 * 2 * 3 * 4 * model.module.dim


def test_rows_come_from_all_of_a_run_and_from_every_source():
    """Of a source with a thousandth of the draws too, and of one that only comes late."""
    many = [tiny.example(f"a{i}", ("say it",), "word") for i in range(50)]
    few = [tiny.example(f"b{i}", ("say it",), "word") for i in range(3)]
    late = [tiny.example(f"c{i}", ("say it",), "word") for i in range(50)]
    sources = [ListSource(rows, name) for rows, name in ((many, "a"), (few, "b"), (late, "c"))]
    mixture = Mixture(sources, [60, 0.5, 40], seed=0, warmup=([1, 0, 0], 2000))
    data = MixtureDataset(sources, mixture)
    rows = rows_of_run(data, training.model().processor, 4000, 16)
    names = [row.name for row in rows]
    assert {name[0] for name in names} == {"a", "b", "c"}
    assert len(names) <= 18
    assert names == [row.name for row in rows_of_run(data, training.model().processor, 4000, 16)]
    assert len(rows_of_run(data, training.model().processor, 3, 16)) == 3


def test_rows_that_cannot_be_used_are_skipped():
    processor = training.model().processor
    bad = tiny.example("bad", (None, "what?"), "word", images=(b"no image",))
    good = tiny.example("good", ("say it",), "word")
    found = rows_of_run(training.dataset([bad, good]), processor, 16, 16)
    assert {row.name for row in found} == {"good"}
    with pytest.raises(ValueError, match="none of 16 rows of the run can be used: bad"):
        rows_of_run(training.dataset([bad]), processor, 16, 16)


def test_rows_are_brought_to_a_number_of_text_tokens():
    model = training.model()
    row = model.processor.encode(training.examples()[0])
    images = int((row.ids == IMAGE).sum())
    for count in (len(row.ids) - images - 3, 80):
        found = row.with_text(count)
        assert len(found.ids) == len(found.scored) == images + count
        assert int((found.ids == IMAGE).sum()) == images
    with pytest.raises(ValueError, match="would cut its images"):
        row.with_text(1)
    with pytest.raises(ValueError, match="at least 1, found 0"):
        row.with_text(0)


def test_pairs_and_texts_are_brought_to_a_number_of_tokens_and_lines_refuse_it():
    pair = training.contrastive_model().processor.encode(training.pairs(1)[0])
    written = training.encoder_decoder_model().processor.encode(training.images_alone()[4])
    line = training.line_model().processor.encode(training.text_lines()[0])
    for count in (2, 40):
        longer, other = pair.with_text(count), written.with_text(count)
        assert [longer.length, len(longer.valid)] == [count, count]
        assert [other.length, len(other.scored)] == [count, count]
        assert torch.equal(longer.ids[:2], pair.ids[:2])
        assert torch.equal(other.ids[:2], written.ids[:2])
    for row in (pair, written):
        with pytest.raises(ValueError, match="at least 1, found 0"):
            row.with_text(0)
    assert line.length == line.views[0][0].shape[-1]
    with pytest.raises(ValueError, match="no text tokens; leave --tokens out"):
        line.with_text(4)
