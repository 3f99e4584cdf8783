"""How images stand in the text stream, as values that a processor makes and a row carries.

An image becomes one or more *spans* of image tokens with text before, between and after them (row
and column tags, line breaks, marks of start and end). Placement, attention masks, generation and
`inspect-batch` read these values; none of them computes a layout again, and none counts pixels.

Shapes: T text position, V view, P packed image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One unbroken run of image tokens in the stream.

    length: the number of its tokens. grid_hw: rows and columns of the last h * w of them; None
    where they have no order in space. text: the non-causal text whose tokens these are, which a
    docked encoder gives in place of an image; None: they are an image's.
    """

    length: int
    grid_hw: tuple[int, int] | None
    text: str | None = None


FenceSpaces = Literal["before_word", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLayout:
    """What one image puts into the text stream.

    pieces: spans and texts, in stream order.
    encoded: how many tokens the adaptor gives for all views of the image.
    source: for each token of the spans its number among the encoded ones, which are counted through
        all views; None: all of them, in their order.
    is_video: whether it is a video's, which chat templates that know images alone take for text.
    fence: what its pieces begin and end with, where that stands but once between two images with no
        text between them; "" for none. fence_spaces: "before_word", a space stands between it and a
        word after it; "none", no space stands on either side of it.
    Raises ValueError where the spans have another number of tokens than `encoded` or `source`.
    """

    pieces: tuple[Span | str, ...]
    encoded: int
    source: tuple[int, ...] | None = None
    fence: str = ""
    is_video: bool = False
    fence_spaces: FenceSpaces = "before_word"

    def __post_init__(self) -> None:
        expected = self.encoded if self.source is None else len(self.source)
        if self.length != expected:
            raise ValueError(
                f"expected spans of {expected} image tokens in all, found {self.length} in "
                f"{[span.length for span in self.spans]}"
            )

    @property
    def spans(self) -> tuple[Span, ...]:
        """The runs of image tokens, in stream order."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Span))

    @property
    def is_text(self) -> bool:
        """Whether this is a non-causal text, not an image."""
        return any(span.text is not None for span in self.spans)

    @property
    def length(self) -> int:
        """The number of image tokens in the stream; texts are not counted."""
        return sum(span.length for span in self.spans)

    def marked(self, mark: str) -> str:
        """The image's text, with `mark` in place of each span.

        >>> span = Span(length=4, grid_hw=(2, 2))
        >>> ImageLayout(pieces=("<a>", span, "\\n<b>", span), encoded=8).marked("*")
        '<a>*\\n<b>*'
        """
        return "".join(mark if isinstance(piece, Span) else piece for piece in self.pieces)


Sees = Literal["causal", "prefix"]
PositionNumbers = Literal[1, 3]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamLayout:
    """How the images of one row stand in its stream, what each position sees, and its position id.

    images: in the order of the stream.
    sees: "causal": each position sees itself and those before it; "prefix": besides, all positions
        before the first target see each other.
    position_numbers: how many numbers a position id has: one, or three (temporal, row, column) for
        language models with multimodal rotary position embedding, such as Qwen2-VL's.
    """

    images: tuple[ImageLayout, ...] = ()
    sees: Sees = "causal"
    position_numbers: PositionNumbers = 1

    @property
    def spans(self) -> tuple[Span, ...]:
        """The runs of image tokens of all images, in stream order."""
        return tuple(span for image in self.images for span in image.spans)

    def positions(self, is_image: Tensor) -> Tensor:
        """The position ids of a row, from 0: int64[T], or int64[3, T] of three numbers.

        is_image: bool[T], True at image positions.
        Text counts all three numbers on. The grid of a span keeps the temporal number that it
        begins with, and from there counts its rows and columns; what follows goes on at the largest
        number + 1. Tokens of a span before its grid, or without one, count as text.
        Raises ValueError for three numbers where there are more or fewer image positions than
        tokens in the spans.
        Source: Qwen2-VL, "Multimodal Rotary Position Embedding"; transformers,
        `modeling_qwen2_vl.py`, `get_rope_index`.

        >>> span = Span(length=6, grid_hw=(2, 3))
        >>> image = ImageLayout(pieces=(span,), encoded=6)
        >>> layout = StreamLayout(images=(image,), position_numbers=3)
        >>> layout.positions(torch.tensor([False] + [True] * 6 + [False]))
        tensor([[0, 1, 1, 1, 1, 1, 1, 4],
                [0, 1, 1, 1, 2, 2, 2, 4],
                [0, 1, 2, 3, 1, 2, 3, 4]])
        """
        positions = torch.arange(len(is_image))
        if self.position_numbers == 1:
            return positions
        positions = positions.repeat(3, 1)
        lengths = [span.length for span in self.spans]
        image_at = is_image.nonzero()[:, 0]
        if len(image_at) != sum(lengths):
            raise ValueError(
                f"expected {sum(lengths)} image positions, as the layout says, found "
                f"{len(image_at)}"
            )
        for span, at in zip(self.spans, image_at.split(lengths)):
            if span.grid_hw is None:
                continue
            h, w = span.grid_hw
            at = at[span.length - h * w :]
            rows_columns = torch.cartesian_prod(torch.arange(h), torch.arange(w)).T
            positions[:, at[-1] + 1 :] -= h * w - max(h, w)
            positions[:, at] = int(positions[0, at[0]])
            positions[1:, at] += rows_columns
        return positions

    def first(self, count: int) -> StreamLayout:
        """The layout of a row that ends after its first `count` images."""
        return replace(self, images=self.images[:count])


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """Which image tokens of a batch stand in the stream, and in what order.

    source: int64[P], for each image position of the stream its number among the tokens that the
        adaptor gives, counted through all examples, images and views.
    encoded: how many tokens the adaptor is to give.
    """

    source: Tensor
    encoded: int

    def __call__(self, tokens: Tensor, example: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded tokens float[encoded, D], and the example int64[encoded] of each, as they stand
        in the stream. Raises ValueError where there is another number of them."""
        if len(tokens) != self.encoded:
            raise ValueError(
                f"expected {self.encoded} image tokens, as the layout says, found {len(tokens)}"
            )
        return tokens[self.source], example[self.source]

    def to(self, device: torch.device | str) -> Arrangement:
        """The arrangement on a device."""
        return replace(self, source=self.source.to(device))


def arrange(layouts: Sequence[StreamLayout]) -> Arrangement | None:
    """The arrangement of the image tokens of rows; None where all stand in the order in which they
    are encoded.

    >>> span = Span(length=2, grid_hw=(1, 2))
    >>> plain = ImageLayout(pieces=(span,), encoded=2)
    >>> turned = ImageLayout(pieces=(span,), encoded=3, source=(2, 0))
    >>> arrange([StreamLayout(images=(plain,)), StreamLayout(images=(turned,))]).source.tolist()
    [0, 1, 4, 2]
    """
    images = [image for layout in layouts for image in layout.images]
    if all(image.source is None for image in images):
        return None
    source: list[int] = []
    start = 0
    for image in images:
        own = range(image.encoded) if image.source is None else image.source
        source += [start + number for number in own]
        start += image.encoded
    return Arrangement(source=torch.tensor(source), encoded=start)
