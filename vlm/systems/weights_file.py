"""A model out of one file of weights, as training tools and OpenAI write them: what the file does
not say is found beside it.

A file is named as it is, or with options after "?": `epoch_3.pt?model=ViT-B-32&state=ema`. What
its weights belong to is told, in this order, by

- `model`: a name of open_clip's (`open_clip.list_models()`);
- open_clip_config.json in its folder (what lies beside a config.json is read by its own system);
- params.txt, which open_clip's training writes above its `checkpoints/`;
- OpenAI's archive itself, or names and widths that are those of OpenAI's CLIP.

Everything else is refused with what to do. Averaged weights are taken where `state` names them.

Source: open_clip 3.3, `open_clip_train/main.py` and `factory.py`; github.com/openai/CLIP,
`build_model`.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor

from vlm.families.contrastive.model import ContrastiveModel
from vlm.found_weights import WeightsError, open_file, weights_in, without_prefix
from vlm.systems import clip
from vlm.systems.open_clip import layout as open_clip_layout
from vlm.torchscript import is_torchscript

OPTIONS = ("model", "state")
PARAMS = "params.txt"
EPOCH = re.compile(r"epoch_(\d+)\.pt")
TRAINING = {"epoch", "name", "state_dict"}
"""What open_clip's training puts into a checkpoint, beside its optimizer."""
PREPROCESSING = {
    "image_mean": "mean",
    "image_std": "std",
    "image_interpolation": "interpolation",
    "image_resize_mode": "resize_mode",
}
"""Settings of open_clip's training -> keys of preprocess_cfg."""
FORCED = {"force_image_size": "vision_cfg.image_size", "force_context_length":
          "text_cfg.context_length"}  # fmt: skip
"""Settings of open_clip's training -> what they change in model_cfg."""
WIDTHS = {
    (size.vision["hidden_size"], size.text["hidden_size"], size.width)
    for size in clip.SIZES.values()
}
"""Of the image tower, the text tower and the shared space of OpenAI's CLIPs: heads of 64 each."""
OPENAI_NAMES = ("visual.conv1.weight", "visual.proj", "visual.positional_embedding",
                "text_projection", "positional_embedding", "token_embedding.weight",
                "ln_final.weight")  # fmt: skip
WAYS = (
    "name open_clip's architecture, as in FILE?model=ViT-B-32; or put the file, alone, beside the "
    "config.json or open_clip_config.json of its model"
)


class File(NamedTuple):
    """A file of weights with the options that were named after it; None where one was not."""

    path: Path
    model: str | None
    state: str | None


def file_of(source: str | Path) -> File | None:
    """The file that a source names, or the newest of an open_clip training's folder; None for
    every other source.

    Raises ValueError for options that there are not, or after something else than a file.
    """
    path = Path(source)
    if path.is_dir():
        return _newest(path)
    if path.is_file():
        return File(path, None, None)
    name, mark, said = str(source).rpartition("?")
    if not mark or not Path(name).exists():
        return None
    options = dict(pair.partition("=")[::2] for pair in said.split("&"))
    if set(options) - set(OPTIONS) or not all(options.values()):
        raise ValueError(f"{source}: expected ?model=NAME, ?state=KEY or both, found {said!r}")
    if Path(name).is_dir() and (newest := _newest(Path(name))):
        name = newest.path
    if not Path(name).is_file():
        raise ValueError(f"{name}: options go after a file of weights, found a folder")
    return File(Path(name), options.get("model"), options.get("state"))


def _newest(folder: Path) -> File | None:
    """The last checkpoint of an open_clip training; None for another folder, also one of a training
    that has written none yet. epoch_latest.pt, where it is, was written last."""
    if not (folder / PARAMS).is_file():
        return None
    there = {int(EPOCH.fullmatch(p.name)[1]): p for p in folder.glob("checkpoints/epoch_*.pt")
             if EPOCH.fullmatch(p.name)}  # fmt: skip
    latest = folder / "checkpoints" / "epoch_latest.pt"
    if latest.is_file():
        return File(latest, None, None)
    return File(there[max(there)], None, None) if there else None


def load(file: File) -> ContrastiveModel:
    """The model in a file that is CLIP's or SigLIP's, its dtypes as stored.

    Raises ValueError naming the file, what was found and what to do.
    """
    path = file.path
    config = path.parent / open_clip_layout.CONFIG
    params = None if config.is_file() else _params(path)
    found = open_file(path)
    state = weights_in(found, path, file.state)
    said: str | Path = path
    if file.model is not None or params is not None:
        values = _values(path, file.model, params or {})
        said = file.model or (params or {})[PARAMS]
    elif config.is_file():
        values, said = json.loads(config.read_text(encoding="utf-8")), config
    else:
        if isinstance(found, Mapping) and found.keys() >= TRAINING:
            raise WeightsError(
                f"{path}: written by open_clip's training, and no {PARAMS} lies beside it or above "
                f"its folder; {WAYS}"
            )
        state = without_prefix(state, OPENAI_NAMES.__contains__, str(path))
        values = _openai_values(state, path)
    return open_clip_layout.assemble(values, lambda: state, path.parent, said, str(path), hub=True)


def _params(path: Path) -> dict[str, Any] | None:
    """What open_clip's training was told that wrote a checkpoint, and under "params.txt" where it
    stands; None for other files."""
    for folder in (path.absolute().parent, path.absolute().parent.parent):
        if (folder / PARAMS).is_file():
            pairs = (line.partition(": ") for line in (folder / PARAMS).read_text().splitlines())
            return {PARAMS: str(folder / PARAMS)} | {k: _value(text) for k, _, text in pairs}
    return None


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a name or a path
        return text


def _values(path: Path, model: str | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip_config.json would hold, of an architecture's name and of what the training
    was told."""
    where = params.get(PARAMS, path)
    name = str(model or params.get("model", "")).replace("/", "-")
    model_cfg = open_clip.get_model_config(name) if ":" not in name else None
    if model_cfg is None:
        raise ValueError(
            f"{where}: model {name!r} is no architecture of open_clip's (open_clip.list_models() "
            f"has all); {WAYS}"
        )
    pretrained = params.get("pretrained") or ""
    quick = model_cfg.get("quick_gelu", False)
    if model is None and pretrained == "openai" and not (quick or params.get("force_quick_gelu")):
        raise ValueError(
            f"{where}: trained from {name}, pretrained openai: open_clip before 3.0 took QuickGELU "
            f"there, later ones GELU; say {path}?model={name}-quickgelu or {path}?model={name}"
        )
    if params.get("force_quick_gelu"):
        model_cfg["quick_gelu"] = True
    if params.get("force_custom_text"):
        model_cfg["custom_text"] = True
    if params.get("siglip"):
        model_cfg["init_logit_bias"] = -10
    for setting, key in FORCED.items():
        if params.get(setting) is not None:
            part, _, leaf = key.partition(".")
            size = params[setting]
            alike = isinstance(size, (list, tuple)) and len(set(size)) == 1
            model_cfg[part][leaf] = size[0] if alike else size
    known = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    preprocess = {key: (known or {}).get(key) for key in PREPROCESSING.values()}
    for setting, key in PREPROCESSING.items():
        if params.get(setting) is not None:
            preprocess[key] = params[setting]
    return {
        "model_cfg": model_cfg,
        "preprocess_cfg": {k: v for k, v in preprocess.items() if v is not None},
    }


def _openai_values(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """What open_clip_config.json would hold of OpenAI's CLIP, by the shapes of its weights.

    Raises WeightsError where the weights do not show what they belong to.
    """
    missing = [key for key in OPENAI_NAMES if key not in state]
    if missing:
        raise WeightsError(
            f"{path}: weights without a configuration, named {sorted(state)[:3]} and so on; {WAYS}"
        )
    vision, text = state["visual.conv1.weight"], state["token_embedding.weight"]
    width = state["text_projection"].shape[1]
    layers = [
        len({key.split(".")[at] for key in state if key.startswith(f"{start}resblocks.")})
        for start, at in (("visual.transformer.", 3), ("transformer.", 2))
    ]
    patches = len(state["visual.positional_embedding"]) - 1
    widths = (vision.shape[0], text.shape[1], width)
    if widths not in WIDTHS:
        raise WeightsError(
            f"{path}: widths {widths} are of none of OpenAI's CLIPs ({sorted(WIDTHS)}), so that "
            f"its heads are not known; {WAYS}"
        )
    own = is_torchscript(path) or len({t.dtype for t in state.values()} & HALVES) == 2
    if not own:
        warnings.warn(
            f"{path}: opened as OpenAI's CLIP, with QuickGELU; if it was trained with open_clip's "
            f"GELU say {path}?model=NAME, such as ViT-B-32",
            stacklevel=2,
        )
    patch_px = vision.shape[-1]
    return {
        "model_cfg": {
            "embed_dim": width,
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": round(patches**0.5) * patch_px,
                "layers": layers[0],
                "width": widths[0],
                "patch_size": patch_px,
            },
            "text_cfg": {
                "context_length": len(state["positional_embedding"]),
                "vocab_size": text.shape[0],
                "width": widths[1],
                "heads": widths[1] // 64,
                "layers": layers[1],
            },
        },
        "preprocess_cfg": {},
    }


HALVES = {torch.float16, torch.float32}
"""The two that OpenAI's own weights are in, and hardly any other tool's."""
