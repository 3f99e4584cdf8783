"""How the views of one image stand in the text stream: in turn, tagged, joined, fenced, or as one
mark.

Each way is a frozen value that a folder's config.json names by its `kind`; called with an image's
size, its preprocessing and the shape of each view's tokens, it gives an `ImageLayout`.

Shapes: h w rows and columns of a view's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm.config import from_dict, to_dict
from vlm.families.decoder_only.image_layout import ImageLayout, Span
from vlm.image_tokens import TokenShape


@dataclass(frozen=True, kw_only=True, slots=True)
class InTurn:
    """The tokens of each view, one view after the other, no text between them."""

    def __call__(
        self, size_hw: tuple[int, int], pixel_spec: Any, shapes: Sequence[TokenShape]
    ) -> ImageLayout:
        """The layout of an image of `size_hw` pixels whose views give tokens of `shapes`."""
        spans = tuple(Span(length=s.length, grid_hw=s.grid_hw) for s in shapes)
        return ImageLayout(pieces=spans, encoded=sum(span.length for span in spans))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tagged:
    """Tiles row by row, each after a tag that says its row and column, then the whole image; a line
    break after each row, and one more before the whole. An image of one view is the whole alone.

    mark: before each tag, and at the end. tile: the tag of a tile, with {row} and {column}, which
    count from 1. whole: the tag of the whole image. The preprocessing says rows and columns.
    Source: transformers, `processing_idefics3.py` and `processing_smolvlm.py`.
    """

    mark: str
    tile: str
    whole: str

    def __call__(
        self, size_hw: tuple[int, int], pixel_spec: Any, shapes: Sequence[TokenShape]
    ) -> ImageLayout:
        """The layout of an image of `size_hw` pixels whose views give tokens of `shapes`.

        Raises ValueError where there are not as many views as tiles and whole.
        """
        *tiles, whole = (Span(length=s.length, grid_hw=s.grid_hw) for s in shapes)
        pieces: list[Span | str] = []
        line = ""
        if tiles:
            rows, columns = pixel_spec.layout(size_hw)
            if rows * columns != len(tiles):
                raise ValueError(
                    f"expected {rows} x {columns} tiles and the whole image, found {len(shapes)} "
                    "views"
                )
            for number, tile in enumerate(tiles):
                row, column = divmod(number, columns)
                tag = self.tile.format(row=row + 1, column=column + 1)
                pieces += ["\n" * (row > 0 and column == 0) + self.mark + tag, tile]
            line = "\n\n"
        pieces += [line + self.mark + self.whole, whole, self.mark]
        return ImageLayout(pieces=tuple(pieces), encoded=sum(s.length for s in shapes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """The whole image first; then its tiles, joined to one grid from which rows and columns that
    show padding alone are taken off, each row ended by a newline token, which the adaptor gives
    before the grid of each view (`vlm.adaptors.NewlineMLP`).

    Source: LLaVA-NeXT; transformers, `modeling_llava_next.py`, `pack_image_features`.
    """

    def __call__(
        self, size_hw: tuple[int, int], pixel_spec: Any, shapes: Sequence[TokenShape]
    ) -> ImageLayout:
        """The layout of an image of `size_hw` pixels whose views give tokens of `shapes`.

        Raises ValueError where views differ in shape, have other tokens before the grid than the
        newline, or are not as many as whole and tiles.
        """
        rows, columns = pixel_spec.layout(size_hw)
        shape = shapes[0]
        if len(set(shapes)) != 1 or shape.prefix != 1 or len(shapes) != rows * columns + 1:
            raise ValueError(
                f"expected {rows * columns + 1} views of a newline token and a grid, found "
                f"{list(shapes)}"
            )
        h, w = shape.grid_hw
        tops, lefts = unpadded(size_hw, (rows * h, columns * w))
        source = list(range(1, shape.length))
        for y in tops:
            for x in lefts:
                view = 1 + y // h * columns + x // w
                source.append(view * shape.length + 1 + y % h * w + x % w)
            source.append(shape.length)  # the newline of the first tile
        joined = (len(tops), len(lefts) + 1)
        return ImageLayout(
            pieces=(
                Span(length=h * w, grid_hw=(h, w)),
                Span(length=joined[0] * joined[1], grid_hw=joined),
            ),
            encoded=shape.length * len(shapes),
            source=tuple(source),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fenced:
    """The tokens of each view, one view after the other, with a mark before the first, between two,
    and after the last. Of two images with no text between them, one mark stands between.

    mark: the text of a special token. A word that follows it is written with a space before.
    Source: transformers, `processing_idefics2.py`.
    """

    mark: str

    def __call__(
        self, size_hw: tuple[int, int], pixel_spec: Any, shapes: Sequence[TokenShape]
    ) -> ImageLayout:
        """The layout of an image of `size_hw` pixels whose views give tokens of `shapes`."""
        pieces: list[Span | str] = [self.mark]
        for shape in shapes:
            pieces += [Span(length=shape.length, grid_hw=shape.grid_hw), self.mark]
        encoded = sum(shape.length for shape in shapes)
        return ImageLayout(pieces=tuple(pieces), encoded=encoded, fence=self.mark)


def unpadded(size_hw: tuple[int, int], grid_hw: tuple[int, int]) -> tuple[range, range]:
    """The rows and columns of a grid that an image of `size_hw` pixels, which was brought into the
    middle of the grid at its own aspect, reaches.

    Source: transformers, `modeling_llava_next.py`, `unpad_image`.

    >>> unpadded((100, 300), (8, 8))
    (range(3, 5), range(0, 8))
    """
    (H, W), (h, w) = size_hw, grid_hw
    if w / h < W / H:
        spare = (h - int(round(H * (w / W), 7))) // 2
        return range(spare, h - spare), range(w)
    spare = (w - int(round(W * (h / H), 7))) // 2
    return range(h), range(spare, w - spare)


@dataclass(frozen=True, kw_only=True, slots=True)
class Marked:
    """One position for the image, its mark; its tokens stand beside the stream, where gated blocks
    read them (`vlm.families.cross_attended`).

    before, after: text that stands around the mark. fence: what stands around these, but once
    between two images with no text between them, and without spaces (Idefics v1).
    """

    before: str = ""
    after: str = ""
    fence: str = ""

    def __call__(
        self, size_hw: tuple[int, int], pixel_spec: Any, shapes: Sequence[TokenShape]
    ) -> ImageLayout:
        """The layout of any image: the mark is what is placed of it."""
        mark = Span(length=1, grid_hw=None)
        pieces = (self.fence, self.before, mark, self.after, self.fence)
        return ImageLayout(
            pieces=tuple(piece for piece in pieces if piece),
            encoded=1,
            fence=self.fence,
            fence_spaces="none",
        )


ViewOrder = InTurn | Tagged | Joined | Fenced | Marked
KINDS: dict[str, type] = {
    "in_turn": InTurn,
    "tagged": Tagged,
    "joined": Joined,
    "fenced": Fenced,
    "marked": Marked,
}
"""Kind in a configuration -> the way."""


def build(values: dict[str, Any]) -> ViewOrder:
    """A way from its configuration, `kind` included. Raises ValueError naming the kinds."""
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"order of views {kind!r} is not one of {', '.join(KINDS)}")
    return from_dict(KINDS[kind], values, where=f"views {kind}")


def config_of(order: ViewOrder) -> dict[str, Any]:
    """The configuration of a way, `kind` included: the inverse of `build`."""
    kind = next(kind for kind, cls in KINDS.items() if type(order) is cls)
    return {"kind": kind, **to_dict(order)}
