"""How rows are shown by `vlm inspect-batch`: what the families' own `inspect.py` share.

Such a module has two functions: `show(rows, processor, console)` prints rows as they are trained on
and gives the batches that it made of them; `draw(rows, processor, path)` draws the images, as the
model sees them, into a PNG file. Both take `pack` besides, the most positions of a packed row,
where the family's recipes pack rows. rows: at least one, none of them skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from vlm.draw import draw_page
from vlm.families.rows import EncodedRow
from vlm.image_tokens import Pixels

SCORED, PAD = "bold green", "dim"
"""Styles of what is learned, and of padding."""


def show_head(row: EncodedRow, said: str, console: Console) -> None:
    """Prints the row's name and what is said of it."""
    console.print(Text(row.name, style="bold"), end="")
    cut = f"; {row.cut} text tokens cut" if row.cut else ""
    console.print(f"  {said}{cut}", highlight=False)


def show_views(row: EncodedRow, console: Console) -> None:
    """Prints the size of each view of a row."""
    sizes = ", ".join(shapes(pixels) for pixels, _ in row.views)
    console.print(f"image: {sizes}", highlight=False)


def shapes(pixels: Pixels, skip: int = 0) -> str:
    """Shapes of pixels without their first `skip` axes."""
    if isinstance(pixels, Tensor):
        return " × ".join(map(str, pixels.shape[skip:]))
    return ", ".join(shapes(part, skip) for part in pixels)


def padding(count: int) -> Text:
    """What stands for so many pads."""
    return Text(f"[padding × {count}]", style=PAD)


def first_images(
    rows: Sequence[EncodedRow], processor: Any
) -> tuple[list[EncodedRow], list[Image.Image]]:
    """The rows that have an image, and the first view of each as it is seen.

    Raises ValueError where none has one.
    """
    kept = [row for row in rows if row.views]
    if not kept:
        raise ValueError("expected a row with an image to draw, found none")
    spec = processor.pixel_spec
    return kept, [to_pil_image(spec.unnormalise(row.views[0][0])) for row in kept]


def draw_first_images(rows: Sequence[EncodedRow], processor: Any, path: Path) -> None:
    """The first view of each row over its name, as a PNG. Raises as `first_images` does."""
    kept, seen = first_images(rows, processor)
    draw_page(seen, [row.name for row in kept], path)
