"""open_clip's model_cfg of a CLIP or SigLIP as a configuration of transformers, and back.

A model_cfg is what `open_clip_config.json` says of a model. What transformers' classes cannot
represent is refused by the key that says so, never skipped: other towers (ModifiedResNet, other
timm trunks, text towers of transformers), other pooling, layer scale, CoCa, sides that differ.

Source: open_clip 3.3, `model.py` and `timm_model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import timm
import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg
from torch import nn

from vlm.systems.open_clip.key_map import SIGLIP_VISION_MAP, expand

LARGEST_ID = 2
"""transformers' `eos_token_id` that stands for "text is pooled at its largest id"."""


class Keys(NamedTuple):
    """What may be said in one part of a model_cfg.

    free: keys that are read, or change nothing that is computed. fixed: values other than
    open_clip's default that the system needs, or takes. All other keys must keep their default.
    """

    free: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]]


TOP = frozenset({
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale",
    "init_logit_bias", "nonscalar_logit_scale", "output_dict",
})  # fmt: skip
_TEXT_FREE = frozenset({
    "width", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs", "heads", "context_length",
    "vocab_size", "pad_id", "eos_id", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs",
    "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
})  # fmt: skip
_BLOCK = {"block_type": (None, "default")}
CLIP_VISION = Keys(
    frozenset({
        "width", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs", "head_width", "patch_size",
        "image_size", "patch_dropout", "attn_pooler_queries", "attn_pooler_heads",
        "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
        "timm_drop_path",
        "final_ln_after_pool",  # norming the class token is the same before and after pooling it
    }),
    _BLOCK,
)  # fmt: skip
CLIP_TEXT = Keys(_TEXT_FREE, {"pool_type": ("argmax", "eos"), **_BLOCK})
SIGLIP_VISION = Keys(
    # A trunk of timm has its own sizes, whatever stands beside its name.
    frozenset(CLIPVisionCfg.__dataclass_fields__) - {"timm_pool", "timm_proj", "output_tokens"},
    {"timm_pool": ("map",), "timm_proj": ("none",)},
)
SIGLIP_TEXT = Keys(
    _TEXT_FREE,
    {"no_causal_mask": (True,), "proj_bias": (True,), "pool_type": ("last",), **_BLOCK},
)


def system_of(model_cfg: Mapping[str, Any]) -> str:
    """Which system a model_cfg speaks of: "siglip" for a trunk of timm, else "clip".

    Raises ValueError where a part of the model_cfg is missing, or is not known.
    """
    unknown = sorted(set(model_cfg) - TOP)
    if unknown:
        raise unfit("model_cfg", f"keys of {sorted(TOP)}", unknown)
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in model_cfg:
            raise unfit(f"model_cfg.{key}", "a value", "none")
    return "siglip" if model_cfg["vision_cfg"].get("timm_model_name") else "clip"


def reference_config(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """`clip_config` or `siglip_config`, whichever the model_cfg speaks of."""
    return (siglip_config if system_of(model_cfg) == "siglip" else clip_config)(model_cfg)


def clip_config(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The values of transformers' CLIPConfig for an open_clip CLIP.

    Raises ValueError naming the key that CLIPModel cannot represent, expected and found.
    """
    system_of(model_cfg)  # whether all is there, and known
    vision = _settings(model_cfg, "vision_cfg", CLIPVisionCfg, CLIP_VISION)
    text = _settings(model_cfg, "text_cfg", CLIPTextCfg, CLIP_TEXT)
    if not isinstance(vision["layers"], int):
        raise unfit("vision_cfg.layers", "the number of blocks", vision["layers"], "(a ResNet)")
    heads = vision["width"] // vision["head_width"]
    if not heads or vision["width"] % heads:
        expected = f"heads that divide {vision['width']}"
        raise unfit("vision_cfg.head_width", expected, vision["head_width"], f"({heads} heads)")
    vision_config = _shared(model_cfg, "vision_cfg", vision) | {
        "num_attention_heads": heads,
        "image_size": _one_side(vision, "image_size"),
        "patch_size": _one_side(vision, "patch_size"),
        "projection_dim": model_cfg["embed_dim"],
    }
    text_config = _shared(model_cfg, "text_cfg", text) | _text_sizes(text)
    text_config |= {"projection_dim": model_cfg["embed_dim"], "eos_token_id": LARGEST_ID}
    if text["pool_type"] == "eos":
        if text["eos_id"] == LARGEST_ID:
            raise unfit("text_cfg.eos_id", f"not {LARGEST_ID} with pool_type eos", LARGEST_ID)
        text_config["eos_token_id"] = text["eos_id"]
    return {
        "projection_dim": model_cfg["embed_dim"],
        "vision_config": {"model_type": "clip_vision_model", **vision_config},
        "text_config": {"model_type": "clip_text_model", **text_config},
    }


def clip_model_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's model_cfg for the values of a CLIPConfig (`config.to_dict()`); what
    `clip_config` gave for it is that configuration again.

    Raises ValueError naming the key that open_clip cannot represent, expected and found.
    """
    vision, text = config["vision_config"], config["text_config"]
    quick = [part["hidden_act"] == "quick_gelu" for part in (vision, text)]
    if quick[0] != quick[1]:
        raise unfit("text_config.hidden_act", vision["hidden_act"], text["hidden_act"])
    eos = text["eos_token_id"]
    if not isinstance(eos, int):
        raise unfit("text_config.eos_token_id", "one id", eos)
    # The end of text is the last id of CLIP's vocabulary: the largest of any text.
    at_largest = eos in (LARGEST_ID, text["vocab_size"] - 1)
    return {
        "embed_dim": config["projection_dim"],
        **({"quick_gelu": True} if quick[0] else {}),
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_open_clip_sizes("vision_config", vision),
        },
        "text_cfg": {
            **_open_clip_text_sizes(text),
            **({} if at_largest else {"pool_type": "eos", "eos_id": eos}),
        },
    }


def siglip_config(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The values of transformers' SiglipConfig for an open_clip SigLIP.

    Raises ValueError naming the key that SiglipModel cannot represent, expected and found.
    """
    system_of(model_cfg)  # whether all is there, and known
    vision = _settings(model_cfg, "vision_cfg", CLIPVisionCfg, SIGLIP_VISION)
    text = _settings(model_cfg, "text_cfg", CLIPTextCfg, SIGLIP_TEXT)
    trunk = _trunk_config(vision["timm_model_name"])
    for key, expected in (("image_size", trunk["image_size"]), ("embed_dim", trunk["hidden_size"])):
        found = _one_side(vision, key) if key == "image_size" else model_cfg[key]
        if found != expected:
            name = key if key == "embed_dim" else f"vision_cfg.{key}"
            raise unfit(name, f"{expected}, as {vision['timm_model_name']} has it", found)
    text_config = _shared(model_cfg, "text_cfg", text) | _text_sizes(text)
    return {
        "vision_config": {"model_type": "siglip_vision_model", **trunk},
        "text_config": {
            "model_type": "siglip_text_model",
            **text_config,
            "projection_size": model_cfg["embed_dim"],
        },
    }


def siglip_model_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's model_cfg for the values of a SiglipConfig (`config.to_dict()`): its trunk is the
    one of timm's with the same geometry.

    Raises ValueError naming the key that open_clip cannot represent, expected and found; the
    authors' SigLIP with tanh GELU in the image tower is among it, except the giant one.
    """
    vision, text = config["vision_config"], config["text_config"]
    pattern = f"vit_*_patch{vision['patch_size']}_siglip_{vision['image_size']}"
    near: dict[str, list[str]] = {}
    for name in timm.list_models(pattern):
        trunk = _trunk_config(name)
        near[name] = [f"{k}: {v!r}" for k, v in trunk.items() if vision.get(k) != v]
    if not near:
        raise unfit(
            "vision_config.image_size and patch_size",
            f"those of a trunk of timm ({pattern})",
            (vision["image_size"], vision["patch_size"]),
        )
    trunk = min(near, key=lambda name: len(near[name]))
    if near[trunk]:
        keys = [line.partition(":")[0] for line in near[trunk]]
        found = {key: vision.get(key) for key in keys}
        raise unfit("vision_config", f"{', '.join(near[trunk])}, as timm's {trunk} has", found)
    quick = text["hidden_act"] == "quick_gelu"
    return {
        "embed_dim": vision["hidden_size"],
        **({"quick_gelu": True} if quick else {}),
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision["image_size"],
            "timm_model_name": trunk,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **_open_clip_text_sizes(text),
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }


def _settings(
    model_cfg: Mapping[str, Any], part: str, known: type, keys: Keys
) -> Mapping[str, Any]:
    """One part of a model_cfg with open_clip's defaults, all that is not free being as it must."""
    given, defaults = model_cfg[part], asdict(known())
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise unfit(part, "keys that open_clip knows", unknown)
    values = defaults | given
    for key, value in values.items():
        allowed = keys.fixed.get(key, (defaults[key],))
        if key not in keys.free and value not in allowed:
            raise unfit(f"{part}.{key}", " or ".join(map(repr, allowed)), value)
    return values


def _shared(model_cfg: Mapping[str, Any], part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a tower's configuration says in the same words for images and text."""
    act, norm = values["act_kwargs"] or {}, values["norm_kwargs"] or {}
    quick = bool(model_cfg.get("quick_gelu"))
    known = [{}] if quick else [{}, *({"approximate": form} for form in GELU)]
    if act not in known:
        raise unfit(f"{part}.act_kwargs", " or ".join(map(str, known)), act)
    if set(norm) - {"eps"}:
        raise unfit(f"{part}.norm_kwargs", "eps alone", norm)
    return {
        "hidden_size": values["width"],
        "intermediate_size": int(values["width"] * values["mlp_ratio"]),
        "num_hidden_layers": values["layers"],
        "hidden_act": "quick_gelu" if quick else GELU[act.get("approximate", "none")],
        "layer_norm_eps": norm.get("eps", EPS),
    }


def _text_sizes(text: Mapping[str, Any]) -> dict[str, Any]:
    if text["width"] % text["heads"]:
        raise unfit("text_cfg.heads", f"a divisor of {text['width']}", text["heads"])
    return {
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # the tokenizer's matter
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "vocab_size": text["vocab_size"],
    }


def _open_clip_sizes(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    width, mlp_width, act = (
        values[key] for key in ("hidden_size", "intermediate_size", "hidden_act")
    )
    forms = {name: form for form, name in GELU.items()} | {"quick_gelu": "none"}
    if act not in forms:
        raise unfit(f"{part}.hidden_act", " or ".join(forms), act)
    ratio = mlp_width / width
    if int(width * ratio) != mlp_width:  # rounded down to the row below
        ratio = (mlp_width + 0.5) / width
    eps = values["layer_norm_eps"]
    return {
        "width": width,
        "layers": values["num_hidden_layers"],
        "mlp_ratio": ratio,
        **({} if forms[act] == "none" else {"act_kwargs": {"approximate": forms[act]}}),
        **({} if eps == EPS else {"norm_kwargs": {"eps": eps}}),
    }


def _open_clip_text_sizes(text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "heads": text["num_attention_heads"],
        **_open_clip_sizes("text_config", text),
    }


def _one_side(vision: Mapping[str, Any], key: str) -> int:
    """Rows and columns of a tower, which transformers' classes take as one number."""
    value = vision[key]
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise unfit(f"vision_cfg.{key}", "a square", value)
    return sides.pop()


def unfit(key: str, expected: str, found: object, remark: str = "") -> ValueError:
    """The error for a key that one of the two libraries cannot represent."""
    return ValueError(f"{key}: expected {expected}, found {found!r} {remark}".rstrip())


GELU = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
"""torch's `approximate` -> transformers' name."""
EPS = 1e-5
"""Of torch's layer norms where nothing is said."""


@lru_cache(maxsize=64)
def _trunk(name: str) -> nn.Module:
    """A trunk of timm's without its values, as open_clip makes it for SigLIP."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=0, global_pool="map")
    except (RuntimeError, TypeError, AssertionError) as error:  # unknown, or no such pooling
        raise unfit(
            "vision_cfg.timm_model_name", "a vision transformer of timm's", name, f"({error})"
        ) from error


def _trunk_config(name: str) -> dict[str, Any]:
    """The geometry of a trunk in the words of SiglipVisionConfig.

    Raises ValueError for a trunk that is no SigLIP, naming weights that one has and the other not.
    """
    trunk = _trunk(name)
    where = "vision_cfg.timm_model_name"
    if not isinstance(trunk, timm.models.VisionTransformer):
        raise unfit(where, "a vision transformer of timm's", name, f"({type(trunk).__name__})")
    depth = len(trunk.blocks)
    expected = {
        key.removeprefix("visual.trunk.")
        for row in expand(SIGLIP_VISION_MAP, depth)
        for key in row.published
    }
    different = sorted(expected ^ set(trunk.state_dict()))
    if different:
        raise unfit(where, "SigLIP's weights", name, f"(only one of them has {different[:8]})")
    norms = {module.eps for module in trunk.modules() if isinstance(module, nn.LayerNorm)}
    acts = {_gelu(trunk.blocks[0].mlp.act), _gelu(trunk.attn_pool.mlp.act)}
    heads = {trunk.blocks[0].attn.num_heads, trunk.attn_pool.num_heads}
    sides = {*trunk.patch_embed.img_size}, {*trunk.patch_embed.patch_size}
    widths = {
        trunk.blocks[0].mlp.fc1.out_features,
        trunk.attn_pool.mlp.fc1.out_features,
    }
    kinds = {"eps": norms, "activation": acts, "heads": heads, "MLP width": widths}
    for what, found in (kinds | {"image side": sides[0], "patch side": sides[1]}).items():
        if len(found) != 1 or None in found:
            raise unfit(where, f"a trunk with one {what}", name, f"({sorted(found, key=str)})")
    return {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": widths.pop(),
        "num_hidden_layers": depth,
        "num_attention_heads": heads.pop(),
        "image_size": sides[0].pop(),
        "patch_size": sides[1].pop(),
        "hidden_act": acts.pop(),
        "layer_norm_eps": norms.pop(),
    }


def _gelu(act: nn.Module) -> str | None:
    """transformers' name of an activation; None where it has none that we know."""
    if isinstance(act, timm.layers.GELUTanh):
        return GELU["tanh"]
    return GELU[act.approximate] if isinstance(act, nn.GELU) else None
