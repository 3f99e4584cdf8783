"""Training steps beside transformers' Llava class: same weights, same examples, one run.

    OMP_NUM_THREADS=2 python eval/speed_training.py --stages 1 2 3 [--nanovlm CHECKOUT]

Sizes are SigLIP-B/16-224 and SmolLM2-135M with random weights, batch 8, answers of unequal lengths.
Stage 1 trains the adaptor, stage 2 the language model too, stage 3 all. First both give their loss
in fp32, which must agree to 1e-4. Then each variant trains in a process of its own, in turn, for
several rounds: ours with the state and step of `fit` (packed rows, the loss in chunks, bf16 compute
copies of fp32 master weights), with a token cache too where the image tokenizer is frozen. In bf16
Llava trains under autocast with fp32 weights (what a Trainer does with bf16=True) and in pure bf16,
trained weights too; in fp32 it has one variant. Reported are the medians of samples/s and of the
process's peak memory while it trains (without building the model), and the ratios; the operations
a second that our steps reach; and, with --profile, which operations their time goes to.

With --nanovlm, the folder of a checkout of nanoVLM, the same is done beside it, in bf16 under
autocast as its own training does, for a model of its structure: SigLIP's normed tokens and one
linear map.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import (
    STEPS,
    add_precision,
    autocast,
    child,
    chosen,
    in_turn,
    medians,
    parse,
    parser_for,
    repeat,
)
from nanovlm import nanovlm_of
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from vlm import adaptors
from vlm.families.decoder_only.batch import IMAGE, Batch, Row
from vlm.families.decoder_only.module import DecoderOnly
from vlm.image_tokens import ViewGroup
from vlm.losses.token import token_losses
from vlm.pixels import HALF, PixelSpec
from vlm.precision import DTYPES
from vlm.tokenizers.encoders import ENCODERS
from vlm.tokenizers.transformers import TransformersTokenizer
from vlm.training.activation_checkpointing import set_mmap_threshold
from vlm.training.flops import flop_counter
from vlm.training.loading.token_cache import cached_tokens
from vlm.training.objectives.base import sum_totals
from vlm.training.objectives.next_token import NextToken
from vlm.training.stages import FROZEN, Stage
from vlm.training.state import build_state

Step = Callable[[], float]
FlopsOf = Callable[[], int]

VARIANTS = {"bf16": ("ours", "llava-autocast", "llava-bf16"), "fp32": ("ours", "llava-fp32")}
CACHED = "ours, tokens kept"
"""Ours where the image tokenizer is frozen, from the second epoch on."""
NANO = ("ours-linear", "nanovlm")
RATES = {
    1: (("adaptor.*", 1e-3), ("*", FROZEN)),
    2: (("adaptor.*", 1e-4), ("text.*", 1e-4), ("*", FROZEN)),
    3: (("*", 1e-4),),
}
"""Stage -> what learns, at which rate."""
BATCH = 8
PACK = 2048
VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
              num_attention_heads=12, image_size=224, patch_size=16)  # fmt: skip
TEXT = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            max_position_embeddings=8192, pad_token_id=2)  # fmt: skip


def llava(vision: dict = VISION, text: dict = TEXT, image_id: int = 49151, seed: int = 0):
    """transformers' Llava of the given sizes with random weights, in fp32."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=LlamaConfig(**text),
        image_token_index=image_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    return LlavaForConditionalGeneration._from_config(config, dtype=torch.float32).eval()


def ours_from(peer: LlavaForConditionalGeneration, linear: bool = False) -> DecoderOnly:
    """Our model with a Llava's weights. linear: of nanoVLM's structure instead, with normed image
    tokens and one linear map, whose bias is zero."""
    config = peer.config
    side = config.vision_config.image_size
    width = config.text_config.hidden_size
    spec = PixelSpec(
        size_hw=(side, side), fit="stretch", resample="bicubic", mean=HALF.mean, std=HALF.std
    )
    tower = type(peer.model.vision_tower)(config.vision_config).eval()
    tower.load_state_dict(peer.model.vision_tower.state_dict())
    tower.set_attn_implementation(ENCODERS[config.vision_config.model_type].attention)
    tokenizer = TransformersTokenizer(
        tower, spec, layer=-1, prefix="drop", norm=linear, pooled=False
    )
    adaptor = adaptors.build(
        {
            "kind": "mlp",
            "in_width": config.vision_config.hidden_size,
            "out_width": width,
            "depth": 1 if linear else 2,
            "hidden_width": width,
        }
    )
    projector = peer.model.multi_modal_projector
    adaptor.layers[0].load_state_dict(projector.linear_1.state_dict())
    if linear:
        nn.init.zeros_(adaptor.layers[0].bias)
    else:
        adaptor.layers[2].load_state_dict(projector.linear_2.state_dict())
    text = LlamaForCausalLM._from_config(config.text_config, dtype=torch.float32)
    text.model.load_state_dict(peer.model.language_model.state_dict())
    text.lm_head.load_state_dict(peer.lm_head.state_dict())
    return DecoderOnly(tokenizer, adaptor, text).eval()


def batch_for(
    peer: LlavaForConditionalGeneration, size: int = 8, prompt: int = 20, seed: int = 1
) -> tuple[Batch, dict[str, Tensor]]:
    """One batch for both: ours, and Llava's keyword arguments. Each row is an image, a prompt of
    `prompt` random ids, and an answer of 8 to 71 ids, unequal from row to row."""
    generator = torch.Generator().manual_seed(seed)
    side = peer.config.vision_config.image_size
    image_tokens = (side // peer.config.vision_config.patch_size) ** 2
    answers = [8 + (i * 63) // max(size - 1, 1) for i in range(size)]
    T = image_tokens + prompt + max(answers)
    ids = torch.randint(3, peer.config.text_config.vocab_size - 1, (size, T), generator=generator)
    ids[:, :image_tokens] = IMAGE
    position = torch.arange(T)
    ends = torch.tensor([image_tokens + prompt + answer for answer in answers])
    valid = position < ends[:, None]
    scored = valid & (position >= image_tokens + prompt)
    ids[~valid] = peer.config.text_config.pad_token_id
    pixels = torch.randn(size, 3, side, side, generator=generator)
    owner = torch.tensor([[row, 0, 0] for row in range(size)])
    ours = Batch(
        ids=ids,
        valid=valid,
        scored=scored,
        positions=position * valid,
        groups=(ViewGroup(pixels=pixels, owner=owner),),
        names=tuple(f"row {row}" for row in range(size)),
    )
    theirs = {
        "input_ids": ids.masked_fill(ids == IMAGE, peer.config.image_token_id),
        "attention_mask": valid.long(),
        "pixel_values": pixels,
        "labels": ids.masked_fill(~scored, -100),
    }
    return ours, theirs


def losses(peer: LlavaForConditionalGeneration) -> tuple[float, float]:
    """The fp32 loss of one batch: ours, Llava's."""
    ours, theirs = batch_for(peer)
    with torch.no_grad():
        mine = token_losses(ours_from(peer)(ours), ours.targets).mean()
        return float(mine), float(peer(**theirs).loss)


def losses_beside_nanovlm(peer: LlavaForConditionalGeneration, folder: Path) -> tuple[float, float]:
    """The fp32 loss of one batch: ours of nanoVLM's structure, nanoVLM's."""
    ours, theirs = batch_for(peer)
    mine = ours_from(peer, linear=True)
    model = nanovlm_of(folder, mine, peer.config.image_token_id).eval()
    with torch.no_grad():
        loss = float(token_losses(mine(ours), ours.targets).mean())
        return loss, float(nanovlm_loss(model, theirs))


def nanovlm_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Its loss of Llava's arguments: labels stand at the position before, and rows end with
    padding, which no real position sees."""
    targets = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return model(batch["input_ids"], batch["pixel_values"], targets=targets)[1]


def rows_of(batch: Batch) -> list[Row]:
    """The rows of a padded batch with one image each, as a loader gives them."""
    (group,) = batch.groups
    return [
        Row(
            name=name,
            ids=batch.ids[row, batch.valid[row]],
            scored=batch.scored[row, batch.valid[row]],
            views=((group.pixels[row], (0, 0)),),
        )
        for row, name in enumerate(batch.names)
    ]


def step_of_ours(
    peer: LlavaForConditionalGeneration,
    stage: int,
    dtype: torch.dtype,
    linear: bool = False,
    cached: bool = False,
) -> tuple[Step, FlopsOf]:
    """A step as `vlm.training.fit` makes it, and one whose operations are to be counted. cached:
    with a token cache, as long as the process lasts."""
    rows = rows_of(batch_for(peer, BATCH)[0])
    return step_of_fit(ours_from(peer, linear), rows, RATES[stage], dtype, cached)


def step_of_fit(
    module: DecoderOnly,
    rows: list[Row],
    rates: tuple[tuple[str, float | None], ...],
    dtype: torch.dtype,
    cached: bool = False,
) -> tuple[Step, FlopsOf]:
    """A step over rows, packed, with the state that `vlm.training.fit` builds; and one whose
    operations are to be counted. rates: as in `Stage`. cached: as in `step_of_ours`."""
    set_mmap_threshold()
    size = len(rows)
    stage = Stage(name="speed", rates=rates, steps=1, batch=size, micro_batch=size, warmup_steps=0)
    state = build_state(module, stage, dtype)
    if cached:
        held = contextlib.ExitStack()
        atexit.register(held.close)
        folder = held.enter_context(tempfile.TemporaryDirectory())
        held.enter_context(cached_tokens(module.tokenizer, Path(folder)))
    objective = NextToken(pad_id=2, pack=PACK)
    batches = objective.collate(rows)
    totals = sum_totals(objective.totals, [objective.count(part) for part in batches])
    computes = partial(autocast, dtype)

    def counted() -> int:
        with flop_counter() as counter, state.computing():
            objective.backward(module, batches, totals, computes)
        state.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    return partial(state.learn, objective, batches, totals, computes), counted


def step_of_llava(peer: LlavaForConditionalGeneration, stage: int, variant: str) -> Step:
    """A step as a training loop over transformers' own class makes it."""
    _, theirs = batch_for(peer, BATCH)
    parts = {1: ["multi_modal_projector"], 2: ["multi_modal_projector", "language_model"]}
    peer.requires_grad_(stage == 3)
    for name in parts.get(stage, []):
        getattr(peer.model, name).requires_grad_(True)
    if variant == "llava-bf16":
        peer.to(torch.bfloat16)
    peer.train()

    def loss() -> Tensor:
        with autocast(torch.bfloat16 if variant == "llava-autocast" else torch.float32):
            given = theirs
            if variant == "llava-bf16":
                given = theirs | {"pixel_values": theirs["pixel_values"].bfloat16()}
            return peer(**given).loss

    return step_of_peer(peer, loss)


def step_of_nanovlm(
    peer: LlavaForConditionalGeneration, stage: int, dtype: torch.dtype, folder: Path
) -> Step:
    """A step as nanoVLM's own training makes it."""
    _, theirs = batch_for(peer, BATCH)
    model = nanovlm_of(folder, ours_from(peer, linear=True), peer.config.image_token_id)
    model.requires_grad_(stage == 3)
    for part in {1: [model.MP], 2: [model.MP, model.decoder], 3: []}[stage]:
        part.requires_grad_(True)
    model.train()

    def loss() -> Tensor:
        with autocast(dtype):
            return nanovlm_loss(model, theirs)

    return step_of_peer(model, loss)


def step_of_peer(model: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
    """A plain step: one pass, gradients clipped, fused AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def train(variant: str, stage: int, settings: argparse.Namespace) -> dict[str, Any]:
    """Trains; samples/s (median step), peak memory in MB, the first loss, and of ours the GFLOP/s
    and, where asked for, a table of operations."""
    dtype = DTYPES[settings.precision]
    peer = llava()
    counted = None
    if variant in ("ours", "ours-linear", CACHED):
        linear, cached = variant == "ours-linear", variant == CACHED
        step, counted = step_of_ours(peer, stage, dtype, linear, cached)
    elif variant == "nanovlm":
        step = step_of_nanovlm(peer, stage, dtype, settings.nanovlm)
    else:
        step = step_of_llava(peer, stage, variant)
    del peer
    trained = repeat(step, settings.steps - 1)
    found = {
        "samples_per_s": BATCH / trained.seconds,
        "peak_mb": trained.peak_mb,
        "loss": trained.values[0],
    }
    if counted is not None:
        found["gflops"] = counted() / trained.seconds / 1e9
    if settings.profile:
        with torch.profiler.profile() as profile:
            step()
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14)
        found["profile"] = table
    return found


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[1], choices=sorted(RATES))
    parser.add_argument(
        "--steps", type=int, default=6, help="steps in each; the first is not timed"
    )
    parser.add_argument("--profile", action="store_true", help="where the time of ours goes")
    parser.add_argument("--nanovlm", type=Path, help="a checkout of nanoVLM, to compare beside")
    add_precision(parser)
    names = (*sum(VARIANTS.values(), ()), CACHED, *NANO)
    parser.add_argument("--only", choices=names, help=argparse.SUPPRESS)
    settings = parse(parser)
    if settings.steps < 2:
        parser.error(f"--steps: expected at least 2, found {settings.steps}")
    if settings.only:
        (stage,) = settings.stages
        print(json.dumps(train(settings.only, stage, settings)))
        return
    chosen(settings)
    variants = VARIANTS[settings.precision]
    require_same(*losses(llava()), "Llava")
    if settings.nanovlm:
        require_same(*losses_beside_nanovlm(llava(), settings.nanovlm), "nanoVLM")
    for stage in settings.stages:
        compare(stage, (*variants, CACHED) if stage < 3 else variants, settings)
        if settings.nanovlm:
            compare(stage, NANO, settings)
    print("speed: ours / variant, higher is better; memory: ours / variant, lower is better")


def require_same(mine: float, theirs: float, peer: str) -> None:
    """Prints both losses, and ends the run where they differ."""
    print(f"fp32 loss: ours {mine:.6f}, {peer} {theirs:.6f}, difference {abs(mine - theirs):.1e}")
    if abs(mine - theirs) > 1e-4:
        sys.exit("the losses differ: speeds would mean nothing")


def compare(stage: int, variants: tuple[str, ...], settings: argparse.Namespace) -> None:
    """Prints one stage's table; the first of the variants is ours."""
    ours = variants[0]
    profiled: set[str] = set()

    def measured(variant: str) -> dict[str, Any]:
        profile = settings.profile and variant == ours and variant not in profiled
        profiled.add(variant)
        return child(settings, variant, stages=[stage], profile=profile)

    found = in_turn(variants, settings.rounds, measured)
    middle = medians(found)
    print(f"\nstage {stage}; ours at {middle[ours]['gflops']:,.0f} GFLOP/s")
    STEPS.print_head()
    STEPS.print_rows(middle)
    if "profile" in found[ours][0]:
        print(found[ours][0]["profile"])


if __name__ == "__main__":
    main()
