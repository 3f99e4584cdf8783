"""What a decoder-only recipe can be told: its settings, and the model and data that they name.

It is over 400 lines, as what each setting means stands beside it and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from vlm.box_codecs import LocTokens
from vlm.data.augment import LEVELS
from vlm.data.mixture import Mixture, MixtureDataset, check_weights
from vlm.data.sources import Source
from vlm.data.sources.documents import TextOnly
from vlm.data.spans import DrawSpans, InOrder
from vlm.families.decoder_only.layout import with_box_codec
from vlm.families.decoder_only.model import CAPTION_PROMPT, DecoderOnlyModel
from vlm.families.registry import FAMILIES
from vlm.lora import Lora, add_lora, lora_of, quantize_4bit
from vlm.systems import published_caption_prompt
from vlm.systems.compose import add_loc_tokens
from vlm.training.base_settings import BaseSettings, Usual, require_share
from vlm.training.run_folder import RunError
from vlm.training.stages import FROZEN
from vlm.vocabulary import train_rows

Mode = Literal["full", "lora", "frozen"]


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Settings of any decoder-only run."""

    text_train: tuple[str, ...] = ()
    """Training data without images: python:train (Python's manual), PATH.txt, PATH.jsonl."""
    text_share: float = 0.0
    """Share of the mixture that is text_train."""
    modality_warmup: float = 0.0
    """Share of the steps over which the data with images rise evenly from none to their share;
    DeepSeek-VL's second stage begins with text alone."""
    text_held_out: str = "python:val"
    """Data without images to evaluate on, before and after."""
    text_held_out_rows: int = 0
    """How many of its rows; 0 evaluates none."""
    max_tokens: int | None = None
    """Longest row, image tokens included; None takes the model's own: the language model's context,
    or what an earlier run was told."""
    overflow: Literal["drop", "shrink"] = "drop"
    """Rows that are longer than the context: skipped, or their text cut from the end; both are
    counted."""
    pack: int | None = None
    """Most positions of a packed row: examples go through the language model end to end, without
    padding, and none sees another; a longer one goes alone. Losses and gradients stay, rows of
    unequal length take less time. None pads rows of like length side by side."""
    balance: bool = False
    """Deal the rows of a step out to processes, and to their micro-batches, by FLOP cost, so that
    none waits long for another: by operations of the image tokenizer on each view and of the
    language model at each position. Counts of rows stay, and losses and gradients do. The price:
    every process reads each row of the step, its text and its images' headers (before
    augmentation);
    sources that draw their images would draw each on every process. `balance` among the figures
    is the mean cost of the processes over the largest; where data_wait rises, take more workers.
    With a token_cache views count nothing. One process has nothing to deal out."""
    token_cache: Path | None = None
    """A folder where tokens of a frozen image tokenizer are kept, so that an image is encoded in
    the first epoch alone, of this run or of any other with the same weights; images must not
    change, so it goes with --augment none. Nothing that is learned changes."""
    loc_bins: int = 0
    """Bins of the <loc> tokens that boxes are written with, four a box; 0 adds none. 1024 is
    PaliGemma's; fewer are learned from fewer boxes. Their rows learn in every stage."""
    span_share: float = 0.0
    """Share of the words of learned text that are drawn at random, in spans, for the docked text
    encoder to read in both directions; the language model learns what lies outside of them. 0
    draws none. See --docked."""
    merge: bool = True
    """Whether the model is saved with LoRA merged into its weights, or as layers of its own."""

    @property
    def caption_prompt(self) -> str:
        """The user's text after an image where rows hold a caption alone."""
        raise NotImplementedError

    def source(self, spec: str) -> Source:
        """The source that `spec` names, as rows of this run's task."""
        return self.open(spec, self.caption_prompt)

    def data(self) -> MixtureDataset:
        return training_data(self)

    def memory_remedies(self) -> tuple[str, ...]:
        return ("shorten rows (--max-tokens)",)

    def add_tokens(self, model: DecoderOnlyModel, learned: bool) -> None:
        """Gives the model the <loc> tokens that the settings ask for. learned: whether the whole
        language model learns; else only the rows of these tokens do, as `text.*.new`."""
        codec = LocTokens(bins=self.loc_bins) if self.loc_bins else model.processor.box_codec
        if not isinstance(codec, LocTokens):
            return
        add_loc_tokens(model, codec, seed=self.seed)
        if not learned:
            ids = model.processor.text_tokenizer.convert_tokens_to_ids(list(codec.tokens))
            train_rows(model.module.text, ids)


PARTS = ("vision", "image_px", "vision_layer", "text", "text_layers", "adaptor", "adaptor_depth",
         "shuffle_ratio", "queries", "cross_every", "docked", "system")  # fmt: skip
"""Settings of a model that is composed anew."""


@dataclass(frozen=True, kw_only=True)
class FromParts(Settings):
    """Settings of a run that composes its model of pretrained parts and a fresh adaptor.

    mask: what a position of the stream sees, see `vlm.systems.compose.build`.
    """

    mask: ClassVar[str] = "causal"

    start: str | None = None
    """A model's folder or hub id whose parts are taken, its adaptor included (DeepSeek-VL's own,
    for one), with its own system message; None composes the parts below."""
    vision: str = "demo"
    """Image tokenizer: "demo" (an ImageNet backbone that needs no hub), "kind:id", such as
    transformers:google/siglip-base-patch16-224, timm:vit_base_patch14_dinov2,
    open_clip:ViT-B-32:laion2b_s34b_b79k, or the folder of a model or run, whose own is taken, one
    that recipes/contrastive.py trained for example."""
    image_px: tuple[int, int] | None = None
    """Rows and columns that images are brought to; None keeps the image tokenizer's own."""
    vision_layer: int = -1
    """Which of its layers: -1 the final features; -2 is LLaVA's choice for CLIP."""
    text: str = "demo"
    """Language model: "demo" (SmolLM2-135M-Instruct, no hub needed), a hub id or a folder."""
    text_layers: int | None = None
    """How many of its first layers are kept, for small and fast models; None keeps all."""
    adaptor: Literal["linear", "mlp", "pixel_shuffle", "resampler", "perceiver"] = "pixel_shuffle"
    """What stands between them. pixel_shuffle makes one token of each block of neighbours, which
    cuts the cost of an image by shuffle_ratio squared; its grid must divide."""
    adaptor_depth: int = 2
    """Layers of the adaptor."""
    shuffle_ratio: int = 2
    """pixel_shuffle: sides of the blocks that become one token."""
    queries: int = 64
    """resampler, perceiver: tokens that they give for each view."""
    cross_every: int | None = None
    """Gated cross-attention blocks before each so many-th layer of the language model, which learn
    as the adaptor does: it reads images beside the text, as in Flamingo. None places image tokens
    in the text."""
    docked: str | None = None
    """A text encoder that reads in both directions, such as BERT: a hub id or a folder. It reads
    the spans of --span-share, through a linear connector, inside the causal stream (MetaLM). None
    docks none."""
    prompt: str = CAPTION_PROMPT
    """The user's text after an image where rows hold a caption alone; where this is not given, a
    `start` model keeps its own."""
    system: str | None = ""
    """System message where a conversation has none; "" is an empty one, None the template's own."""

    @property
    def caption_prompt(self) -> str:
        if self.start is None or self.given(("prompt",)):
            return self.prompt
        return stored_caption_prompt(self.start)

    def build(self) -> DecoderOnlyModel:
        if self.start is None:
            model = self.compose()
        else:
            self.require_no_parts()
            model = load_stored(self.start, self)
            model.caption_prompt = self.caption_prompt
        self.add_tokens(model, learned=False)
        return model

    def require_no_parts(self) -> None:
        """Raises ValueError naming the settings of parts, which `start` brings itself."""
        self.require_not_given(f"start {self.start!r}", PARTS)

    def compose(self) -> DecoderOnlyModel:
        """The model of pretrained parts and a fresh adaptor."""
        import vlm

        return vlm.build(
            dtype="stored",
            vision=self.vision,
            text=self.text,
            adaptor=self.adaptor,
            adaptor_depth=self.adaptor_depth,
            shuffle_ratio=self.shuffle_ratio,
            queries=self.queries,
            cross_every=self.cross_every,
            system=self.system,
            caption_prompt=self.prompt,
            max_tokens=self.max_tokens,
            overflow=self.overflow,
            size_hw=self.image_px,
            vision_layer=self.vision_layer,
            text_layers=self.text_layers,
            mask=self.mask,
            docked=self.docked,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class FromModel(Settings):
    """Settings of a run that goes on from a whole model, each of its components full, LoRA or
    frozen."""

    prompt: str | None = None
    """The user's text after an image where rows hold a caption alone; None keeps the model's
    own, that of a published system included."""

    vision: Mode = "frozen"
    """What of the image tokenizer learns."""
    vision_rate: float = Usual(2e-5)
    """Its peak learning rate."""
    adaptor: Mode = "full"
    """What of the adaptor learns, and of cross-attention blocks where there are any."""
    adaptor_rate: float = Usual(2e-4)
    """Its peak learning rate."""
    language: Mode = "full"
    """What of the language model learns."""
    language_rate: float = Usual(2e-5)
    """Its peak learning rate; with LoRA or frozen, that of the rows of new <loc> tokens too."""
    lora_rank: int = 16
    """Rank of the low-rank layers of every component that is "lora"."""
    lora_alpha: int = 32
    """Their scale times their rank."""
    lora_dropout: float = 0.0
    """Dropout before them."""
    base_4bit: bool = False
    """Keep the language model's frozen weights in 4 bits beside its LoRA; needs bitsandbytes."""

    @property
    def base_model(self) -> str:
        """The model that the run goes on from: a folder, a run, or a hub id."""
        raise NotImplementedError

    @property
    def caption_prompt(self) -> str:
        return stored_caption_prompt(self.base_model) if self.prompt is None else self.prompt

    def memory_remedies(self) -> tuple[str, ...]:
        lora = ("train less (--language lora)",) if self.language == "full" else ()
        return (*lora, *super().memory_remedies())

    def unread_rates(self) -> dict[str, str]:
        modes = {"vision": self.vision, "adaptor": self.adaptor}
        before = _config_in(self.base_model)
        # Rows of <loc> tokens learn beside a frozen language model, the model's own too.
        if not self.loc_bins and before.get("format") == "vlm" and not _has_loc_tokens(before):
            modes["language"] = self.language
        return {
            f"{part}_rate": f"{part} is frozen" for part, mode in modes.items() if mode == "frozen"
        }

    def build(self) -> DecoderOnlyModel:
        self.require_used()
        model = load_stored(self.base_model, self)
        if self.prompt is not None:
            model.caption_prompt = self.prompt
        self.add_tokens(model, learned=self.language == "full")
        if self.base_4bit:
            if self.language != "lora":
                raise ValueError(f"base_4bit needs --language lora, found {self.language}")
            quantize_4bit(model.module.text)
        self.add_lora(model.module)
        return model

    def add_lora(self, module: nn.Module) -> None:
        """Puts low-rank layers on every component that is "lora" and has none yet.

        Raises ValueError where a component has layers of another rank, scale or dropout.
        """
        low = module.tokenizer.low_resolution
        vision = "tokenizer" if low is None else f"tokenizer.{low}"
        modes = {vision: self.vision, "adaptor": self.adaptor, "text": self.language}
        if "cross" in module.parts():
            modes["cross"] = self.adaptor
        value = Lora(rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout)
        there = lora_of(module)
        asked = {"rank": value.rank, "alpha": value.alpha, "dropout": value.dropout}
        for component in there.keys() & {c for c, mode in modes.items() if mode == "lora"}:
            found = {key: there[component][key] for key in asked}
            if found != asked:
                raise ValueError(
                    f"{component} of {self.base_model} has LoRA layers already, of {found}; "
                    f"expected {asked}, as --lora-rank, --lora-alpha and --lora-dropout say"
                )
        wanted = {c: value for c, mode in modes.items() if mode == "lora" and c not in there}
        if wanted:
            add_lora(module, wanted, seed=self.seed)

    def require_used(self) -> None:
        """Raises ValueError naming settings of LoRA where no component has it."""
        if "lora" in (self.vision, self.adaptor, self.language):
            return
        names = ("lora_rank", "lora_alpha", "lora_dropout", "base_4bit", "merge")
        if given := self.given(names):
            raise ValueError(
                f"{given} are settings of LoRA, and no component has it; expected one of vision, "
                f"adaptor, language to be lora, found {self.vision}, {self.adaptor}, "
                f"{self.language}"
            )


@dataclass(frozen=True, kw_only=True)
class FromRun(FromModel):
    """Settings of a run that goes on from an earlier stage's."""

    follows: ClassVar[tuple[str, ...]] = ()
    """Names of the stages that this one may follow."""

    previous: str
    """The previous stage's run folder; or a model's folder or hub id that no run here made, a
    published system's for example."""

    @property
    def base_model(self) -> str:
        return self.previous

    @property
    def caption_prompt(self) -> str:
        if self.prompt is None and self._is_missing_default():
            return CAPTION_PROMPT  # as `require_stage` says before the model is built
        return super().caption_prompt

    def _is_missing_default(self) -> bool:
        """Whether `previous` is the usual place of an earlier run, and none is there."""
        return not self.given(("previous",)) and not Path(self.previous).exists()

    def build(self) -> DecoderOnlyModel:
        self.require_stage()
        return super().build()

    def require_stage(self) -> None:
        """Raises RunError where `previous` is a run of a stage that this one does not follow, or
        the usual place of one and empty."""
        if self._is_missing_default():
            raise RunError(
                f"{self.previous}: no such run; expected one of "
                f"{' or '.join(map(repr, self.follows))} there, or another named by --previous"
            )
        path = Path(self.previous, "settings.json")
        if not path.is_file():
            return
        held = json.loads(path.read_text()).get("stage")
        if held not in self.follows:
            raise RunError(
                f"{self.previous} holds {held!r}; expected a run of "
                f"{' or '.join(map(repr, self.follows))}, or a model's folder"
            )


def _has_loc_tokens(values: dict[str, Any]) -> bool:
    """Whether a model whose config.json, in our own layout, holds `values` writes boxes as <loc>
    tokens."""
    return (with_box_codec(values).get("box_codec") or {}).get("kind") == "loc"


def stored_caption_prompt(source: str) -> str:
    """What the model of a folder, run or hub id asks for a caption with; its weights are not read.
    Raises what `published_caption_prompt` raises."""
    held = _config_in(source)
    if "caption_prompt" in held:
        return held["caption_prompt"]
    return published_caption_prompt(source)


def _config_in(source: str) -> dict[str, Any]:
    """What the config.json of a model in a folder or run says; empty where it is on the hub."""
    for folder in (Path(source), Path(source, "model")):  # as `vlm.load` looks
        if (folder / "config.json").is_file():
            return json.loads((folder / "config.json").read_text())
    return {}


def load_stored(source: str, settings: Settings) -> DecoderOnlyModel:
    """The model in a folder or under a hub id, its weights and prompts as they were saved.

    Raises ValueError for one of a family that does not write text from images in or beside its
    stream.
    """
    import vlm

    model = vlm.load(source, device="cpu", dtype="stored")
    if not isinstance(model, DecoderOnlyModel):
        raise ValueError(
            f"{source}: expected a model that writes text from images in or beside its stream, "
            f"found one of the family {FAMILIES[model.module.family].said}"
        )
    model.processor.overflow = settings.overflow
    if settings.max_tokens is not None:
        model.processor.max_tokens = settings.max_tokens
    return model


def tuned(
    module: nn.Module, component: str, mode: Mode, rate: float
) -> tuple[tuple[str, float | None], ...]:
    """The patterns and rates of one component for `Stage.rates`. Where rows of new tokens were set
    apart they learn at the same rate. Cross-attention blocks learn as the adaptor does."""
    if component == "adaptor" and "cross" in module.parts():
        return (*_tuned(module, "adaptor", mode, rate), *_tuned(module, "cross", mode, rate))
    return _tuned(module, component, mode, rate)


def _tuned(
    module: nn.Module, component: str, mode: Mode, rate: float
) -> tuple[tuple[str, float | None], ...]:
    names = [name for name, _ in getattr(module, component).named_parameters()]
    if not names:  # such as the adaptor of Idefics without a perceiver
        return ()
    if mode == "full":
        return ((f"{component}.*", rate),)
    rates = [(f"{component}.*", FROZEN)]
    if any(name.endswith(".new") for name in names):
        rates.insert(0, (f"{component}.*.new", rate))
    if mode == "lora":
        rates.insert(0, (f"{component}.*lora_*", rate))
    return tuple(rates)


def tuned_docked(
    settings: Settings, module: nn.Module, rate: float, encoder_rate: float | None
) -> tuple[tuple[str, float | None], ...]:
    """The patterns and rates of a docked text encoder and its connector for `Stage.rates`: none
    where there is none, frozen where no spans are drawn for it. encoder_rate: None freezes the
    encoder."""
    if module.docked is None:
        return ()
    if not settings.span_share:
        return (("docked.*", FROZEN),)
    return (("docked.connector.*", rate), ("docked.encoder.*", encoder_rate))


def high_resolution_frozen(module: nn.Module) -> tuple[tuple[str, None], ...]:
    """The pattern that freezes the high-resolution tower of a paired image tokenizer; none where
    there is no such tower."""
    high = module.tokenizer.high_resolution
    return () if high is None else ((f"tokenizer.{high}*", FROZEN),)


def training_data(settings: Settings) -> MixtureDataset:
    """The mixture of the settings' sources."""
    for name in ("modality_warmup", "warmup_ratio"):
        require_share(name, getattr(settings, name))
    if settings.pack is not None and settings.pack < 1:
        raise ValueError(f"pack must be at least 1, found {settings.pack}")
    if settings.token_cache is not None and settings.augment != "none":
        raise ValueError(
            f"token_cache {settings.token_cache}: expected images that stay the same (augment "
            f"none), found augment {settings.augment}"
        )
    if not 0 <= settings.text_share < 1:
        raise ValueError(f"text_share must be in 0 to 1, 1 excluded, found {settings.text_share}")
    if bool(settings.text_train) != bool(settings.text_share):
        raise ValueError(
            f"text_train {list(settings.text_train)} and text_share {settings.text_share}: "
            "expected both or neither (neither is --text-train --text-share 0)"
        )
    seen = [settings.source(spec) for spec in settings.train]
    prompt = settings.caption_prompt
    read = [TextOnly(settings.open(spec, prompt)) for spec in settings.text_train]
    shares = settings.weights or [len(source) for source in seen]
    check_weights(shares, [source.name for source in seen])
    share = settings.text_share
    weights = _scaled(shares, 1 - share) + _scaled([len(source) for source in read], share)
    warmup = None
    if settings.modality_warmup:
        if not read:
            raise ValueError("modality_warmup begins with text alone: it needs text_train")
        samples = round(settings.modality_warmup * settings.steps) * settings.batch
        warmup = ([0.0] * len(seen) + weights[len(seen) :], samples)
    mixture = Mixture(seen + read, weights, settings.seed, warmup)
    changes = LEVELS[settings.augment]
    if settings.span_share:
        spans = DrawSpans(share=settings.span_share)
        changes = spans if changes is None else InOrder((changes, spans))
    return MixtureDataset(seen + read, mixture, settings.bad_rows, changes)


def _scaled(weights: Sequence[float], total: float) -> list[float]:
    """The weights in their own proportions, `total` in sum."""
    whole = sum(weights)
    return [total * weight / whole for weight in weights]
