"""Rows become a batch, padded or packed end to end; views of equal pixel size are stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm.data.example import BadRow, Example, Skipped
from vlm.families.decoder_only.processor import Processor, Row
from vlm.image_tokens import Pixels, ViewGroup, pixel_shape
from vlm.pixels import BadImage
from vlm.placement import Batch


def collate(rows: Sequence[Row], pad_id: int, padding: str = "right") -> Batch:
    """A batch of rows, in their order, padded on one side ("right" or "left").

    No padding lies between an image and its text: a row stays one unbroken run.
    """
    if padding not in ("right", "left"):
        raise ValueError(f"padding is 'right' or 'left', found {padding!r}")
    T = max((len(row.ids) for row in rows), default=0)
    ids = torch.full((len(rows), T), pad_id)
    valid = torch.zeros(len(rows), T, dtype=torch.bool)
    scored = torch.zeros(len(rows), T, dtype=torch.bool)
    for b, row in enumerate(rows):
        start = 0 if padding == "right" else T - len(row.ids)
        stop = start + len(row.ids)
        ids[b, start:stop] = row.ids
        valid[b, start:stop] = True
        scored[b, start:stop] = row.scored
        scored[b, start] = False  # nothing stands before the first place to predict it
    return Batch(
        ids=ids,
        valid=valid,
        scored=scored,
        groups=group_views(rows),
        names=tuple(row.name for row in rows),
        padding=padding,
    )


def collate_packed(rows: Sequence[Row]) -> Batch:
    """A batch of rows, at least one, as one packed row: end to end in their order, no padding.

    The first place of each is no target, since nothing of its own stands before it.
    """
    lengths = torch.tensor([len(row.ids) for row in rows])
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    scored = torch.cat([row.scored for row in rows])
    scored[bounds[:-1]] = False
    return Batch(
        ids=torch.cat([row.ids for row in rows])[None],
        valid=torch.ones(1, len(scored), dtype=torch.bool),
        scored=scored[None],
        groups=group_views(rows),
        names=tuple(row.name for row in rows),
        bounds=bounds.int(),
    )


def pack_rows(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """The rows in few parts of at most `most` places each, every part in the rows' own order. A
    longer row is a part of its own: none is left out or cut.

    First fit decreasing: the longest row first, each into the first part that has room for it.
    """
    parts: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number].ids)):
        length = len(rows[number].ids)
        part = next((part for part, left in enumerate(room) if left >= length), len(parts))
        if part == len(parts):
            parts.append([])
            room.append(most)
        parts[part].append(number)
        room[part] -= length
    return [[rows[number] for number in sorted(part)] for part in parts]


def group_views(rows: Sequence[Row]) -> tuple[ViewGroup, ...]:
    """All views of the rows, those of one pixel size together, each with its owner."""
    groups: dict[tuple, tuple[list, list]] = {}
    for b, row in enumerate(rows):
        for pixels, (image, view) in row.views:
            views, owners = groups.setdefault(pixel_shape(pixels), ([], []))
            views.append(pixels)
            owners.append((b, image, view))
    return tuple(
        ViewGroup(pixels=_stack(views), owner=torch.tensor(owners))
        for views, owners in groups.values()
    )


def _stack(views: Sequence[Pixels]) -> Pixels:
    if isinstance(views[0], Tensor):
        return torch.stack(list(views))
    return tuple(_stack(part) for part in zip(*views))


class Encoded(Dataset):
    """A dataset of examples as rows, pictures decoded here, in the loader's workers.

    examples: anything indexed that gives Example or Skipped. on_bad_row says what a row does that
    cannot be read or has no answer: "raise" stops, naming it; "skip" gives Skipped, to be counted.
    """

    def __init__(self, examples, processor: Processor, on_bad_row: str = "raise") -> None:
        if on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row is 'raise' or 'skip', found {on_bad_row!r}")
        self.examples = examples
        self.processor = processor
        self.on_bad_row = on_bad_row

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Row | Skipped:
        example: Example | Skipped = self.examples[index]
        if isinstance(example, Skipped):
            return example
        try:
            return self.processor.encode(example)
        except (BadRow, BadImage) as error:
            if self.on_bad_row == "raise":
                raise
            return Skipped(example.name, str(error).removeprefix(f"{example.name}: "))
