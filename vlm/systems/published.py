"""What published systems share: weight names in two columns, and how their folders are written.

A system's KEY_MAP is a list of (published prefix, our prefix). Where several published prefixes
stand for one of ours (names changed between versions of a library), all are read, and the first
is written.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

from vlm.families.contrastive.processor import PairProcessor
from vlm.families.decoder_only.chat_template import SLOT, Template
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.processor import Processor
from vlm.found_weights import without_prefix
from vlm.merge import plain_state
from vlm.pixels import PixelSpec
from vlm.tokenizers.transformers import BOOKKEEPING
from vlm.weights import WeightsError, save_weights

KeyMap = Sequence[tuple[str, str]]


def architecture(config: PreTrainedConfig) -> dict[str, Any]:
    """A part's configuration as values, without those that describe no architecture."""
    return {k: v for k, v in config.to_dict().items() if k not in BOOKKEEPING}


def listed_stop_ids(folder: Path, processor: Processor) -> tuple[int, ...]:
    """The end token, and what the folder's generation_config.json names beside it; ids that are no
    special tokens are skipped, since classes write their own defaults there."""
    named: Any = []
    if (folder / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(folder).eos_token_id or []
    named = named if isinstance(named, list) else [named]
    special = processor.text_tokenizer.all_special_ids
    return tuple(dict.fromkeys([processor.end_id, *(id for id in named if id in special)]))


def listed_banned_ids(folder: Path, processor: Processor, *marks: str) -> tuple[int, ...]:
    """Ids that no answer holds: the image mark, and `marks`, where they are tokens; and what the
    folder's generation_config.json bans: ids to suppress, and bad words of one id each."""
    vocabulary = processor.text_tokenizer.get_added_vocab()
    ids = [vocabulary[mark] for mark in (processor.image_mark, *marks) if mark in vocabulary]
    if (folder / "generation_config.json").is_file():
        said = GenerationConfig.from_pretrained(folder)
        ids += [word[0] for word in said.bad_words_ids or () if len(word) == 1]
        ids += said.suppress_tokens or ()
    return tuple(dict.fromkeys(ids))


def write_config(config: dict[str, Any], dtype: torch.dtype, folder: Path) -> None:
    """Writes a published config.json, which says the dtype of its weights wherever it said one."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in {"dtype", "torch_dtype"} & part.keys():
            part[name] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_grown_tokenizer(text_tokenizer, folder: Path) -> None:
    """Writes the tokenizer anew where tokens were added to the published one in `folder`; else its
    own files stay as they were."""
    if AutoTokenizer.from_pretrained(folder).get_vocab() == text_tokenizer.get_vocab():
        return
    text_tokenizer = copy.deepcopy(text_tokenizer)
    text_tokenizer.chat_template = None  # ours is for plain text; the folder's stays
    text_tokenizer.save_pretrained(folder)


def read_json(path: Path) -> dict[str, Any]:
    """What a file of a folder holds; empty where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def use_published_template(text_tokenizer, folder: Path, image_mark: str) -> Template:
    """Gives a text tokenizer the folder's chat template, for contents in parts, and says how it is
    used. It marks images as `Processor` asks for: a text that spells `image_mark` stays text. Where
    it ends no answer, the token that ends texts does.

    Raises ValueError where the folder has no template, or one that writes no image mark.
    """
    template = text_tokenizer.chat_template
    if not template:
        template = read_json(folder / "chat_template.json").get("chat_template")
    if not template or image_mark not in template:
        raise ValueError(
            f"{folder}: expected a chat template that writes {image_mark} for an image, in "
            f"chat_template.jinja, chat_template.json or tokenizer_config.json, found "
            f"{'one that does not' if template else 'none'}"
        )
    text_tokenizer.chat_template = template.replace(image_mark, SLOT)
    probe = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "?"), ("assistant", PROBE_ANSWER))
    ]
    text = text_tokenizer.apply_chat_template(probe, tokenize=False)
    after = text.rpartition(PROBE_ANSWER)[2]
    ends = any(token in after for token in text_tokenizer.all_special_tokens)
    begins = text_tokenizer.convert_ids_to_tokens(text_tokenizer("")["input_ids"])
    return Template(
        parts=True,
        answer_end="" if ends else text_tokenizer.eos_token,
        special_tokens=bool(begins) and not text.startswith(begins[0]),
    )


PROBE_ANSWER = "\ue5c4"
"""A private-use character, which no template writes."""


def save_decoder_only(
    model: DecoderOnlyModel, folder: Path, key_map: KeyMap, text_key: str = "text_config"
) -> None:
    """Writes a decoder-only model in its published layout: the files of the folder that it came
    from, with what has changed since (weights, dtype, vocabulary, whether the head is tied).

    text_key: of the language model's part of config.json, which may be the whole, as in folders of
        before transformers 4.52.
    Raises ValueError for weights that the layout cannot represent, before anything is written.
    """
    module, reference = model.module, model.reference
    for key in plain_state(module):
        published_name(key, key_map)
    reference.write(folder)
    config, text_config = reference.config, module.text.config
    text_values = config.get(text_key, config)
    tied = text_config.tie_word_embeddings
    config["tie_word_embeddings"] = text_values["tie_word_embeddings"] = tied
    text_values["vocab_size"] = text_config.vocab_size
    write_config(config, next(module.text.parameters()).dtype, folder)
    write_grown_tokenizer(model.processor.text_tokenizer, folder)
    name = partial(published_name, key_map=key_map)
    save_weights(module, folder, name, beside=reference.unused)


def require_rows(text_tokenizer, rows: int, where: str) -> None:
    """Raises ValueError where the text tokenizer gives ids beyond the language model's table, as
    some of transformers' processors do to a folder that lacks their tokens: they add them. The
    image's mark, whose id no table needs, may be beyond."""
    mark = getattr(text_tokenizer, "image_token_id", None)
    beyond = {t: id for t, id in text_tokenizer.get_vocab().items() if id >= rows and id != mark}
    if beyond:
        token, id = max(beyond.items(), key=lambda item: item[1])
        raise ValueError(
            f"{where}: expected ids below {rows}, the rows of the embedding table, found "
            f"{len(beyond)} tokens beyond, such as {token} ({id})"
        )


def require_unchanged(processor: PairProcessor, pixel_spec: PixelSpec, length: int) -> None:
    """Raises ValueError naming every setting of a processor that is not what the files of a
    published layout say: `pixel_spec` for images; for texts `length` tokens at most, with the
    text tokenizer's own capitals and end."""
    text = {"length": length, "lower_case": False, "end_id": None}
    expected = _pixel_settings(pixel_spec) | text
    found = _pixel_settings(processor.pixel_spec) | {k: getattr(processor, k) for k in text}
    wrong = [
        f"processor.{key}: expected {expected.get(key)!r}, found {found.get(key)!r}"
        for key in expected | found
        if expected.get(key) != found.get(key)
    ]
    if wrong:
        raise ValueError(
            "preprocessing that was changed cannot be represented in the Hugging Face format: "
            f"{'; '.join(wrong)}"
        )


def _pixel_settings(spec: PixelSpec) -> dict[str, Any]:
    """The fields of a specification by name; of a box of patches, only their number counts."""
    values = {f"pixel_spec.{key}": value for key, value in asdict(spec).items()}
    if getattr(spec, "max_patches", None) is not None:
        del values["pixel_spec.size_hw"]
        values["pixel_spec.max_patches"] = spec.max_patches
    return values


def published_name(key: str, key_map: KeyMap) -> str:
    """What one of our weights is called in the published layout.

    Raises ValueError for a weight that the layout cannot represent (a LoRA that is not merged).

    >>> published_name("adaptor.out.bias", [("model.aligner.proj.", "adaptor.out.")])
    'model.aligner.proj.bias'
    """
    for published, ours in key_map:
        if key.startswith(ours):
            return published + key.removeprefix(ours)
    raise ValueError(
        f"{key} cannot be represented in the Hugging Face format, which has "
        f"{[ours for _, ours in key_map]}"
    )


def first_names(
    state: Mapping[str, Tensor], key_map: KeyMap, unused: Iterable[str], where: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A published state under the first of the names that the map has for each weight: what the
    model uses, and what it does not.

    unused: prefixes of weights that are known and that the model has not.
    A prefix before all of the names is taken off, see `vlm.found_weights`. Keys that the map does
    not know stay as they are. Raises WeightsError where two keys are one.
    """
    prefixes = tuple(published for published, _ in key_map)
    if not all(key.startswith(prefixes) for key in state):
        state = without_prefix(state, lambda key: key.startswith(prefixes), where)
    first: dict[str, str] = {}
    for published, ours in key_map:
        first.setdefault(ours, published)
    found: dict[str, str] = {}
    left: set[str] = set()
    for key in state:
        fitting = [pair for pair in key_map if key.startswith(pair[0])]
        name = key
        if fitting:
            published, ours = max(fitting, key=lambda pair: len(pair[0]))
            name = first[ours] + key.removeprefix(published)
        if name in found:
            raise WeightsError(f"{where}: {found[name]} and {key} are the same weight")
        found[name] = key
        if any(key.startswith(prefix) for prefix in unused):
            left.add(name)
    named = {name: state[key] for name, key in found.items()}
    used = {name: tensor for name, tensor in named.items() if name not in left}
    return used, {name: tensor for name, tensor in named.items() if name in left}
