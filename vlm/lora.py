"""LoRA on any component: low-rank layers, peft's, beside the frozen layers of a part.

It stands beside the systems, not with training: a folder may hold LoRA layers that training is to
go on with, and opening it makes them again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from vlm.compat.extras import needs
from vlm.compat.peft import ADAPTER, is_lora, mark_packed, settings_of
from vlm.compat.transformers import Conv1D
from vlm.config import from_dict, to_dict
from vlm.image_tokens import ImageTokenizer, meta_pixels, meta_twin

PROBE_HW = (256, 192)
"""Rows and columns of the image that shows which layers an image tokenizer calls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """LoRA of one component.

    rank: width of its layers. alpha: what they add is multiplied by alpha / rank. dropout: on
    their input, in training.
    targets: shell wildcards over the names of the component's layers ("*.q_proj"). None takes all
    linear layers, and in a net that has more convolutions than these its convolutions too
    (grouped ones and ones with padding of their own skipped); never an output head or an
    embedding.
    Source: arXiv 2106.09685.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, found {self.rank}")
        if self.alpha < 1:
            raise ValueError(f"alpha must be at least 1, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in 0 to 1, found {self.dropout}")


def add_lora(module: nn.Module, components: Mapping[str, Lora], *, seed: int = 0) -> None:
    """Puts LoRA layers beside layers of the named components, in place; the outputs stay.

    components: paths of components ("tokenizer", "adaptor", "text", or deeper: "tokenizer.low").
    seed: of the first weights; the global generator is left as it is.
    LoRA's parameters are named after their layer, "text.….q_proj.lora_A.default.weight", and the
    layer's own move under "….base_layer": a stage trains LoRA alone by the patterns
    ("text.*lora_*", rate), ("text.*", FROZEN). `Model.save` merges it, or keeps it.
    Raises ValueError, before anything is changed, for a path that leads nowhere, a component with
    LoRA already or without a layer that takes it, a pattern that matches none, and, by name, for
    weights that LoRA's layers cannot stand beside: these are never skipped in silence.
    """
    chosen = {path: _targets(module, path, lora) for path, lora in components.items()}
    _require_calls(module, [name for names in chosen.values() for name in names])
    overlap = [a for a in chosen for b in chosen if a != b and f"{a}.".startswith(f"{b}.")]
    if overlap:
        raise ValueError(f"components lie within others: {overlap}")
    for path, lora in components.items():
        component = module.get_submodule(path)
        names = [name.removeprefix(f"{path}.") for name in chosen[path]]
        settings = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules="|".join(re.escape(name) for name in names),
            fan_in_fan_out=all(isinstance(component.get_submodule(n), Conv1D) for n in names),
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(settings, component)
        for name in names:
            layer = component.get_submodule(name)
            layer.train(layer.base_layer.training)  # new modules start in training mode


def lora_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The LoRA of each component as JSON values, its layers by name; `add_lora_of` reads them."""
    found = {}
    for path, component in module.named_modules():
        settings = settings_of(component)
        if settings is None:
            continue
        layers = [name for name, layer in component.named_modules() if is_lora(layer)]
        found[path] = to_dict(
            Lora(
                rank=settings.r,
                alpha=settings.lora_alpha,
                dropout=settings.lora_dropout,
                targets=tuple(layers),
            )
        )
    return found


def add_lora_of(module: nn.Module, values: Mapping[str, dict[str, Any]], where: str) -> None:
    """Makes the LoRA layers that `lora_of` described; `where` names the source in messages."""
    add_lora(module, {path: from_dict(Lora, v, f"{where}.{path}") for path, v in values.items()})


def quantize_4bit(text: nn.Module) -> None:
    """Gives the language model's linear layers, its head and LoRA's own excepted, 4-bit weights
    (NF4), in place, to put LoRA beside them. They are packed when the model is moved to a device.
    Folders that are saved hold them unpacked, in bf16.

    Source: QLoRA (arXiv 2305.14314).
    Raises MissingExtra naming the package where bitsandbytes is not installed.
    """
    with needs("quantize"):
        import bitsandbytes as bnb
    head = text.get_output_embeddings()
    for name, layer in list(text.named_modules()):
        if type(layer) is nn.Linear and layer is not head and ADAPTER not in name:
            bias = layer.bias is not None
            packed = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            weight = layer.weight.data
            packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            packed.bias = layer.bias
            text.set_submodule(name, packed)
    mark_packed(text)


def _targets(module: nn.Module, path: str, lora: Lora) -> list[str]:
    """The full names of the layers that `lora` stands beside in the component at `path`."""
    parts = sorted({name.split(".")[0] for name, _ in module.named_parameters()})
    try:
        component = module.get_submodule(path) if path else None
    except AttributeError:
        component = None
    if component is None:
        raise ValueError(f"no component {path!r}: the parts are {parts}, or paths below them")
    if any(is_lora(layer) for layer in component.modules()):
        raise ValueError(f"{path} has LoRA layers already")
    linear, convolutions, refused = _layers(module, component)
    known = [*linear, *convolutions]
    if lora.targets is not None:
        idle = [p for p in lora.targets if not any(fnmatchcase(name, p) for name in known)]
        if idle:
            raise ValueError(
                f"{path}: targets {idle} match no layer that takes LoRA; those that do are "
                f"{known[:40]}, those that do not are {refused[:10]}"
            )
        taken = [name for name in known if any(fnmatchcase(name, p) for p in lora.targets)]
        return [f"{path}.{name}" for name in taken]
    if refused:
        raise ValueError(
            f"{path}: LoRA layers cannot stand beside {len(refused)} of its weights, such as "
            f"{refused[:4]}; to leave these as they are, name the layers that take LoRA by "
            f"targets, of {sorted({name.split('.')[-1] for name in known})}"
        )
    taken = known if len(convolutions) > len(linear) else linear
    if not taken:
        kinds = sorted({type(layer).__name__ for layer in component.modules()})
        raise ValueError(f"{path} has no layer that takes LoRA; its layers are {kinds}")
    return [f"{path}.{name}" for name in taken]


def _layers(module: nn.Module, component: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """The names of a component's linear layers and convolutions that take LoRA, and of the weights
    as large as these that do not.

    A fused weight without a layer (attention's in_proj_weight, a table of experts) cannot; nor can
    a subclass with arithmetic of its own. peft's layer for nn.MultiheadAttention adds to the
    frozen weights in each pass and takes off again, so that they would not keep their bits.
    """
    head = module.text.get_output_embeddings()
    linear, convolutions, refused = [], [], []
    inside: tuple[str, ...] = ()
    for name, layer in component.named_modules():
        if layer is head or not name or (inside and name.startswith(inside)):
            continue
        if "in_proj_weight" in dict(layer.named_parameters(recurse=False)):
            refused.append(f"{name}.in_proj_weight")
            if isinstance(layer, nn.MultiheadAttention):
                refused.append(f"{name}.out_proj.weight")
                inside = (*inside, f"{name}.")
        elif type(layer) in (nn.Linear, Conv1D) or type(layer).__name__ == "Linear4bit":
            linear.append(name)
        elif isinstance(layer, nn.Linear):
            refused.append(name)
        elif type(layer) is nn.Conv2d and layer.groups == 1:
            convolutions.append(name)
        for leaf, parameter in layer.named_parameters(recurse=False):
            if parameter.dim() == 3 and len(parameter) > 1 and not isinstance(layer, nn.Conv1d):
                refused.append(f"{name}.{leaf}")
    return linear, convolutions, refused


def _require_calls(module: nn.Module, names: list[str]) -> None:
    """Raises ValueError naming the layers that the image tokenizer never calls: some backbones
    read a layer's weight themselves, so that LoRA beside it would do nothing."""
    wanted = [n.removeprefix("tokenizer.") for n in names if n.startswith("tokenizer.")]
    if not wanted or not isinstance(module.tokenizer, ImageTokenizer):
        return
    twin = meta_twin(module.tokenizer)
    called: set[str] = set()
    for name in wanted:
        twin.get_submodule(name).register_forward_hook(partial(_note, called, name))
    dtype = next(twin.parameters()).dtype
    with torch.no_grad():
        twin(meta_pixels(module.tokenizer.pixel_spec.view_sizes(PROBE_HW)[0], dtype))
    dead = [f"tokenizer.{name}" for name in wanted if name not in called]
    if dead:
        raise ValueError(
            f"the image tokenizer reads the weights of {len(dead)} layers without calling them, "
            f"so that LoRA would do nothing: {dead[:4]}; name other layers by targets"
        )


def _note(called: set[str], name: str, *_) -> None:
    called.add(name)
