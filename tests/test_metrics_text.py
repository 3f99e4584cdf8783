"""Error rates of read texts beside hand-computed cases, jiwer's figures and a second definition."""

import json

import jiwer
import numpy as np
import pytest

from vlm.metrics.share import wilson
from vlm.metrics.text import (
    cer_difference,
    compare_texts,
    differences,
    length_group,
    normalise,
    pieces_right,
    words_right,
)


def distance(first, second):
    """Levenshtein's, by the textbook's table."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def random_pairs(count=200):
    draw = np.random.default_rng(0)

    def text():
        return "".join(draw.choice(list("abc  é"), draw.integers(0, 12)))

    return [text() for _ in range(count)], [text() for _ in range(count)]


def test_rates_equal_those_counted_by_hand():
    """kitten to sitting: two exchanged, one added. Of six words, three are wrong."""
    found = compare_texts(["kitten", "one two", "the big cat"], ["sitting", "one two", "he cat"])
    assert found.edits.tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 5]]
    assert found.characters.tolist() == [6, 7, 11]
    result = found.result()
    assert result.cer.rate == pytest.approx(8 / 24)
    assert result.wer.rate == pytest.approx(3 / 6)
    assert result.exact == wilson(1, 3)
    assert (result.substitutions, result.insertions, result.deletions) == (2, 1, 5)
    assert (result.lines, result.characters, result.words) == (3, 24, 6)


def test_rates_are_pooled_and_no_mean_of_lines():
    result = compare_texts(["a", "b" * 9], ["x", "b" * 9]).result()
    assert result.cer.rate == pytest.approx(0.1)


def test_edits_equal_a_second_definition_and_jiwers_rates():
    truths, reads = random_pairs()
    found = compare_texts(truths, reads)
    plain = [normalise(text) for text in truths], [normalise(text) for text in reads]
    assert found.edits.sum(1).tolist() == [distance(*pair) for pair in zip(*plain)]
    assert found.word_edits.tolist() == [
        distance(truth.split(), read.split()) for truth, read in zip(*plain)
    ]
    result = found.result()
    assert result.cer.rate == pytest.approx(jiwer.cer(*map(list, plain)))
    assert result.wer.rate == pytest.approx(jiwer.wer(*map(list, plain)))
    assert sum(found.confused.values()) == found.edits.sum()


def test_empty_texts_are_defined():
    nothing = compare_texts(["", ""], ["", "abc"]).result()
    assert (nothing.cer.rate, nothing.wer.rate, nothing.exact.share) == (3, 1, 0.5)
    assert (nothing.insertions, nothing.characters) == (3, 0)
    unread = compare_texts(["ab cd", ""], ["", ""]).result()
    assert (unread.cer.rate, unread.wer.rate, unread.deletions) == (1, 1, 5)
    assert compare_texts(["", "ab"], ["x", ""]).line_cer.tolist() == [1, 1]
    json.dumps(nothing.metrics(), allow_nan=False)


@pytest.mark.parametrize(
    ("truth", "read", "equal_under"),
    [
        (" a \t b\n", "a b", {"none", "nfc", "nfkc", "lower"}),
        ("Cafe\u0301", "Café", {"nfc", "nfkc", "lower"}),
        ("ﬁve", "five", {"nfkc"}),
        ("Cat", "cat", {"lower"}),
        ("“a”", '"a"', set()),
    ],
)
def test_normalisation_makes_equal_what_its_name_says(truth, read, equal_under):
    for name in ("none", "nfc", "nfkc", "lower"):
        same = compare_texts([truth], [read], normalisation=name).exact[0]
        assert same == (name in equal_under), name


def test_groups_hold_their_lines_and_add_up():
    truths, reads = random_pairs()
    found = compare_texts(truths, reads)
    groups = [("a", "b", "c")[i % 3] for i in range(len(truths))]
    by = found.by_group(groups, draws=10)
    assert list(by) == ["a", "b", "c"]
    assert by["b"].cer.rate == compare_texts(truths[1::3], reads[1::3]).result().cer.rate
    assert sum(result.characters for result in by.values()) == found.result().characters
    with pytest.raises(ValueError, match="groups: expected 200, found 1"):
        found.by_group(["a"])


def test_interval_covers_the_rate_and_narrows_with_more_lines():
    draw = np.random.default_rng(1)
    truths = ["abcdefgh"] * 900
    reads = ["abcdefg" + ("x" if draw.random() < 0.2 else "h") for _ in truths]
    few = compare_texts(truths[:100], reads[:100]).result().cer
    many = compare_texts(truths, reads).result().cer
    assert few.low < few.rate < few.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    # the normal one of a mean of independent lines, each wrong in one of eight or right
    errors = np.array([read[-1] == "x" for read in reads]) / 8
    half = 1.96 * errors.std() / 30
    assert many.low == pytest.approx(many.rate - half, rel=0.1)
    assert many.high == pytest.approx(many.rate + half, rel=0.1)
    assert compare_texts(truths, reads).result(seed=0) == compare_texts(truths, reads).result()


@pytest.mark.parametrize("lines", [1, 100])
def test_interval_of_lines_without_fault_reaches_to_what_they_cannot_exclude(lines):
    """3.84 edits of as many characters: Wilson's interval without a hit, z squared."""
    found = compare_texts(["abcd ef"] * lines, ["abcd ef"] * lines).result()
    for rate, units in ((found.cer, 7 * lines), (found.wer, 2 * lines)):
        assert rate[:2] == (0, 0)
        assert rate.high == pytest.approx(3.8415 / (units + 3.8415), rel=1e-4)
    assert found.exact.low == pytest.approx(lines / (lines + 3.8415), rel=1e-4)


def test_interval_of_lines_without_anything_right_reaches_below_one():
    cer = compare_texts(["ab", "cd"], ["xy", "xy"]).result().cer
    assert cer == (1, pytest.approx(4 / 7.8415, rel=1e-4), 1)
    same = compare_texts(["ab", "cd"], ["ab", "cx"])
    assert cer_difference(same, same).low == -cer_difference(same, same).high < 0
    more = compare_texts(["a"], ["abc"]).result().cer  # a rate, above 1: no share of characters
    assert more == (2, 2, 2)


def test_confusions_are_counted_most_frequent_first():
    found = compare_texts(["lIl", "rn l", "ab"], ["1I1", "m l", "abc"])
    most = found.confusions()
    assert most[:2] == [("l", "1", 2), ("", "c", 1)]
    # of the two least ways to bring rn to m, either
    assert most[2:] in ([("n", "", 1), ("r", "m", 1)], [("n", "m", 1), ("r", "", 1)])
    assert len(found.confusions(most=1)) == 1


def test_differences_join_to_both_texts():
    for truth, read in zip(*random_pairs(50)):
        pairs = differences(truth, read)
        assert "".join(first for first, _ in pairs) == truth
        assert "".join(second for _, second in pairs) == read
        exchanged = [(a, b) for a, b in pairs if a and b]
        assert all(len(a) == len(b) for a, b in exchanged)
    assert differences("", "") == []


def test_words_are_right_at_their_places():
    assert words_right("a b c", ["a", "b", "c"]).tolist() == [True] * 3
    assert words_right("a b c", ["b", "c"]).tolist() == [True, True]
    assert words_right("a b", ["b", "a"]).sum() <= 1
    assert words_right("", ["x"]).tolist() == [False]
    assert words_right("x", []).tolist() == []
    assert words_right("Cafe\u0301 x", ["Café", ""]).tolist() == [True, False]
    assert words_right("a b", ["A", "B"], "lower").tolist() == [True, True]


def test_pieces_are_right_where_all_their_characters_are():
    assert pieces_right("hello", ["he", "l", "o"]).tolist() == [True] * 3
    assert pieces_right("hello", ["hx", "llo"]).tolist() == [False, True]
    assert pieces_right("ab", ["ab", "c"]).tolist() == [True, False]
    assert pieces_right("", ["", ""]).tolist() == [True, True]
    assert pieces_right("a", ["", ""]).tolist() == [False, False]
    assert pieces_right("é", ["", "é", ""]).tolist() == [True] * 3


def test_difference_of_two_readers_is_taken_on_the_same_lines():
    """Both fail on the same hard lines: intervals of their rates overlap, that of the difference
    does not hold 0."""
    truths = ["abcdefghij"] * 100
    hard = ["x" * 8 + "ij" if i % 10 == 0 else truths[0] for i in range(100)]
    harder = ["x" * 9 + "j" if i % 10 == 0 else truths[0] for i in range(100)]
    first, second = compare_texts(truths, hard), compare_texts(truths, harder)
    assert first.result().cer.high > second.result().cer.low
    found = cer_difference(first, second)
    assert found.rate == pytest.approx(-0.01)
    assert found.high < 0
    with pytest.raises(ValueError, match="expected two readings of the same lines"):
        cer_difference(first, compare_texts(["b"] * 100, hard))


def test_length_groups_part_all_lengths():
    groups = [length_group("x" * n) for n in range(1, 120)]
    assert list(dict.fromkeys(groups)) == [
        "1 to 10", "11 to 20", "21 to 40", "41 to 80", "over 80"
    ]  # fmt: skip


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="found 1 read and 2 true"):
        compare_texts(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="at least one, found 0 read and 0 true"):
        compare_texts([], [])
    with pytest.raises(ValueError, match="expected one of none, nfc, nfkc, lower, found 'NFD'"):
        compare_texts(["a"], ["a"], normalisation="NFD")
    with pytest.raises(ValueError, match="expected at least one line"):
        compare_texts(["a"], ["a"]).result([])
    with pytest.raises(ValueError, match="draws: expected 1 or more, found 0"):
        compare_texts(["a"], ["a"]).result(draws=0)
