"""A text tokenizer read from a file of tiktoken: byte pairs by rank, without the code around it.

Each line holds a token's bytes in base64 and its rank, which is its id. tiktoken joins the
neighbours whose union has the lowest rank; a list of merges by rank says the same to the tokenizers
library.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a file by their bytes -> rank. Raises ValueError naming the file, and the line
    that is none, where ranks do not count from 0, each once, or a byte has no token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{path}: line {number}: expected a token in base64 and its rank, found "
                f"{line[:40]!r}"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"{path}: expected ranks from 0 to {len(ranks) - 1}, each once, found "
            f"{len(set(ranks.values()))} of them up to {max(ranks.values(), default=None)}"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{path}: expected a token for each byte, found none for {missing[:8]}")
    return ranks


def open_tiktoken(
    path: Path,
    *,
    pattern: str,
    added: Sequence[AddedToken],
    end: str,
    normalizer: normalizers.Normalizer | None = None,
) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a file of tiktoken.

    pattern: what cuts a text before bytes are joined, as tiktoken has it. added: tokens beside
        those of the file, whose ids follow in this order. end: the one of them that ends and pads.
    normalizer: what is done to texts first.
    Raises ValueError as `read_ranks` does.
    """
    ranks = read_ranks(path)
    spelled = {token: _spelled(token) for token in ranks}
    core = Tokenizer(
        models.BPE(
            {spelled[token]: rank for token, rank in ranks.items()},
            [(spelled[left], spelled[right]) for left, right in _merges(ranks)],
            ignore_merges=True,  # what is a token as a whole is never cut
        )
    )
    if normalizer is not None:
        core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    core.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens whose union is one, by the rank of that."""
    return [
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]


def _letters() -> list[str]:
    """What stands for each byte in a byte-level vocabulary: itself where it is printed, else a
    letter from 256 on. Source: openai/gpt-2, `src/encoder.py`, `bytes_to_unicode`."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


LETTERS = _letters()


def _spelled(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)
