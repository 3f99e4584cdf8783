"""A small SigLIP trained from scratch, by our recipe and by open_clip's own training program.

    python eval/contrastive_beside_open_clip.py

Both train the same architecture, layer by layer with as many parameters, on the packaged drawings
(one vendor's): the same number of steps and of pairs in each, batch, rate, schedule, weight decay
and precision (bf16 is what open_clip calls amp_bf16), one after the other on the same machine. Both
are then evaluated by the same embeddings and figures: retrieval among another vendor's drawings of
the same things and their names, and ours besides by zero-shot classification into their groups.
Seconds are those of training alone, from the end of the first step to the end of the last, as each
program logs them.

open_clip's run is `open_clip_train.main` with `--siglip`, CSV data and one worker. Its image's
tower is a SigLIP trunk of timm's, pooled by attention, as in open_clip's own SigLIP models; its
text's tower is its causal transformer. Only whole epochs can be asked of it, so `--steps` is
brought to whole epochs for both.

What differs: each has its own initial weights, preprocessing and augmentation; open_clip skips
each epoch's rows beyond the last whole batch, ours takes all rows in turn; its text's tower
computes all positions of every caption, ours those of the batch's longest.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import open_clip
import torch
from bench import add_precision, chosen, parse, parser_for
from timm.models import VisionTransformer, register_model
from torch import Tensor, nn

import vlm
from vlm.data.sources import open_source
from vlm.families.contrastive.module import SIGMOID_BIAS, SIGMOID_SCALE
from vlm.metrics.classification import classification
from vlm.metrics.retrieval import retrieval
from vlm.pixels import open_image
from vlm.systems.scratch import HEAD_WIDTH
from vlm.training.runs.contrastive import Settings

ROOT = Path(__file__).resolve().parent.parent
TRAIN, HELD_OUT = "sample:train", "sample:transfer"
NAME, PEER = "beside", "peer"
PEER_PRECISIONS = {"bf16": "amp_bf16", "fp32": "fp32"}
"""What open_clip's program calls a precision."""
SIZES = Settings()


@register_model
def vit_beside_siglip(**_) -> VisionTransformer:
    """Our fresh image's tower in timm's class, for open_clip to find by its name."""
    trunk = VisionTransformer(
        img_size=SIZES.image_px,
        patch_size=SIZES.patch_px,
        embed_dim=SIZES.width,
        depth=SIZES.depth,
        num_heads=SIZES.width // HEAD_WIDTH,
        act_layer="gelu_tanh",
        class_token=False,
        global_pool="map",
        num_classes=0,
    )
    trunk.default_cfg = {}  # open_clip asks it for the size of a feature map, which it has not
    return trunk


def peer_config() -> dict[str, Any]:
    """open_clip's model_cfg of the recipe's fresh model."""
    return {
        "embed_dim": SIZES.embed_width,
        "init_logit_scale": math.log(SIGMOID_SCALE),
        "init_logit_bias": SIGMOID_BIAS,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": SIZES.image_px,
            "timm_model_name": vit_beside_siglip.__name__,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "linear",
        },
        "text_cfg": {
            "context_length": SIZES.length,
            "vocab_size": 49408,
            "width": SIZES.text_width,
            "heads": SIZES.text_width // HEAD_WIDTH,
            "layers": SIZES.text_depth,
        },
    }


def train_as_open_clip(configs: str, *arguments: str) -> None:
    """open_clip's own training program, with what it needs to know of the model."""
    from open_clip_train.main import main as train

    open_clip.add_model_config(configs)
    train(list(arguments))


def whole_epochs(steps: int, batch: int, rows: int) -> int:
    """The number of epochs, of whole batches alone, whose steps come nearest to `steps`.

    >>> whole_epochs(200, 128, 1720)  # 13 batches each
    15
    """
    return max(1, round(steps / (rows // batch)))


def train_ours(settings: argparse.Namespace, folder: Path, steps: int) -> float:
    """Trains by the recipe into folder/ours; seconds of the steps after the first."""
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "recipes" / "contrastive.py")),
            *("--out", str(folder / "ours"), "--train", TRAIN, "--held-out-rows", "0"),
            *("--steps", str(steps), "--batch", str(settings.batch)),
            *("--image-rate", str(settings.rate), "--text-rate", str(settings.rate)),
            *("--head-rate", str(settings.rate), "--save-every", "0"),
            *(
                "--seed",
                str(settings.seed),
                "--min-lr-ratio",
                "0",
                "--precision",
                settings.precision,
            ),
        ],
        check=True,
    )
    lines = (folder / "ours" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["samples_per_s"] for line in lines if "samples_per_s" in line]
    return sum(settings.batch / rate for rate in rates[1:])


def train_peer(settings: argparse.Namespace, folder: Path, epochs: int, steps: int) -> float:
    """Trains by open_clip's program into folder/open_clip; seconds of the steps after the first."""
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / f"{NAME}.json").write_text(json.dumps(peer_config()))
    source = open_source(TRAIN)
    images = folder / "images"
    images.mkdir()
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        for row in range(len(source)):
            example = source[row]
            path = images / f"{row}.png"
            open_image(example.images[0]).save(path)
            writer.writerow([str(path), example.answer])
    subprocess.run(
        [
            *(sys.executable, __file__, PEER, str(folder / "configs")),
            *("--model", NAME, "--siglip", "--dataset-type", "csv"),
            *("--train-data", str(folder / "train.csv")),
            *("--batch-size", str(settings.batch), "--epochs", str(epochs)),
            *("--lr", str(settings.rate), "--wd", "0.1", "--beta2", "0.95"),
            *("--warmup", str(round(0.05 * steps)), "--grad-clip-norm", "1.0"),
            *("--precision", PEER_PRECISIONS[settings.precision]),
            *("--device", "cpu", "--workers", "1"),
            *("--seed", str(settings.seed), "--logs", str(folder), "--name", "open_clip"),
            *("--log-every-n-steps", "1", "--save-frequency", str(epochs)),
        ],
        check=True,
    )
    log = (folder / "open_clip" / "out.log").read_text()
    stamps = [
        datetime.strptime(found[1], "%Y-%m-%d,%H:%M:%S")
        for found in re.finditer(r"^(\S+) \|.*Train Epoch", log, re.MULTILINE)
    ]
    return (stamps[-1] - stamps[0]).total_seconds()


def load_peer(folder: Path) -> tuple[nn.Module, Callable]:
    """The model that open_clip's program saved, and its preprocessing of an image."""
    open_clip.add_model_config(folder / "configs")
    (path,) = (folder / "open_clip" / "checkpoints").glob("*.pt")
    model, _, preprocess = open_clip.create_model_and_transforms(NAME)
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict(state)
    return model.eval(), preprocess


def embed_peer(
    model: nn.Module, preprocess: Callable, image_list: list, texts: list[str]
) -> tuple[Tensor, Tensor]:
    """Embeddings by open_clip's model."""
    tokenizer = open_clip.get_tokenizer(NAME)
    with torch.no_grad():
        images = torch.cat(
            [
                model.encode_image(torch.stack([preprocess(p) for p in image_list[i : i + 64]]))
                for i in range(0, len(image_list), 64)
            ]
        )
        return images, model.encode_text(tokenizer(texts))


def main() -> None:
    parser = parser_for(__doc__, rounds=False)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep both runs here; default: a folder that goes")
    add_precision(parser)
    settings = parse(parser)
    rows = len(open_source(TRAIN))
    if not 1 <= settings.batch <= rows:
        parser.error(f"--batch must be 1 to {rows}, the rows of {TRAIN}, found {settings.batch}")
    chosen(settings)
    epochs = whole_epochs(settings.steps, settings.batch, rows)
    steps = epochs * (rows // settings.batch)
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.out or Path(temporary)
        seconds = {
            "ours": train_ours(settings, folder, steps),
            "open_clip": train_peer(settings, folder, epochs, steps),
        }
        source, groups = open_source(HELD_OUT), open_source(f"{HELD_OUT}?caption=group")
        examples = [source[row] for row in range(len(source))]
        image_list = [open_image(example.images[0]) for example in examples]
        texts = [example.answer for example in examples]
        model = vlm.load(folder / "ours", device="cpu", dtype="float32")
        peer, preprocess = load_peer(folder)
        parameters = {
            name: sum(p.numel() for p in module.parameters())
            for name, module in (("ours", model.module), ("open_clip", peer))
        }
        embedded = {
            "ours": (model.embed_images(image_list), model.embed_texts(texts)),
            "open_clip": embed_peer(peer, preprocess, image_list, texts),
        }
        print(f"{steps} steps of {settings.batch} pairs each, {epochs} epochs of open_clip's")
        print(f"{len(texts)} pairs of {HELD_OUT}, chance {1 / len(texts):.2%}")
        print(
            f"{'':12} {'image to text':>24} {'text to image':>24} {'seconds':>9} {'parameters':>12}"
        )
        for name, (images, words) in embedded.items():
            found = retrieval(images, words, torch.arange(len(words)))
            cells = [
                f"{r.share:.1%} ({r.low:.1%} to {r.high:.1%})"
                for r in (found.image_to_text.recall[1], found.text_to_image.recall[1])
            ]
            print(
                f"{name:12} {cells[0]:>24} {cells[1]:>24} {seconds[name]:9.0f} "
                f"{parameters[name]:12,}"
            )
        print(f"speed: ours / open_clip {seconds['open_clip'] / seconds['ours']:.2f}x")
        true = [groups[row].answer for row in range(len(groups))]
        labels = sorted(set(true))
        scores = model.classify(image_list, [label.replace("-", " ") for label in labels])
        figures = classification(scores, torch.tensor([labels.index(t) for t in true]), scale=1.0)
        print(
            f"zero-shot group of ours: {figures.top_1.share:.1%}, chance {1 / len(labels):.1%} "
            f"of {len(labels)} groups"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == [PEER]:
        train_as_open_clip(*sys.argv[2:])
    else:
        main()
