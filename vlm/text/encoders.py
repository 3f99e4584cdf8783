"""Text encoders: a transformers text model and the choice of which of its states stands for a text.

Covers the text towers of CLIP, SigLIP and SigLIP 2, encoders like BERT, and the decoder of a causal
language model. The model's own forward runs.

Shapes: B example, T text position, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig

from vlm.compat.transformers import random_weights
from vlm.config import from_dict, to_dict
from vlm.tokenizers import cannot_load
from vlm.tokenizers.transformers import BOOKKEEPING, OFFLINE

POOLINGS = {
    "end": "the first position that holds `end_id` (CLIP)",
    "largest": "the first position of the row's largest id (CLIP folders that name a wrong end id)",
    "last": "the last position of the text; of the row, pads included, where nothing is masked",
    "class": "the first position (BERT)",
    "mean": "the mean of the text's positions; of the whole row where nothing is masked",
    "own": "the model's own pooled vector (SigLIP's last position and head, BERT's pooler)",
}
"""Name of a pooling -> which of the final states stands for the text."""

TOWERS = {
    "clip_text_model": "CLIPTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
}
"""`model_type` of the text half of a two-tower model -> its class; `AutoModel` knows the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """What rebuilds a `TextEncoder` without a download.

    text_config: the model's configuration, `model_type` included. The rest is `TextEncoder`'s.
    Raises ValueError for an unknown pooling, and for an end id that is missing or not used.
    """

    text_config: dict[str, Any]
    pooling: str
    masked: bool
    end_id: int | None = None

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling {self.pooling!r} is not one of {', '.join(POOLINGS)}")
        if (self.pooling == "end") != (self.end_id is not None):
            raise ValueError(
                "pooling 'end' needs an end_id, the others take none; found pooling "
                f"{self.pooling!r} and end_id {self.end_id}"
            )


class TextEncoder(nn.Module):
    """A text model with a pooling.

    Takes `backbone` over: a pooler that is not asked for is removed from it, so that training finds
    no parameter without a gradient.

    backbone: a finished text model of transformers whose output has `last_hidden_state`.
    pooling: one of `POOLINGS`. end_id: the id that "end" looks for; None for the others.
    masked: whether the model is told which positions are padding. False for CLIP (causal: no text
        position sees the pads after it) and for SigLIP, which attends its pads by design; True
        for encoders like BERT and for causal language models.
    Raises ValueError for a combination that does not exist.
    """

    def __init__(
        self, backbone: nn.Module, pooling: str, *, masked: bool, end_id: int | None = None
    ) -> None:
        super().__init__()
        self.pooling, self.masked, self.end_id = pooling, masked, end_id
        self.backbone = backbone
        _ = self.config  # whether these go together
        if pooling != "own" and isinstance(getattr(backbone, "pooler", None), nn.Module):
            backbone.pooler = None
        self.dim = backbone.config.hidden_size
        if pooling == "own":
            self.dim = getattr(backbone.config, "projection_size", None) or self.dim
        self._options = {"use_cache": False} if hasattr(backbone.config, "use_cache") else {}

    @property
    def config(self) -> TextEncoderConfig:
        """What rebuilds it, its vocabulary as it is now."""
        return TextEncoderConfig(
            text_config=plain_config(self.backbone.config),
            pooling=self.pooling,
            masked=self.masked,
            end_id=self.end_id,
        )

    def states(self, ids: Tensor, valid: Tensor) -> Tensor:
        """The final state of each position, float[B, T, D]; arguments as in `forward`."""
        return self._read(ids, valid).last_hidden_state

    def _read(self, ids: Tensor, valid: Tensor) -> Any:
        mask = {"attention_mask": valid.long()} if self.masked else {}
        return self.backbone(input_ids=ids, **mask, **self._options)

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        """The vector of each text, float[B, D].

        ids: int64[B, T]; valid: bool[B, T], False at padding, which lies after the text.
        Raises ValueError where "own" is asked of a model that pools nothing.
        """
        output = self._read(ids, valid)
        pooling = self.pooling
        if pooling == "own":
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                kind = type(self.backbone).__name__
                raise ValueError(f"pooling 'own': {kind} pools nothing; take another pooling")
            return pooled
        states = output.last_hidden_state
        if pooling == "class":
            return states[:, 0]
        if not self.masked:
            valid = torch.ones_like(valid)
        if pooling == "mean":
            weights = valid[:, :, None].to(states.dtype)
            return (states * weights).sum(1) / weights.sum(1)
        if pooling == "last":
            positions = (valid * torch.arange(ids.shape[1], device=ids.device)).argmax(1)
        elif pooling == "end":
            positions = (ids == self.end_id).int().argmax(1)
        else:
            positions = ids.argmax(1)
        return states[torch.arange(len(ids), device=ids.device), positions]

    def get_output_embeddings(self) -> None:
        """None: a text encoder has no output head that LoRA would have to leave alone."""


def plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as values, without those that describe no architecture."""
    return {key: value for key, value in config.to_dict().items() if key not in BOOKKEEPING}


def build_backbone(text_config: dict[str, Any]) -> nn.Module:
    """The text model of a configuration, `model_type` included, with random weights."""
    config = AutoConfig.for_model(**text_config)
    name = TOWERS.get(config.model_type)
    if name is None:
        return AutoModel.from_config(config)
    return random_weights(getattr(transformers, name), config, "sdpa")


def build(values: dict[str, Any]) -> TextEncoder:
    """A text encoder with random weights from its configuration. Downloads nothing.

    Raises ValueError for unknown or missing keys.
    """
    config = from_dict(TextEncoderConfig, values, where="text encoder")
    backbone = build_backbone(config.text_config)
    return TextEncoder(backbone, config.pooling, masked=config.masked, end_id=config.end_id)


def config_of(encoder: TextEncoder) -> dict[str, Any]:
    """The configuration of a text encoder: the inverse of `build`."""
    return to_dict(encoder.config)


def load(
    source: str | Path, pooling: str, *, masked: bool, end_id: int | None = None
) -> TextEncoder:
    """The text encoder with the weights of a hub id or local folder, in float32.

    A folder of a whole CLIP or SigLIP gives its text tower, one of a causal language model its
    decoder, without the head. The options are those of `TextEncoder`. Remote code is never run.
    Raises OSError where folder or hub give nothing, ValueError for weights that are missing.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type not in TOWERS and hasattr(config, "text_config"):
            config = config.text_config
        name = TOWERS.get(config.model_type)
        loader = AutoModel if name is None else getattr(transformers, name)
        backbone, report = loader.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load(str(source), "transformers", OFFLINE, error) from error
    encoder = TextEncoder(backbone.eval(), pooling, masked=masked, end_id=end_id)
    kept = {name for name, _ in encoder.backbone.named_parameters()}
    wrong = sorted(kept & {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if wrong:
        raise ValueError(f"{source}: the folder lacks these weights, or has other shapes: {wrong}")
    return encoder


def load_tokenizer(source: str | Path):
    """The tokenizer that belongs to `load(source)`. Raises OSError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load(str(source), "transformers", OFFLINE, error) from error
