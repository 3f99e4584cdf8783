"""VQA accuracy and ANLS, by values worked by hand from their definitions."""

import random

import pytest

from vlm.metrics.vqa import anls, edits, normalise, vqa_accuracies, vqa_metrics


def votes(**counts):
    return [answer for answer, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("agree", "accuracy"),
    [
        (0, 0.0),
        (1, 0.3),  # skipped itself: 0 others; the nine other ways: 1/3
        (2, 0.6),  # two ways with 1/3, eight with 2/3
        (3, 0.9),  # three ways with 2/3, seven with 1
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_vqa_accuracy_is_the_mean_over_leaving_one_of_ten_references_out(agree, accuracy):
    references = votes(yes=agree, no=10 - agree)
    assert vqa_accuracies([("yes", references)])[0] == pytest.approx(accuracy, abs=1e-12)


def test_vqa_accuracy_of_fewer_references_takes_each_as_right():
    pairs = [("red", ["red"]), ("Red.", ["blue", "red"]), ("green", ["blue", "red"])]
    assert vqa_accuracies(pairs).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  two\ndogs.", "2 dogs"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("an apple and a pear", "apple and pear"),
        ("I dont know", "i don't know"),
        ("couldnt've", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("were wed", "were wed"),  # other words
        ("the girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("100,978", "100978"),
        ("yes,no", "yes no"),
        ("yes, no", "yes no"),
        ("T-shirt", "t shirt"),
        ("T-shirt - red", "tshirt red"),  # a sign beside a space is removed everywhere
        ("(left)", "left"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_visualqa_describes(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("answer", "references", "similarity"),
    [
        ("hallo", ["hello"], 0.8),
        ("HELLO  there ", ["hello there"], 1.0),
        ("hellothere", ["hello there"], 10 / 11),  # a space is a character
        ("cat", ["dog"], 0.0),
        ("ab", ["abcd"], 0.5),  # at the threshold it counts
        ("ab", ["abcde"], 0.0),
        ("1996", ["in 1996", "1996"], 1.0),
        ("", ["a"], 0.0),
    ],
)
def test_anls_takes_the_nearest_reference_and_drops_what_is_below_half(
    answer, references, similarity
):
    assert anls([(answer, references)])[0] == pytest.approx(similarity)


def test_edits_equal_those_of_rapidfuzz():
    distance = pytest.importorskip("rapidfuzz.distance").Levenshtein.distance
    dice = random.Random(0)
    for _ in range(300):
        a, b = ("".join(dice.choices("abc ", k=dice.randint(0, 9))) for _ in range(2))
        assert edits(a, b) == distance(a, b)


def test_report_holds_means_with_intervals_and_counts():
    pairs = [("yes", votes(yes=1, no=9)), ("hallo", ["hello"]), ("red", ["red"])]
    found = vqa_metrics(pairs)
    assert (found["n"], found["n_ten_references"]) == (3, 1)
    assert found["vqa_accuracy"] == pytest.approx((0.3 + 0 + 1) / 3)
    assert found["anls"] == pytest.approx((1 + 0.8 + 1) / 3)
    for name in ("vqa_accuracy", "anls"):
        low, high = found[f"{name}_ci"]
        assert 0 < low < found[name] < high <= 1


@pytest.mark.parametrize("metric", [vqa_accuracies, anls])
def test_questions_without_references_are_named(metric):
    with pytest.raises(ValueError, match="found none"):
        metric([])
    for references in ([], "yes"):
        with pytest.raises(ValueError, match="question 1: expected a list of references"):
            metric([("yes", ["yes"]), ("yes", references)])
    with pytest.raises(ValueError, match="question 0: expected a text as answer"):
        metric([(None, ["yes"])])
