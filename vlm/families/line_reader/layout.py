"""The line reader: columns of a line, and the character that each of them shows. Our own system.

A folder holds config.json (`format` "vlm", `family` "line_reader", the image tokenizer, the
characters, the temperatures of confidences) and model.safetensors; the one that is shipped lies in
the package, with a card of what it was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm import tokenizers
from vlm.families import native_layout
from vlm.families.line_reader.model import LineReaderModel
from vlm.families.line_reader.module import LineReader
from vlm.families.line_reader.processor import LineProcessor
from vlm.metrics.calibration import UNFITTED, Temperatures
from vlm.tokenizers.columns import ColumnsConfig, ColumnsTokenizer, line_spec
from vlm.weights import load_weights, read_weights, save_weights

SOURCE = "our own"
NAME = "line-reader"
"""What `vlm.load` calls the reader that is shipped."""
SHIPPED = Path(__file__).resolve().parents[2] / "data" / "line_reader"


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """What config.json says, besides `format` and `version`."""

    family: str
    tokenizer: dict[str, Any]
    characters: str
    temperatures: Temperatures = UNFITTED


def build(
    characters: str,
    *,
    height_px: int = 32,
    channels: tuple[int, int] = (32, 64),
    blocks: tuple[int, int] = (2, 2),
    width: int = 192,
    layers: int = 6,
    seed: int = 0,
) -> LineReaderModel:
    """A fresh reader of `characters`; the other arguments are those of `ColumnsConfig`.

    seed: of its weights; the global generator is left as it is.
    """
    sizes = ColumnsConfig(
        channels=channels,
        blocks=blocks,
        width=width,
        layers=layers,
        pixel_spec=line_spec(height_px),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = ColumnsTokenizer(sizes)
        module = LineReader(tokenizer, nn.Linear(width, len(characters) + 1))
    return LineReaderModel(
        module=module.eval(), processor=LineProcessor(sizes.pixel_spec, characters)
    )


def with_characters(model: LineReaderModel, characters: str, seed: int = 0) -> LineReaderModel:
    """The same reader for other characters: those that it knows keep what it has learned, new ones
    are fresh. A new script keeps every stroke that the old one taught."""
    if characters == model.processor.characters:
        return model
    old_head, old = model.module.head, model.processor.characters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(old_head.in_features, len(characters) + 1)
    ids = {c: i for i, c in enumerate(old, start=1)}
    kept = [(0, 0)] + [(i, ids[c]) for i, c in enumerate(characters, 1) if c in ids]
    new, known = (torch.tensor(column) for column in zip(*kept))
    with torch.no_grad():
        head.weight[new] = old_head.weight.float()[known]
        head.bias[new] = old_head.bias.float()[known]
    head = head.to(old_head.weight.device, old_head.weight.dtype)
    return LineReaderModel(
        module=LineReader(model.module.tokenizer, head).train(model.module.training),
        processor=LineProcessor(model.processor.pixel_spec, characters),
    )


def save(model: LineReaderModel, folder: Path, merge: bool = True) -> None:
    """Writes our own layout; see the module's docstring. merge: there is no LoRA to keep."""
    description = Folder(
        family=model.module.family,
        tokenizer=tokenizers.config_to_dict(model.module.tokenizer),
        characters=model.processor.characters,
        temperatures=model.temperatures,
    )
    save_weights(model.module, folder)
    native_layout.write_description(description, folder)


def load(folder: Path, values: dict[str, Any]) -> LineReaderModel:
    """The reader in a folder of our own layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit.
    """
    said = native_layout.read_description(Folder, folder, values)

    def make() -> LineReader:
        tokenizer = tokenizers.build(said.tokenizer)
        return LineReader(tokenizer, nn.Linear(tokenizer.dim, len(said.characters) + 1))

    module = native_layout.empty(make, folder, lora={})
    load_weights(module, read_weights(folder), where=str(folder))
    return LineReaderModel(
        module=module.eval(),
        processor=LineProcessor(module.tokenizer.pixel_spec, said.characters),
        temperatures=said.temperatures,
    )
