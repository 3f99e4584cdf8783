"""The public cross-attention tower: what a decoder-only model does, images seen beside the text."""

from __future__ import annotations

from dataclasses import dataclass

from vlm.families.cross_attended.module import CrossAttended
from vlm.families.decoder_only.model import DecoderOnlyModel


@dataclass(kw_only=True, eq=False)
class CrossAttendedModel(DecoderOnlyModel):
    """A model of the cross-attended family. Its rows hold one position for each image, so that they
    are as long as their text, whatever the images' sizes."""

    module: CrossAttended
