"""A contrastive run: what it can be told, and its way from settings to result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from tqdm import tqdm

from vlm.data.augment import LEVELS
from vlm.data.mixture import Mixture, MixtureDataset, check_weights
from vlm.data.sources.base import Source
from vlm.families.base import evaluating
from vlm.families.contrastive.batch import collate_pairs
from vlm.families.contrastive.model import ContrastiveModel
from vlm.metrics.retrieval import retrieval
from vlm.metrics.share import with_ci
from vlm.systems import compose_contrastive, scratch
from vlm.training.base_settings import Augmentation, BaseSettings, Usual, require_share
from vlm.training.fit import fit
from vlm.training.run_folder import Curves
from vlm.training.runs.run import MakeObjective, MakeStage, TrainingRun

NEW = "new"
SIZES = tuple(field.name for field in dataclasses.fields(scratch.ScratchConfig))
POOLINGS = ("pool", "text_pooling")
RECALL = Curves(
    "nats per pair",
    "held-out retrieval",
    "recall at 1",
    "pairs",
    (
        ("image_to_text_r1", "#b5532a", "image to text"),
        ("text_to_image_r1", "#1f4e8c", "text to image"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Settings of a contrastive run: a fresh model, one of pretrained towers, or one to go on from.

    Images and captions are told apart within a step's batch, over all processes and
    micro-batches: a smaller micro_batch saves memory and changes nothing that is learned.
    """

    out: Path = Path("runs/contrastive")
    loss: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid (SigLIP) scores each pair by itself; softmax (CLIP) picks each one's partner."""

    start: str | None = None
    """A contrastive model to go on from: a run, a folder in our layout, transformers' or
    open_clip's, or a hub id. Its own towers and heads are taken."""
    vision: str = NEW
    """The image's tower: "new" (a fresh transformer of the sizes below), "demo", "kind:id" of a
    pretrained one, or the folder of a model or run, as in stage 1."""
    text: str = NEW
    """The text's tower: "new", "demo" (SmolLM2-135M), or the hub id or folder of a text encoder or
    causal language model. Both towers are new, or neither."""
    lock_image: bool = False
    """Leave the image's tower as it is, and train the rest (LiT). Its weights are kept, and
    saved, in the precision of the run."""
    lock_text: bool = False
    """Leave the text's tower as it is."""

    image_px: int = 64
    """Side of the image that a new tower sees."""
    patch_px: int = 8
    """Side of its patches."""
    width: int = 192
    """Width of a new image's tower, a multiple of 64."""
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
    """How a pretrained image's tower becomes one vector."""
    text_pooling: Literal["own", "class", "mean", "last"] = "mean"
    """How a pretrained text's tower becomes one vector."""

    held_out_rows: int = 400
    """How many of its rows are evaluated, during training and at the end alike, since recall goes
    by their number; 0 evaluates nothing."""
    augment: Augmentation = "light"
    epochs: Literal["exact", "resampled"] = "exact"
    """exact: every row once before any comes again; resampled: each draw takes any row."""
    image_rate: float = Usual(1e-3)
    """Peak learning rate of the image's tower."""
    text_rate: float = Usual(1e-3)
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

    def build(self) -> ContrastiveModel:
        """The model to train.

        Raises ValueError where settings are given that the way of building does not read.
        """
        self._require_read()
        if self.start is not None:
            return self._loaded()
        if self.vision == NEW:
            sizes = {name: getattr(self, name) for name in SIZES}
            return scratch.build(scratch.ScratchConfig(**sizes), self.loss, self.seed)
        return compose_contrastive.build(
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

    def unread_rates(self) -> dict[str, str]:
        locked = {"image": self.lock_image, "text": self.lock_text}
        return {f"{tower}_rate": f"--lock-{tower} locks it" for tower in locked if locked[tower]}

    def memory_remedies(self) -> tuple[str, ...]:
        return ("shorten texts (--length)",) if self.start is None else ()

    def _loaded(self) -> ContrastiveModel:
        import vlm

        model = vlm.load(self.start, device="cpu", dtype="stored")
        if not isinstance(model, ContrastiveModel):
            raise ValueError(
                f"start {self.start!r}: expected a contrastive model, found a "
                f"{model.module.family} one"
            )
        has_bias = model.module.bias is not None
        if has_bias != (self.loss == "sigmoid"):
            raise ValueError(
                f"start {self.start!r}: it was trained with the "
                f"{'sigmoid' if has_bias else 'softmax'} loss, found --loss {self.loss}"
            )
        return model

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
            unread["a locked image's tower"] = ("image_rate",)
        if self.lock_text:
            unread["a locked text's tower"] = ("text_rate",)
        if self.lock_image and self.lock_text:
            unread["a pair of locked towers"] = ("layer_decay",)
        for way, names in unread.items():
            self.require_not_given(way, sorted(names))


def training_data(settings: Settings) -> MixtureDataset:
    """The mixture of the settings' sources."""
    require_share("warmup_ratio", settings.warmup_ratio)
    sources = [settings.open(spec) for spec in settings.train]
    if settings.weights is not None:
        check_weights(settings.weights, [source.name for source in sources])
    resampled = settings.epochs == "resampled"
    mixture = Mixture(sources, settings.weights, settings.seed, resampled=resampled)
    return MixtureDataset(sources, mixture, settings.bad_rows, LEVELS[settings.augment])


def run(settings: Settings, make_stage: MakeStage, make_objective: MakeObjective) -> dict[str, Any]:
    """One run from settings to result: trains, evaluates retrieval on held-out rows, saves."""
    training_run = TrainingRun(settings, RECALL)
    data = settings.data()
    held_out = settings.open(settings.held_out) if settings.held_out_rows else None
    training_run.check(data, held_out, reads_prompts=False)
    with training_run.accelerator.main_process_first():
        model = settings.build()
    plan = training_run.stage(make_stage, model.module)
    there = sum(map(len, data.sources))
    if there < settings.batch:
        training_run.say(
            f"a batch of {settings.batch} holds rows more than once, as the data have {there}: the "
            "loss tells a caption apart from its own image's other copies"
        )
    rows, skipped, cut = training_run.held_out(model, held_out)
    accelerator = training_run.accelerator
    evaluate = partial(retrieval_on, model, held_out, rows, accelerator) if rows else None
    objective = make_objective(settings, model, plan)
    training_run.preflight(model, plan, data, objective)
    progress = fit(
        model,
        plan,
        data,
        training_run.folder,
        accelerator,
        objective,
        training_run.loop(),
        evaluate=evaluate,
    )
    training_run.save(model)
    more: dict[str, Any] = {"scale": model.module.log_scale.exp().item()}
    if evaluate:
        more |= {"held_out": held_out.name, "held_out_skipped": skipped}
        more |= {"held_out_cut_tokens": cut}
    figures = evaluate() if evaluate else {}
    show = partial(_report, training_run, model.processor.length)
    return training_run.end(progress, figures, more, show)


def retrieval_on(
    model: ContrastiveModel,
    source: Source,
    rows: Sequence[int],
    accelerator: Accelerator,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Recall both ways among the images and captions of rows: each image's own caption is the
    one right text. The same on any number of ranks.

    Returns pairs (how many), image_to_text_r1, _r5, _r10 and text_to_image_r1, _r5, _r10 (shares),
    and each with _ci after it (low and high end of its 95 % interval).
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
    metrics: dict[str, Any] = {"pairs": len(rows)}
    for name in ("image_to_text", "text_to_image"):
        for k, recall in getattr(found, name).recall.items():
            metrics |= with_ci(f"{name}_r{k}", recall)
    return metrics


def _report(training_run: TrainingRun, length: int, result: dict[str, Any]) -> None:
    """The run's result, for people. length: the most tokens of a text."""
    say = training_run.say
    training_run.say_skipped(result, str(length))
    say(f"{training_run.settings.out}: loss.png, metrics.jsonl, model/", highlight=False)
    if "pairs" not in result:
        return
    directions = []
    for name in ("image_to_text", "text_to_image"):
        low, high = result[f"{name}_r1_ci"]
        share = result[f"{name}_r1"]
        directions.append(f"{name.replace('_', ' ')} {share:.1%} ({low:.1%} to {high:.1%})")
    say(
        f"recall@1 on {result['held_out']}, {result['pairs']} pairs: {', '.join(directions)}; "
        f"chance {1 / result['pairs']:.1%}",
        style="bold",
    )
