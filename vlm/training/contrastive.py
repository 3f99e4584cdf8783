"""A contrastive run: what it can be told, and its way from settings to result."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn
from tqdm import tqdm

from vlm.data.augment import LEVELS
from vlm.data.mixture import Mixture, MixtureDataset, check_weights
from vlm.data.sources import open_source
from vlm.data.sources.base import Source
from vlm.image_tokens import ImageTokenizer
from vlm.inference.embed import ContrastiveModel
from vlm.inference.engine import evaluating
from vlm.metrics.retrieval import retrieval
from vlm.pairs import collate_pairs
from vlm.systems import pairing, scratch
from vlm.training.base_settings import Augmentation, BaseSettings, deciding, require_share
from vlm.training.fit import Interrupted, Pace, fit
from vlm.training.held_out import held_out_rows, usable_rows
from vlm.training.launch import accelerator_for, processes
from vlm.training.memory import checkpoint_activations
from vlm.training.objectives import Contrast
from vlm.training.run import Curves, Run
from vlm.training.stages import Stage, StageError

NEW = "new"
SIZES = tuple(field.name for field in dataclasses.fields(scratch.ScratchConfig))
POOLINGS = ("pool", "text_pooling")
RECALL = Curves(
    "nats per pair",
    "held-out retrieval",
    "recall at 1",
    (
        ("image_to_text_r1", "#b5532a", "image to text"),
        ("text_to_image_r1", "#1f4e8c", "text to image"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Settings of a contrastive run: a fresh model, one of pretrained towers, or one to go on from.

    Pictures and captions are told apart within a step's batch, over all processes and
    micro-batches: a smaller micro_batch saves memory and changes nothing that is learned.
    """

    out: Path = Path("runs/contrastive")
    loss: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid (SigLIP) judges each pair by itself; softmax (CLIP) picks each one's partner."""

    start: str | None = None
    """A contrastive model to go on from: a run, a folder in our layout, transformers' or
    open_clip's, or a hub id. Its own towers and heads are taken."""
    vision: str = NEW
    """The picture's tower: "new" (a fresh transformer of the sizes below), "demo", "kind:id" of a
    pretrained one, or the folder of a model or run, as in stage 1."""
    text: str = NEW
    """The text's tower: "new", "demo" (SmolLM2-135M), or the hub id or folder of a text encoder or
    causal language model. Both towers are new, or neither."""
    lock_image: bool = False
    """Leave the picture's tower as it is, and train the rest (LiT). Its weights are kept, and
    saved, in the precision of the run."""
    lock_text: bool = False
    """Leave the text's tower as it is."""

    image_px: int = 64
    """Side of the picture that a new tower sees."""
    patch_px: int = 8
    """Side of its patches."""
    width: int = 192
    """Width of a new picture's tower, a multiple of 64."""
    depth: int = 6
    """Its layers."""
    text_width: int = 192
    """Width of a new text's tower, a multiple of 64."""
    text_depth: int = 4
    """Its layers."""
    embed_width: int = 256
    """Width of the shared space, of fresh heads."""
    length: int = 32
    """The most tokens of a text, where no model to go on from says so; longer ones are cut and
    counted."""
    pool: Literal["own", "class", "mean", "attention"] = "mean"
    """How a pretrained picture's tower becomes one vector."""
    text_pooling: Literal["own", "class", "mean", "last"] = "mean"
    """How a pretrained text's tower becomes one vector."""

    held_out_rows: int = 400
    """How many of its rows are evaluated, during training and at the end alike, since recall goes
    by their number; 0 evaluates nothing."""
    augment: Augmentation = "light"
    epochs: Literal["exact", "resampled"] = "exact"
    """exact: every row once before any comes again; resampled: each draw takes any row."""
    image_rate: float = 1e-3
    """Peak learning rate of the picture's tower."""
    text_rate: float = 1e-3
    """Peak learning rate of the text's tower."""
    head_rate: float = 1e-3
    """Peak learning rate of poolings, heads, scale and bias."""
    layer_decay: float = 1.0
    """What each layer's rate is of that of the layer above it, from a tower's last layer down to
    its embeddings; 1 is the same rate for all. 0.6 to 0.8 is usual for fine-tuning."""
    weight_decay: float = 0.1
    steps: int = 200
    batch: int = 128
    eval_every: int = 100
    save_every: int = 100

    def build(self) -> pairing.Pairing:
        """The model to train.

        Raises ValueError where settings are given that the way of building does not read.
        """
        self._require_read()
        if self.start is not None:
            return self._loaded()
        if self.vision == NEW:
            sizes = {name: getattr(self, name) for name in SIZES}
            return scratch.build(scratch.ScratchConfig(**sizes), self.loss, self.seed)
        return pairing.build(
            vision=self.vision,
            text=self.text,
            pool=self.pool,
            text_pooling=self.text_pooling,
            width=self.embed_width,
            length=self.length,
            loss=self.loss,
            seed=self.seed,
        )

    def data(self) -> MixtureDataset:
        return training_data(self)

    def _loaded(self) -> pairing.Pairing:
        import vlm

        parts = vlm.load(self.start, device="cpu", dtype="stored").parts
        if not isinstance(parts, pairing.Pairing):
            raise ValueError(
                f"start {self.start!r}: expected a contrastive model, found a "
                f"{parts.module.family} one"
            )
        has_bias = parts.module.bias is not None
        if has_bias != (self.loss == "sigmoid"):
            raise ValueError(
                f"start {self.start!r}: it was trained with the "
                f"{'sigmoid' if has_bias else 'softmax'} loss, found --loss {self.loss}"
            )
        return parts

    def _require_read(self) -> None:
        new = self.start is None and self.vision == NEW
        if self.start is None and new != (self.text == NEW):
            raise ValueError(
                f"vision {self.vision!r} and text {self.text!r}: expected both to be new, or "
                "neither"
            )
        if self.start is not None:
            unread = {f"start {self.start!r}": ("vision", "text", *SIZES, *POOLINGS)}
        elif new:
            unread = {"a new model": (*POOLINGS, "lock_image", "lock_text")}
        else:
            sizes = [name for name in SIZES if name not in ("length", "embed_width")]
            unread = {"a model of pretrained towers": sizes}
        if self.lock_image:
            unread["a locked picture's tower"] = ("image_rate",)
        if self.lock_text:
            unread["a locked text's tower"] = ("text_rate",)
        if self.lock_image and self.lock_text:
            unread["a pair of locked towers"] = ("layer_decay",)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for way, names in unread.items():
            given = sorted(name for name in names if getattr(self, name) != defaults[name])
            if given:
                raise ValueError(f"{way} does not read {given}; leave them out")


def layer_rates(
    module: nn.Module, tower: str, rate: float, decay: float
) -> list[tuple[str, float]]:
    """Patterns and rates of one tower: `rate` for what lies behind its layers and for the last of
    them, `decay` times that of the layer above for each one below, and once more for all before
    the first.

    tower: path of an image tokenizer or a text encoder. Its layers are the row of modules, in no
    other row, that holds most parameters: the blocks of a transformer, the stages of a net that
    shrinks its maps. Raises StageError where the rates are to fall and there is no such row, or
    several of weight (ResNet's).
    """
    if not 0 < decay <= 1:
        raise StageError(f"layer_decay must be above 0 and at most 1, found {decay}")
    if decay == 1:
        return [(f"{tower}.*", rate)]
    rows = _rows_of_layers(module, tower)
    if not rows:
        raise StageError(
            f"layer_decay {decay}: expected a row of two layers or more in {tower}, found none"
        )
    path, *others = sorted(rows, key=lambda path: -_size(module, path))
    heavy = [other for other in others if _size(module, other) > 0.1 * _size(module, path)]
    if heavy:
        raise StageError(
            f"layer_decay {decay}: expected one row of layers in {tower}, found {[path, *heavy]}; "
            "their order is not known, so give one rate to all of it (--layer-decay 1)"
        )
    layers = rows[path]
    names = _in_order(module, tower)
    first = next(i for i, name in enumerate(names) if name.startswith(layers[0]))
    rates = [(name, rate * decay ** len(layers)) for name in names[:first]]
    rates += [(f"{layer}*", rate * decay**i) for i, layer in enumerate(reversed(layers))]
    if not all(name.startswith(tuple(layers)) for name in names[first:]):
        rates.append((f"{tower}.*", rate))
    return rates


def _rows_of_layers(module: nn.Module, tower: str) -> dict[str, list[str]]:
    """Prefixes of the layers of each row of two or more in a tower that lies in no other row, by
    the row's path."""
    rows: dict[str, list[str]] = {}
    for path, row in module.get_submodule(tower).named_modules(prefix=tower):
        if isinstance(row, nn.ModuleList | nn.Sequential):
            layers = [f"{path}.{name}." for name, layer in row.named_children() if _learns(layer)]
            if len(layers) > 1 and not any(path.startswith(f"{other}.") for other in rows):
                rows[path] = layers
    return rows


def _size(module: nn.Module, path: str) -> int:
    return sum(parameter.numel() for parameter in module.get_submodule(path).parameters())


def _learns(layer: nn.Module) -> bool:
    """Whether it has parameters: the place of a layer that was removed has none."""
    return next(layer.parameters(), None) is not None


def _in_order(module: nn.Module, tower: str) -> list[str]:
    """The names of a tower's parameters in the order of computation, where it knows that; else as
    they are registered."""
    root = module.get_submodule(tower)
    names = {id(parameter): name for name, parameter in root.named_parameters(prefix=tower)}
    if not isinstance(root, ImageTokenizer):
        return list(names.values())
    return [names[id(p)] for part in root.parts().values() for p in part.parameters()]


def training_data(settings: Settings) -> MixtureDataset:
    """The mixture of the settings' sources."""
    require_share("warmup", settings.warmup)
    sources = [open_source(spec) for spec in settings.train]
    if settings.weights is not None:
        check_weights(settings.weights, [source.name for source in sources])
    resampled = settings.epochs == "resampled"
    mixture = Mixture(sources, settings.weights, settings.seed, resampled=resampled)
    return MixtureDataset(sources, mixture, settings.bad_rows, LEVELS[settings.augment])


MakeStage = Callable[[Settings, nn.Module, int], Stage]
"""From the settings, the module and the examples of one forward pass to the stage."""


def run(settings: Settings, make_stage: MakeStage) -> dict[str, Any]:
    """One run from settings to result: trains, evaluates retrieval on held-out rows, saves."""
    started = time.monotonic()
    accelerator, share = accelerator_for(settings)
    say = Console(file=sys.stderr, quiet=not accelerator.is_main_process, soft_wrap=True).print
    run_folder = Run(
        settings.out,
        {"stage": "contrastive", **dataclasses.asdict(settings)},
        deciding(settings),
        main=accelerator.is_main_process,
        resume=settings.resume,
        curves=RECALL,
    )
    data = settings.data()
    held_out = open_source(settings.held_out) if settings.held_out_rows else None
    with accelerator.main_process_first():
        model = ContrastiveModel(settings.build())
    plan = make_stage(settings, model.module, settings.micro_batch or share)
    if settings.checkpoint_activations:
        towers = {"tokenizer": settings.lock_image, "text": settings.lock_text}
        checkpoint_activations(
            model.module, [name for name, locked in towers.items() if not locked]
        )
    say(f"{plan.name}: {processes(accelerator, share)}")
    there = sum(map(len, data.sources))
    if there < settings.batch:
        say(
            f"a batch of {settings.batch} holds rows more than once, as the data have {there}: the "
            "loss tells a caption apart from its own picture's other copies"
        )
    asked = held_out_rows(held_out, settings.held_out_rows) if held_out else []
    rows, cut = usable_rows(model, held_out, asked, settings.bad_rows, say) if asked else ([], 0)
    evaluate = partial(retrieval_on, model, held_out, rows, accelerator) if rows else None
    try:
        progress = fit(
            model,
            plan,
            data,
            run_folder,
            accelerator,
            objective=Contrast(settings.loss),
            precision=settings.precision,
            pace=Pace(
                workers=settings.workers,
                eval_every=settings.eval_every,
                save_every=settings.save_every,
            ),
            resume=settings.resume,
            evaluate=evaluate,
        )
    except Interrupted:
        run_folder.close()
        raise
    if accelerator.is_main_process:
        model.save(settings.out / "model")
    result: dict[str, Any] = vars(progress) | {"scale": model.module.log_scale.exp().item()}
    if evaluate:
        figures = evaluate()
        run_folder.log(progress.step, {"eval": figures, "final": True})
        left_out = len(asked) - len(rows)
        result |= {"held_out": held_out.name, "held_out_skipped": left_out}
        result |= {"held_out_cut_tokens": cut, **figures}
    if accelerator.is_main_process:
        result["minutes"] = (time.monotonic() - started) / 60
        run_folder.write_result(result)
        run_folder.close()
        _report(say, settings.out, model.processor.length, result)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def retrieval_on(
    model: ContrastiveModel,
    source: Source,
    rows: Sequence[int],
    accelerator: Accelerator,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Recall both ways among the pictures and captions of rows: each picture's own caption is the
    one right text. The same on any number of ranks.

    Returns pairs (how many), image_to_text_r1, _r5, _r10 and text_to_image_r1, _r5, _r10 (shares),
    and each with _95 behind it (low and high end of its 95 % interval).
    Raises BadRow or BadImage for a row that cannot be read.
    """
    module, device = model.module, accelerator.device
    rank, ranks = accelerator.process_index, accelerator.num_processes
    images = torch.zeros(len(rows), module.dim, device=device)
    texts = torch.zeros_like(images)
    mine = range(0, len(rows), batch_size)[rank::ranks]
    quiet = not accelerator.is_main_process or len(mine) < 4
    with evaluating(module), torch.no_grad():
        for start in tqdm(mine, desc="held out", leave=False, disable=quiet):
            part = slice(start, start + batch_size)
            pairs = [model.processor.encode(source[row]) for row in rows[part]]
            with accelerator.autocast():
                images[part], texts[part] = module(collate_pairs(pairs).to(device))
    total = partial(accelerator.reduce, reduction="sum")
    found = retrieval(
        total(images),  # each row is zero on all ranks but one
        total(texts),
        torch.arange(len(rows), device=device),
        rank=rank,
        ranks=ranks,
        total=total,
    )
    figures: dict[str, Any] = {"pairs": len(rows)}
    for name in ("image_to_text", "text_to_image"):
        for k, recall in getattr(found, name).recall.items():
            figures[f"{name}_r{k}"] = recall.share
            figures[f"{name}_r{k}_95"] = [recall.low, recall.high]
    return figures


def _report(say, out: Path, length: int, result: dict[str, Any]) -> None:
    """The run's result, for people. length: the most tokens of a text."""
    lines = []
    if result["skipped"]:
        lines.append(f"{result['skipped']} rows skipped, such as:")
        lines += [f"  {line}" for line in result["examples_skipped"][:5]]
    if result["cut_tokens"]:
        lines.append(f"{result['cut_tokens']} text tokens cut to fit {length}")
    say("\n".join(lines or ["no training row was left out"]), highlight=False, markup=False)
    say(f"{out}: loss.png, metrics.jsonl, model/", highlight=False)
    if "pairs" not in result:
        return
    directions = []
    for name in ("image_to_text", "text_to_image"):
        low, high = result[f"{name}_r1_95"]
        share = result[f"{name}_r1"]
        directions.append(f"{name.replace('_', ' ')} {share:.1%} ({low:.1%} to {high:.1%})")
    say(
        f"recall@1 on {result['held_out']}, {result['pairs']} pairs: {', '.join(directions)}; "
        f"chance {1 / result['pairs']:.1%}",
        style="bold",
    )
