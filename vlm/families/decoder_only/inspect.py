"""Rows with images in their stream as `vlm inspect-batch` shows them: decoded text with scored
tokens in colour, image runs collapsed, masks, boxes; who shares a packed row, and where the borders
are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from vlm.data.example import Box
from vlm.draw_packed import Segment, draw_packed
from vlm.families.decoder_only.batch import (
    IMAGE,
    Batch,
    Row,
    collate,
    collate_packed,
    pack_rows,
    rows_of_like_length,
)
from vlm.families.decoder_only.processor import Processor
from vlm.families.inspect import SCORED, draw_first_images, padding, shapes, show_head

RUN, BORDER, UNSCORED = "bold cyan", "bold magenta", "strike yellow"


def show(
    rows: Sequence[Row], processor: Processor, console: Console, pack: int | None = None
) -> list[Batch]:
    """Prints rows as they are trained on; gives the batches: one, or one for each packed row.

    Green is scored (learned), struck out in yellow an answer that is not, cyan an image run or a
    non-causal text with its number of positions, dim what is padding. Line breaks are shown as ⏎.
    pack: the most positions of a packed row, in which rows stand end to end, as one micro-batch;
        None pads.
    """
    if pack is not None:
        return _show_packed(rows, processor, console, pack)
    batch = collate(rows, processor.pad_id)
    for b, row in enumerate(rows):
        console.print()
        _show_positions(row, batch, b, slice(None), processor, console)
    _show_pixels(batch, console)
    return [batch]


def draw(rows: Sequence[Row], processor: Processor, path: Path, pack: int | None = None) -> None:
    """The images that rows show a model, as it sees them, over their names, as a PNG. Packed rows
    are drawn position by position, each example over its images.

    Raises ValueError where no row has an image and none is packed.
    """
    if pack is None:
        draw_first_images(rows, processor, path)
        return
    parts = [[_segment(row, processor) for row in part] for part in pack_rows(rows, pack)]
    draw_packed(parts, pack, path)


def _segment(row: Row, processor: Processor) -> Segment:
    spec = processor.pixel_spec
    images = [to_pil_image(spec.unnormalise(view)) for view, _ in row.views]
    scored = row.scored.clone()
    scored[0] = False  # nothing stands before it
    return Segment(row.name, _kinds(row.ids, scored), images)


def _show_packed(
    rows: Sequence[Row], processor: Processor, console: Console, pack: int
) -> list[Batch]:
    """Rows end to end: a line stands between examples, with the position where the next begins."""
    parts = pack_rows(rows, pack)
    batches = [collate_packed(part) for part in parts]
    for number, (batch, part) in enumerate(zip(batches, parts, strict=True)):
        bounds, count = batch.bounds.tolist(), f"{len(part)} example{'s' * (len(part) > 1)}"
        console.print()
        console.print(Text(f"packed row {number + 1} of {len(batches)}", style="bold"), end="")
        console.print(
            f"  {count} end to end, {bounds[-1]} positions of at most {pack} "
            f"({bounds[-1] / pack:.0%}); borders at {' '.join(map(str, bounds))}",
            highlight=False,
        )
        for row, start, end in zip(part, bounds, bounds[1:]):
            console.print(Text(f"──┤ position {start} ├{'─' * 40}", style=BORDER))
            _show_positions(row, batch, 0, slice(start, end), processor, console)
        console.print(Text(f"──┤ end {bounds[-1]} ├{'─' * 40}", style=BORDER))
        _show_pixels(batch, console)
    padded = [collate(part, processor.pad_id) for part in rows_of_like_length(rows)]
    console.print(
        f"\n{len(rows)} examples in {len(batches)} packed rows: utilisation "
        f"{_utilisation(batches):.0%} of the positions computed; padded side by side it "
        f"would be {_utilisation(padded):.0%}",
        highlight=False,
    )
    return batches


def _utilisation(batches: Sequence[Batch]) -> float:
    """Real positions over those computed, as a run logs it."""
    real = sum(int(batch.valid.sum()) for batch in batches)
    return real / sum(batch.valid.numel() for batch in batches)


def _show_positions(
    row: Row, batch: Batch, b: int, own: slice, processor: Processor, console: Console
) -> None:
    """Prints one example: its positions `own` of row b of a batch."""
    ids, scored, valid = (mask[b, own] for mask in (batch.ids, batch.scored, batch.valid))
    placed = int((row.ids == IMAGE).sum())
    docked = sum(span.length for span in row.layout.spans if span.text is not None)
    said = (
        f"{len(row.ids)} positions: {placed - docked} image, {len(row.ids) - placed} text, "
        + f"{docked} docked text, " * bool(docked)
        + f"{int(row.scored.sum())} scored; {int((~valid).sum())} padding"
    )
    show_head(row, said, console)
    if row.system is not None:
        console.print(Text(f"system message  {row.system!r}"))
    if row.unscored is not None:
        console.print(Text(f"{_answers(row.unscored)} not scored", style=UNSCORED))
    colour = console.is_terminal and not console.no_color
    console.print(row_text(ids, scored, valid, row, processor, colour))
    show_masks(scored, valid, console)
    if row.layout.sees == "prefix":  # read at once, the rest after it
        console.print(Text(f"prefix mask  {mask_runs(batch.prefix[b, own])}", style="dim"))
    for box in row.boxes:
        console.print(box_line(box), highlight=False)


def show_masks(scored: Tensor, valid: Tensor, console: Console) -> None:
    """Prints the masks of a row, each bool[T], as runs."""
    console.print(Text(f"scored mask  {mask_runs(scored)}", style="dim"))
    console.print(Text(f"valid mask   {mask_runs(valid)}", style="dim"))


def _show_pixels(batch: Batch, console: Console) -> None:
    for group in batch.groups:
        sizes = shapes(group.pixels, 1)
        if group.is_text:
            console.print(f"\nids of {len(group.owner)} docked texts: {sizes}", highlight=False)
            continue
        console.print(f"\npixels of {len(group.owner)} views: {sizes}", highlight=False)


def row_text(
    ids: Tensor,
    scored: Tensor,
    valid: Tensor,
    row: Row,
    processor: Processor,
    colour: bool = True,
) -> Text:
    """One row, decoded: ids int64[T], scored and valid bool[T]. Without colour, scored text stands
    in [[double brackets]], and answers that are not scored in [unscored: ...]."""
    text = Text()
    spans = iter(row.layout.spans)
    kinds = [kind if ok else "pad" for kind, ok in zip(_kinds(ids, scored), valid.tolist())]
    if row.unscored is not None:
        for t in row.unscored.nonzero()[:, 0].tolist():
            kinds[t + _first(valid)] = "unscored"
    start = 0
    for kind, run in groupby(kinds):
        length = len(list(run))
        piece = ids[start : start + length]
        start += length
        if kind == "image":
            while length:
                span = next(spans)
                what = "image" if span.text is None else f"docked {span.text!r}"
                text.append(f"[{what} × {span.length}]", style=RUN)
                length -= span.length
        elif kind == "pad":
            text.append(padding(length))
        else:
            said = processor.text_tokenizer.decode(piece, skip_special_tokens=False)
            said = said.replace("\n", "⏎")
            if kind == "scored":
                text.append(said if colour else f"[[{said}]]", style=SCORED)
            elif kind == "unscored":
                text.append(said if colour else f"[unscored: {said}]", style=UNSCORED)
            else:
                text.append(said)
    return text


def _first(valid: Tensor) -> int:
    """The first real position of a row: bool[T]."""
    return int(valid.int().argmax())


def _answers(unscored: Tensor) -> str:
    """How many answers a mask bool[T] shows.

    >>> import torch
    >>> _answers(torch.tensor([False, True, True, False, True]))
    '2 answers'
    """
    count = sum(value for value, _ in groupby(unscored.tolist()))
    return f"{count} answer{'s' * (count > 1)}"


def _kinds(ids: Tensor, scored: Tensor) -> list[str]:
    """What each position is: "image", "scored" or "prompt". ids int64[T], scored bool[T]."""
    return [
        "image" if id == IMAGE else "scored" if hit else "prompt"
        for id, hit in zip(ids.tolist(), scored.tolist())
    ]


def mask_runs(mask: Tensor) -> str:
    """A mask bool[T] as runs.

    >>> import torch
    >>> mask_runs(torch.tensor([False, False, True]))
    '0×2 1×1'
    """
    return " ".join(f"{int(value)}×{len(list(run))}" for value, run in groupby(mask.tolist()))


def box_line(box: Box) -> str:
    """A box in words: x0, y0, x1, y1 in pixels of the original image."""
    x0, y0, x1, y1 = box.xyxy_px
    return f"  box on image {box.image}: {box.label!r} x {x0:g}–{x1:g}, y {y0:g}–{y1:g} px"
