"""Fine-tuning steps beside transformers' own class of a published system: same weights, same rows.

    OMP_NUM_THREADS=2 python eval/speed_finetune.py --tower frozen full [--layers 2]

Cases are published geometries with random weights: SmolVLM-256M (SigLIP-B/16-512 tiles,
SmolLM2-135M). Rows are unequal: text alone, images of one to five views, two images. transformers'
class gets them from a collator as its documentation has it: padded to the longest, with images of
zeros up to the most views, and as labels all ids but those of padding and image tokens; ours packs
them, with the state and step of `fit`. Adaptor and language model learn, and the image tokenizer
with --tower full. First both give their loss in fp32, which must agree to 1e-4. Then each variant
trains in a process of its own, in turn, for several rounds: transformers' class in bf16 under
autocast with fp32 weights. Where the tower is frozen, ours trains with a token cache too, as from
the second epoch on. Reported are the medians of samples/s and of the process's peak memory while it
trains (without building the model), and the ratios.

--layers keeps so few layers of both models, for machines on which a step takes minutes: the loss
over the vocabulary then takes a larger share of a step than it does in the whole model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
from speed_training import require_same, step_of_fit, step_of_peer
from torch import Tensor, nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from vlm.families.decoder_only.batch import IMAGE, Row, collate
from vlm.families.decoder_only.module import DecoderOnly
from vlm.losses.token import token_losses
from vlm.pixels import HALF, PixelSpec
from vlm.precision import DTYPES
from vlm.systems import smolvlm
from vlm.systems.published import first_names, published_name
from vlm.training.stages import FROZEN

OURS, CACHED, PEER = "ours", "ours, tokens kept", "transformers"
RATES = {
    "frozen": (("adaptor.*", 1e-4), ("text.*", 1e-4), ("*", FROZEN)),
    "full": (("*", 1e-4),),
}
"""What of the tower learns -> what learns, at which rate."""
PAD = 2


class Case(NamedTuple):
    """A published geometry.

    said: what it is. peer: transformers' model in fp32, of so many layers; None: of all. ours: our
    model with its weights. rows: unequal ones. inputs: transformers' arguments of rows. tower: the
    path of its image encoder.
    """

    said: str
    peer: Callable[[int | None], nn.Module]
    ours: Callable[[nn.Module], DecoderOnly]
    rows: Callable[[nn.Module], list[Row]]
    inputs: Callable[[nn.Module, list[Row]], dict[str, Tensor]]
    tower: str


SMOLVLM_VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                      num_attention_heads=12, image_size=512, patch_size=16)  # fmt: skip
SMOLVLM_TEXT = dict(model_type="llama", vocab_size=49280, hidden_size=576, intermediate_size=1536,
                    num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
                    max_position_embeddings=8192, pad_token_id=PAD)  # fmt: skip
SMOLVLM_SHUFFLE = 4
"""Source: config.json of HuggingFaceTB/SmolVLM-256M-Instruct."""


def smolvlm_peer(layers: int | None = None, seed: int = 0) -> SmolVLMForConditionalGeneration:
    """transformers' SmolVLM-256M with random weights."""
    torch.manual_seed(seed)
    few = {} if layers is None else {"num_hidden_layers": layers}
    config = SmolVLMConfig(
        vision_config=SMOLVLM_VISION | few,
        text_config=SMOLVLM_TEXT | few,
        image_token_id=SMOLVLM_TEXT["vocab_size"] - 1,
        scale_factor=SMOLVLM_SHUFFLE,
        tie_word_embeddings=False,
    )
    return SmolVLMForConditionalGeneration._from_config(config, dtype=torch.float32).eval()


def smolvlm_ours(peer: SmolVLMForConditionalGeneration) -> DecoderOnly:
    """Our model with the weights of transformers'."""
    side = peer.config.vision_config.image_size
    tile = PixelSpec(
        size_hw=(side, side), fit="stretch", resample="lanczos", mean=HALF.mean, std=HALF.std
    )
    module = smolvlm.compose(peer.config, tile, long_px=4 * side)
    state, _ = first_names(peer.state_dict(), smolvlm.KEY_MAP, (), "transformers")
    own = {key: state[published_name(key, smolvlm.KEY_MAP)] for key in module.state_dict()}
    module.load_state_dict(own)
    return module.eval()


SMOLVLM_ROWS = (((), 120), ((1,), 12), ((3,), 40), ((5,), 24), ((3, 3), 60))
"""Views of each image of a row, and ids of its text."""


def smolvlm_rows(peer: SmolVLMForConditionalGeneration, seed: int = 1) -> list[Row]:
    """Rows of random ids and pixels, two ids before each view and one after an image, where its
    marks stand; all ids are scored but those of image tokens."""
    generator = torch.Generator().manual_seed(seed)
    vision, vocab = peer.config.vision_config, peer.config.text_config.vocab_size
    tokens = (vision.image_size // vision.patch_size) ** 2 // peer.config.scale_factor**2

    def text(count: int) -> Tensor:
        return torch.randint(PAD + 1, vocab - 1, (count,), generator=generator)

    def pixels() -> Tensor:
        side = vision.image_size
        return torch.randn(3, side, side, generator=generator)

    rows = []
    for number, (images, count) in enumerate(SMOLVLM_ROWS):
        parts, views = [text(4)], []
        for image, of_image in enumerate(images):
            for view in range(of_image):
                parts += [text(2), torch.full((tokens,), IMAGE)]
                views.append((pixels(), (image, view)))
            parts.append(text(1))
        ids = torch.cat([*parts, text(count)])
        rows.append(Row(name=f"row {number}", ids=ids, scored=ids != IMAGE, views=tuple(views)))
    return rows


def smolvlm_inputs(peer: SmolVLMForConditionalGeneration, rows: list[Row]) -> dict[str, Tensor]:
    """What transformers' processor and the collator of its documentation make of rows."""
    padded = collate(rows, PAD)
    most, side = max(len(row.views) for row in rows), peer.config.vision_config.image_size
    pixels = torch.zeros(len(rows), most, 3, side, side)
    for number, row in enumerate(rows):
        for view, (seen, _) in enumerate(row.views):
            pixels[number, view] = seen
    real = torch.tensor([[view < len(row.views) for view in range(most)] for row in rows])
    return {
        "input_ids": padded.ids.masked_fill(padded.ids == IMAGE, peer.config.image_token_id),
        "attention_mask": padded.valid.long(),
        "labels": padded.ids.masked_fill(~padded.scored, -100),
        "pixel_values": pixels,
        "pixel_attention_mask": real[..., None, None].expand(-1, -1, side, side),
    }


CASES = {
    "smolvlm": Case(
        "SmolVLM-256M: SigLIP-B/16-512 tiles, pixel shuffle by 4, SmolLM2-135M",
        smolvlm_peer,
        smolvlm_ours,
        smolvlm_rows,
        smolvlm_inputs,
        "model.vision_model",
    ),
}


def losses(case: Case, layers: int | None) -> tuple[float, float]:
    """The fp32 loss of the rows: ours, transformers'."""
    peer = case.peer(layers)
    rows = case.rows(peer)
    batch = collate(rows, PAD)
    with torch.no_grad():
        mine = token_losses(case.ours(peer)(batch), batch.targets).mean()
        return float(mine), float(peer(**case.inputs(peer, rows)).loss)


def train(variant: str, case: Case, tower: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Trains; samples/s (median step), peak memory in MB, and the first loss."""
    dtype = DTYPES[settings.precision]
    peer = case.peer(settings.layers)
    rows = case.rows(peer)
    if variant == PEER:
        step = step_of_transformers(case, peer, rows, tower, dtype)
    else:
        step, _ = step_of_fit(case.ours(peer), rows, RATES[tower], dtype, variant == CACHED)
    del peer
    trained = repeat(step, settings.steps - 1)
    return {
        "samples_per_s": len(rows) / trained.seconds,
        "peak_mb": trained.peak_mb,
        "loss": trained.values[0],
    }


def step_of_transformers(
    case: Case, peer: nn.Module, rows: list[Row], tower: str, dtype: torch.dtype
) -> Callable[[], float]:
    """A step as a training loop over transformers' own class makes it."""
    peer.train()
    peer.get_submodule(case.tower).requires_grad_(tower == "full")
    inputs = case.inputs(peer, rows)

    def loss() -> Tensor:
        with autocast(dtype):
            return peer(**inputs).loss

    return step_of_peer(peer, loss)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tower", nargs="+", default=["frozen"], choices=sorted(RATES))
    parser.add_argument("--layers", type=int, help="layers of each model; by default all")
    parser.add_argument(
        "--steps", type=int, default=4, help="steps in each; the first is not timed"
    )
    add_precision(parser)
    parser.add_argument("--only", choices=(OURS, CACHED, PEER), help=argparse.SUPPRESS)
    settings = parse(parser)
    for name, least in (("steps", 2), ("layers", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            parser.error(f"--{name}: expected at least {least}, found {value}")
    if settings.only:
        (name,), (tower,) = settings.cases, settings.tower
        print(json.dumps(train(settings.only, CASES[name], tower, settings)))
        return
    chosen(settings)
    for name in settings.cases:
        case = CASES[name]
        cut = "all layers" if settings.layers is None else f"{settings.layers} layers of each alone"
        print(f"\n{case.said}; {cut}")
        require_same(*losses(case, settings.layers), "transformers")
        for tower in settings.tower:
            print(f"\nimage tokenizer {tower}")
            variants = (OURS, PEER, CACHED) if tower == "frozen" else (OURS, PEER)
            measured = partial(child, settings, cases=[name], tower=[tower])
            STEPS.print_head()
            STEPS.print_rows(medians(in_turn(variants, settings.rounds, measured)))
    print("speed: ours / variant, higher is better; memory: ours / variant, lower is better")


if __name__ == "__main__":
    main()
