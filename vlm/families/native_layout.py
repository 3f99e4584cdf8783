"""Our own folder layout: what all families write and open in the same way.

config.json holds `format`, `version` and what the family says of itself, a frozen dataclass;
model.safetensors the weights; `text_tokenizer/` the text tokenizer, where there is one; and
`reference/` the small files of the published folder that a model came from, and what that folder
has of weights that the model has not, in unused.safetensors, where there is any.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoTokenizer

from vlm import config
from vlm.families.published_files import Reference, open_part, read_reference
from vlm.weights import read_tensors, save_file, save_weights

FORMAT = "vlm"
VERSION = 1
_REFERENCE, _TEXT_TOKENIZER = "reference", "text_tokenizer"
_UNUSED = "unused.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """What config.json says of any model with text, besides `format` and `version`.

    tokenizer: the image tokenizer's configuration, with its `kind`. text: the text model's own.
    reference: the published system that the model came from, whose files lie in `reference/`.
    lora: for each component with LoRA layers of its own what they are, see `vlm.lora`.
    """

    family: str
    tokenizer: dict[str, Any]
    text: dict[str, Any]
    reference: str | None = None
    lora: dict[str, dict[str, Any]] = field(default_factory=dict)


D = TypeVar("D")
M = TypeVar("M", bound=nn.Module)


def read_description(cls: type[D], folder: Path, values: dict[str, Any]) -> D:
    """What a folder says of its model, as a `cls`; `values` is what its config.json holds.

    Raises ValueError naming the file, for another version and for unknown or missing keys.
    """
    where = str(folder / "config.json")
    said = {key: value for key, value in values.items() if key not in ("format", "version")}
    version = values.get("version")
    if version != VERSION:
        raise ValueError(f"{where}: written as version {version}, this vlm reads {VERSION}")
    return config.from_dict(cls, said, where)


def write_description(description: Any, folder: Path) -> None:
    """Writes config.json."""
    values = {"format": FORMAT, "version": VERSION, **config.to_dict(description)}
    text = json.dumps(values, indent=2, default=str, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def empty(make: Callable[[], M], folder: Path, lora: dict[str, dict[str, Any]]) -> M:
    """The module that `make` gives, with the LoRA layers that the folder's description has, its
    weights still to come. Names of one tensor (a tied head) come apart: tie them again."""
    with init_empty_weights(include_buffers=False):
        module = make()
        if lora:
            from vlm.lora import add_lora_of  # here, since peft is slow to import

            add_lora_of(module, lora, f"{folder / 'config.json'}.lora")
    return module


def read_text_tokenizer(folder: Path) -> Any:
    """The folder's text tokenizer. Raises ValueError where it cannot be read."""
    return open_part(AutoTokenizer, folder / _TEXT_TOKENIZER)


def read_origin(folder: Path, name: str | None) -> Reference | None:
    """The published layout `name` that the folder's model came from; None for none."""
    if name is None:
        return None
    path = folder / _REFERENCE / _UNUSED
    unused = read_tensors(path) if path.is_file() else None
    return read_reference(folder / _REFERENCE, name, unused)


def write(model: Any, description: Folder, folder: Path, merge: bool) -> None:
    """Writes the whole folder of a model with text: its `module`, `processor` and `reference`.

    description: what the family says; where the model came from, and LoRA, are added to it.
    merge: whether LoRA is merged into the weights that are written.
    """
    save_weights(model.module, folder, merge=merge)
    if not merge:
        from vlm.lora import lora_of  # here, since peft is slow to import

        description = replace(description, lora=lora_of(model.module))
    if model.reference is not None:
        _write_origin(model.reference, folder / _REFERENCE)
        description = replace(description, reference=model.reference.model_type)
    model.processor.text_tokenizer.save_pretrained(folder / _TEXT_TOKENIZER)
    write_description(description, folder)


def _write_origin(reference: Reference, folder: Path) -> None:
    """Writes what is kept of the published folder that a model came from."""
    reference.write(folder)
    (folder / _UNUSED).unlink(missing_ok=True)
    if reference.unused:
        unused = {name: tensor.contiguous() for name, tensor in reference.unused.items()}
        save_file(unused, folder / _UNUSED, {"format": "pt"})
