"""How near captions come to references: exact match, CIDEr-D and BLEU-4.

Pure functions over pairs (candidate, references), a pair for each image, with any number of
references. CIDEr-D weighs n-grams by the images whose references hold them, and BLEU-4 counts
over the corpus, so a part of the pairs says nothing: processes gather their pairs first.

CIDEr-D is computed by pycocoevalcap's scorer (that of the COCO evaluation), BLEU-4 by sacrebleu.
The COCO evaluation cuts texts into tokens with a Java program; `tokens` stands in for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from vlm.compat.extras import needs
from vlm.metrics.share import bootstrap, wilson, with_ci

with needs("eval"):  # here, so that captions are not written first
    from pycocoevalcap.cider.cider import Cider
    from sacrebleu.metrics import BLEU

Pair = tuple[str, Sequence[str]]
"""An image's candidate caption and its references."""

_STRAIGHT = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})
_CONTRACTIONS = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
_TOKEN = re.compile(
    r"""(?:\w\.){2,}            # u.s.
      | \d+(?:[.,:/]\d+)+       # 3.5, 1,000
      | n't\b | '\w+            # parts of contractions
      | \w+(?:-\w+)*            # t-shirt
      | [^\w\s]                 # signs""",
    re.VERBOSE,
)
_DROPPED = set(".?!,:;-'\"`()[]{}")


def tokens(text: str) -> list[str]:
    """A caption's tokens for CIDEr-D and BLEU-4: those of the Penn Treebank as the COCO evaluation
    takes them, lower-case and without punctuation.

    Contractions are split ("isn't": is n't), hyphened words and numbers stay whole, other signs
    (& % $ # * +) are tokens of their own. Text without spaces between words is one word a run.
    Source: pycocoevalcap, tokenizer/ptbtokenizer.py, PUNCTUATIONS. There brackets survive, as
    "-lrb-" and "-rrb-", because lower case hides them from that list; here they are dropped.

    >>> tokens("A man's T-shirt isn't 3.5 feet (long) — is it?")
    ['a', 'man', "'s", 't-shirt', 'is', "n't", '3.5', 'feet', 'long', 'is', 'it']
    """
    text = _CONTRACTIONS.sub(r" \1", text.translate(_STRAIGHT).lower())
    text = re.sub(r"\bcannot\b", "can not", text)
    return [token for token in _TOKEN.findall(text) if token not in _DROPPED]


def normalise(text: str) -> str:
    """A caption as exact match compares it: case folded, white space at the ends gone and collapsed
    within, one full stop at the end gone.

    >>> normalise("  A grinning\\n Face. ")
    'a grinning face'
    """
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def exact_matches(pairs: Sequence[Pair]) -> np.ndarray:
    """Whether each candidate equals one of its references, both normalised: bool[N].

    Raises ValueError for no pairs, or an image without references, naming it by its index.
    """
    _check(pairs)
    return np.array(
        [normalise(candidate) in map(normalise, references) for candidate, references in pairs]
    )


def cider_d(pairs: Sequence[Pair]) -> np.ndarray:
    """CIDEr-D of each image, float64[N] in 0 to 10; their mean is the corpus's.

    (Papers often print it times 100.) Its weights are log(images / images whose references hold
    the n-gram): one image alone, or the same references everywhere, score 0.
    Source: Vedantam et al. 2015, section 6; pycocoevalcap, cider/cider_scorer.py.
    Raises ValueError for no pairs, or an image without references, naming it by its index.
    """
    _check(pairs)
    candidates, references = _joined(pairs)
    if not any(any(texts) for texts in references.values()):
        return np.zeros(len(pairs))  # signs alone: no n-gram, which the scorer cannot take
    return np.asarray(Cider().compute_score(references, candidates)[1])


def bleu_4(pairs: Sequence[Pair]) -> float:
    """BLEU-4 of the corpus, in 0 to 1: n-grams to four words, the closest reference's length,
    unsmoothed, as in the COCO evaluation. 0 where no four words in a row are right (there: 1e-5
    or so).

    Source: Papineni et al. 2002.
    Raises ValueError for no pairs, or an image without references, naming it by its index.
    """
    _check(pairs)
    candidates, references = _joined(pairs)
    most = max(len(texts) for texts in references.values())
    streams = [
        [texts[i] if i < len(texts) else None for texts in references.values()] for i in range(most)
    ]
    bleu = BLEU(tokenize="none", smooth_method="none", force=True)
    return bleu.corpus_score([texts[0] for texts in candidates.values()], streams).score / 100


def bleu_4_interval(pairs: Sequence[Pair]) -> tuple[float, float]:
    """The bootstrap 95 % interval of BLEU-4 over images. Raises ValueError as `bleu_4` does."""
    _check(pairs)
    bleu = BLEU(tokenize="none", smooth_method="none", force=True, effective_order=True)
    candidates, references = _joined(pairs)
    found = [bleu.sentence_score(candidates[i][0], references[i]) for i in candidates]
    terms = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found], float)
    return bootstrap(terms, _bleu_of)


def _bleu_of(sums: np.ndarray) -> np.ndarray:
    """BLEU-4 of sums over images, float[D, 10]: right n-grams and all n-grams of the candidates
    by length, words of the candidates and of the closest references."""
    right, all_, (length, wanted) = sums[:, :4], sums[:, 4:8], sums[:, 8:].T
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(right / all_).mean(1)
        brevity = np.minimum(1 - wanted / length, 0)
        return np.nan_to_num(np.exp(logs + brevity), nan=0.0)


def caption_metrics(pairs: Sequence[Pair]) -> dict[str, float | list[float] | int]:
    """The corpus's metrics with their 95 % intervals (keys in _ci): exact_match (Wilson's),
    cider (CIDEr-D) and bleu4 (bootstrap over images; CIDEr-D's weights are those of all images). n:
    how many images."""
    hits = int(exact_matches(pairs).sum())
    cider = cider_d(pairs)
    cider_ci = bootstrap(cider[:, None], lambda sums: sums[:, 0] / len(pairs))
    return {
        "n": len(pairs),
        **with_ci("exact_match", wilson(hits, len(pairs))),
        **with_ci("cider", (float(cider.mean()), *cider_ci)),
        **with_ci("bleu4", (bleu_4(pairs), *bleu_4_interval(pairs))),
    }


def _joined(pairs: Sequence[Pair]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Candidates and references by image, tokens joined by spaces."""
    candidates = {i: [" ".join(tokens(candidate))] for i, (candidate, _) in enumerate(pairs)}
    references = {
        i: [" ".join(tokens(text)) for text in texts] for i, (_, texts) in enumerate(pairs)
    }
    return candidates, references


def _check(pairs: Sequence[Pair]) -> None:
    if not len(pairs):
        raise ValueError("expected at least one image with a caption, found none")
    for i, (candidate, references) in enumerate(pairs):
        if isinstance(references, str) or not len(references):
            raise ValueError(f"image {i}: expected a list of references, found {references!r}")
        if not isinstance(candidate, str):
            raise ValueError(f"image {i}: expected a text as candidate, found {candidate!r}")
