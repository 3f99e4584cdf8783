"""Which model vectors came from, so that vectors of different models are never compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm import pooling, tokenizers
from vlm.families.contrastive.model import ContrastiveModel
from vlm.families.contrastive.module import Contrastive
from vlm.families.contrastive.processor import PairProcessor
from vlm.text import encoders as text_encoders

DIGITS = 16
"""Hexadecimal digits of a digest."""
PROBES = ("a photo of a cat", "TWO  Red\tshapes: 3.5%, l'été, 猫と犬 🙂", "word " * 600)
"""Texts whose ids stand for what a text tokenizer does: characters of all kinds, blanks, and more
than any context holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """A model as far as its vectors depend on it.

    model: where it was opened: the full path of a folder or file, or a hub id. dtype: as `vlm.load`
    was told. weights, settings, preprocessing: digests, of the bits of every weight and
    buffer, of what the parts compute with them, and of what is done to images and texts. dim: the
    width of its vectors.
    """

    model: str
    dtype: str
    weights: str
    settings: str
    preprocessing: str
    dim: int

    def agrees(self, other: Fingerprint) -> bool:
        """Whether vectors of the two can be compared: where a model lies plays no part."""
        return replace(other, model=self.model, dtype=self.dtype) == self

    def __str__(self) -> str:
        return (
            f"{self.model} (width {self.dim}, weights {self.weights}, settings {self.settings}, "
            f"preprocessing {self.preprocessing}, dtype {self.dtype})"
        )


def fingerprint_of(model: ContrastiveModel, source: str | Path, dtype: str = "auto") -> Fingerprint:
    """What identifies a model that `vlm.load(source, dtype=dtype)` gave."""
    return Fingerprint(
        model=_full_path(str(source)),
        dtype=dtype,
        weights=_weights(model.module),
        settings=_settings(model.module),
        preprocessing=_preprocessing(model.processor),
        dim=model.module.dim,
    )


def _full_path(source: str) -> str:
    """A source in full: the path of a folder or file, options after "?" kept."""
    if Path(source).exists():
        return str(Path(source).resolve())
    path, mark, options = source.rpartition("?")
    return f"{Path(path).resolve()}?{options}" if mark and Path(path).exists() else source


def _weights(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:DIGITS]


def _settings(module: Contrastive) -> str:
    """What decides the vectors beside the tensors: activations, epsilons, the layer that is read,
    poolings. Pixels are told by the preprocessing."""
    values = {
        "tokenizer": tokenizers.config_to_dict(module.tokenizer),
        "pool": pooling.config_of(module.pool),
        "text": text_encoders.config_of(module.text),
    }
    values["tokenizer"].pop("pixel_spec", None)
    if any(".lora_" in name for name, _ in module.named_parameters()):
        from vlm.lora import lora_of  # here, since peft is slow to import

        values["lora"] = lora_of(module)
    return _digest(values)


def _preprocessing(processor: PairProcessor) -> str:
    """The text side by what it does, as tokenizers write themselves down in ways that change from
    one version of their library to the next."""
    ids, _ = processor.pad(processor.rows(PROBES)[0])
    values = {"pixels": asdict(processor.pixel_spec), "length": processor.length}
    values |= {"ids": ids.tolist()}
    return _digest(values)


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
