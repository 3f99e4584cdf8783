"""SigLIP 2 at native resolution (NaFlex): each image at its own aspect ratio, in the layout of
transformers' `Siglip2Model`.

An image becomes as many whole patches as the folder's image processor allows (`max_num_patches`:
256 in the published folders; the models saw 128 to 1024). transformers' Siglip2Processor takes 256
whatever the folder says, unless told otherwise at each call; ours takes the folder's number, and
`with_size` of the processor's `pixel_spec` gives another, which is saved with the model. Texts are
lower-cased, end with `<eos>` and always have 64 tokens, mostly pads; the state at the last one
stands for the text. The text tower sees no attention mask unless the folder's
text tokenizer gives one, as transformers' class does when its folder says nothing
(`model_input_names`). The fixed-size SigLIP 2 are of SigLIP's layout: see `vlm.systems.siglip`.

Source: arXiv 2502.14786; google-research/big_vision; transformers, `siglip2`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vlm.families.contrastive.model import ContrastiveModel
from vlm.families.contrastive.module import SIGMOID_BIAS, SIGMOID_SCALE, Contrastive
from vlm.families.published_files import Reference
from vlm.pixels import HALF, PixelSpec, from_transformers
from vlm.pixels.spec import box_of_patches
from vlm.pooling import OwnPool
from vlm.systems.published import KeyMap
from vlm.systems.published_contrastive import load_published, save_published
from vlm.systems.siglip import TOWERS, VOCABULARY_2
from vlm.text.encoders import TextEncoder, build_backbone, plain_config
from vlm.tokenizers import naflex

SOURCE = "arXiv 2502.14786; google/siglip2-{base,so400m}-patch16-naflex on the hub"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A published size, in the words of transformers' configurations.

    vision, text: of the towers. max_patches: of an image.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    max_patches: int


_VISION = {
    "model_type": "siglip2_vision_model",
    "patch_size": 16,
    "num_patches": 256,
    "vision_use_head": True,
}
"""`num_patches` is the size of the position table, 16 x 16, whatever an image's own."""
_TEXT = {
    "model_type": "siglip2_text_model",
    "vocab_size": VOCABULARY_2,
    "max_position_embeddings": 64,
}


def _size(tower: str) -> Size:
    return Size(vision=_VISION | TOWERS[tower], text=_TEXT | TOWERS[tower], max_patches=256)


SIZES = {
    "siglip2-base-patch16-naflex": _size("base"),
    "siglip2-so400m-patch16-naflex": _size("so400m"),
}
"""Published sizes, named as on the hub; each has as many parameters as google's model of the same
towers for squares of 256 pixels, whose position table is as large.
Source: transformers, `convert_siglip2_to_hf.py`; preprocessor_config.json of google/{name}."""


def build(size: str) -> Contrastive:
    """A published size with random weights; under `torch.device("meta")`, shapes alone.

    Raises ValueError naming the sizes.
    """
    if size not in SIZES:
        raise ValueError(f"SigLIP 2 NaFlex size {size!r} is not one of {', '.join(SIZES)}")
    sizes = SIZES[size]
    patch_px = sizes.vision["patch_size"]
    spec = PixelSpec(
        size_hw=box_of_patches(sizes.max_patches, patch_px),
        fit="patches",
        patch_px=patch_px,
        resample="bilinear",
        mean=HALF.mean,
        std=HALF.std,
    )
    return compose(sizes.vision, sizes.text, spec).eval()


def compose(
    vision: dict[str, Any], text: dict[str, Any], pixel_spec: PixelSpec, *, masked: bool = False
) -> Contrastive:
    """SigLIP 2's architecture at native resolution, with random weights.

    vision, text: configurations of transformers' two towers, which end in one width.
    masked: whether the text tower is told which tokens are padding; the published one is not.
    """
    tokenizer = naflex.build(
        naflex.NaflexConfig(
            vision_config=vision, layer=-1, norm=True, pooled=True, pixel_spec=pixel_spec
        )
    )
    return Contrastive(
        tokenizer,
        OwnPool(),
        nn.Identity(),
        TextEncoder(build_backbone(text), "own", masked=masked),
        nn.Identity(),
        scale=SIGMOID_SCALE,
        bias=SIGMOID_BIAS,
    )


def load(folder: Path, values: dict[str, Any]) -> ContrastiveModel:
    """The model in a folder of transformers' layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit; for weights, every key at once.
    """
    return load_published(
        folder,
        "siglip2",
        KEY_MAP,
        UNUSED,
        lambda config, reader: compose(
            plain_config(config.vision_config),
            plain_config(config.text_config),
            from_transformers(reader.image_processor),
            masked="attention_mask" in reader.tokenizer.model_input_names,
        ),
        pad_to_length=True,
    )


def save(model: ContrastiveModel, folder: Path) -> None:
    """Writes transformers' layout: the files of the folder that the model came from, with the
    weights, and the number of patches that an image may become, as they are now.

    Raises ValueError for weights and preprocessing that the layout cannot represent.
    """
    max_patches = model.processor.pixel_spec.max_patches
    if max_patches is not None:
        model = replace(model, reference=_with_max_patches(model.reference, max_patches))
    save_published(model, folder, KEY_MAP, scalar_shape=(1,))


def _with_max_patches(reference: Reference, max_patches: int) -> Reference:
    """The files, those of the image processor saying `max_patches`."""
    files = dict(reference.files)
    for name in {"processor_config.json", "preprocessor_config.json"} & files.keys():
        values = json.loads(files[name])
        settings = values if name.startswith("pre") else values.get("image_processor")
        if settings is not None and settings.get("max_num_patches") != max_patches:
            settings["max_num_patches"] = max_patches
            files[name] = (json.dumps(values, indent=2) + "\n").encode()
    return replace(reference, files=files)


UNUSED = ("text_model.embeddings.position_ids",)
"""0, 1, 2, ..., which older folders may hold."""

KEY_MAP: KeyMap = [
    ("vision_model.", "tokenizer.backbone."),
    ("text_model.", "text.backbone."),
    ("logit_scale", "log_scale"),
    ("logit_bias", "bias"),
]
"""(published prefix, our prefix), read in both directions."""
