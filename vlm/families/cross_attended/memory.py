"""The memory that cross-attention reads, and what each text position sees of it.

Image tokens do not stand in the text stream. They are encoded once and packed end to end without
padding, and a text position sees one unbroken run of them: the images that its model's rule says.
Positions that see the same lie side by side, so that attention is computed for one run of positions
after the other and needs no mask; a position that sees no image is left out altogether.

Shapes: B row, T text position, V view, L image tokens per view, P packed image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vlm.image_tokens import ImageTokens, pack, stream_order

ImagesSeen = Literal["all", "latest", "latest_group"]
"""Which images of its example a text position sees, of those whose marks stand at or before it:
"all"; "latest", the last one (Flamingo, Idefics v1); "latest_group", the last one and those whose
marks stand right before its own, with no text between them (Mllama)."""
Blind = Literal["nothing", "feed_forward", "unmasked"]
"""What blocks do for a text position that sees no image: "nothing", neither branch (Mllama, as
Meta's own code has it); "feed_forward", that branch alone (Flamingo, Idefics v1); "unmasked",
attention to all of its row's memory, tokens that are not valid included, and no feed-forward branch
(Mllama, as transformers has it: what stands before an image then depends on it)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """The image tokens of a batch, packed by example, then image, then view.

    tokens: float[P, D].
    bounds: for each example where in P each of its images begins, and where the last one ends; one
        number alone for an example without images.
    valid: bool[P], False at tokens that are seen under "unmasked" alone; None where there are none.
    """

    tokens: Tensor
    bounds: tuple[tuple[int, ...], ...]
    valid: Tensor | None = None

    def sizes(self, examples: int) -> list[int]:
        """For each of so many examples how many images it has, which is how many another must have
        to lend it its own."""
        return [len(self._bounds(example)) - 1 for example in range(examples)]

    def of(self, example: int) -> Memory:
        """The memory of one example, as that of example 0."""
        bounds = self._bounds(example)
        own = slice(bounds[0], bounds[-1])
        return Memory(
            tokens=self.tokens[own],
            bounds=(tuple(bound - bounds[0] for bound in bounds),),
            valid=None if self.valid is None else self.valid[own],
        )

    def for_examples(self, examples: int) -> Memory:
        """The same memory where there are so many examples, the last ones without images."""
        return replace(self, bounds=tuple(map(self._bounds, range(examples))))

    def _bounds(self, example: int) -> tuple[int, ...]:
        return self.bounds[example] if example < len(self.bounds) else self.bounds[-1][-1:]

    @classmethod
    def side_by_side(cls, parts: Sequence[Memory]) -> Memory:
        """The memories of `parts`, at least one part, each of one example: as those of examples 0,
        1, 2 and so on.

        >>> part = Memory(tokens=torch.zeros(5, 1), bounds=((0, 2, 5),))
        >>> Memory.side_by_side([part, part]).bounds
        ((0, 2, 5), (5, 7, 10))
        """
        bounds, start = [], 0
        for part in parts:
            bounds.append(tuple(start + bound for bound in part.bounds[0]))
            start += len(part.tokens)
        valid = None
        if any(part.valid is not None for part in parts):
            valid = torch.cat([part._all_valid() for part in parts])
        return cls(
            tokens=torch.cat([part.tokens for part in parts]), bounds=tuple(bounds), valid=valid
        )

    @classmethod
    def in_one_example(cls, parts: Sequence[Memory]) -> Memory:
        """The images of `parts`, at least one part, each of one example: as those of example 0, in
        their order.

        >>> part = Memory(tokens=torch.zeros(5, 1), bounds=((0, 2, 5),))
        >>> Memory.in_one_example([part, part]).bounds
        ((0, 2, 5, 7, 10),)
        """
        joined = cls.side_by_side(parts)
        begins = [bound for own in joined.bounds for bound in own[:-1]]
        return replace(joined, bounds=((*begins, len(joined.tokens)),))

    def _all_valid(self) -> Tensor:
        """bool[P]"""
        if self.valid is not None:
            return self.valid
        return torch.ones(len(self.tokens), dtype=torch.bool, device=self.tokens.device)


def pack_memory(groups: Sequence[ImageTokens], examples: int, keep_invalid: bool = False) -> Memory:
    """The memory of encoded views.

    groups: at least one, of one width, each with its owner.
    examples: how many examples there are, those without images counted.
    keep_invalid: whether tokens that are not valid stay, for the rule "unmasked".

    >>> views = torch.arange(6.0).view(3, 2, 1)
    >>> owner = torch.tensor([[2, 0, 0], [0, 1, 0], [0, 0, 0]])
    >>> memory = pack_memory([ImageTokens(tokens=views, grid_hw=None, owner=owner)], examples=3)
    >>> memory.tokens[:, 0].tolist(), memory.bounds
    ([4.0, 5.0, 2.0, 3.0, 0.0, 1.0], ((0, 2, 4), (4,), (4, 6)))
    """
    whole = [replace(group, valid=None) for group in groups] if keep_invalid else groups
    tokens, _ = pack(list(whole))
    lengths = [length for group in whole for length in _lengths(group)]
    owner = torch.cat([group.owner for group in whole])
    order = stream_order(owner).tolist()
    own = owner[:, :2].tolist()
    views = [(own[view], lengths[view]) for view in order]
    bounds = [[0]]
    for (example, _), image in groupby(views, key=lambda view: view[0]):
        _begin(bounds, example)
        bounds[-1].append(bounds[-1][-1] + sum(length for _, length in image))
    _begin(bounds, examples - 1)
    valid = None
    if keep_invalid and any(group.valid is not None for group in groups):
        flags = [replace(group, tokens=_valid(group)[..., None], valid=None) for group in groups]
        valid = pack(flags)[0][:, 0]
    return Memory(tokens=tokens, bounds=tuple(map(tuple, bounds)), valid=valid)


def _begin(bounds: list[list[int]], example: int) -> None:
    """Makes `bounds` go as far as this example."""
    while len(bounds) <= example:
        bounds.append([bounds[-1][-1]])


def _lengths(group: ImageTokens) -> list[int]:
    """The number of tokens of each view."""
    V, L = group.tokens.shape[:2]
    return [L] * V if group.valid is None else group.valid.sum(1).tolist()


def _valid(group: ImageTokens) -> Tensor:
    """bool[V, L]"""
    if group.valid is not None:
        return group.valid
    return torch.ones(group.tokens.shape[:2], dtype=torch.bool, device=group.tokens.device)


class Run(NamedTuple):
    """Text positions `start` to `stop` that see the tokens `first` to `last` of a memory, none
    where these are equal; the ends are exclusive.

    feeds: whether the feed-forward branch works on them. masked: whether tokens that are not valid
    are left out.
    """

    start: int
    stop: int
    first: int
    last: int
    feeds: bool
    masked: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryView:
    """What each text position of a batch sees of a memory.

    memory: what is seen.
    rows: for each row the runs that its positions 0 to T fall into, in order and without gaps.
    kept: keys and values of the memory, by the block that made them, for later calls with the same
        memory, as in generation; None keeps none.
    reached: the blocks that have read it.
    """

    memory: Memory
    rows: tuple[tuple[Run, ...], ...]
    kept: dict[Any, tuple[Tensor, Tensor]] | None = None
    reached: set[Any] = field(default_factory=set)

    @property
    def runs(self) -> Iterator[Run]:
        """The runs of all rows, their positions counted through the rows: 0 to B * T."""
        before = 0
        for row in self.rows:
            for run in row:
                yield run._replace(start=before + run.start, stop=before + run.stop)
            before += row[-1].stop

    def at(self, start: int, stop: int, rows: int) -> MemoryView:
        """The view of positions `start` to `stop`, for rows of a beam search or the same rows.

        Positions after the last see what it sees. rows: how many there are now, a multiple of those
        of this view, each of which has as many one after the other.

        >>> seen = (Run(0, 2, 0, 0, feeds=False), Run(2, 3, 0, 5, feeds=True))
        >>> view = MemoryView(memory=Memory(tokens=torch.zeros(5, 1), bounds=((0, 5),)),
        ...                   rows=(seen,))
        >>> [[run[:4] for run in row] for row in view.at(1, 4, rows=2).rows]
        [[(0, 1, 0, 0), (1, 3, 0, 5)], [(0, 1, 0, 0), (1, 3, 0, 5)]]
        """
        beams = rows // len(self.rows)
        now = []
        for row in self.rows:
            runs = [*row[:-1], row[-1]._replace(stop=max(stop, row[-1].stop))]
            cut = (run._replace(start=max(run.start, start) - start,
                                stop=min(run.stop, stop) - start) for run in runs)  # fmt: skip
            now += [tuple(run for run in cut if run.start < run.stop)] * beams
        return replace(self, rows=tuple(now))


def view_of(
    memory: Memory,
    is_image: Tensor,
    valid: Tensor,
    names: Sequence[str],
    bounds: Tensor | None = None,
    sees: ImagesSeen = "all",
    blind: Blind = "nothing",
) -> MemoryView:
    """What the text positions of a batch see of its memory.

    is_image: bool[B, T], True at the mark of an image. valid: bool[B, T], False at padding, which
        sees nothing. names: each example's, for messages. bounds: of a packed row, as in
        `vlm.families.decoder_only.batch.Batch`.
    Raises ValueError naming each example whose marks and images differ in number, with both.

    Two images of 4 and 6 tokens. The first position, before both marks, sees none; then the first
    image is seen, and from its mark on the second, or both:

    >>> memory = Memory(tokens=torch.zeros(10, 1), bounds=((0, 4, 10),))
    >>> is_image = torch.tensor([[False, True, False, True, False]])
    >>> def seen(**rule):
    ...     view = view_of(memory, is_image, torch.ones(1, 5).bool(), ["row"], **rule)
    ...     return [run[:4] for run in view.runs]
    >>> seen(sees="all")
    [(0, 1, 0, 0), (1, 3, 0, 4), (3, 5, 0, 10)]
    >>> seen(sees="latest")
    [(0, 1, 0, 0), (1, 3, 0, 4), (3, 5, 4, 10)]
    >>> seen(sees="latest_group", blind="unmasked")
    [(0, 1, 0, 10), (1, 3, 0, 4), (3, 5, 4, 10)]
    >>> is_image = torch.tensor([[False, True, True, False, False]])  # marks side by side
    >>> seen(sees="latest_group")
    [(0, 1, 0, 0), (1, 2, 0, 4), (2, 5, 0, 10)]
    """
    B, T = is_image.shape
    marks: list[list[int]] = [[] for _ in range(B)]
    for row, position in is_image.nonzero().tolist():
        marks[row].append(position)
    if bounds is None:
        starts, lengths = valid.int().argmax(1).tolist(), valid.sum(1).tolist()
        examples = [[(start, start + length)] for start, length in zip(starts, lengths)]
    else:
        ends = bounds.tolist()
        examples = [list(pairwise(ends))]
    own = [
        [[mark for mark in marks[row] if start <= mark < stop] for start, stop in spans]
        for row, spans in enumerate(examples)
    ]
    _require_images(memory, [found for row in own for found in row], names)
    rows, example = [], 0
    for spans, found in zip(examples, own):
        runs = []
        for (start, stop), at in zip(spans, found):
            runs += _runs(start, stop, at, memory.bounds[example], sees, blind)
            example += 1
        rows.append(tuple(_without_gaps(runs, T)))
    return MemoryView(memory=memory, rows=tuple(rows))


def _require_images(memory: Memory, marks: Sequence[list[int]], names: Sequence[str]) -> None:
    counts = [len(own) - 1 for own in memory.bounds]
    wrong = [
        f"{name}: {len(found)} image marks in the text, {count} images"
        for name, found, count in zip(names, marks, counts)
        if len(found) != count
    ]
    if wrong or not len(names) == len(marks) == len(counts):
        raise ValueError(f"image marks and images differ in {len(wrong)} rows: {'; '.join(wrong)}")


def _runs(
    start: int,
    stop: int,
    marks: Sequence[int],
    images: Sequence[int],
    sees: ImagesSeen,
    blind: Blind,
) -> list[Run]:
    """The runs of an example at the positions start to stop, its images beginning at `images`."""
    runs = []
    if (before := marks[0] if marks else stop) > start:
        whole = (images[0], images[-1]) if blind == "unmasked" else (images[0], images[0])
        runs.append(Run(start, before, *whole, feeds=blind == "feed_forward", masked=False))
    group = 0
    for number, (mark, after) in enumerate(zip(marks, [*marks[1:], stop])):
        parted = number and marks[number - 1] < mark - 1
        if sees == "latest" or (sees == "latest_group" and parted):
            group = number
        first, last = images[group], images[number + 1]
        runs.append(Run(mark, after, first, last, feeds=first < last or blind == "feed_forward"))
    return runs


def _without_gaps(runs: Sequence[Run], T: int) -> Iterator[Run]:
    """The runs of a row, with ones at its padding that see nothing."""
    at = 0
    for run in (*runs, Run(T, T, 0, 0, feeds=False)):
        if run.start > at:
            yield Run(at, run.start, 0, 0, feeds=False)
        if run.stop > run.start:
            yield run
        at = max(at, run.stop)
