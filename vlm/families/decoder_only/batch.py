"""Rows and batches of families whose images stand in the text stream.

A row is one stream of positions: a text id at each, or IMAGE where an image token stands. IMAGE is
no id of any vocabulary, so text that happens to spell an image mark can never be taken for an
image. A batch holds rows padded to the longest, or packed: its only row holds all examples end to
end, and none of them sees another.

Shapes: B row, S example, T position, V view, P packed image tokens, N target, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm.data.example import Box
from vlm.families.decoder_only.image_layout import (
    Arrangement,
    PositionNumbers,
    Sees,
    StreamLayout,
    arrange,
)
from vlm.families.rows import require_text, stretched
from vlm.image_tokens import Pixels, ViewGroup, group_views


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One example, ready to be batched.

    name: the example's own name.
    ids: int64[T], IMAGE at image positions; scored: bool[T], True at targets of the loss.
    views: pixels of each view, without a view axis, with its (image, view) numbers, in which
        images and non-causal texts are counted through in the order of the stream.
    texts: the views of its non-causal texts, in the same form (`docked_text`).
    layout: how the images and texts stand in the stream, and what each position sees.
    boxes: the example's boxes, in the pixels of its original images.
    unscored: bool[T], True at the text of answers that are context alone; None where there is none.
    system: the system message that was put in; None where that was left to the chat template.
    cut: the number of text tokens that had to go to fit the context.
    """

    name: str
    ids: Tensor
    scored: Tensor
    views: tuple[tuple[Pixels, tuple[int, int]], ...]
    layout: StreamLayout = field(default_factory=StreamLayout)
    texts: tuple[tuple[Tensor, tuple[int, int]], ...] = ()
    boxes: tuple[Box, ...] = ()
    cut: int = 0
    unscored: Tensor | None = None
    system: str | None = None

    @property
    def positions(self) -> Tensor:
        """Its position ids, as its layout has them: int64[T] or int64[3, T]."""
        return self.layout.positions(self.ids == IMAGE)

    @property
    def length(self) -> int:
        """Positions of its stream."""
        return len(self.ids)

    def with_text(self, count: int) -> Row:
        """The row with `count` text tokens, at least 1, cut at its end, or with more of what its
        end holds; its images stay. Raises ValueError where that would cut them."""
        require_text(count)
        images = int((self.ids == IMAGE).sum())
        ids = stretched(self.ids, images + count)
        if int((ids == IMAGE).sum()) != images:
            raise ValueError(
                f"{self.name}: {count} text tokens would cut its images; its text has "
                f"{len(self.ids) - images}"
            )
        unscored = None if self.unscored is None else stretched(self.unscored, len(ids))
        scored = stretched(self.scored, len(ids))
        return replace(self, ids=ids, scored=scored, unscored=unscored)


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
    common = _common(rows)
    positions = torch.zeros(len(rows), T, dtype=torch.long)
    if common.position_numbers == 3:
        positions = positions.repeat(3, 1, 1)
    for b, row in enumerate(rows):
        start = 0 if padding == "right" else T - len(row.ids)
        stop = start + len(row.ids)
        ids[b, start:stop] = row.ids
        valid[b, start:stop] = True
        positions[..., b, start:stop] = row.positions
        scored[b, start:stop] = row.scored
        scored[b, start] = False  # nothing stands before the first position to predict it
    return Batch(
        ids=ids,
        valid=valid,
        scored=scored,
        positions=positions,
        groups=_groups(rows),
        names=tuple(row.name for row in rows),
        padding=padding,
        arrangement=arrange([row.layout for row in rows]),
        sees=common.sees,
    )


def collate_packed(rows: Sequence[Row]) -> Batch:
    """A batch of rows, at least one, as one packed row: end to end in their order, no padding.

    The first position of each is no target, since nothing of its own stands before it.
    """
    common = _common(rows)
    lengths = torch.tensor([len(row.ids) for row in rows])
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    scored = torch.cat([row.scored for row in rows])
    scored[bounds[:-1]] = False
    return Batch(
        ids=torch.cat([row.ids for row in rows])[None],
        valid=torch.ones(1, len(scored), dtype=torch.bool),
        scored=scored[None],
        positions=torch.cat([row.positions for row in rows], dim=-1).unsqueeze(-2),
        groups=_groups(rows),
        names=tuple(row.name for row in rows),
        bounds=bounds.int(),
        arrangement=arrange([row.layout for row in rows]),
        sees=common.sees,
    )


def _groups(rows: Sequence[Row]) -> tuple[ViewGroup, ...]:
    """The views of all images, and those of non-causal texts."""
    return group_views(rows) + group_views([_Texts(row.texts) for row in rows])


class _Texts(NamedTuple):
    """The non-causal texts of a row as `group_views` takes them."""

    views: tuple[tuple[Tensor, tuple[int, int]], ...]


def _common(rows: Sequence[Row]) -> StreamLayout:
    """A layout that sees what the positions of all rows see, and has their position numbers. Raises
    ValueError naming a row that differs."""
    common = rows[0].layout if rows else StreamLayout()
    for row in rows:
        if row.layout.sees != common.sees:
            raise ValueError(
                f"{row.name}: expected a {common.sees} row, as {rows[0].name} is, found a "
                f"{row.layout.sees} one"
            )
        if row.layout.position_numbers != common.position_numbers:
            raise ValueError(
                f"{row.name}: expected position_numbers={common.position_numbers}, as "
                f"{rows[0].name} has, found {row.layout.position_numbers}"
            )
    return common


def pack_rows(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """The rows in few parts of at most `most` positions each, every part in the rows' own order. A
    longer row is a part of its own: none is skipped or cut.

    First fit decreasing: the longest row first, each into the first part that can hold it.
    """
    parts: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number].ids)):
        length = len(rows[number].ids)
        part = next((part for part, left in enumerate(free) if left >= length), len(parts))
        if part == len(parts):
            parts.append([])
            free.append(most)
        parts[part].append(number)
        free[part] -= length
    return [[rows[number] for number in sorted(part)] for part in parts]


def rows_of_like_length(rows: Sequence[Row], spread: float = 1.5) -> list[list[Row]]:
    """The rows in parts whose longest is at most `spread` times the shortest, each in the rows' own
    order, so that a short caption is not padded to a long document's length."""
    parts: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number].ids)):
        if not parts or len(rows[number].ids) > spread * len(rows[parts[-1][0]].ids):
            parts.append([])
        parts[-1].append(number)
    return [[rows[number] for number in sorted(part)] for part in parts]


IMAGE = -1
"""Stands in `ids` where an image token, or one of a non-causal text, is placed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Examples as padded rows, or end to end in one packed row, with the views of their images.

    ids: int64[B, T], text ids, IMAGE at image positions, any valid id at padding.
    valid: bool[B, T], False at padding, which is all on one side.
    scored: bool[B, T], True where the id is a target of the loss; never at IMAGE, padding or the
        first position of an example.
    positions: int64[B, T], or int64[3, B, T] where position ids have three numbers: the position
        id of each position within its example, as its layout has it; 0 at padding.
    groups: the views of all images, grouped by pixel size, and those of non-causal texts; empty for
        text alone. Their owners are numbers of examples.
    names: each example's own name, for messages and records.
    padding: "right" or "left", the side that padding lies on.
    bounds: int32[S + 1], where each example of a packed row begins, and the row's end; None where
        each has a row of its own.
    arrangement: which image tokens stand in the stream; None where all do, in their order.
    sees: what the positions of every example see, as in `StreamLayout`.
    dummy_groups: dummy views that go through the image tokenizer and the adaptor and are placed
        nowhere, so that sharded processes make the same calls whatever their rows hold.
    """

    ids: Tensor
    valid: Tensor
    scored: Tensor
    positions: Tensor
    groups: tuple[ViewGroup, ...]
    names: tuple[str, ...]
    padding: str = "right"
    bounds: Tensor | None = None
    arrangement: Arrangement | None = None
    sees: Sees = "causal"
    dummy_groups: tuple[ViewGroup, ...] = ()

    @property
    def position_numbers(self) -> PositionNumbers:
        """How many numbers a position id has."""
        return 1 if self.positions.dim() == 2 else 3

    @property
    def example(self) -> Tensor:
        """The number of each position's example among `names`, int64[B, T]."""
        numbers = torch.arange(len(self.names), device=self.ids.device)
        if self.bounds is None:
            return numbers[:, None].expand(self.ids.shape)
        T = self.ids.shape[1]
        return numbers.repeat_interleave(self.bounds.diff(), output_size=T)[None]

    @property
    def prefix(self) -> Tensor:
        """The positions that see each other, bool[B, T]: none under "causal"; under "prefix" those
        before an example's first target, image and prompt."""
        if self.sees == "causal":
            return torch.zeros_like(self.valid)
        seen = self.scored.cumsum(1)
        if self.bounds is not None:
            seen = seen - seen[0, self.bounds[:-1]][self.example]
        return self.valid & (seen == 0)

    @property
    def targets(self) -> Tensor:
        """The ids to predict, int64[N], row by row."""
        return self.ids[self.scored]

    @property
    def target_rows(self) -> Tensor:
        """The number of each target's example among `names`, int64[N]."""
        return self.example[self.scored]

    def to(self, device: torch.device | str, pixel_dtype: torch.dtype | None = None) -> Batch:
        """The batch on a device; pixels also in `pixel_dtype` (None keeps theirs)."""
        return replace(
            self,
            ids=self.ids.to(device),
            valid=self.valid.to(device),
            scored=self.scored.to(device),
            positions=self.positions.to(device),
            groups=tuple(group.to(device, pixel_dtype) for group in self.groups),
            bounds=None if self.bounds is None else self.bounds.to(device),
            arrangement=None if self.arrangement is None else self.arrangement.to(device),
            dummy_groups=tuple(group.to(device, pixel_dtype) for group in self.dummy_groups),
        )


def place(
    text: Tensor,
    is_image: Tensor,
    tokens: Tensor,
    example: Tensor,
    names: Sequence[str],
    bounds: Tensor | None = None,
) -> Tensor:
    """The stream of vectors: image tokens at image positions, text vectors elsewhere.

    text: float[B, T, D]; what it holds at image positions is ignored.
    is_image: bool[B, T], True at image positions.
    tokens: float[P, D], in stream order; example: int64[P], the example of each.
    names: each example's name, for messages. bounds: of a packed row, as in `Batch`.
    Raises ValueError where an example has more or fewer image positions than tokens, naming every
    such one and both numbers.

    >>> text = torch.zeros(1, 3, 1)
    >>> is_image = torch.tensor([[False, True, True]])
    >>> image_tokens = torch.tensor([[5.0], [7.0]])
    >>> place(text, is_image, image_tokens, torch.tensor([0, 0]), ["row"])[0, :, 0].tolist()
    [0.0, 5.0, 7.0]
    """
    found = torch.bincount(example, minlength=len(names))
    if bounds is None:
        expected = is_image.sum(1)
    else:
        expected = F.pad(is_image[0].cumsum(0), (1, 0))[bounds].diff()
    wrong = (found != expected).nonzero()[:, 0].tolist()
    if wrong or len(found) != len(names):
        rows = "; ".join(
            f"{names[row]}: {int(expected[row])} image positions in the text, "
            f"{int(found[row])} image tokens from its images"
            for row in wrong
        )
        raise ValueError(f"image positions and image tokens differ in {len(wrong)} rows: {rows}")
    return text.masked_scatter(is_image[..., None], tokens.to(text.dtype))
