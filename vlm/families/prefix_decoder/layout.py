"""Our own folder layout of prefix decoders: what it holds is that of decoder-only models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.families.decoder_only import layout
from vlm.families.decoder_only.layout import save
from vlm.families.prefix_decoder.model import PrefixDecoderModel
from vlm.families.prefix_decoder.module import PrefixDecoder

__all__ = ["load", "save"]


def load(folder: Path, values: dict[str, Any]) -> PrefixDecoderModel:
    """The model in a folder of our own layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit.
    """
    return layout.load_as(PrefixDecoder, folder, values)
