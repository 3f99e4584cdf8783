"""The text tokenizers of open_clip as tokenizers of transformers, which clean texts themselves.

Source: open_clip 3.3, `tokenizer.py` and `factory.py`, `get_tokenizer`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_clip import CLIPTextCfg, SimpleTokenizer
from tokenizers import Regex, Tokenizer, normalizers
from transformers import (
    AutoTokenizer,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipTokenizer,
)

from vlm.systems.open_clip.config import unfit


def folder_tokenizer(
    folder: Path, model_cfg: Mapping[str, Any], *, hub: bool = False
) -> PreTrainedTokenizerBase:
    """What open_clip's `get_tokenizer("local-dir:...")` takes for a folder, as a tokenizer of
    transformers that cleans texts itself: CLIP's, or where `text_cfg.hf_tokenizer_name` says
    anything the one whose files lie in the folder (hub: or, where there are none, under this name
    on the hub).

    Of open_clip's cleaning the repair of broken text (ftfy) and of HTML's "&amp;" is skipped.
    Raises OSError where the files are missing; ValueError naming the key that cannot be done.
    """
    text = asdict(CLIPTextCfg()) | model_cfg["text_cfg"]
    name, options = text["hf_tokenizer_name"], text["tokenizer_kwargs"] or {}
    if not name:
        if text["no_causal_mask"]:  # such a tower sees its pads, and CLIP's 0 is no token for it
            raise unfit("text_cfg.hf_tokenizer_name", "a name where no_causal_mask", name)
        if options not in ({}, {"clean": "lower"}):
            raise unfit("text_cfg.tokenizer_kwargs", "nothing, or clean: lower", options)
        tokenizer = clip_tokenizer()
    else:
        clean = options.get("clean", "whitespace")
        if set(options) - {"clean"} or clean not in CLEANINGS:
            raise unfit("text_cfg.tokenizer_kwargs", f"clean: {' or '.join(CLEANINGS)}", options)
        if text["tokenizer_mode"]:
            raise unfit("text_cfg.tokenizer_mode", "none", text["tokenizer_mode"])
        tokenizer = _cleaning(_open_tokenizer(folder, name, hub), CLEANINGS[clean])
    if len(tokenizer) > text["vocab_size"]:
        raise unfit("text_cfg.vocab_size", f"{len(tokenizer)} or more", text["vocab_size"])
    return tokenizer


def _open_tokenizer(folder: Path, name: str, hub: bool) -> PreTrainedTokenizerBase:
    here = any(folder.glob("token*")) or any(folder.glob("*.model"))
    try:
        source = name if hub and not here else folder
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # each part of transformers raises its own kinds
        found = sorted(path.name for path in folder.iterdir())[:8]
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"{folder}: text_cfg.hf_tokenizer_name is {name!r}: expected the files of this "
            f"tokenizer here (tokenizer.json, tokenizer_config.json), found {found} ({reason})"
        ) from error


def _cleaning(
    tokenizer: PreTrainedTokenizerBase, steps: Sequence[normalizers.Normalizer]
) -> PreTrainedTokenizerBase:
    """The tokenizer with steps before its own, in the class that saves and opens them as they are
    (others make theirs anew when they are opened)."""
    if not tokenizer.is_fast:
        if isinstance(tokenizer, SiglipTokenizer):  # which does all this itself
            return tokenizer
        raise unfit("text tokenizer", "a fast tokenizer", type(tokenizer).__name__)
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own = [] if core.normalizer is None else [core.normalizer]
    core.normalizer = normalizers.Sequence([*steps, *own])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_max_length=tokenizer.model_max_length,
        **{key: tokenizer.special_tokens_map.get(key) for key in SPECIAL},
    )


SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")

_ONE_SPACE = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
CLEANINGS: dict[str, Sequence[normalizers.Normalizer]] = {
    "whitespace": _ONE_SPACE,
    "lower": [*_ONE_SPACE, normalizers.Lowercase()],
    "canonicalize": [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Lowercase(),
        *_ONE_SPACE,
    ],
}
"""`clean` in open_clip's `tokenizer_kwargs` -> what it does to a text."""


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's text tokenizer from the byte pairs inside open_clip, in transformers' class: the same
    49408 ids in the same order. Fetches nothing.

    Ids equal those of open_clip's SimpleTokenizer but for these: text is neither repaired (ftfy:
    mojibake, curly quotes, full width, ligatures) nor freed of HTML's "&amp;" first; a Greek
    capital sigma at a word's end becomes σ, not ς; in a text, the special tokens are called
    <|startoftext|> and <|endoftext|>, not <start_of_text> and <end_of_text>; padding is the end of
    text, not id 0, and nothing sees it: the tower is causal and pooled at the first end.
    """
    source = SimpleTokenizer()
    begin, end = source.all_special_ids
    vocabulary = {token: id for token, id in source.encoder.items() if id not in (begin, end)}
    vocabulary |= {"<|startoftext|>": begin, "<|endoftext|>": end}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(source.bpe_ranks),
        model_max_length=source.context_length,
    )
