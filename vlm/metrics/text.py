"""Errors of read texts: character and word error rates, exact lines, and what is confused.

Rates are pooled: the edits of all lines over the characters (code points) or words of all truths,
so that a long line counts for more than a short one. Both texts are normalised first, by a choice
that is named; white space is joined to single spaces in each of them, and is no error.

Shapes: N line.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm.compat.extras import needs
from vlm.metrics.share import Interval, wilson, with_ci

with needs("ocr"):
    import jiwer
    from jiwer import transforms


class Normalisation(NamedTuple):
    """What is done to both texts before white space is joined, and what a report says of it."""

    meaning: str
    apply: Callable[[str], str]


NORMALISATIONS = {
    "none": Normalisation("white space joined", str),
    "nfc": Normalisation(
        "Unicode NFC (a letter and its accent are one sign), white space joined",
        lambda text: unicodedata.normalize("NFC", text),
    ),
    "nfkc": Normalisation(
        "Unicode NFKC (ligatures and wide signs are plain ones), white space joined",
        lambda text: unicodedata.normalize("NFKC", text),
    ),
    "lower": Normalisation(
        "Unicode NFC, lower case, white space joined",
        lambda text: unicodedata.normalize("NFC", text).lower(),
    ),
}
"""By name."""
LENGTHS = (10, 20, 40, 80)
"""The longest lines, in characters, of the groups by length; a last group holds all longer ones."""


class Rate(NamedTuple):
    """Errors for each unit of truth, 0 or more, with its 95 % interval; above 1 where more is read
    than there is."""

    rate: float
    low: float
    high: float


class Confusion(NamedTuple):
    """A character taken for another, and how often. truth "": nothing stood there; read "": it was
    skipped."""

    truth: str
    read: str
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TextResult:
    """The error rates of the texts of some lines.

    cer, wer: edits over characters and over words, pooled over lines; where the truths hold none,
    the number of edits, as in jiwer. Intervals are those between the 2.5th and 97.5th percentile
    over lines drawn with replacement; Wilson's where every draw is the same (see `_bootstrap`).
    exact: the share of lines that are the same, with Wilson's 95 % interval.
    substitutions, insertions, deletions: of characters. characters, words: of the truths.
    """

    cer: Rate
    wer: Rate
    exact: Interval
    lines: int
    characters: int
    words: int
    substitutions: int
    insertions: int
    deletions: int

    def metrics(self) -> dict[str, Any]:
        """What stands in a report, for JSON. n: how many lines."""
        return {
            "n": self.lines,
            "characters": self.characters,
            "words": self.words,
            **with_ci("cer", self.cer),
            **with_ci("wer", self.wer),
            **with_ci("exact_match", self.exact),
            "substitutions": self.substitutions,
            "insertions": self.insertions,
            "deletions": self.deletions,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Lines beside what was read of them, one by one.

    truths, reads: normalised. characters, words: int64[N], of the truths. edits: int64[N, 3],
    substituted, inserted and deleted characters. word_edits: int64[N]. confused: how often which
    character was taken for which, both "" where there is none.
    """

    truths: tuple[str, ...]
    reads: tuple[str, ...]
    characters: NDArray[np.int64]
    words: NDArray[np.int64]
    edits: NDArray[np.int64]
    word_edits: NDArray[np.int64]
    confused: Counter[tuple[str, str]]

    @property
    def exact(self) -> NDArray[np.bool_]:
        """Whether each line is the same: bool[N]."""
        return np.array([truth == read for truth, read in zip(self.truths, self.reads)])

    @property
    def line_cer(self) -> NDArray[np.float64]:
        """Each line's own character error rate, float64[N]; of an empty truth, the edits."""
        return self.edits.sum(1) / np.maximum(1, self.characters)

    def result(
        self, rows: Sequence[int] | None = None, *, draws: int = 1000, seed: int = 0
    ) -> TextResult:
        """The figures of the lines at `rows`, None: of all.

        draws, seed: the samples of lines behind the intervals of the rates.
        Raises ValueError for no lines.
        """
        at = np.arange(len(self.truths)) if rows is None else np.asarray(rows, np.int64)
        if not len(at):
            raise ValueError("expected at least one line, found none")
        edits, exact = self.edits[at], self.exact[at]
        cer = _bootstrap(edits.sum(1), self.characters[at], draws, seed)
        wer = _bootstrap(self.word_edits[at], self.words[at], draws, seed)
        substitutions, insertions, deletions = (int(n) for n in edits.sum(0))
        return TextResult(
            cer=cer,
            wer=wer,
            exact=wilson(int(exact.sum()), len(at)),
            lines=len(at),
            characters=int(self.characters[at].sum()),
            words=int(self.words[at].sum()),
            substitutions=substitutions,
            insertions=insertions,
            deletions=deletions,
        )

    def by_group(
        self, groups: Sequence[Hashable], *, draws: int = 1000, seed: int = 0
    ) -> dict[Any, TextResult]:
        """The figures of each group's lines, groups in the order of their first line.

        groups: N, the group of each line, such as its font.
        """
        if len(groups) != len(self.truths):
            raise ValueError(f"groups: expected {len(self.truths)}, found {len(groups)}")
        rows: dict[Hashable, list[int]] = {}
        for row, group in enumerate(groups):
            rows.setdefault(group, []).append(row)
        return {group: self.result(at, draws=draws, seed=seed) for group, at in rows.items()}

    def confusions(self, most: int = 20) -> list[Confusion]:
        """The most frequent confusions of characters, of equal counts by their signs."""
        ordered = sorted(self.confused.items(), key=lambda item: (-item[1], item[0]))
        return [Confusion(*pair, count) for pair, count in ordered[:most]]


def normalise(text: str, normalisation: str = "nfc") -> str:
    """A text as it is compared: one of NORMALISATIONS, then white space joined.

    >>> normalise(" Cafe\\u0301\\n ﬁn ") == "Café ﬁn"
    True
    >>> normalise("ﬁn  ＯＫ", "nfkc"), normalise("OK  Now", "lower")
    ('fin OK', 'ok now')
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(
            f"normalisation: expected one of {', '.join(NORMALISATIONS)}, found {normalisation!r}"
        )
    return " ".join(NORMALISATIONS[normalisation].apply(text).split())


def compare_texts(
    truths: Sequence[str], reads: Sequence[str], *, normalisation: str = "nfc"
) -> Comparison:
    """The least edits, by jiwer, that make each truth what was read of it, in characters and words.

    Either may be empty: a truth that is not read is deleted characters, one read where nothing
    stands is inserted ones. Raises ValueError for no lines and for unequal numbers of them.

    >>> found = compare_texts(["a cat", "dogs"], ["a cot", "dogs!"])
    >>> found.edits.tolist(), found.characters.tolist(), found.word_edits.tolist()
    ([[1, 0, 0], [0, 1, 0]], [5, 4], [1, 1])
    >>> result = found.result()
    >>> round(result.cer.rate, 3), round(result.wer.rate, 3), result.exact.share
    (0.222, 0.667, 0.0)
    >>> found.confusions()
    [Confusion(truth='', read='!', count=1), Confusion(truth='a', read='o', count=1)]
    """
    if len(truths) != len(reads) or not len(truths):
        raise ValueError(
            f"expected as many texts read as true ones, and at least one, found {len(reads)} read "
            f"and {len(truths)} true"
        )
    truths = tuple(normalise(text, normalisation) for text in truths)
    reads = tuple(normalise(text, normalisation) for text in reads)
    edits = np.zeros((len(truths), 3), np.int64)
    confused: Counter[tuple[str, str]] = Counter()
    for row, (truth, read) in enumerate(zip(truths, reads)):
        for first, second in differences(truth, read):
            if first == second:
                continue
            edits[row, 0 if first and second else 2 if first else 1] += max(len(first), len(second))
            confused.update(zip(first or [""] * len(second), second or [""] * len(first)))
    return Comparison(
        truths=truths,
        reads=reads,
        characters=np.array([len(text) for text in truths]),
        words=np.array([len(text.split()) for text in truths]),
        edits=edits,
        word_edits=np.array([_word_edits(*pair) for pair in zip(truths, reads)]),
        confused=confused,
    )


def differences(truth: str, read: str) -> list[tuple[str, str]]:
    """Both texts cut into pairs of equal, exchanged (of equal length), missing and added pieces,
    in order; the least edits, by jiwer.

    >>> differences("a cat", "a coat!")
    [('a c', 'a c'), ('', 'o'), ('at', 'at'), ('', '!')]
    """
    aligned = jiwer.process_characters([truth], [read], _CHARACTERS, _CHARACTERS).alignments[0]
    return [
        (truth[c.ref_start_idx : c.ref_end_idx], read[c.hyp_start_idx : c.hyp_end_idx])
        for c in aligned
    ]


def words_right(truth: str, words: Sequence[str], normalisation: str = "nfc") -> NDArray[np.bool_]:
    """Whether each word that was read is one of the truth at its position: bool[words].

    The words are aligned with those of the truth by the least edits of words.

    >>> words_right("the cat sat", ["the", "oat", "sat", "."]).tolist()
    [True, False, True, False]
    """
    read = [normalise(word, normalisation).replace(" ", "") for word in words]
    filled = [at for at, word in enumerate(read) if word]
    aligned = _align_words(normalise(truth, normalisation), " ".join(read[at] for at in filled))
    right = np.zeros(len(words), bool)
    for chunk in aligned:
        if chunk.type == "equal":
            right[filled[chunk.hyp_start_idx : chunk.hyp_end_idx]] = True
    return right


def pieces_right(truth: str, pieces: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each piece of a read text, such as a token, is right in all characters: bool[pieces].

    pieces: joined they are the text. One without a character, where several make one, is as right
    as the next that has any, or else the one before; where none has, as the empty text is.
    Texts are compared as they are, in NFC alone; what was skipped counts against no piece.

    >>> pieces_right("a cat", ["a", " c", "", "ot"]).tolist()
    [True, True, False, False]
    """
    right = np.zeros(len(pieces), bool)
    truth = unicodedata.normalize("NFC", truth)
    good: list[bool] = []
    for first, second in differences(truth, "".join(pieces)):
        good += [first == second] * len(second)
    start, open_pieces, last = 0, [], not truth
    for at, piece in enumerate(pieces):
        open_pieces.append(at)
        if piece:
            last = all(good[start : start + len(piece)])
            start += len(piece)
            right[open_pieces] = last
            open_pieces = []
    right[open_pieces] = last
    return right


def cer_difference(
    first: Comparison, second: Comparison, *, draws: int = 1000, seed: int = 0
) -> Rate:
    """The first's character error rate less the second's on the same lines, with its 95 % interval
    over lines drawn with replacement, both readers' together: below 0 throughout, the first is
    better by more than the choice of lines explains.

    Raises ValueError where the truths are not the same.

    >>> truths = ["abcd"] * 4
    >>> a, b = compare_texts(truths, truths), compare_texts(truths, ["abcx"] * 4)
    >>> [round(value, 3) for value in cer_difference(a, b)]
    [-0.25, -0.495, -0.102]
    """
    if first.truths != second.truths:
        raise ValueError("expected two readings of the same lines, found other truths")
    edits = first.edits.sum(1) - second.edits.sum(1)
    return _bootstrap(edits, first.characters, draws, seed, signed=True)


def length_group(text: str) -> str:
    """The group by length that a true line falls into.

    >>> [length_group("x" * n) for n in (0, 10, 11, 80, 81)]
    ['1 to 10', '1 to 10', '11 to 20', '41 to 80', 'over 80']
    """
    low = 1
    for high in LENGTHS:
        if len(text) <= high:
            return f"{low} to {high}"
        low = high + 1
    return f"over {LENGTHS[-1]}"


_CHARACTERS = transforms.ReduceToListOfListOfChars()
_WORDS = transforms.ReduceToListOfListOfWords()


def _align_words(truth: str, read: str) -> list[jiwer.AlignmentChunk]:
    return jiwer.process_words([truth], [read], _WORDS, _WORDS).alignments[0]


def _word_edits(truth: str, read: str) -> int:
    return sum(
        max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx)
        for c in _align_words(truth, read)
        if c.type != "equal"
    )


def _bootstrap(
    edits: NDArray[np.int64],
    units: NDArray[np.int64],
    draws: int,
    seed: int,
    *,
    signed: bool = False,
) -> Rate:
    """The pooled rate and its percentile interval. Lines of equal edits and units are alike, so
    that what is drawn is how often each kind of line comes, which is a multinomial.

    Where every sample has the same rate (no edit at all, nothing right, one line), the samples say
    nothing of its uncertainty: the interval is Wilson's over the units, which at no edit reaches to
    about 4 edits. Of differences between readers, below 0 or 0, it is mirrored."""
    if draws < 1:
        raise ValueError(f"draws: expected 1 or more, found {draws}")
    kinds, often = np.unique(np.stack([edits, units], 1), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(edits), often / len(edits), draws)
    sums = drawn @ kinds
    rates = sums[:, 0] / np.maximum(1, sums[:, 1])
    low, high = (float(value) for value in np.percentile(rates, (2.5, 97.5)))
    found, count = int(edits.sum()), max(1, int(units.sum()))
    if low == high and abs(found) <= count:
        _, near, far = wilson(abs(found), count)
        low, high = (near, far) if found > 0 else (-far, -near)
        if not found:
            low, high = (-far if signed else 0.0), far
    return Rate(found / count, low, high)
