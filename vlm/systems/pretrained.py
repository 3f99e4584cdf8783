"""Pretrained parts by name: image tokenizers, language models and their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vlm import assets, config, systems, tokenizers
from vlm.image_tokens import ImageTokenizer
from vlm.merge import Made, plain_state
from vlm.weights import load_weights

DEMO = "demo"
LAYER_OPTION = {
    "timm": "level",
    "transformers": "layer",
    "open_clip": "layer",
    "naflex": "layer",
    "torchvision": None,
}
"""Kinds of image tokenizer with pretrained weights -> what each calls its layer; None where it
gives its last features alone, and pools nothing."""


def load_vision(
    name: str,
    size_hw: tuple[int, int] | None = None,
    layer: int = -1,
    *,
    prefix: str = "drop",
    pooled: bool = False,
) -> ImageTokenizer:
    """A pretrained image tokenizer: "demo", "kind:id", or the folder of a model or run of any
    family (or a file of weights that `vlm.load` opens), whose image tokenizer is taken as it was
    trained.

    size_hw: pixels that images are brought to; None keeps the backbone's own.
    layer: -1 the backbone's final features, its closing norm included, and of a folder those that
        it was trained for; other numbers an earlier block or level as it is (-2 is what LLaVA takes
        of CLIP).
    prefix: "drop" or "keep" tokens before the grid; pooled: whether it pools a vector too. The
        demo has neither; decoder families want patch tokens alone.
    Raises OSError or FetchError where weights cannot be had, ValueError for what a folder's image
    tokenizer cannot do.
    """
    if name == DEMO:
        return _demo_vision(size_hw, layer)
    if Path(name).is_dir() or systems.is_file(name):
        return _vision_of(name, size_hw, layer, prefix, pooled)
    kind = name.partition(":")[0]
    if kind not in LAYER_OPTION:
        raise ValueError(
            f"vision {name!r}: expected 'demo', the folder of a model or run, or 'kind:id' with a "
            f"kind of {', '.join(LAYER_OPTION)}"
        )
    options: dict[str, Any] = {"prefix": prefix}
    if LAYER_OPTION[kind] is not None:
        options |= {"pooled": pooled, "norm": layer == -1, LAYER_OPTION[kind]: layer}
    elif pooled or layer != -1:
        raise ValueError(
            f"vision {name!r}: a {kind} tokenizer gives its last features and no pooled vector, "
            f"expected layer -1 and pooled=False, found {layer} and {pooled}"
        )
    if size_hw is not None:
        options["size_hw"] = size_hw
    return tokenizers.load(name, **options)


def _vision_of(
    folder: str, size_hw: tuple[int, int] | None, layer: int, prefix: str, pooled: bool
) -> ImageTokenizer:
    """The image tokenizer, weights and all, of a model of any family; what is not asked of it, such
    as the pooling of a contrastive one, is left behind."""
    trained = systems.load(folder, device="cpu", dtype="stored").module.tokenizer
    values = tokenizers.config_to_dict(trained)
    kind = values["kind"]
    if pooled and not values.get("pooled"):
        raise ValueError(
            f"vision {folder!r}: a pooled vector is asked of an image tokenizer that was saved "
            "without one"
        )
    asked = {"prefix": prefix, "pooled": pooled}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if key in values}
    if layer != -1:
        if LAYER_OPTION.get(kind) is None:
            raise ValueError(
                f"vision {folder!r}: expected the last layer of a {kind} tokenizer, found layer "
                f"{layer}"
            )
        changes |= {LAYER_OPTION[kind]: layer, "norm": False}
    if size_hw is not None and size_hw != trained.pixel_spec.size_hw:
        changes |= _resized(trained, values, size_hw, folder)
    with init_empty_weights(include_buffers=False):
        tokenizer = tokenizers.build(values | changes)
    state = plain_state(trained)
    kept = {key: state[key] for key in tokenizer.state_dict() if key in state}
    made = {key: t.make() if isinstance(t, Made) else t for key, t in kept.items()}
    load_weights(tokenizer, made, where=folder)
    return tokenizer.eval()


def _resized(
    trained: ImageTokenizer, values: dict[str, Any], size_hw: tuple[int, int], folder: str
) -> dict[str, Any]:
    """What changes in a tokenizer's configuration `values` for pixels of another size; positions
    that timm's backbones make for one size are resized in `trained`, in place."""
    if values["kind"] not in ("timm", "transformers", "naflex", "torchvision"):
        raise ValueError(
            f"vision {folder!r}: a {values['kind']} tokenizer keeps its size, expected "
            f"{trained.pixel_spec.size_hw} pixels, found {size_hw}"
        )
    changes = {"pixel_spec": config.to_dict(trained.pixel_spec.with_size(size_hw))}
    if values["kind"] == "timm" and hasattr(trained.backbone, "set_input_size"):
        trained.backbone.set_input_size(img_size=size_hw)
        changes["model_args"] = values["model_args"] | {"img_size": size_hw}
    return changes


def _demo_vision(size_hw: tuple[int, int] | None, layer: int) -> ImageTokenizer:
    """tf_efficientnet_lite0 with ImageNet weights, at 128 pixels: a grid of 4 x 4, which pixel
    shuffle halves. Statistics as its authors trained it (mean 127, standard deviation 128 of
    255)."""
    from vlm.pixels import PixelSpec
    from vlm.tokenizers import timm

    folder = assets.fetch("efficientnet-lite0")
    spec = PixelSpec(
        size_hw=size_hw or (128, 128),
        fit="stretch",
        resample="bicubic",
        backend="pil",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )
    tokenizer = timm.build(
        timm.TimmConfig(
            name="tf_efficientnet_lite0",
            model_args={},
            level=layer,
            prefix="drop",
            norm=layer == -1,
            pooled=False,
            pixel_spec=spec,
        )
    )
    weights = load_file(folder / "model.safetensors")
    own = tokenizer.state_dict()
    taken = {k: weights[k.removeprefix("backbone.")] for k in own if "batches_tracked" not in k}
    counters = {k: t for k, t in own.items() if "batches_tracked" in k}
    load_weights(tokenizer, taken | counters, where=str(folder))
    return tokenizer.eval()


def load_text(name: str) -> torch.nn.Module:
    """A causal language model with its weights in their stored dtype: "demo", a hub id or folder.

    Raises OSError naming the id where it cannot be had. Remote code is never run.
    """
    source = assets.fetch("smollm2-135m-instruct") if name == DEMO else name
    return _from_pretrained(AutoModelForCausalLM, source, dtype="auto")


def load_text_tokenizer(name: str):
    """The tokenizer that belongs to `load_text(name)`."""
    source = assets.fetch("smollm2-135m-instruct") if name == DEMO else name
    return _from_pretrained(AutoTokenizer, source)


def _from_pretrained(loader, source: str | Path, **options):
    try:
        return loader.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"text {str(source)!r}: {loader.__name__} finds no causal language model in a "
            f"folder of this name, and the hub did not give one ({reason}); without a network "
            "name a folder, or 'demo'"
        ) from error
