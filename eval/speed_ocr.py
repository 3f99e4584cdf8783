"""Greedy reading beside transformers' VisionEncoderDecoderModel.generate: same weights and pixels.

    python eval/speed_ocr.py

TrOCR-small's sizes (DeiT at 384 pixels, six decoder layers 256 wide, 64,044 ids), random weights,
batch 16, 32 new tokens, of which none ends a line. First both write in fp32: their ids must be
identical. Then each variant writes in the same precision in a process of its own, in turn, for
several rounds. Reported are the medians of lines/s and of the process's peak memory while it writes
(without building the model), the seconds of the encoder alone, and the ratio, which alone carries
over to other machines of the kind.

Where ours gains: image keys and values are projected once, into the layout that a single query
reads fastest; what was written lies in buffers of one size; weights are laid out once for products
with few rows, in bf16 all, in fp32 those that are measured faster so; no logits processors;
images are encoded a few at a time, so that what is in work stays in the caches, in bf16 with
whole products in place of the fused attention where they gain. The encoder's products are the same
for both, so the ratio is the larger the faster a machine multiplies.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial

import torch
import transformers
from bench import Table, add_precision, child, chosen, in_turn, medians, parse, parser_for, repeat
from torch import Tensor

from vlm.families.encoder_decoder import generate as transcribe
from vlm.families.encoder_decoder.module import EncoderDecoder
from vlm.image_tokens import ViewGroup
from vlm.precision import DTYPES
from vlm.systems import trocr
from vlm.systems.published import first_names, published_name

VARIANTS = ("ours", "transformers")
TABLE = Table(
    columns={
        "lines/s": ("lines_per_s", "9.2f"),
        "encoder s": ("encoder_s", "10.3f"),
        "peak MB": ("peak_mb", "9.0f"),
    },
    ratios={"speed": ("lines_per_s", "6.2f"), "memory": ("peak_mb", "6.2f")},
    width=14,
)
SIZE = "small"
BATCH, TOKENS = 16, 32
START, PAD, NEVER = 2, 1, -1
"""Ids to begin with and at padding, and one that no model writes, so that no line ends."""


def peer(seed: int = 0) -> transformers.VisionEncoderDecoderModel:
    """transformers' model with random weights in fp32, its attention as it is by default."""
    sizes = trocr.SIZES[SIZE]
    torch.manual_seed(seed)
    config = transformers.VisionEncoderDecoderConfig(
        encoder=transformers.AutoConfig.for_model(**sizes.vision).to_dict(),
        decoder=transformers.TrOCRConfig(**sizes.text).to_dict(),
        decoder_start_token_id=START,
        pad_token_id=PAD,
    )
    model = transformers.VisionEncoderDecoderModel(config).eval()
    with torch.no_grad():  # the usual start writes one id again and again
        for parameter in model.decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=START, pad_token_id=PAD, eos_token_id=None
    )
    return model


def ours_from(model: transformers.VisionEncoderDecoderModel) -> EncoderDecoder:
    """Our model with the same weights."""
    module = trocr.build(SIZE)
    vision = module.tokenizer.config.vision_config
    key_map = trocr.key_map_for(vision)
    state, _ = first_names(model.state_dict(), key_map, trocr.unused_of(vision), "transformers")
    own = {key: state[published_name(key, key_map)] for key in module.state_dict()}
    module.load_state_dict(own)
    return module


def pixels(count: int = BATCH) -> Tensor:
    return torch.randn(count, 3, 384, 384, generator=torch.Generator().manual_seed(1))


def groups_of(views: Tensor) -> tuple[ViewGroup, ...]:
    owner = torch.tensor([[row, 0, 0] for row in range(len(views))])
    return (ViewGroup(pixels=views, owner=owner),)


def write(model, views: Tensor) -> list[list[int]]:
    """The ids that a model writes for images, start skipped."""
    if isinstance(model, EncoderDecoder):
        found = transcribe.greedy(model, groups_of(views), [START], [NEVER], PAD, TOKENS)
        return [ids for ids, _ in found]
    with torch.no_grad():
        out = model.generate(views, do_sample=False, num_beams=1, max_new_tokens=TOKENS)
    return out[:, 1:].tolist()


def measure(variant: str, repeats: int, dtype: torch.dtype) -> dict[str, float]:
    """Lines/s (median), peak memory of the process in MB, and the seconds that encoding takes."""
    model = peer()
    if variant == "ours":
        model = ours_from(model)
    model = model.to(dtype)
    views = pixels().to(dtype)
    written = repeat(lambda: write(model, views), repeats)

    @torch.no_grad()
    def encode() -> None:
        if variant == "ours":
            transcribe.encode(model, groups_of(views))
        else:
            model.encoder(views)

    return {
        "lines_per_s": BATCH / written.seconds,
        "peak_mb": written.peak_mb,
        "encoder_s": repeat(encode, repeats).seconds,
    }


def same_ids(count: int = 4) -> tuple[bool, int]:
    """Whether both write the same ids in fp32, and how many different ones."""
    model, views = peer(), pixels(count)
    theirs = write(model, views)
    mine = write(ours_from(model), views)
    return mine == theirs, len({id for ids in mine for id in ids})


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument(
        "--repeats", type=int, default=5, help="batches in each, one more to warm up"
    )
    add_precision(parser)
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    settings = parse(parser)
    if settings.only:
        print(json.dumps(measure(settings.only, settings.repeats, DTYPES[settings.precision])))
        return
    chosen(settings)
    equal, different = same_ids()
    print(f"fp32 ids: {'identical' if equal else 'different'}, {different} different ids written")
    if not equal:
        sys.exit("the ids differ: speeds would mean nothing")
    found = in_turn(VARIANTS, settings.rounds, partial(child, settings))
    TABLE.print_head()
    TABLE.print_rows(medians(found))
    print("speed: ours / variant, higher is better; memory: ours / variant, lower is better")


if __name__ == "__main__":
    main()
