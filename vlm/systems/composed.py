"""Any image tokenizer with any language model: our own composition and our own folder layout.

A folder holds config.json (family, parts, prompt), model.safetensors and `text_tokenizer/`; of a
model that came from a published system, also that folder's small files, in `reference/`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from vlm import adaptors, assets, config, tokenizers
from vlm.data.grounding import GROUND_PROMPT
from vlm.families.decoder_only import DecoderOnly, Places
from vlm.families.prefix_decoder import PrefixDecoder
from vlm.geometry import LocTokens
from vlm.image_tokens import ImageTokenizer
from vlm.merge import Made, plain_state
from vlm.prompts import MARK, Processor
from vlm.systems.reference import Reference, read_reference
from vlm.vocabulary import grow
from vlm.weights import load_weights, read_weights, save_weights

SOURCE = "our own"
FORMAT = "vlm"
VERSION = 1
REFERENCE = "reference"
"""Sub-folder for the files of the published folder that a model came from."""
DEMO = "demo"
LAYER_OPTION = {
    "timm": "level",
    "transformers": "layer",
    "open_clip": "layer",
    "naflex": "layer",
}
"""Kinds of image tokenizer with pretrained weights -> what each calls its layer."""


MASKS = {"causal": DecoderOnly, "prefix": PrefixDecoder}
"""What a place of the stream sees -> the family whose mask it is."""

CAPTION_PROMPT = "Describe the picture."
ANSWER_PROMPT = "{question}"


@dataclass(kw_only=True, slots=True)
class Composition:
    """A module with what is needed to use it.

    processor: prompts and preprocessing. stop_ids: ids that end an answer. caption_prompt: what
    asks for a caption where nothing else is said. ground_prompt: what asks for the boxes of a
    `{phrase}`. labelled_boxes: whether its answer names the phrase behind each box. answer_prompt:
    what is written for a `{question}`. ocr_prompt: what asks for the text in a picture; None where
    it was trained on none. reference: the published layout that it came from, which it can be saved
    in; None for one composed here.
    """

    module: DecoderOnly
    processor: Processor
    stop_ids: tuple[int, ...]
    caption_prompt: str = CAPTION_PROMPT
    ground_prompt: str = GROUND_PROMPT
    labelled_boxes: bool = False
    answer_prompt: str = ANSWER_PROMPT
    ocr_prompt: str | None = None
    reference: Reference | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """What config.json says, besides `format` and `version`.

    tokenizer, adaptor: configurations with their `kind`. text: the language model's own
    configuration. stop_ids: ids that end an answer. loc: how boxes are written; None: not at all.
    reference: the published system that the model came from, whose files lie in `reference/`.
    lora: for each component with LoRA layers of its own what they are, see `vlm.lora`.
    The rest is the prompts'.
    """

    family: str
    tokenizer: dict[str, Any]
    adaptor: dict[str, Any]
    text: dict[str, Any]
    stop_ids: tuple[int, ...]
    caption_prompt: str
    system: str | None
    max_tokens: int | None
    ground_prompt: str = GROUND_PROMPT
    labelled_boxes: bool = False
    answer_prompt: str = ANSWER_PROMPT
    ocr_prompt: str | None = None
    loc: LocTokens | None = None
    image_mark: str = MARK
    framed: bool = False
    reference: str | None = None
    lora: dict[str, dict[str, Any]] = field(default_factory=dict)


def build(
    *,
    vision: str = DEMO,
    text: str = DEMO,
    adaptor: str = "pixel_shuffle",
    adaptor_depth: int = 2,
    shuffle_ratio: int = 2,
    queries: int = 64,
    system: str | None = None,
    caption_prompt: str = CAPTION_PROMPT,
    max_tokens: int | None = None,
    overflow: str = "drop",
    size_hw: tuple[int, int] | None = None,
    vision_layer: int = -1,
    text_layers: int | None = None,
    mask: str = "causal",
    seed: int = 0,
) -> Composition:
    """A model of pretrained parts and a fresh adaptor, whose language model reads the pictures.

    vision: "demo", or "kind:id" such as "transformers:google/siglip-base-patch16-224",
        "timm:vit_base_patch16_dinov2" or "open_clip:ViT-B-32:laion2b_s34b_b79k".
    text: "demo", or a causal language model's hub id or folder, tuned to chat.
    adaptor: "linear", "mlp", "pixel_shuffle" or "resampler", as wide as the language model.
    max_tokens: longest row; None takes the language model's context. overflow: what happens to
        longer rows, see `Processor`.
    text_layers: how many of the language model's first layers are kept, for small and fast
        models; None keeps all.
    mask: "causal", a decoder-only model; or "prefix", where pictures and prompt see each other and
        the answer alone is causal, as in PaliGemma.
    seed: of the adaptor's weights; the global generator is left as it is.
    Raises OSError or FetchError where weights cannot be had, ValueError for what does not fit.
    """
    if mask not in MASKS:
        raise ValueError(f"mask is one of {', '.join(MASKS)}, found {mask!r}")
    image_tokenizer = load_vision(vision, size_hw, vision_layer)
    language = load_text(text)
    if text_layers is not None:
        keep_layers(language, text_layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bridge = adaptors.build(
            adaptor_config(
                adaptor,
                in_width=image_tokenizer.dim,
                out_width=language.config.get_text_config().hidden_size,
                depth=adaptor_depth,
                ratio=shuffle_ratio,
                queries=queries,
            )
        )
    module = MASKS[mask](image_tokenizer, bridge, language)
    places = Places(image_tokenizer, bridge)
    places(image_tokenizer.pixel_spec.size_hw)  # whether the parts fit, before any work
    processor = Processor(
        load_text_tokenizer(text),
        image_tokenizer.pixel_spec,
        places,
        system=system,
        max_tokens=context_of(language) if max_tokens is None else max_tokens,
        overflow=overflow,
        prefix=mask == "prefix",
    )
    ends = stop_ids(processor, language)
    language.generation_config = GenerationConfig()  # its own habits would be lost when saved
    return Composition(
        module=module.eval(), processor=processor, stop_ids=ends, caption_prompt=caption_prompt
    )


def keep_layers(language: torch.nn.Module, count: int) -> None:
    """Cuts a language model off after its first `count` layers, in place; its final norm and head
    stay. Raises ValueError where it has fewer."""
    config = language.config.get_text_config()
    if not 1 <= count <= config.num_hidden_layers:
        raise ValueError(
            f"text_layers must be 1 to {config.num_hidden_layers}, which this language model has, "
            f"found {count}"
        )
    decoder = language.get_decoder()
    decoder.layers = decoder.layers[:count]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


def add_loc_tokens(parts: Composition, loc: LocTokens, *, seed: int = 0) -> None:
    """Gives a composition the tokens that boxes are written with, in place: ids and rows.

    seed: of the rows' first values.
    Raises ValueError where it writes boxes in another way already.
    """
    had = parts.processor.loc
    if had is not None and had != loc:
        raise ValueError(f"this model writes boxes as {had}, not as {loc}")
    grow(parts.module.text, parts.processor.text_tokenizer, loc.tokens, seed=seed)
    parts.processor.loc = loc


def context_of(language: torch.nn.Module) -> int | None:
    """The longest row that the language model was made for; None where it does not say."""
    return getattr(language.config.get_text_config(), "max_position_embeddings", None)


def adaptor_config(
    kind: str, *, in_width: int, out_width: int, depth: int, ratio: int, queries: int
) -> dict[str, Any]:
    """The configuration of an adaptor by name, its hidden layers as wide as the language model."""
    widths = {"in_width": in_width, "out_width": out_width}
    deep = {"depth": depth, "hidden_width": out_width}
    known = {
        "linear": {"kind": "mlp", **widths, "depth": 1, "hidden_width": out_width},
        "mlp": {"kind": "mlp", **widths, **deep},
        "pixel_shuffle": {
            "kind": "pixel_shuffle",
            **widths,
            **deep,
            "ratio": ratio,
            "norm": True,
            "positions": 6,
        },
        "resampler": {
            "kind": "resampler",
            **widths,
            "depth": depth,
            "queries": queries,
            "heads": max(1, out_width // 64),
        },
    }
    if kind not in known:
        raise ValueError(f"adaptor {kind!r} is not one of {', '.join(known)}")
    return known[kind]


def load_vision(
    name: str,
    size_hw: tuple[int, int] | None = None,
    layer: int = -1,
    *,
    prefix: str = "drop",
    pooled: bool = False,
) -> ImageTokenizer:
    """A pretrained image tokenizer: "demo", "kind:id", or the folder of a model or run of any
    family, whose image tokenizer is taken as it was trained.

    size_hw: pixels that pictures are brought to; None keeps the backbone's own.
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
    if Path(name).is_dir():
        return _vision_of(name, size_hw, layer, prefix, pooled)
    kind = name.partition(":")[0]
    if kind not in LAYER_OPTION:
        raise ValueError(
            f"vision {name!r}: expected 'demo', the folder of a model or run, or 'kind:id' with a "
            f"kind of {', '.join(LAYER_OPTION)}"
        )
    options: dict[str, Any] = {"prefix": prefix, "pooled": pooled, "norm": layer == -1}
    options[LAYER_OPTION[kind]] = layer
    if size_hw is not None:
        options["size_hw"] = size_hw
    return tokenizers.load(name, **options)


def _vision_of(
    folder: str, size_hw: tuple[int, int] | None, layer: int, prefix: str, pooled: bool
) -> ImageTokenizer:
    """The image tokenizer, weights and all, of a model of any family; what is not asked of it, such
    as the pooling of a contrastive one, is left behind."""
    from vlm import systems  # which knows this file

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
        if kind not in LAYER_OPTION:
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
    if values["kind"] not in ("timm", "transformers", "naflex"):
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


def stop_ids(processor: Processor, language: torch.nn.Module) -> tuple[int, ...]:
    """Ids that end an answer: the template's end token and the language model's own."""
    own = getattr(language, "generation_config", None)
    own = getattr(own, "eos_token_id", None)
    listed = own if isinstance(own, (list, tuple)) else [] if own is None else [own]
    return tuple(dict.fromkeys([processor.end_id, *listed]))


def save(model: Composition, folder: Path, merge: bool = True) -> None:
    """Writes our own layout; see the module's docstring. merge: whether LoRA is merged into the
    weights that are written, or kept as layers of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model.module, folder, merge=merge)
    description = Folder(
        family=model.module.family,
        tokenizer=tokenizers.config_to_dict(model.module.tokenizer),
        adaptor=adaptors.config_of(model.module.adaptor),
        text=model.module.text.config.to_dict(),
        stop_ids=model.stop_ids,
        caption_prompt=model.caption_prompt,
        system=model.processor.system,
        max_tokens=model.processor.max_tokens,
        ground_prompt=model.ground_prompt,
        labelled_boxes=model.labelled_boxes,
        answer_prompt=model.answer_prompt,
        ocr_prompt=model.ocr_prompt,
        loc=model.processor.loc,
        image_mark=model.processor.image_mark,
        framed=model.processor.framed,
        reference=None if model.reference is None else model.reference.model_type,
        lora={} if merge else _kept_lora(model.module),
    )
    if model.reference is not None:
        model.reference.write(folder / REFERENCE)
    model.processor.text_tokenizer.save_pretrained(folder / "text_tokenizer")
    values = {"format": FORMAT, "version": VERSION, **config.to_dict(description)}
    (folder / "config.json").write_text(json.dumps(values, indent=2, default=str) + "\n")


def _kept_lora(module: DecoderOnly) -> dict[str, dict[str, Any]]:
    from vlm.lora import lora_of  # here, since peft is slow to import

    return lora_of(module)


def load(folder: Path, values: dict[str, Any]) -> Composition:
    """The model in a folder of our own layout; `values` is what its config.json holds.

    Raises ValueError naming the file and what does not fit.
    """
    values = dict(values)
    where = str(folder / "config.json")
    version = values.pop("version", None)
    values.pop("format")
    if version != VERSION:
        raise ValueError(f"{where}: written as version {version}, this vlm reads {VERSION}")
    described = config.from_dict(Folder, values, where)
    families = {family.family: family for family in MASKS.values()}
    if described.family not in families:
        raise ValueError(
            f"{where}: family {described.family!r} is not one of {', '.join(families)}"
        )
    with init_empty_weights(include_buffers=False):
        text_config = AutoConfig.for_model(**described.text)
        module = families[described.family](
            tokenizers.build(described.tokenizer),
            adaptors.build(described.adaptor),
            AutoModelForCausalLM.from_config(text_config),
        )
        if described.lora:
            from vlm.lora import add_lora_of  # here, since peft is slow to import

            add_lora_of(module, described.lora, f"{where}.lora")
    module.text.tie_weights()  # making parameters empty has parted tied ones
    load_weights(module, read_weights(folder), where=str(folder))
    module.text.generation_config = GenerationConfig()
    processor = Processor(
        _from_pretrained(AutoTokenizer, folder / "text_tokenizer"),
        module.tokenizer.pixel_spec,
        Places(module.tokenizer, module.adaptor),
        system=described.system,
        max_tokens=described.max_tokens,
        loc=described.loc,
        image_mark=described.image_mark,
        prefix=described.family == PrefixDecoder.family,
        framed=described.framed,
    )
    reference = described.reference
    return Composition(
        module=module.eval(),
        processor=processor,
        stop_ids=described.stop_ids,
        caption_prompt=described.caption_prompt,
        ground_prompt=described.ground_prompt,
        labelled_boxes=described.labelled_boxes,
        answer_prompt=described.answer_prompt,
        ocr_prompt=described.ocr_prompt,
        reference=reference and read_reference(folder / REFERENCE, reference),
    )
