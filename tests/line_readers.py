"""Tiny line readers, lines for them, and settings of a run that trains one."""

import torch
from PIL import Image

from tests import tiny
from tests.pages import DEJAVU
from vlm.families.line_reader import layout as line_reader
from vlm.training.runs.line_reader import LineReaderSettings


def parts(characters="abc ", seed=0):
    return line_reader.build(
        characters, height_px=16, channels=(8, 16), blocks=(1, 1), width=64, layers=3, seed=seed
    )


def line(text="ab", width=96, height=24, seed=0):
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))
    image = Image.fromarray((noise * 255).byte().numpy())
    return tiny.example(f"line {seed}", (None,), text, images=(image,))


LINES = f":fonts={DEJAVU}:kind=clean:longest=6"


SIZES = dict(height_px=16, width=64, depth=2)


def settings(folder, **changes):
    values = dict(
        out=folder,
        steps=3,
        batch=4,
        precision="fp32",
        workers=0,
        held_out_rows=8,
        eval_every=2,
        save_every=0,
        threads=1,
        train=(f"lines:1000:seed=1{LINES}",),
        held_out=f"lines:8:seed=2{LINES}:split=validation",
    )
    sizes = {} if "start" in changes else SIZES  # of a new reader alone
    return LineReaderSettings(**values | sizes | changes)
