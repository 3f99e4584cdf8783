"""A text encoder docked to a causal language model: spans of text that are read in both directions
inside the stream (MetaLM's semi-causal language modeling).

A span's text goes through the encoder and a linear connector, and the states of its tokens take
their places in the stream, just as image tokens do: the same placement, masks and packing. The
language model stays causal and predicts what lies outside of spans alone, each token after a span
from the whole of it.

A span travels as a view of its own kind, int64[2, L]: the encoder's ids, -1 at padding, and 1 at
tokens that stand in the stream; what the encoder's tokenizer adds around a text is read with it,
and does not. Lengths are padded to multiples of PADDED, so that spans of about one length go
through the encoder together.

Shapes: V span, L token of a span, D width.

Source: arXiv 2206.06336 (MetaLM), sections 2.1 to 2.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.data.example import BadRow
from vlm.families.decoder_only.image_layout import ImageLayout, Span
from vlm.image_tokens import ImageTokens, ViewGroup
from vlm.text.encoders import TextEncoder

PADDED = 16


class SpanTokenizer:
    """Texts of spans as views and layouts.

    text_tokenizer: the docked encoder's. max_tokens: the most that the encoder reads, with those
        that the tokenizer adds; None means no limit.
    """

    def __init__(self, text_tokenizer, max_tokens: int | None) -> None:
        self.text_tokenizer = text_tokenizer
        self.max_tokens = max_tokens

    def __call__(self, text: str, name: str) -> tuple[Tensor, ImageLayout]:
        """The view int64[2, L] of a text, and how it stands in the stream.

        Raises BadRow naming the row where the text has no token, or too many.
        """
        out = self.text_tokenizer(text, return_special_tokens_mask=True)
        ids = torch.tensor(out["input_ids"], dtype=torch.long)
        kept = 1 - torch.tensor(out["special_tokens_mask"], dtype=torch.long)
        if not kept.any():
            raise BadRow(f"{name}: expected a non-causal text, found {text!r}, which has no token")
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise BadRow(
                f"{name}: a non-causal text has {len(ids)} tokens, the docked encoder takes "
                f"{self.max_tokens}"
            )
        more = -len(ids) % PADDED
        view = torch.stack([F.pad(ids, (0, more), value=-1), F.pad(kept, (0, more))])
        count = int(kept.sum())
        span = Span(length=count, grid_hw=None, text=text)
        return view, ImageLayout(pieces=(span,), encoded=count)


class DockedText(nn.Module):
    """A text encoder and the linear connector from it to a language model of `width`."""

    def __init__(self, encoder: TextEncoder, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.connector = nn.Linear(encoder.backbone.config.hidden_size, width)

    def forward(self, views: Tensor) -> ImageTokens:
        """The tokens of spans; those that do not stand in the stream are not valid.

        views: int64[V, 2, L].
        """
        ids, kept = views.unbind(1)
        states = self.encoder.states(ids.clamp(min=0), ids >= 0)
        return ImageTokens(tokens=self.connector(states), grid_hw=None, valid=kept.bool())


def blank_texts() -> ViewGroup:
    """One text of one token, which stands nowhere."""
    view = torch.zeros(1, 2, PADDED, dtype=torch.long)
    view[:, 0, 1:] = -1
    return ViewGroup(pixels=view, owner=torch.zeros(1, 3, dtype=torch.long))


@torch.no_grad()
def require_both_directions(encoder: TextEncoder, where: str) -> None:
    """Raises ValueError for an encoder whose first state does not change with what comes after it:
    its spans would be causal all the same."""
    valid = torch.ones(1, 3, dtype=torch.bool)
    first = [encoder.states(torch.tensor([ids]), valid)[0, 0] for ids in ([1, 2, 3], [1, 2, 4])]
    if torch.equal(*first):
        raise ValueError(
            f"{where}: expected a text encoder that reads in both directions, such as BERT, found "
            f"{type(encoder.backbone).__name__}, which reads from left to right"
        )
