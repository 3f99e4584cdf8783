import pytest
import torch

from tests import encoder_decoders as law
from tests.tiny import image
from vlm.families.decoder_only.batch import collate
from vlm.families.encoder_decoder import cached_decoder as stepper
from vlm.families.encoder_decoder import generate as transcribe

KINDS = list(law.SHAPES)
START, PAD = [257], 256


def groups_of(module, sizes=((8, 12), (8, 40), (8, 12), (16, 8))):
    """Images whose memories differ in length."""
    made = [
        law.wide(module, size).encode_image(image(i), name=f"p{i}") for i, size in enumerate(sizes)
    ]
    return collate(made, PAD).groups


def ends_of(module, groups):
    """The id that ends rows at the most different lengths."""
    free = [ids for ids, _ in transcribe.greedy_plain(module, groups, START, [], PAD, 12)]

    def lengths(end):
        return {ids.index(end) if end in ids else 12 for ids in free}

    return [max(sorted({id for ids in free for id in ids}), key=lambda id: len(lengths(id)))]


def same(found, expected):
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    for (_, mine), (_, other) in zip(found, expected):
        assert mine == pytest.approx(other, abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 2])
def test_greedy_equals_its_slow_twin(kind, seed):
    """Ids and log-probabilities, with memories of unequal length and rows that end early."""
    module = law.model(kind, seed)
    groups = groups_of(module)
    ends = ends_of(module, groups)
    asked = (module, groups, START, ends, PAD, 12)
    found = transcribe.greedy(*asked)
    assert len({len(ids) for ids, _ in found}) > 1
    same(found, transcribe.greedy_plain(*asked))
    for ids, logprobs in found:
        assert all(p <= 1e-6 for p in logprobs)
        assert len(ids) == 12 or ids[-1] in ends
        assert not set(ids[:-1]) & set(ends)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_with_prompts_of_unequal_length_equals_its_slow_twin(kind):
    module = law.model(kind)
    groups = groups_of(module)
    ends = ends_of(module, groups)
    prompts = [[257], [257, 9, 9, 9], [5, 6], [257, 70]]
    asked = (module, groups, START, ends, PAD, 10)
    found = transcribe.greedy(*asked, prompts=prompts)
    same(found, transcribe.greedy_plain(*asked, prompts=prompts))


@pytest.mark.parametrize("kind", ["trocr", "bert"])
def test_banned_ids_are_never_written_and_keep_their_probability(kind):
    module = law.model(kind)
    groups = groups_of(module)
    free = transcribe.greedy(module, groups, START, [258], PAD, 8)
    banned = sorted({id for ids, _ in free for id in ids})
    asked = (module, groups, START, [258], PAD, 8)
    found = transcribe.greedy(*asked, banned=banned)
    assert not {id for ids, _ in found for id in ids} & set(banned)
    same(found, transcribe.greedy_plain(*asked, banned=banned))
    beams = transcribe.beam(
        module, groups, START, [258], PAD, banned=banned, max_new_tokens=8, num_beams=2
    )
    assert not {id for ids, _ in beams for id in ids} & set(banned)


def test_rows_that_end_at_once_and_never_share_a_batch():
    module = law.model()
    groups = groups_of(module)
    first = transcribe.greedy_plain(module, groups, START, [], PAD, 1)
    found = transcribe.greedy(module, groups, START, first[0][0], PAD, 40)
    same(found, transcribe.greedy_plain(module, groups, START, first[0][0], PAD, 40))
    assert found[0][0] == first[0][0]


def test_writing_beyond_one_buffer_equals_the_slow_twin(monkeypatch):
    monkeypatch.setattr(stepper, "BLOCK", 3)
    module = law.model("mbart")
    groups = groups_of(module)
    asked = (module, groups, START, [258], PAD, 11)
    same(transcribe.greedy(*asked), transcribe.greedy_plain(*asked))


def rescored(module, groups, found):
    """Each row's total log-probability, by the module's own forward over its ids."""
    memory = module.encode(groups)
    totals = []
    for row, (ids, _) in enumerate(found):
        own = memory.rows(torch.tensor([row]))
        logits = module.logits(module.read(torch.tensor([[*START, *ids]]), own))[0, :-1]
        totals.append(float(logits.log_softmax(-1)[range(len(ids)), ids].sum()))
    return totals


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_beam_log_probabilities_are_those_of_the_written_ids(kind):
    """Whatever the search's penalties, a confidence is the model's own."""
    module = law.model(kind)
    groups = groups_of(module)
    ends = ends_of(module, groups)
    found = transcribe.beam(
        module, groups, START, ends, PAD, max_new_tokens=10, num_beams=3, length_penalty=2.0,
        no_repeat_ngram_size=3,
    )  # fmt: skip
    totals = [sum(logprobs) for _, logprobs in found]
    assert totals == pytest.approx(rescored(module, groups, found), abs=1e-3)
    assert all(total <= 0 for total in totals)
    for ids, _ in found:
        assert len(ids) == 10 or ids[-1] in ends


@pytest.mark.parametrize("kind", ["trocr", "mbart", "bert"])
@torch.no_grad()
def test_one_beam_is_greedy_and_more_find_no_less(kind):
    module = law.model(kind)
    groups = groups_of(module)
    greedy = transcribe.greedy(module, groups, START, [258], PAD, 8)
    same(transcribe.beam(module, groups, START, [258], PAD, max_new_tokens=8), greedy)
    prompts = [[257], [257, 9, 9, 9], [5, 6], [257, 70]]
    same(
        transcribe.beam(module, groups, START, [258], PAD, prompts, max_new_tokens=8),
        transcribe.greedy(module, groups, START, [258], PAD, 8, prompts),
    )


@torch.no_grad()
def test_score_of_what_was_written_is_its_log_probability():
    module = law.model()
    chosen = law.processor(module)
    batch = collate(law.rows(chosen, "ab", "longer"), PAD)
    found = transcribe.score(module, batch)
    for row in range(2):
        ids = batch.ids[row, batch.valid[row]].tolist()[1:]
        alone = collate([law.rows(chosen, "ab", "longer")[row]], PAD)
        assert float(found[row]) == pytest.approx(
            rescored(module, alone.groups, [(ids, [])])[0], abs=1e-4
        )


def test_greedy_refuses_what_cannot_be():
    module = law.model()
    groups = groups_of(module)
    with pytest.raises(ValueError, match="64 positions, 1 ids to begin with leave 64, found 65"):
        transcribe.greedy(module, groups, START, [258], PAD, 65)
    transcribe.greedy(module, groups, START, [258], PAD, 64)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, found 0"):
        transcribe.greedy(module, groups, START, [258], PAD, 0)
    with pytest.raises(ValueError, match="there are 1 prompts and images of 4 examples"):
        transcribe.greedy(module, groups, START, [258], PAD, 4, prompts=[[257]])
    with pytest.raises(ValueError, match="at least one id to begin with"):
        transcribe.greedy(module, groups, [], [258], PAD, 4)
    with pytest.raises(ValueError, match="expected the views of at least one image"):
        transcribe.greedy(module, (), START, [258], PAD, 4)
