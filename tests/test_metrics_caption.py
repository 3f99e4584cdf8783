import math
import random

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from vlm.metrics.caption import (
    bleu_4,
    bleu_4_interval,
    caption_metrics,
    cider_d,
    exact_matches,
    normalise,
    tokens,
)
from vlm.metrics.share import bootstrap, wilson

WORDS = ("a", "the", "cat", "dog", "on", "mat", "red", "runs", "sits", "with")


def corpus(seed, images=200):
    """Random candidates and 1 to 5 references of 1 to 12 words, which share many n-grams."""
    draw = random.Random(seed)

    def sentence():
        return " ".join(draw.choices(WORDS[: draw.randint(3, 10)], k=draw.randint(1, 12)))

    return [(sentence(), [sentence() for _ in range(draw.randint(1, 5))]) for _ in range(images)]


def by_image(pairs):
    return {i: list(r) for i, (_, r) in enumerate(pairs)}, {
        i: [c] for i, (c, _) in enumerate(pairs)
    }


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_the_coco_evaluations_on_random_corpora(seed):
    pairs = corpus(seed)
    references, candidates = by_image(pairs)
    mean, each = Cider().compute_score(references, candidates)
    np.testing.assert_allclose(cider_d(pairs), each)
    assert caption_metrics(pairs)["cider"] == pytest.approx(mean)
    theirs = Bleu(4).compute_score(references, candidates, verbose=0)[0][3]
    assert bleu_4(pairs) == pytest.approx(theirs, abs=1e-6)
    assert theirs > 0.01


def test_cider_equals_the_hand_computed_score():
    """Two images of two words each: every n-gram has the weight log 2, so the cosine of unigrams
    is 1/2 for one of two words and that of bigrams 0; the mean is over n = 1 to 4, times 10. The
    length penalty counts bigrams, one on both sides."""
    pairs = [("red cat", ["red cat"]), ("blue cow", ["blue dog"])]
    assert cider_d(pairs).tolist() == pytest.approx([10 * 2 / 4, 10 * 0.5 / 4])
    two = [("red cat", ["red cat", "big fox"]), ("blue cow", ["blue dog"])]
    assert cider_d(two)[0] == pytest.approx(10 * 2 / 4 / 2)  # the mean over references
    longer = [("red cat here now", ["red cat here"]), ("x", ["y"])]
    cosines = [3 / math.sqrt(12), 2 / math.sqrt(6), 1 / math.sqrt(2), 0]
    # a word that no reference holds weighs as one that a single image's do
    assert cider_d(longer)[0] == pytest.approx(10 * sum(cosines) / 4 * math.exp(-1 / 72))


def test_bleu_equals_the_hand_computed_score():
    """5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 fours."""
    candidate, reference = "the cat sat on the mat", "the cat sits on the mat"
    pairs = [(f"{candidate} today", [f"{reference} today"])]
    expected = (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert bleu_4(pairs) == pytest.approx(expected)
    short = [("on the mat today", ["a cat sits on the mat today"])]
    assert bleu_4(short) == pytest.approx(math.exp(1 - 7 / 4))


def test_equal_captions_score_full_marks_where_images_differ():
    pairs = [(text, [text]) for text in ("a cat sits on it", "some red dogs run home")]
    figures = caption_metrics(pairs)
    assert figures["cider"] == pytest.approx(10)
    assert figures["bleu4"] == pytest.approx(1)
    assert figures["exact_match"] == 1


@pytest.mark.parametrize("empty", ["", "  ", "?!"])
def test_empty_candidates_score_nothing(empty):
    pairs = [(empty, ["a cat sits there"]), ("a dog runs over there", ["a dog runs over there"])]
    assert cider_d(pairs)[0] == 0
    assert cider_d(pairs)[1] > 0
    assert 0 < bleu_4(pairs) < 1
    assert bleu_4(pairs[:1]) == 0
    assert exact_matches(pairs).tolist() == [False, True]


def test_one_image_has_no_cider_and_duplicates_are_scored_each():
    """With one image, or the same references everywhere, no n-gram tells images apart."""
    one = ("a red cat is here", ["a red cat is here"])
    assert cider_d([one]).tolist() == [0]
    assert bleu_4([one]) == pytest.approx(1)
    assert cider_d([one, one]).tolist() == [0, 0]
    other = ("a dog", ["the dog"])
    scores = cider_d([one, one, other])
    assert scores[0] == scores[1] > 0
    assert len(exact_matches([one, one, other])) == 3
    assert cider_d([("!", ["?"]), ("a", ["..."])]).tolist() == [0, 0]


def test_order_of_images_changes_nothing():
    """So processes may gather their pairs in any order."""
    pairs = corpus(7)
    turned = pairs[13:] + pairs[:13]
    for name, figure in caption_metrics(pairs).items():
        assert caption_metrics(turned)[name] == pytest.approx(figure, rel=1e-12)


def test_intervals_hold_the_corpus_figures():
    figures = caption_metrics(corpus(7))
    for name in ("cider", "bleu4"):
        low, high = figures[f"{name}_ci"]
        assert low < figures[name] < high, name
    alike = [("a cat sat on the red mat", ["the cat sat on the red mat today"])] * 5
    assert bleu_4_interval(alike) == pytest.approx([bleu_4(alike)] * 2)
    assert bleu_4_interval([("a cat", ["a cat"]), ("", ["x"])]) == (0.0, 0.0)


def test_bootstrap_interval_of_a_mean_is_that_of_its_normal_distribution():
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    low, high = bootstrap(values[:, None], lambda sums: sums[:, 0] / len(values))
    half = 1.96 * values.std() / len(values) ** 0.5
    assert low == pytest.approx(values.mean() - half, abs=half / 8)
    assert high == pytest.approx(values.mean() + half, abs=half / 8)
    turned = bootstrap(values[::-1, None], lambda sums: sums[:, 0] / len(values))
    assert turned == pytest.approx((low, high))


def test_exact_match_compares_normalised_texts():
    assert normalise(" Straße  1. ") == "strasse 1"
    assert normalise("etc..") == "etc."
    pairs = [
        ("A  Cat.", ["dog", "a cat"]),
        ("a cat!", ["a cat"]),
        ("CAFÉ", ["café."]),
        ("cat", ["a cat"]),
    ]
    assert exact_matches(pairs).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Flag: Côte d’Ivoire", "flag côte d 'ivoire"),
        ("keycap: *", "keycap *"),
        ("The U.S. isn't 1,000.5 miles-long; it's", "the u.s. is n't 1,000.5 miles-long it 's"),
        ("hello,world...", "hello world"),
        ("I cannot; we'll, they've", "i can not we 'll they 've"),
        ("salt & pepper - 5%", "salt & pepper 5 %"),
        ("", ""),
    ],
)
def test_tokens_are_lower_case_words_without_punctuation(text, expected):
    assert " ".join(tokens(text)) == expected


def test_wilson_interval_equals_the_published_example():
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611."""
    assert wilson(81, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20)[1:] == pytest.approx((0, 0.1611), abs=5e-5)
    _, low, high = wilson(20, 20)
    assert (low, high) == pytest.approx((1 - 0.1611, 1), abs=5e-5)
    with pytest.raises(ValueError, match="found 3 and 2"):
        wilson(3, 2)


def test_bad_pairs_are_named():
    for function in (exact_matches, cider_d, bleu_4):
        with pytest.raises(ValueError, match="at least one image"):
            function([])
        with pytest.raises(ValueError, match=r"image 1: expected a list of references, found \[\]"):
            function([("a", ["b"]), ("a", [])])
        with pytest.raises(ValueError, match="image 0: expected a list of references, found 'b'"):
            function([("a", "b")])
        with pytest.raises(ValueError, match="image 0: expected a text as candidate, found None"):
            function([(None, ["b"])])
