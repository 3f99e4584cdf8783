"""Images and their texts as `vlm inspect-batch` shows them: the decoder's stream, start ids and
prompt before what is learned, and the sizes of the views that it attends to."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from vlm.families.decoder_only.batch import Batch, Row, collate
from vlm.families.decoder_only.inspect import row_text, show_masks
from vlm.families.encoder_decoder.processor import LineProcessor
from vlm.families.inspect import draw_first_images, show_head, show_views


def show(rows: Sequence[Row], processor: LineProcessor, console: Console) -> Batch:
    """Prints rows as they are trained on; gives the batch. Green is scored (learned), dim is
    padding; line breaks are shown as ⏎."""
    batch = collate(rows, processor.pad_id)
    colour = console.is_terminal and not console.no_color
    for b, row in enumerate(rows):
        ids, scored, valid = batch.ids[b], batch.scored[b], batch.valid[b]
        learned = int(row.scored.sum())
        said = (
            f"{len(row.ids)} tokens: {len(row.ids) - learned} start and prompt, {learned} scored; "
            f"{int((~valid).sum())} padding"
        )
        console.print()
        show_head(row, said, console)
        console.print(row_text(ids, scored, valid, row, processor, colour))
        show_masks(scored, valid, console)
        show_views(row, console)
    return batch


draw = draw_first_images
