"""Mixture laws: shares, epochs, and that a position in training is one integer."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from fractions import Fraction

import pytest
from torch.utils.data import DataLoader

from vlm.data.example import BadRow, Example, Skipped, Turn
from vlm.data.mixture import Mixture, MixtureDataset, StepSampler, permuted
from vlm.data.sources import BadSource, ListSource, Source

PUBLISHED = [
    (0, 8),
    (0, 0),
    (1, 0),
    (0, 9),
    (0, 2),
    (0, 3),
    (1, 2),
    (0, 4),
    (0, 1),
    (0, 6),
    (1, 1),
    (0, 7),
]


def talk(name: str) -> Example:
    return Example(name, (Turn("user", ("q",)), Turn("assistant", ("a",))))


def listed(name: str, count: int) -> ListSource:
    return ListSource([talk(f"{name}{row}") for row in range(count)], name)


class Holed(Source):
    """Four rows of which row 2 is bad."""

    name = "holed"

    def __len__(self):
        return 4

    def row_name(self, row):
        return f"holed:{row}"

    def read(self, row):
        if row == 2:
            raise BadRow("holed:2: expected a caption, found nothing")
        return talk(self.row_name(row))


def names_of(loader) -> list[list[str]]:
    return [[example.name for example in batch] for batch in loader]


def loader_of(workers: int, start_step: int, seed: int = 11) -> DataLoader:
    sources = [listed("a", 7), listed("b", 5)]
    dataset = MixtureDataset(sources, Mixture(sources, [2, 1], seed))
    sampler = StepSampler(batch=6, micro_batch=3, start_step=start_step, steps=9)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=list)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_resumed_at_a_step_equals_the_uninterrupted_one(workers):
    """Shuffled, with workers; the restart knows the step's number and nothing else."""
    whole = names_of(loader_of(0, 0))
    assert names_of(loader_of(workers, 4)) == whole[4 * 2 :]
    assert names_of(loader_of(0, 0, seed=12)) != whole


def test_every_split_of_a_step_is_the_same_samples():
    whole = [set(range(8 * step, 8 * step + 8)) for step in range(3)]
    for ranks, micro_batch in ((1, 8), (1, 4), (1, 1), (2, 4), (2, 1), (4, 2)):
        samplers = [StepSampler(8, micro_batch, rank, ranks, 0, 3) for rank in range(ranks)]
        batches = [list(sampler) for sampler in samplers]
        count = samplers[0].micro_batches_per_step
        for step in range(3):
            numbers = [n for rank in batches for run in rank[step * count : step * count + count]
                       for n in run]  # fmt: skip
            assert len(numbers) == 8
            assert set(numbers) == whole[step]
        assert all(len(sampler) == len(list(sampler)) for sampler in samplers)


def test_rank_order_of_samples_does_not_depend_on_the_micro_batch():
    fine = [n for run in StepSampler(12, 1, 1, 2, 0, 2) for n in run]
    assert fine == [n for run in StepSampler(12, 3, 1, 2, 0, 2) for n in run]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"batch": 8, "micro_batch": 3}, "8 is no whole number of micro-batches of 3"),
        ({"batch": 8, "micro_batch": 4, "ranks": 4}, "of 4 on each of 4 ranks"),
        ({"batch": 8, "micro_batch": 0}, "micro-batches of 0"),
        ({"batch": 8, "micro_batch": 4, "rank": 2, "ranks": 2}, "found 2"),
        ({"batch": 8, "micro_batch": 4, "start_step": 5, "steps": 4}, "found 5"),
    ],
)
def test_step_sampler_names_values_that_do_not_fit(arguments, found):
    with pytest.raises(ValueError, match=found):
        StepSampler(**arguments)


def test_every_source_epoch_is_each_row_once_in_a_new_order():
    sources = [listed("a", 7), listed("b", 13), listed("c", 1)]
    mixture = Mixture(sources, [3, 2, 1], seed=5)
    draws = [mixture[i] for i in range(1200)]
    for number, source in enumerate(sources):
        rows = [draw.row for draw in draws if draw.source == number]
        length = len(source)
        epochs = [rows[k : k + length] for k in range(0, len(rows) - length, length)]
        assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
        if length > 1:
            assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2
        assert [d.epoch for d in draws if d.source == number] == [
            k // length for k in range(len(rows))
        ]


def test_resampled_draws_are_any_rows_and_resume_alike():
    """About 1/e of the rows do not come in as many draws; shares stay as they are."""
    sources = [listed("a", 400), listed("b", 100)]
    exact, mixture = Mixture(sources, seed=3), Mixture(sources, seed=3, resampled=True)
    draws = [mixture[i] for i in range(1000)]
    assert [draw.source for draw in draws] == [exact[i].source for i in range(1000)]
    first = Counter(draw.row for draw in draws if draw.source == 0 and draw.epoch == 0)
    assert sum(first.values()) == 400
    assert 400 - len(first) == pytest.approx(400 / math.e, abs=30)
    assert len({draw.row for draw in draws if draw.source == 1}) == pytest.approx(86, abs=12)
    assert draws[500:] == [Mixture(sources, seed=3, resampled=True)[i] for i in range(500, 1000)]


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.3], [1, 1e-3], [3, 1]])
def test_shares_of_two_sources_hold_to_half_a_sample(weights):
    mixture = Mixture([listed("a", 3), listed("b", 4)], weights)
    share = Fraction(weights[0]) / (Fraction(weights[0]) + Fraction(weights[1]))
    first = 0
    for i in range(500):
        assert abs(first - i * share) <= Fraction(1, 2)
        assert mixture.counts(i) == [first, i - first]
        first += mixture[i].source == 0


def test_shares_of_many_sources_hold_to_two_samples_in_every_prefix():
    dice = random.Random(0)
    for _ in range(60):
        weights = [dice.random() ** dice.choice([1, 6]) for _ in range(dice.randint(3, 30))]
        mixture = Mixture([listed(f"s{k}", 2) for k in range(len(weights))], weights)
        total = sum(weights)
        for i in [*range(40), *(dice.randint(40, 10**9) for _ in range(100))]:
            counts = mixture.counts(i)
            assert sum(counts) == i
            errors = [abs(c - i * w / total) for c, w in zip(counts, weights)]
            assert max(errors) < 2 + 1e-5


def test_counts_agree_with_the_samples():
    mixture = Mixture([listed(f"s{k}", 3) for k in range(5)], [5, 1, 0, 2, 0.5])
    seen = Counter()
    for i in range(300):
        assert mixture.counts(i) == [seen[k] for k in range(5)]
        seen[mixture[i].source] += 1
    assert seen[2] == 0


def test_weights_of_none_are_the_numbers_of_rows():
    mixture = Mixture([listed("a", 6), listed("b", 2)])
    assert mixture.counts(8) == [6, 2]
    assert {(d.source, d.row) for d in map(mixture.__getitem__, range(8))} == {
        *((0, row) for row in range(6)), (1, 0), (1, 1)
    }  # fmt: skip


def test_another_seed_gives_another_order():
    orders = {
        tuple(mixture[i].row for i in range(20))
        for mixture in (Mixture([listed("a", 20)], [1], seed) for seed in range(8))
    }
    assert len(orders) == 8


def test_stream_stays_as_published():
    """A checkpoint's position means the same samples in every later version."""
    mixture = Mixture([listed("a", 10), listed("b", 3)], [3, 1], seed=1)
    assert [tuple(mixture[i])[:2] for i in range(12)] == PUBLISHED


@pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 65, 1000])
def test_permutation_holds_every_number_once(length):
    for key in range(3):
        assert sorted(permuted(p, length, key) for p in range(length)) == list(range(length))


def test_permutation_is_even_over_keys():
    length, keys = 5, 4000
    seen = Counter((p, permuted(p, length, key)) for key in range(keys) for p in range(length))
    expected = keys / length
    assert all(abs(seen[p, q] - expected) < 5 * expected**0.5 for p in range(5) for q in range(5))
    pairs = Counter((permuted(0, 5, key), permuted(1, 5, key)) for key in range(keys))
    assert len(pairs) == 20
    assert all(abs(count - keys / 20) < 5 * (keys / 20) ** 0.5 for count in pairs.values())


def test_permutation_of_a_huge_source_needs_no_table():
    rows = {permuted(p, 10**12, 7) for p in range(100)}
    assert len(rows) == 100
    assert max(rows) > 10**11


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ([1, -2], r"\[1, -2\]"),
        ([0, 0], r"\[0, 0\]"),
        ([1], r"1 weights \[1\] for 2 sources \['a', 'b'\]"),
        ([1, float("nan")], "nan"),
        ([1, float("inf")], "inf"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, found):
    with pytest.raises(ValueError, match=found):
        Mixture([listed("a", 2), listed("b", 2)], weights)


def test_mixture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one source"):
        Mixture([], [])
    with pytest.raises(BadSource, match="empty: expected at least one row"):
        listed("empty", 0)
    with pytest.raises(IndexError, match="-1"):
        Mixture([listed("a", 2)])[-1]


def test_bad_row_raises_or_is_given_back_as_skipped():
    mixture = Mixture([Holed()], [1])
    strict, lenient = (MixtureDataset([Holed()], mixture, mode) for mode in ("raise", "skip"))
    at = next(i for i in range(4) if mixture[i].row == 2)
    with pytest.raises(BadRow, match="holed:2"):
        strict[at]
    given = [lenient[i] for i in range(4)]
    assert given[at] == Skipped("holed:2", "expected a caption, found nothing")
    assert sum(isinstance(example, Example) for example in given) == 3
    with pytest.raises(ValueError, match="'ignore'"):
        MixtureDataset([Holed()], mixture, "ignore")


def test_bad_row_in_a_worker_keeps_its_message():
    dataset = MixtureDataset([Holed()], Mixture([Holed()], [1]))
    sampler = StepSampler(4, 4)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=1, collate_fn=list)
    with pytest.raises(BadRow, match="holed:2: expected a caption"):
        list(loader)


def test_dataset_refuses_a_mixture_of_other_sources():
    with pytest.raises(ValueError, match=r"of \[3\] rows, the sources have \[4\]"):
        MixtureDataset([Holed()], Mixture([listed("a", 3)]))


def test_mixture_pickles():
    mixture = Mixture([listed("a", 9), listed("b", 2)], [1, 2], seed=-3)
    assert pickle.loads(pickle.dumps(mixture))[17] == mixture[17]
