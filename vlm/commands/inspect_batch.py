"""What a batch really holds, before any training: decoded text with scored tokens in colour,
image runs collapsed, the mask, boxes; who shares a packed row, and where the borders are; of
contrastive models images and captions in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from vlm.data.example import Box, Skipped
from vlm.draw_packed import Segment, draw_packed
from vlm.families.contrastive.batch import Pair, PairBatch, collate_pairs
from vlm.families.contrastive.processor import PairProcessor
from vlm.families.decoder_only.batch import IMAGE, Batch, Row, collate, pack_rows
from vlm.families.decoder_only.processor import Processor
from vlm.families.line_reader.batch import LineBatch, LineRow, by_width, collate_lines
from vlm.families.line_reader.processor import LineProcessor
from vlm.image_tokens import Pixels
from vlm.losses.ctc import least_columns
from vlm.tokenizers.columns import STRIDE
from vlm.training.objectives.next_token import NextToken

SCORED, RUN, PAD, BORDER = "bold green", "bold cyan", "dim", "bold magenta"
UNSCORED = "strike yellow"


def show_rows(
    rows: Sequence[Row | Pair | LineRow | Skipped],
    processor: Processor | PairProcessor | LineProcessor,
    console: Console,
    pack: int | None = None,
) -> Batch | PairBatch | list[LineBatch] | list[Batch] | None:
    """Prints rows as they are trained on, whichever family's processor made them; gives the batch,
    None where every row was skipped. pack: the most places of a packed row; None pads."""
    if pack is not None:
        return show_packed(rows, processor, console, pack)
    if isinstance(processor, LineProcessor):
        return show_lines(rows, processor, console)
    if isinstance(processor, PairProcessor):
        return show_pairs(rows, processor, console)
    if hasattr(processor, "text_tokenizer"):
        return show_batch(rows, processor, console)
    return show_any(rows, console)


def show_any(rows: Sequence[Any], console: Console) -> None:
    """Prints rows of a family that has no view of its own here: the sizes of their views, and their
    ids."""
    for row in _kept(rows, console):
        console.print()
        console.print(Text(row.name, style="bold"), end="")
        sizes = ", ".join(_shapes(pixels, 0) for pixels, _ in row.views)
        console.print(f"  {len(row.views)} views: {sizes}", highlight=False)
        ids = " ".join(str(int(id)) for id in row.ids)
        console.print(Text(f"ids  {ids}"))


def show_lines(
    rows: Sequence[LineRow | Skipped], processor: LineProcessor, console: Console
) -> list[LineBatch] | None:
    """Prints lines as a line reader is trained on them: their pixels, their tokens, their text as
    it comes back from its ids; gives the batches, None where every row was skipped."""
    kept = _kept(rows, console)
    if not kept:
        return None
    for row in kept:
        console.print()
        console.print(Text(row.name, style="bold"), end="")
        H, W = row.pixels.shape[-2:]
        narrow = "" if row.fits else "; too narrow for its text, so it is not learned from"
        console.print(
            f"  {H} x {W} pixels, {W // STRIDE} tokens, {len(row.ids)} characters, "
            f"at least {least_columns(row.ids)} tokens{narrow}",
            highlight=False,
        )
        console.print(Text(processor.decode(row.ids), style=SCORED))
    groups = by_width([row.pixels.shape[-1] for row in kept])
    batches = [collate_lines([kept[number] for number in group]) for group in groups]
    shapes = ", ".join(" x ".join(map(str, batch.pixels.shape)) for batch in batches)
    console.print(f"\nbatches of one width: {shapes}", highlight=False)
    return batches


def draw_rows(
    rows: Sequence[Row | Pair | LineRow | Skipped],
    processor: Processor | PairProcessor | LineProcessor,
    path: Path,
    pack: int | None = None,
) -> None:
    """The images that rows show a model, as it sees them, over their names, as a PNG. Where rows
    are packed, `pack` places at most, each of them as a band, its examples' images below.

    Raises ValueError where no row has an image; of packed rows, where there is none.
    """
    from vlm.draw import draw_lines, draw_page

    if pack is not None:
        kept = [row for row in rows if not isinstance(row, Skipped)]
        parts = [[_segment(row, processor) for row in part] for part in pack_rows(kept, pack)]
        return draw_packed(parts, pack, path)
    kept = [row for row in rows if not isinstance(row, Skipped) and row.views]
    if not kept:
        raise ValueError("expected a row with an image to draw, found none")
    seen = [to_pil_image(processor.pixel_spec.unnormalise(row.views[0][0])) for row in kept]
    if isinstance(processor, LineProcessor):
        texts = [processor.decode(row.ids) for row in kept]
        draw_lines(seen, texts, texts, path, [row.name for row in kept])
    else:
        draw_page(seen, [row.name for row in kept], path)


def _segment(row: Row, processor: Processor) -> Segment:
    spec = processor.pixel_spec
    images = [to_pil_image(spec.unnormalise(view)) for view, _ in row.views]
    scored = row.scored.clone()
    scored[0] = False  # nothing stands before it
    return Segment(row.name, _kinds(row.ids, scored), images)


def show_batch(
    rows: Sequence[Row | Skipped], processor: Processor, console: Console
) -> Batch | None:
    """Prints rows as they are trained on; gives the batch, None where every row was skipped.

    Green is scored (learned), struck out in yellow an answer that is not, cyan an image run with
    its number of places, dim what is padding. Line breaks are shown as ⏎.
    """
    kept = _kept(rows, console)
    if not kept:
        return None
    batch = collate(kept, processor.pad_id)
    for b, row in enumerate(kept):
        console.print()
        _show_places(row, batch, b, slice(None), processor, console)
    _show_pixels(batch, console)
    return batch


def show_packed(
    rows: Sequence[Row | Skipped], processor: Processor, console: Console, pack: int
) -> list[Batch] | None:
    """Prints rows as they are trained on end to end, as one micro-batch; gives its batches, one for
    each packed row, None where every row was skipped.

    pack: the most places of a packed row. Colours are those of `show_batch`; a line stands between
    examples, with the place where the next begins.
    """
    kept = _kept(rows, console)
    if not kept:
        return None
    objective = NextToken(processor.pad_id, pack)
    batches = list(objective.collate(kept))
    for number, (batch, part) in enumerate(zip(batches, pack_rows(kept, pack), strict=True)):
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
            _show_places(row, batch, 0, slice(start, end), processor, console)
        console.print(Text(f"──┤ end {bounds[-1]} ├{'─' * 40}", style=BORDER))
        _show_pixels(batch, console)
    padded = NextToken(processor.pad_id)
    console.print(
        f"\n{len(kept)} examples in {len(batches)} packed rows: utilisation "
        f"{_utilisation(objective, batches):.0%} of the positions computed; padded side by side it "
        f"would be {_utilisation(padded, padded.collate(kept)):.0%}",
        highlight=False,
    )
    return batches


def _utilisation(objective: NextToken, batches: Sequence[Batch]) -> float:
    """Real places over those computed, as a run logs it."""
    counts = [objective.count(batch) for batch in batches]
    return sum(count.tokens for count in counts) / sum(count.positions for count in counts)


def _show_places(
    row: Row, batch: Batch, b: int, own: slice, processor: Processor, console: Console
) -> None:
    """Prints one example: its places `own` of row b of a batch."""
    ids, scored, valid = (mask[b, own] for mask in (batch.ids, batch.scored, batch.valid))
    console.print(Text(row.name, style="bold"), end="")
    console.print(
        f"  {len(row.ids)} positions: {int((row.ids == IMAGE).sum())} image, "
        f"{int((row.ids != IMAGE).sum())} text, {int(row.scored.sum())} scored; "
        f"{int((~valid).sum())} padding" + (f"; {row.cut} text tokens cut" if row.cut else ""),
        highlight=False,
    )
    if row.system is not None:
        console.print(Text(f"system message  {row.system!r}"))
    if row.unscored is not None:
        console.print(Text(f"{_answers(row.unscored)} not scored", style=UNSCORED))
    colour = console.is_terminal and not console.no_color
    console.print(row_text(ids, scored, valid, row, processor, colour))
    console.print(Text(f"scored mask  {mask_runs(scored)}", style="dim"))
    console.print(Text(f"valid mask   {mask_runs(valid)}", style="dim"))
    if row.layout.sees == "prefix":  # read at once, the rest after it
        console.print(Text(f"prefix mask  {mask_runs(batch.prefix[b, own])}", style="dim"))
    for box in row.boxes:
        console.print(box_line(box), highlight=False)


def _show_pixels(batch: Batch, console: Console) -> None:
    for group in batch.groups:
        shapes = _shapes(group.pixels, 1)
        console.print(f"\npixels of {len(group.owner)} views: {shapes}", highlight=False)


def show_pairs(
    rows: Sequence[Pair | Skipped], processor: PairProcessor, console: Console
) -> PairBatch | None:
    """Prints pairs as they are trained on: the size of each view, and the caption as it comes back
    from its ids, the tokenizer's own first and end tokens included, padding dim; gives the batch,
    None where every row was skipped."""
    kept = _kept(rows, console)
    if not kept:
        return None
    batch = collate_pairs(kept)
    for b, pair in enumerate(kept):
        valid = batch.valid[b]
        console.print()
        console.print(Text(pair.name, style="bold"), end="")
        console.print(
            f"  {int(valid.sum())} text tokens; {int((~valid).sum())} padding"
            + (f"; {pair.cut} text tokens cut" if pair.cut else ""),
            highlight=False,
        )
        console.print(caption_text(batch.ids[b], valid, processor))
        sizes = ", ".join(_shapes(pixels, 0) for pixels, _ in pair.views)
        console.print(f"image: {sizes}", highlight=False)
    return batch


def caption_text(ids: Tensor, valid: Tensor, processor: PairProcessor) -> Text:
    """One caption, decoded: ids int64[T], valid bool[T]."""
    text = Text()
    start = 0
    for real, run in groupby(valid.tolist()):
        length = len(list(run))
        piece = ids[start : start + length]
        start += length
        if real:
            said = processor.text_tokenizer.decode(piece, skip_special_tokens=False)
            text.append(said.replace("\n", "⏎"))
        else:
            text.append(f"[padding × {length}]", style=PAD)
    return text


def _kept(rows: Sequence, console: Console) -> list:
    """The rows without the skipped ones, which are printed."""
    for row in rows:
        if isinstance(row, Skipped):
            console.print(Text(f"skipped {row.name}: {row.reason}", style="bold red"))
    return [row for row in rows if not isinstance(row, Skipped)]


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
                count = next(spans).length
                text.append(f"[image × {count}]", style=RUN)
                length -= count
        elif kind == "pad":
            text.append(f"[padding × {length}]", style=PAD)
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
    """The first real place of a row: bool[T]."""
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
    """What each place is: "image", "scored" or "prompt". ids int64[T], scored bool[T]."""
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


def _shapes(pixels: Pixels, skip: int) -> str:
    """Shapes of pixels without their first `skip` axes."""
    if isinstance(pixels, Tensor):
        return " × ".join(map(str, pixels.shape[skip:]))
    return ", ".join(_shapes(part, skip) for part in pixels)
