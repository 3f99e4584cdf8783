"""Published systems, one file each, and the one way to open and write a model's folder."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.families.registry import FAMILIES, SYSTEMS

if TYPE_CHECKING:
    from torch import nn

    from vlm.families.base import Model
    from vlm.families.contrastive.model import ContrastiveModel
    from vlm.families.decoder_only.model import DecoderOnlyModel

DTYPES = ("auto", "stored", "float32", "bfloat16", "float16")
CONFIGS = ("config.json", "open_clip_config.json")
"""Configurations that a folder may hold; where it has both, the first is read."""


def load(source: str | Path, device: str = "auto", dtype: str = "auto") -> Model:
    """The model in a folder or under a hub id, ready to use.

    source: a model's folder, a run folder of a recipe (its `model/` is taken), a hub id, or a file
        of weights that another tool wrote, see `vlm.systems.weights_file`.
    device: "auto" takes a GPU where there is one. dtype: "auto" takes the text model's own for all
        parts, 16 bits only where the device multiplies faster in them, else float32; weights that
        are stored in float32 stay so. "stored" leaves each part as it was saved, to train on; else
        "float32", "bfloat16" or "float16", with a warning where the device is slow in it.
    Raises ValueError naming the folder and what was expected, or the device that is not here;
    OSError for an unknown hub id.
    """
    device = _device(device)
    _require_dtype(dtype)
    model = _of_file(source)
    if model is None:
        folder = _folder(source)
        path = _config(folder)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        kind = _kind(values, path, folder)
        name = _native(values, path) if kind == "vlm" else SYSTEMS[kind].module
        model = import_module(name).load(folder, values)
    compute_in(model.module, dtype, device)
    model.module.to(device)
    return model


def published_caption_prompt(source: str | Path) -> str:
    """What a model in a published layout asks for a caption with, by its configuration alone: its
    weights are not read. source: a folder or hub id that `load` takes.

    Raises what `load` raises for one without a configuration of a known system.
    """
    from vlm.families.decoder_only.model import CAPTION_PROMPT

    path = _config(_folder(source)) if Path(source).exists() else _hub_config(source)
    kind = _kind(json.loads(path.read_text(encoding="utf-8")), path, source)
    return getattr(import_module(SYSTEMS[kind].module), "CAPTION_PROMPT", CAPTION_PROMPT)


def build(*, dtype: str = "auto", **settings) -> DecoderOnlyModel:
    """A model composed of pretrained parts and a fresh adaptor, on the CPU; dtype is that of
    `load`, the other settings are those of `vlm.systems.compose.build`."""
    from vlm.systems import compose

    model = compose.build(**settings)
    compute_in(model.module, dtype, "cpu")
    return model


def compute_in(module: nn.Module, dtype: str, device: str) -> None:
    """Casts a model, in place, to what it is to compute in on a device; `dtype` is that of
    `vlm.load`. Warns where a dtype is asked for that the device is slow in.

    Raises ValueError for another dtype.
    """
    import torch

    from vlm.precision import FASTER, speed_ratio
    from vlm.weights import cast_parameters

    _require_dtype(dtype)
    if dtype == "stored":
        return
    chosen = _own_dtype(module) if dtype == "auto" else getattr(torch, dtype)
    if chosen in (torch.bfloat16, torch.float16):
        ratio, reason = speed_ratio(device, chosen)
        if dtype == "auto" and ratio <= FASTER:
            chosen = torch.float32
        elif ratio == 0:
            raise ValueError(
                f"dtype {dtype!r}: the device does not compute in it ({reason}); "
                "take auto or float32"
            )
        elif ratio < 1:
            warnings.warn(
                f"dtype {dtype!r}: this device multiplies {1 / ratio:.3g} times as fast in float32 "
                f"({reason}); dtype 'auto' takes that",
                stacklevel=3,
            )
    cast_parameters(module, chosen)


def _require_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, found {dtype!r}")


def _own_dtype(module):
    """What a model computes in that was saved in several dtypes, as a run saves its fp32 masters
    beside parts that were frozen in bf16: the language model's, or the wider of two towers'."""
    from vlm.weights import castable

    if "text" in module.through:
        return next(module.text.parameters()).dtype
    return max((p.dtype for p in castable(module)), key=lambda dtype: dtype.itemsize)


def _device(name: str) -> str:
    """The device that `name` asks for, "auto" resolved. Raises ValueError where there is none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        here = not torch.empty(0, device=name).is_meta  # which would lose the weights
        reason = "it holds no values"
    except (RuntimeError, AssertionError) as error:  # each build of torch has its own
        here, reason = False, str(error).strip().splitlines()[0].partition(". ")[0]
    if not here:
        raise ValueError(
            f"device {name!r}: expected auto, cpu or a device of this machine ({reason[:100]})"
        )
    return name


def _kind(values: dict, where: str | Path, source: str | Path) -> str:
    """Which of SYSTEMS a configuration speaks of. Raises ValueError naming what it found.

    where: what messages call the configuration. source: the folder or hub id that it lies in.
    """
    kind = values.get("format") or values.get("model_type")
    if kind is None and "model_cfg" in values:
        kind = "open_clip"
    if kind == "vision-encoder-decoder":  # one class of transformers for both
        swin = values.get("encoder", {}).get("model_type") == "donut-swin"
        kind = "donut" if swin else "trocr"
    if kind not in SYSTEMS:
        _refuse_tower(kind, where, source)
        near = difflib.get_close_matches(str(kind), SYSTEMS, n=1)
        nearest = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(
            f"{where}: model type {kind!r} is not one of {', '.join(SYSTEMS)} (see `vlm systems`)"
            f"{nearest}"
        )
    if kind == "qwen" and "visual" not in values:
        raise ValueError(
            f"{where}: expected Qwen-VL, found a text-only Qwen (model type 'qwen' without "
            "`visual`), which is no vision-language model"
        )
    return kind


def _refuse_tower(kind: str | None, where: str | Path, source: str | Path) -> None:
    """Raises ValueError for the configuration of one tower alone, with what it can serve as."""
    from vlm.text import encoders as text_encoders
    from vlm.tokenizers import naflex
    from vlm.tokenizers.encoders import ENCODERS

    image_tokenizers = dict.fromkeys(ENCODERS, "transformers") | {naflex.MODEL_TYPE: "naflex"}
    if kind in image_tokenizers:
        raise ValueError(
            f"{where}: expected a whole model, found {kind!r}, a tower for images alone, without "
            f"one for texts; it can serve as an image tokenizer: {image_tokenizers[kind]}:{source}"
        )
    if kind in text_encoders.TOWERS:
        raise ValueError(
            f"{where}: expected a whole model, found {kind!r}, a tower for texts alone, without "
            "one for images"
        )


def _native(values: dict, where: Path) -> str:
    """The module that reads a config.json of our own layout. Raises ValueError for an unknown
    family."""
    family = values.get("family")
    if family not in FAMILIES:
        raise ValueError(f"{where}: family {family!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[family].layout


def _config(folder: Path) -> Path | None:
    """The configuration that a folder holds; None where it has none."""
    return next((folder / name for name in CONFIGS if (folder / name).is_file()), None)


def _shipped(source: str | Path) -> Path | None:
    """The folder of a model that comes with the package, where `source` is its name."""
    from vlm.families.line_reader import layout as line_reader

    if str(source) != line_reader.NAME:
        return None
    if not line_reader.SHIPPED.is_dir():
        raise ValueError(
            f"{line_reader.NAME}: expected it in {line_reader.SHIPPED}, found none: this vlm comes "
            "without a reader; train one with recipes/line_reader.py and name its run"
        )
    return line_reader.SHIPPED


def _of_file(source: str | Path) -> ContrastiveModel | None:
    """The model in a file of weights that says, or whose surroundings say, what it is; None for a
    source of another kind, and for a file beside its configuration."""
    if not is_file(source):
        return None
    from vlm.systems import weights_file

    file = weights_file.file_of(source)
    if file is None:
        return None
    if file.model is None and (file.path.parent / CONFIGS[0]).is_file():
        if file.state is not None:
            raise ValueError(
                f"{source}: ?state= chooses among weights of CLIP and SigLIP alone; save those "
                f"that are meant in a file of their own beside {CONFIGS[0]}"
            )
        return None
    return weights_file.load(file)


def is_file(source: str | Path) -> bool:
    """Whether a source names a file of weights, alone or with options after "?", or the folder of
    an open_clip training; what is no path at all is none."""
    path = Path(str(source).rpartition("?")[0] or source)
    try:
        return path.is_file() or ((path / "params.txt").is_file() and not _config(path))
    except OSError:  # longer than a path may be
        return False


def _beside(file: Path) -> Path:
    """The folder of a file of weights that lies beside its configuration. Raises ValueError where
    other weights lie there too, which would be taken, or the file holds none."""
    from vlm.found_weights import SUFFIXES

    weights = [p.name for p in file.parent.iterdir() if p.suffix in SUFFIXES]
    if file.name != "model.safetensors" and weights != [file.name]:
        raise ValueError(
            f"{file}: expected the only weights beside {_config(file.parent).name}, found "
            f"{sorted(weights)[:8]}; copy both into a folder of their own, or name the folder"
        )
    return file.parent


def _folder(source: str | Path) -> Path:
    """The folder that holds a configuration: `source`, its `model/`, or a hub snapshot."""
    folder = _shipped(source) or Path(source)
    if folder.is_file():
        return _beside(folder)
    for candidate in (folder, folder / "model"):
        if _config(candidate):
            return candidate
    if folder.exists():
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise ValueError(
            f"{folder}: expected config.json here or in model/, found {found}; "
            "a run writes model/ when it ends"
        )
    from huggingface_hub import snapshot_download

    _hub_config(source)  # small: is it one of ours at all?
    others = ["*.pt", "*.msgpack"]
    with _hub_errors(source):
        folder = Path(snapshot_download(str(source), ignore_patterns=[*others, "*.bin"]))
        if any(folder.glob("*.safetensors")):
            return folder
        return Path(snapshot_download(str(source), ignore_patterns=others))


def _hub_config(source: str | Path) -> Path:
    """The configuration under a hub id, fetched alone. Raises ValueError where it speaks of no
    known system, OSError where there is none, and at once for what is a mistyped path."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    _require_hub_id(source)
    with _hub_errors(source):
        try:
            path = hf_hub_download(str(source), CONFIGS[0])
        except EntryNotFoundError:
            path = hf_hub_download(str(source), CONFIGS[1])
    _kind(json.loads(Path(path).read_text()), f"{source} on the hub", source)
    return Path(path)


def _require_hub_id(source: str | Path) -> None:
    """Raises OSError for a source that is not here and reads as a path, so that the hub is not
    asked for it: one that ends as files do, or lies in a folder that is here."""
    from vlm.found_weights import SUFFIXES

    path = Path(source)
    within = path.parent != Path() and path.parent.is_dir()
    if not within and path.suffix not in (*SUFFIXES, ".json"):
        return
    reason = f"{path.parent} is a folder here" if within else f"it ends in {path.suffix}"
    here = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, here, n=1)
    nearest = f"; the nearest is {path.parent / near[0]}" if near else ""
    raise OSError(
        f"{source}: no such folder or file, and no hub id ORG/NAME, since {reason}{nearest}"
    )


@contextmanager
def _hub_errors(source: str | Path) -> Iterator[None]:
    """Raises OSError naming the source where the hub does not give it."""
    from huggingface_hub.utils import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise OSError(f"{source}: no such folder, and no hub id") from error
    except ValueError:
        raise
    except Exception as error:  # the client raises kinds of its transport, which change
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"{source}: no such folder, and the hub did not give it ({reason}); "
            "without a network name a folder"
        ) from error
