"""What CLIP, SigLIP and SigLIP 2 in transformers' layout share: folders opened and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoProcessor

from vlm.families.contrastive.layout import OWN_SCALARS, ContrastiveModel, in_float32
from vlm.families.contrastive.module import Contrastive
from vlm.families.contrastive.processor import PairProcessor
from vlm.families.published_files import open_part, read_reference
from vlm.merge import plain_state
from vlm.pixels import from_transformers
from vlm.systems.published import KeyMap, first_names, published_name, require_unchanged
from vlm.text.encoders import TextEncoder
from vlm.weights import load_weights, read_weights, save_weights


def load_published(
    folder: Path,
    model_type: str,
    key_map: KeyMap,
    unused: tuple[str, ...],
    compose: Callable[[Any, Any], Contrastive],
    *,
    pad_to_length: bool,
) -> ContrastiveModel:
    """The model in a folder of transformers' layout.

    compose: the module, its weights still to come, from the folder's configuration and processor.
    pad_to_length: whether texts always have the trained length.
    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    where = str(folder)
    values, reader = open_part(AutoConfig, folder), open_part(AutoProcessor, folder)
    state, kept = first_names(read_weights(folder), key_map, unused, where)
    with init_empty_weights(include_buffers=False):
        module = compose(values, reader)
    state = in_float32(state, ("logit_scale", "logit_bias"))
    load_weights(module, state, where, lambda key: published_name(key, key_map))
    processor = PairProcessor(
        reader.tokenizer,
        module.tokenizer.pixel_spec,
        length=values.text_config.max_position_embeddings,
        pad_to_length=pad_to_length,
    )
    require_end(module.text, processor, where)
    return ContrastiveModel(
        module=module.eval(),
        processor=processor,
        reference=read_reference(folder, model_type, kept),
    )


def save_published(
    model: ContrastiveModel, folder: Path, key_map: KeyMap, scalar_shape: tuple[int, ...]
) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with its
    weights and their dtype as they are now.

    scalar_shape: of the published scale and bias.
    Raises ValueError for what the layout cannot represent, before anything is written.
    """
    module = model.module
    with TemporaryDirectory() as written:  # what will be read from these files
        model.reference.write(Path(written))
        values, reader = (open_part(part, Path(written)) for part in (AutoConfig, AutoProcessor))
    require_unchanged(
        model.processor,
        from_transformers(reader.image_processor),
        values.text_config.max_position_embeddings,
    )
    root = nn.Module()  # our module's parts beside scalars of the published shape
    for name, part in module.named_children():
        root.add_module(name, part)
    for name in OWN_SCALARS:
        if getattr(module, name) is not None:
            value = getattr(module, name).detach().reshape(scalar_shape)
            root.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for key in plain_state(root):
        published_name(key, key_map)
    model.reference.write(folder)
    values = model.reference.config
    dtype = str(next(module.text.parameters()).dtype).removeprefix("torch.")
    for part in (values, *(value for value in values.values() if isinstance(value, dict))):
        for name in {"dtype", "torch_dtype"} & part.keys():
            part[name] = dtype
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    name = partial(published_name, key_map=key_map)
    save_weights(root, folder, name, beside=model.reference.unused)


def require_end(text: TextEncoder, processor: PairProcessor, where: str) -> None:
    """Raises ValueError where the text encoder looks for an end id that the text tokenizer never
    writes: every text would be read at its first position."""
    end_id = text.end_id
    (row,), _ = processor.rows(["a"])
    if end_id is not None and end_id not in row:
        raise ValueError(
            f"{where}: the text model reads a text at its end id {end_id} (text_config."
            f"eos_token_id), but the text tokenizer ends texts with {row[-1]}"
        )
