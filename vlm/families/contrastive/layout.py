"""Any image tokenizer with any text encoder, trained contrastively: our own composition and layout.

A folder holds config.json (`format` "vlm", `family` "contrastive", parts, text lengths),
model.safetensors and `text_tokenizer/`; of a model that came from a published system, also that
folder's small files, in `reference/`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlm import config, pooling, tokenizers
from vlm.families import native_layout
from vlm.families.contrastive.model import ContrastiveModel
from vlm.families.contrastive.module import Contrastive
from vlm.families.contrastive.processor import PairProcessor
from vlm.image_tokens import ImageTokenizer
from vlm.pixels import PixelSpec
from vlm.text import encoders as text_encoders
from vlm.weights import load_weights, read_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A linear layer between a tower's vector and the shared space."""

    in_width: int
    out_width: int
    bias: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder(native_layout.Folder):
    """What config.json says of a contrastive model.

    The tokenizer's has the preprocessing of images. pool: a configuration with its `kind`.
    image_head, text_head: None where the tower's vector has the shared width already.
    bias: whether cosines get a bias (sigmoid loss).
    length, pad_to_length, lower_case, end_id: the text side of `PairProcessor`.
    """

    pool: dict[str, Any]
    image_head: Head | None
    text_head: Head | None
    bias: bool
    length: int
    pad_to_length: bool
    lower_case: bool = False
    end_id: int | None = None


def save(model: ContrastiveModel, folder: Path, merge: bool = True) -> None:
    """Writes our own layout; see the module's docstring. merge: whether LoRA is merged into the
    weights that are written, or kept as layers of its own.

    Raises ValueError, before anything is written, for what the layout cannot represent.
    """
    module, processor = model.module, model.processor
    description = Folder(
        family=module.family,
        tokenizer=_tokenizer_config(module.tokenizer, processor.pixel_spec),
        pool=pooling.config_of(module.pool),
        image_head=_head_config(module.image_head, "image_head"),
        text=text_encoders.config_of(module.text),
        text_head=_head_config(module.text_head, "text_head"),
        bias=module.bias is not None,
        length=processor.length,
        pad_to_length=processor.pad_to_length,
        lower_case=processor.lower_case,
        end_id=processor.end_id,
    )
    native_layout.write(model, description, folder, merge)


def load(folder: Path, values: dict[str, Any]) -> ContrastiveModel:
    """The model in a folder of our own layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit.
    """
    said = native_layout.read_description(Folder, folder, values)

    def make() -> Contrastive:
        return Contrastive(
            tokenizers.build(said.tokenizer),
            pooling.build(said.pool),
            _head(said.image_head),
            text_encoders.build(said.text),
            _head(said.text_head),
            scale=1.0,
            bias=0.0 if said.bias else None,
        )

    module = native_layout.empty(make, folder, said.lora)
    load_weights(module, in_float32(read_weights(folder), OWN_SCALARS), where=str(folder))
    processor = PairProcessor(
        native_layout.read_text_tokenizer(folder),
        module.tokenizer.pixel_spec,
        length=said.length,
        pad_to_length=said.pad_to_length,
        lower_case=said.lower_case,
        end_id=said.end_id,
    )
    return ContrastiveModel(
        module=module.eval(),
        processor=processor,
        reference=native_layout.read_origin(folder, said.reference),
    )


def _tokenizer_config(tokenizer: ImageTokenizer, spec: PixelSpec) -> dict[str, Any]:
    """The configuration of an image tokenizer with the preprocessing `spec`, which may have been
    changed since the tokenizer was made. Raises ValueError where it cannot be the tokenizer's."""
    values = tokenizers.config_to_dict(tokenizer)
    if spec == tokenizer.pixel_spec:
        return values
    if "pixel_spec" not in values:
        raise ValueError(
            f"processor.pixel_spec: a {values['kind']} tokenizer has that of its parts, expected "
            f"{tokenizer.pixel_spec}, found {spec}"
        )
    replace(tokenizer.config, pixel_spec=spec)  # whether they go together
    return values | {"pixel_spec": config.to_dict(spec)}


def _head(head: Head | None) -> nn.Module:
    if head is None:
        return nn.Identity()
    return nn.Linear(head.in_width, head.out_width, bias=head.bias)


def _head_config(head: nn.Module, name: str) -> Head | None:
    if isinstance(head, nn.Identity):
        return None
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{name}: our layout holds nn.Linear and nn.Identity, found {type(head).__name__}"
        )
    return Head(in_width=head.in_features, out_width=head.out_features, bias=head.bias is not None)


OWN_SCALARS = ("log_scale", "bias")


def in_float32(state: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """A state in which the named tensors, where they are there, are scalars in float32: published
    files hold shapes () and (1,), and any dtype."""
    scalars = {
        name: state[name].float().reshape(())
        for name in names
        if name in state and state[name].numel() == 1
    }
    return state | scalars
