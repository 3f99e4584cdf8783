"""CLIP and SigLIP in open_clip's own layout: folders and weights.

A folder holds open_clip_config.json (`model_cfg` and `preprocess_cfg`), the weights in
open_clip_model.safetensors (older folders: open_clip_pytorch_model.bin) and the files of a text
tokenizer; open_clip opens it as "local-dir:/path". Read and written are

- CLIP: open_clip's vision transformer with a class token and its causal text transformer, at the
  root of the weights or, with `custom_text`, under "text.";
- SigLIP: a trunk of timm pooled by attention ("map"), and the text transformer without a mask,
  pooled at its last position.

`vlm.systems.open_clip.config` says what is refused. What differs from the same systems in
transformers stays as the folder says: open_clip's SigLIP 1 computes exact GELU where the authors'
code and transformers take the tanh form (of its SigLIP 2 the text towers have the tanh form, of
the trunks only the giant one), and CLIP's text is pooled at its largest id.

Source: open_clip 3.3, `factory.py`, `push_to_hf_hub.py`, `transform.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from vlm.families.contrastive.layout import OWN_SCALARS, ContrastiveModel, in_float32
from vlm.families.contrastive.module import Contrastive
from vlm.families.contrastive.processor import PairProcessor
from vlm.families.published_files import read_reference
from vlm.found_weights import misfit, read_file, without_prefix
from vlm.merge import Made, plain_state
from vlm.pixels import PixelSpec, from_open_clip
from vlm.pooling import OwnPool
from vlm.systems import clip, siglip
from vlm.systems.open_clip.config import (
    LARGEST_ID,
    clip_model_cfg,
    reference_config,
    siglip_model_cfg,
    system_of,
    unfit,
)
from vlm.systems.open_clip.key_map import MAPS, SAME, Row, expand
from vlm.systems.open_clip.text_tokenizer import clip_tokenizer, folder_tokenizer
from vlm.systems.published_contrastive import require_end
from vlm.weights import WeightsError, load_weights, other_weights, require_disk_space, save_file

SOURCE = "open_clip 3.3; github.com/mlfoundations/open_clip"

MODEL_TYPE = "open_clip"
CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
OLD_WEIGHTS = "open_clip_pytorch_model.bin"
UNUSED = ("attn_mask", "input_resolution", "context_length", "vocab_size")
"""Ends of names that OpenAI's archives hold beside the weights: sizes, and the causal mask."""


def load(folder: Path, values: Mapping[str, Any]) -> ContrastiveModel:
    """The model in a folder of open_clip's layout; `values` is what its open_clip_config.json
    holds.

    Raises ValueError naming the file and what does not fit, for weights every key at once;
    OSError where the text tokenizer's files are missing.
    """
    model = assemble(values, lambda: _read(folder), folder, folder / CONFIG, str(folder))
    return replace(model, reference=read_reference(folder, MODEL_TYPE))


def assemble(
    values: Mapping[str, Any],
    read: Callable[[], Mapping[str, Tensor]],
    folder: Path,
    said: str | Path,
    where: str,
    *,
    hub: bool = False,
) -> ContrastiveModel:
    """The model of a configuration as open_clip_config.json holds it, and of weights by open_clip's
    names.

    read: gives the weights, once the configuration is known to fit. folder: where the text
    tokenizer's files may lie; hub: whether they are fetched where they do not. said, where: what
    the configuration and the weights are called in messages.
    Raises what `load` does.
    """
    model_cfg = values.get("model_cfg")
    if not isinstance(model_cfg, dict):
        raise ValueError(f"{said}: expected model_cfg, found {sorted(values)}")
    try:
        config = reference_config(model_cfg)
        text_tokenizer = folder_tokenizer(folder, model_cfg, hub=hub)
        pixel_spec = _pixel_spec(values, config)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from error
    with init_empty_weights(include_buffers=False):
        module = _compose(config, pixel_spec, model_cfg)
    names = published_shapes(model_cfg)
    state = without_prefix(read(), names.__contains__, where)
    state = {key: t for key, t in state.items() if not key.endswith(UNUSED)}
    state = in_float32(to_ours(state, model_cfg, where), OWN_SCALARS)
    load_weights(module, state, where)
    processor = PairProcessor(
        text_tokenizer,
        pixel_spec,
        length=config["text_config"]["max_position_embeddings"],
        # open_clip always pads; CLIP's own tokenizer pads with what its pooling passes by.
        pad_to_length=bool(model_cfg["text_cfg"].get("hf_tokenizer_name")),
    )
    require_end(module.text, processor, where)
    return ContrastiveModel(module=module.eval(), processor=processor)


def save(model: ContrastiveModel, folder: Path) -> None:
    """Writes open_clip's layout, for a CLIP or SigLIP of any origin: a model that came from such a
    folder keeps its files, but for preprocessing that was changed since.

    open_clip resizes images with Pillow; a model whose preprocessing resizes with torchvision
    gets the same settings, and a grey level or two of difference.
    Raises ValueError naming what open_clip cannot represent, before anything is written.
    """
    module, reference = model.module, model.reference
    kept = reference is not None and reference.model_type == MODEL_TYPE
    if kept:
        values = json.loads(reference.files[CONFIG])
    else:
        model_cfg = _model_cfg(module, model.processor, folder.resolve().name)
        preprocess_cfg = open_clip_preprocessing(model.processor.pixel_spec)
        values = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    written = _with_preprocessing(values, model.processor)
    state = {
        key: tensor.make() if isinstance(tensor, Made) else tensor
        for key, tensor in plain_state(module).items()
    }
    state = {key: t.contiguous() for key, t in to_open_clip(state, values["model_cfg"]).items()}
    require_disk_space(folder, sum(t.numel() * t.element_size() for t in state.values()))
    folder.mkdir(parents=True, exist_ok=True)
    if kept:
        reference.write(folder)
    else:
        model.processor.text_tokenizer.save_pretrained(folder)
    if not kept or written != values:
        (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
    save_file(state, folder / WEIGHTS, {"format": "pt"})


def _compose(
    config: Mapping[str, Any], pixel_spec: PixelSpec, model_cfg: Mapping[str, Any]
) -> Contrastive:
    """The architecture of a model_cfg, with transformers' towers."""
    vision, text = config["vision_config"], config["text_config"]
    if system_of(model_cfg) == "siglip":
        module = siglip.compose(vision, text, pixel_spec)
    else:
        module = clip.compose(vision, text, config["projection_dim"], pixel_spec)
    biased = model_cfg.get("init_logit_bias") is not None
    module.register_parameter("bias", nn.Parameter(torch.zeros(())) if biased else None)
    return module


def _read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by open_clip's names. Raises WeightsError naming the file."""
    for name in (WEIGHTS, OLD_WEIGHTS):
        if (folder / name).is_file():
            return read_file(folder / name)
    other = other_weights(folder)
    if other is not None:
        return read_file(other)
    found = sorted(path.name for path in folder.iterdir())
    raise WeightsError(f"{folder / WEIGHTS}: expected a safetensors file, found {found}")


def _model_cfg(module: Contrastive, processor: PairProcessor, name: str) -> dict[str, Any]:
    """open_clip's model_cfg of a module that came from elsewhere. name: of its text tokenizer."""
    vision = getattr(module.tokenizer.config, "vision_config", {})
    text = module.text.config.text_config
    kinds = (vision.get("model_type"), text["model_type"])
    if kinds == ("clip_vision_model", "clip_text_model"):
        end_id = module.text.config.end_id
        text = text | {"eos_token_id": LARGEST_ID if end_id is None else end_id}
        model_cfg = clip_model_cfg(
            {"projection_dim": module.dim, "vision_config": vision, "text_config": text}
        )
    elif kinds == ("siglip_vision_model", "siglip_text_model"):
        model_cfg = siglip_model_cfg({"vision_config": vision, "text_config": text})
    else:
        raise unfit("layout 'open_clip'", "the two towers of CLIP or of SigLIP", kinds)
    if not isinstance(module.pool, OwnPool):
        raise unfit("pool", "own", type(module.pool).__name__)
    model_cfg.pop("init_logit_bias", None)
    if module.bias is not None:
        model_cfg["init_logit_bias"] = module.bias.item()
    if processor.text_tokenizer.get_vocab() != clip_tokenizer().get_vocab():
        # Any name makes open_clip read the folder's own files.
        model_cfg["text_cfg"] |= {
            "hf_tokenizer_name": name,
            "tokenizer_kwargs": {"clean": "whitespace"},
        }
    return model_cfg


def _pixel_spec(values: Mapping[str, Any], config: Mapping[str, Any]) -> PixelSpec:
    """What open_clip does to images, which takes the image tower's size whatever a file says.

    values: of open_clip_config.json. config: what `reference_config` gives for its model_cfg.
    """
    given = {k: v for k, v in values.get("preprocess_cfg", {}).items() if v is not None}
    return from_open_clip(given | {"size": config["vision_config"]["image_size"]})


def _with_preprocessing(values: Mapping[str, Any], processor: PairProcessor) -> dict[str, Any]:
    """The values of open_clip_config.json, changed where they say other preprocessing than the
    processor's. Raises ValueError naming what open_clip cannot express."""
    values = deepcopy(dict(values))
    config, spec = reference_config(values["model_cfg"]), processor.pixel_spec
    said = _pixel_spec(values, config)
    context = config["text_config"]["max_position_embeddings"]
    for key, expected, found, whose in (
        ("pixel_spec.size_hw", said.size_hw, spec.size_hw, "the image tower's"),
        ("processor.length", context, processor.length, "the text tower's"),
        ("processor.end_id", None, processor.end_id, "the text tokenizer's own end"),
    ):
        if found != expected:
            raise unfit(key, f"{expected}, {whose}", found)
    wanted = open_clip_preprocessing(spec)
    if wanted != open_clip_preprocessing(said):
        values["preprocess_cfg"] = values.get("preprocess_cfg", {}) | wanted
    text = values["model_cfg"]["text_cfg"]
    clean = (text.get("tokenizer_kwargs") or {}).get("clean", "whitespace")
    # CLIP's own tokenizer and every other cleaning lower texts anyway.
    if processor.lower_case and text.get("hf_tokenizer_name") and clean == "whitespace":
        text["tokenizer_kwargs"] = {"clean": "lower"}
    return values


def open_clip_preprocessing(spec: PixelSpec) -> dict[str, Any]:
    """open_clip's preprocess_cfg of a PixelSpec, apart from who resizes and how halves of a pixel
    fall. Raises ValueError naming the field that open_clip cannot express.
    """
    modes = {"crop": "shortest", "stretch": "squash", "pad": "longest"}
    colour = spec.pad_rgb or (0, 0, 0)
    values = {
        "size": list(spec.size_hw),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.resample,
        "resize_mode": modes[spec.fit],
        "fill_color": colour[0],
    }
    again = from_open_clip(values)
    fields = ["size_hw", "fit", "resample", "mean", "std", "anchor"]
    fields += ["pad_rgb"] if spec.fit == "pad" else []
    pairs = {field: (getattr(again, field), getattr(spec, field)) for field in fields}
    pairs["resize_hw"] = (spec.size_hw, spec.resize_hw or spec.size_hw)
    for field, (expected, found) in pairs.items():
        if expected != found:
            raise unfit(f"pixel_spec.{field}", repr(expected), found)
    return values


def to_ours(
    state: Mapping[str, Tensor], model_cfg: Mapping[str, Any], where: str = "open_clip"
) -> dict[str, Tensor]:
    """An open_clip model's weights under the names of our `Contrastive`, values unchanged.

    where: names the source in messages.
    Raises ValueError for a model_cfg that cannot be represented; WeightsError counting the keys
    that are missing, unused or misshapen.
    """
    rows = _rows(model_cfg)
    _check(state, published_shapes(model_cfg), f"{where}: the weights")
    ours: dict[str, Tensor] = {}
    for row in rows:
        ours |= zip(row.ours, row.kind.read([state[key] for key in row.published]))
    return ours | {key: ours[key].reshape(()) for key in ("log_scale", "bias") if key in ours}


def to_open_clip(state: Mapping[str, Tensor], model_cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of our `Contrastive` under open_clip's names, values unchanged.

    Raises ValueError for a model_cfg that cannot be represented; WeightsError counting the keys
    that are missing or unused, in our names, or misshapen, in open_clip's.
    """
    rows = _rows(model_cfg)
    names = {key for row in rows for key in row.ours}
    missing, unused = sorted(names - set(state)), sorted(set(state) - names)
    if missing or unused:
        raise misfit("the weights do not fit open_clip's layout", missing, unused)
    published: dict[str, Tensor] = {}
    for row in rows:
        published |= zip(row.published, row.kind.write([state[key] for key in row.ours]))
    shapes = published_shapes(model_cfg)
    _check(published, shapes, "the weights, in open_clip's names,")
    scalars = [key for key in ("logit_scale", "logit_bias") if key in published]
    return published | {key: published[key].reshape(shapes[key]) for key in scalars}


def published_shapes(model_cfg: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Name -> shape of every weight that open_clip's own class has; computes and fetches nothing.

    model_cfg: one that `clip_config` or `siglip_config` takes.
    """
    values = dict(model_cfg)
    custom = values.pop("custom_text", False)
    if values["vision_cfg"].get("timm_model_name"):
        values["vision_cfg"] = values["vision_cfg"] | {"timm_model_pretrained": False}
    with torch.device("meta"):
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**values)
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def _check(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], what: str) -> None:
    """Raises WeightsError listing all that does not fit. A scale may be of shape () or (1,)."""
    missing = [key for key in shapes if key not in state]
    unused = [key for key in state if key not in shapes]
    misshapen = [
        f"{key}: expected {tuple(shape)}, found {tuple(state[key].shape)}"
        for key, shape in shapes.items()
        if key in state
        and state[key].shape != shape
        and not (shape.numel() == state[key].numel() == 1)
    ]
    if missing or unused or misshapen:
        raise misfit(f"{what} do not fit the model_cfg", missing, unused, misshapen)


def _rows(model_cfg: Mapping[str, Any]) -> list[Row]:
    """The map of a model, every layer written out."""
    config = reference_config(model_cfg)
    vision, text = MAPS[system_of(model_cfg)]
    rows = expand(vision, config["vision_config"]["num_hidden_layers"])
    prefix = "text." if model_cfg.get("custom_text") else ""
    rows += expand(text, config["text_config"]["num_hidden_layers"], prefix)
    rows.append(Row(("logit_scale",), ("log_scale",), SAME))
    if model_cfg.get("init_logit_bias") is not None:
        rows.append(Row(("logit_bias",), ("bias",), SAME))
    return rows
