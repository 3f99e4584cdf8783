"""Accuracy of answers to questions: VQA accuracy, and ANLS for answers read off documents.

Pure functions over pairs (answer, references), a pair for each question, with any number of
references: those of ten annotators in VQA v2, the spellings that are right in DocVQA, or one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from vlm.metrics.share import wilson, with_ci

Pair = tuple[str, Sequence[str]]
"""An answer, and the references of its question."""

ANNOTATORS = 10
"""References of a question in VQA v2; where there are fewer, each is right by itself."""
AGREEMENT = 3
"""Annotators who must have said the same for an answer to be wholly right."""
ANLS_THRESHOLD = 0.5
"""Similarities below this count 0: such an answer is another one, not one misread."""

ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""What is removed or becomes a space. Apostrophes and colons stay: girl's, 2:50."""
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've"""
"""Words whose apostrophe is put back where one is missing; not those that are other words without
it, such as we're, she'd and I'll."""
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


@cache
def _with_apostrophe() -> dict[str, str]:
    """From each contraction without one of its apostrophes to the contraction; and one the other
    way round, as the evaluation code has it."""
    return {"somebody'd": "somebodyd"} | {
        word[:at] + word[at + 1 :]: word
        for word in CONTRACTIONS.split()
        for at, sign in enumerate(word)
        if sign == "'"
    }


def normalise(text: str) -> str:
    """An answer as VQA accuracy compares it: in lower case, with number words to ten as digits,
    without articles, with the apostrophes of contractions, without periods but those before a
    digit, and without punctuation but apostrophes and colons.

    A sign is removed where it stands beside a space anywhere in the text, and every sign where
    there is a comma between digits; else it becomes a space.
    Source: Antol et al. 2015, and the evaluation of visualqa.org ("Evaluation": the processing of
    answers), with the order and the exceptions of its code, vqaEval.py (2017). That code compares
    texts as they are where all references of a question are equal; here they are normalised too.

    >>> normalise("The two dogs, dont they?"), normalise("1,000.50"), normalise("T-shirt")
    ("2 dogs don't they", '1000.50', 't shirt')
    """
    text = " ".join(text.split())
    joins = bool(_COMMA_IN_NUMBER.search(text))
    cleaned = text
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if joins or beside_space else " ")
    words = (NUMBERS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split())
    return " ".join(_with_apostrophe().get(w, w) for w in words if w not in ARTICLES)


def vqa_accuracies(pairs: Sequence[Pair]) -> np.ndarray:
    """VQA accuracy of each answer, float64[N] in 0 to 1; both sides are normalised.

    Of ten references or more: min(n / 3, 1), n being how many of the references equal the answer,
    averaged over all ways of leaving one reference out. Of fewer, which are no annotators' votes:
    1 where the answer equals one of them, else 0.
    Source: Antol et al. 2015, equation 1; Goyal et al. 2017 (VQA v2), and visualqa.org.
    Raises ValueError for no pairs, or a question without references, naming it by its index.
    """
    _check(pairs)
    return np.array([_accuracy(answer, references) for answer, references in pairs])


def _accuracy(answer: str, references: Sequence[str]) -> float:
    said, count = normalise(answer), len(references)
    equal = sum(normalise(reference) == said for reference in references)
    if count < ANNOTATORS:
        return float(equal > 0)
    one_left_out = min((equal - 1) / AGREEMENT, 1) if equal else 0.0
    other_left_out = min(equal / AGREEMENT, 1)
    return (equal * one_left_out + (count - equal) * other_left_out) / count


def anls(pairs: Sequence[Pair]) -> np.ndarray:
    """Normalised Levenshtein similarity of each answer and its nearest reference, float64[N] in 0
    to 1, those below 0.5 being 0; their mean is ANLS.

    The similarity is 1 - edits / characters of the longer text. Case, and white space beyond one
    space between words, do not count.
    Source: Biten et al. 2019 (ST-VQA), equation 1, and Mathew et al. 2021 (DocVQA). At exactly 0.5
    the similarity counts, as in the evaluation code of the Robust Reading Competition; the equation
    excludes it.
    Raises ValueError for no pairs, or a question without references, naming it by its index.
    """
    _check(pairs)
    return np.array(
        [max(_similarity(answer, one) for one in references) for answer, references in pairs]
    )


def _similarity(answer: str, reference: str) -> float:
    a, b = (" ".join(text.lower().split()) for text in (answer, reference))
    longest = max(len(a), len(b))
    similarity = 1 - edits(a, b) / longest if longest else 1.0
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def edits(a: str, b: str) -> int:
    """Levenshtein distance: the fewest characters to insert, delete or substitute.

    >>> edits("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            substituted = before + (x != y)
            before = row[j]
            row[j] = min(before + 1, row[j - 1] + 1, substituted)
    return row[-1]


def vqa_metrics(pairs: Sequence[Pair]) -> dict[str, float | list[float] | int]:
    """What stands in a report, for JSON: vqa_accuracy and anls with their 95 % intervals (keys that
    end in _ci). n: how many questions; n_ten_references: those with ten references or more.

    Intervals are Wilson's for a share of as many draws as there are questions: wider than need be
    where answers are partly right, and valid at 0 and 1.
    """
    measured = {"vqa_accuracy": vqa_accuracies(pairs), "anls": anls(pairs)}
    result: dict[str, float | list[float] | int] = {
        "n": len(pairs),
        "n_ten_references": sum(len(r) >= ANNOTATORS for _, r in pairs),
    }
    for name, values in measured.items():
        result |= with_ci(name, wilson(min(float(values.sum()), len(pairs)), len(pairs)))
    return result


def _check(pairs: Sequence[Pair]) -> None:
    if not len(pairs):
        raise ValueError("expected at least one question with its answer, found none")
    for i, (answer, references) in enumerate(pairs):
        if isinstance(references, str) or not len(references):
            raise ValueError(f"question {i}: expected a list of references, found {references!r}")
        if not isinstance(answer, str):
            raise ValueError(f"question {i}: expected a text as answer, found {answer!r}")
