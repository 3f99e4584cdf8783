"""Lines as `vlm inspect-batch` shows them: pixels, tokens, and texts as they come back from ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vlm.draw import draw_lines
from vlm.families.inspect import SCORED, first_images, show_head
from vlm.families.line_reader.batch import LineBatch, LineRow, by_width, collate_lines
from vlm.families.line_reader.processor import LineProcessor
from vlm.losses.ctc import least_columns
from vlm.tokenizers.columns import STRIDE


def show(rows: Sequence[LineRow], processor: LineProcessor, console: Console) -> list[LineBatch]:
    """Prints lines as a line reader is trained on them; gives the batches, of one width each."""
    for row in rows:
        H, W = row.pixels.shape[-2:]
        narrow = "" if row.fits else "; too narrow for its text, so it is not learned from"
        said = (
            f"{H} x {W} pixels, {W // STRIDE} tokens, {len(row.ids)} characters, "
            f"at least {least_columns(row.ids)} tokens{narrow}"
        )
        console.print()
        show_head(row, said, console)
        console.print(Text(processor.decode(row.ids), style=SCORED))
    groups = by_width([row.pixels.shape[-1] for row in rows])
    batches = [collate_lines([rows[number] for number in group]) for group in groups]
    shapes = ", ".join(" x ".join(map(str, batch.pixels.shape)) for batch in batches)
    console.print(f"\nbatches of one width: {shapes}", highlight=False)
    return batches


def draw(rows: Sequence[LineRow], processor: LineProcessor, path: Path) -> None:
    """The lines over their texts, as a PNG."""
    kept, seen = first_images(rows, processor)
    texts = [processor.decode(row.ids) for row in kept]
    draw_lines(seen, texts, texts, path, [row.name for row in kept])
