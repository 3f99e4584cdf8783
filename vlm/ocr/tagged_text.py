"""Donut's tagged text: JSON values as text with tags around fields, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def pieces(processor: Any, ids: Sequence[int]) -> list[str]:
    """What each generated id adds to the text of the fields, each on lines of its own: a tag adds a
    line break, a category its name."""
    tokenizer = processor.text_tokenizer
    added = tokenizer.get_added_vocab()
    said: list[str] = []
    field: list[int] = []
    for id, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids))):
        if token not in added:
            field.append(id)
            continue
        said += processor.pieces(field)
        field = []
        mark = token == SEPARATOR or TAG.fullmatch(token.replace("/", "", 1))
        said.append("\n" if mark else token[1:-2] if token.endswith("/>") else "")
    return [*said, *processor.pieces(field)]


def read_json(processor: Any, ids: Sequence[int]) -> Any:
    """What generated ids say, as values of JSON: see `to_json`."""
    tokenizer = processor.text_tokenizer
    special = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token} - {None}
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    for token in special:
        text = text.replace(token, "")
    return to_json(text, set(tokenizer.get_added_vocab()))


TAG = re.compile(r"<s_([^<>]*)>", re.IGNORECASE)


SEPARATOR = "<sep/>"


def to_json(text: str, categories: set[str] = frozenset()) -> Any:
    """Tagged text as values of JSON.

    `<s_x>...</s_x>` is a key x with what lies in it; `<sep/>` stands between the entries of a list;
    a list of one entry is the entry. A tag that is never closed is dropped. Text without any tag is
    {"text_sequence": text}. categories: tokens of the form `<name/>`, which stand for their names.

    >>> to_json("<s_menu><s_nm>tea</s_nm><sep/><s_nm>pie</s_nm></s_menu><s_sum>3<sep/>4</s_sum>")
    {'menu': [{'nm': 'tea'}, {'nm': 'pie'}], 'sum': ['3', '4']}
    """
    entries = _entries(text, categories)
    if not entries:
        return {"text_sequence": text}
    return entries[0] if len(entries) == 1 else entries


def _entries(text: str, categories: set[str]) -> list[dict[str, Any]]:
    """The objects that a text holds, separators between them."""
    entries: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    position = 0
    while opening := TAG.search(text, position):
        key = opening[1]
        closing = re.compile(rf"</s_{re.escape(key)}>", re.IGNORECASE).search(text, opening.end())
        if closing is None:
            position = opening.end()
            continue
        value = _value(text[opening.end() : closing.start()].strip(), categories)
        if value is not None:
            found[key] = value
        position = closing.end()
        rest = text[position:].lstrip()
        if rest.startswith(SEPARATOR):
            entries.append(found)
            found = {}
            position = len(text) - len(rest) + len(SEPARATOR)
    return [*entries, found] if found else entries


def _value(content: str, categories: set[str]) -> Any:
    """What lies between a tag and its end; None for tags that hold nothing."""
    if "<s_" in content and "</s_" in content:
        inner = _entries(content, categories)
        return None if not inner else inner[0] if len(inner) == 1 else inner
    leaves = [leaf.strip() for leaf in content.split(SEPARATOR)]
    leaves = [leaf[1:-2] if leaf in categories and leaf.endswith("/>") else leaf for leaf in leaves]
    return leaves[0] if len(leaves) == 1 else leaves
