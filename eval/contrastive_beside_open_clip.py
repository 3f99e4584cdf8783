"""A small SigLIP trained from scratch, by our recipe and by open_clip's own training program.

    python eval/contrastive_beside_open_clip.py

Both train on the packaged drawings (one vendor's), with towers of the same sizes, the same number
of pairs, batch, rate, schedule and weight decay, in bf16 under autocast, one after the other on the
same machine. Each keeps its own preprocessing and augmentation. Both are then judged by the same
embeddings and figures: retrieval among another vendor's drawings of the same things and their
names, and ours besides by zero-shot classification into their groups. Seconds are those of training
alone, from the first step to the last, as each program logs them.

open_clip's run is `open_clip_train.main` with a model of its own kind (its vision transformer with
mean pooling, its text transformer at the same length), `--siglip`, CSV data and one worker.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import open_clip
import torch
from torch import Tensor

import vlm
from vlm.data.sources import open_source
from vlm.metrics.classification import classification
from vlm.metrics.retrieval import retrieval
from vlm.pixels import open_image
from vlm.training.contrastive import Settings

ROOT = Path(__file__).resolve().parent.parent
TRAIN, HELD_OUT = "sample:train", "sample:transfer"
NAME = "beside"
PEER = """
import sys
import open_clip
open_clip.add_model_config(sys.argv[1])
from open_clip_train.main import main
main(sys.argv[2:])
"""


def train_ours(settings: argparse.Namespace, folder: Path) -> float:
    """Trains by the recipe into folder/ours; seconds of the steps."""
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "recipes" / "contrastive.py")),
            *("--out", str(folder / "ours"), "--train", TRAIN, "--held-out-rows", "0"),
            *("--steps", str(settings.steps), "--batch", str(settings.batch)),
            *("--image-rate", str(settings.rate), "--text-rate", str(settings.rate)),
            *("--head-rate", str(settings.rate), "--save-every", "0"),
            *("--seed", str(settings.seed), "--floor", "0"),
        ],
        check=True,
    )
    lines = (folder / "ours" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["samples_per_s"] for line in lines if "samples_per_s" in line]
    return sum(settings.batch / rate for rate in rates)


def train_peer(settings: argparse.Namespace, folder: Path) -> float:
    """Trains by open_clip's program into folder/open_clip; seconds of the steps."""
    sizes = Settings()
    config = {
        "embed_dim": sizes.embed_width,
        "init_logit_scale": 2.302585,
        "init_logit_bias": -10,
        "vision_cfg": {
            "image_size": sizes.image_px,
            "patch_size": sizes.patch_px,
            "width": sizes.width,
            "layers": sizes.depth,
            "head_width": 64,
            "pool_type": "avg",
        },
        "text_cfg": {
            "context_length": sizes.length,
            "vocab_size": 49408,
            "width": sizes.text_width,
            "heads": sizes.text_width // 64,
            "layers": sizes.text_depth,
        },
    }
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / f"{NAME}.json").write_text(json.dumps(config))
    source = open_source(TRAIN)
    pictures = folder / "pictures"
    pictures.mkdir()
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        for row in range(len(source)):
            example = source[row]
            path = pictures / f"{row}.png"
            open_image(example.images[0]).save(path)
            writer.writerow([str(path), example.answer])
    epochs = max(1, round(settings.steps / (len(source) // settings.batch)))
    subprocess.run(
        [
            *(sys.executable, "-c", PEER, str(folder / "configs")),
            *("--model", NAME, "--siglip", "--dataset-type", "csv"),
            *("--train-data", str(folder / "train.csv")),
            *("--batch-size", str(settings.batch), "--epochs", str(epochs)),
            *("--lr", str(settings.rate), "--wd", "0.1", "--beta2", "0.95"),
            *("--warmup", str(round(0.05 * settings.steps)), "--grad-clip-norm", "1.0"),
            *("--precision", "amp_bf16", "--device", "cpu", "--workers", "1"),
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


def embed_peer(folder: Path, pictures: list, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings by the model that open_clip's program saved."""
    open_clip.add_model_config(folder / "configs")
    (path,) = (folder / "open_clip" / "checkpoints").glob("*.pt")
    model, _, preprocess = open_clip.create_model_and_transforms(NAME)
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict(state)
    model.eval()
    tokenizer = open_clip.get_tokenizer(NAME)
    with torch.no_grad():
        images = torch.cat(
            [
                model.encode_image(torch.stack([preprocess(p) for p in pictures[i : i + 64]]))
                for i in range(0, len(pictures), 64)
            ]
        )
        return images, model.encode_text(tokenizer(texts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep both runs here; default: a folder that goes")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.out or Path(temporary)
        seconds = {
            "ours": train_ours(settings, folder),
            "open_clip": train_peer(settings, folder),
        }
        source, groups = open_source(HELD_OUT), open_source(f"{HELD_OUT}?caption=group")
        examples = [source[row] for row in range(len(source))]
        pictures = [open_image(example.images[0]) for example in examples]
        texts = [example.answer for example in examples]
        model = vlm.load(folder / "ours", dtype="float32")
        embedded = {
            "ours": (model.embed_images(pictures), model.embed_texts(texts)),
            "open_clip": embed_peer(folder, pictures, texts),
        }
        print(f"{len(texts)} pairs of {HELD_OUT}, chance {1 / len(texts):.2%}")
        print(f"{'':12} {'image to text':>24} {'text to image':>24} {'seconds':>9}")
        for name, (images, words) in embedded.items():
            found = retrieval(images, words, torch.arange(len(words)))
            cells = [
                f"{r.share:.1%} ({r.low:.1%} to {r.high:.1%})"
                for r in (found.image_to_text.recall[1], found.text_to_image.recall[1])
            ]
            print(f"{name:12} {cells[0]:>24} {cells[1]:>24} {seconds[name]:9.0f}")
        print(f"speed: ours / open_clip {seconds['open_clip'] / seconds['ours']:.2f}x")
        true = [groups[row].answer for row in range(len(groups))]
        labels = sorted(set(true))
        scores = model.classify(pictures, [label.replace("-", " ") for label in labels])
        figures = classification(scores, torch.tensor([labels.index(t) for t in true]), scale=1.0)
        print(
            f"zero-shot group of ours: {figures.top_1.share:.1%}, chance {1 / len(labels):.1%} "
            f"of {len(labels)} groups"
        )


if __name__ == "__main__":
    main()
