"""Encoder-decoder vision-language models: image tokens as the memory of a text decoder.

TrOCR and Donut are of this family. The parts arrive finished; stages, learning rates, devices and
sharding are unknown here. A row of a batch is the decoder's whole stream, start ids first, then the
answer and its end, right padded; the logits of a scored position come from the position before it,
so that labels are shifted once and nowhere else.

Shapes: B example, T text position, V view, L image tokens (here of an example, all its views
together), P packed image tokens, N scored position, D decoder width, Z vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlm.families.decoder_only.batch import Batch
from vlm.image_tokens import ImageTokenizer, ImageTokens, ViewGroup, pack
from vlm.text.decoders import head_of, memory_width, require_cross_attention


class Memory(NamedTuple):
    """What the decoder attends to: tokens float[B, L, D], of which those with valid bool[B, L] are
    image tokens and the others padding after them; valid is None where there is no padding."""

    tokens: Tensor
    valid: Tensor | None

    def rows(self, index: Tensor) -> Memory:
        """The memory of the examples int64[N]."""
        return Memory(self.tokens[index], None if self.valid is None else self.valid[index])


class EncoderDecoder(nn.Module):
    """An image tokenizer, an adaptor and a text decoder with cross-attention.

    tokenizer: gives image tokens; prefix tokens that it keeps are attended to like the others.
    adaptor: brings them to the width that the decoder's cross-attention takes.
    text: a transformers causal language model with cross-attention (see `vlm.text.decoders`).
    Raises ValueError where a part does not fit the one before it.
    """

    family = "encoder_decoder"
    sees = "causal"
    """What the positions of its rows see, as in `StreamLayout`."""
    through = ("text",)
    """Parts that gradients pass through where they do not learn."""

    def __init__(self, tokenizer: ImageTokenizer, adaptor: nn.Module, text: nn.Module) -> None:
        super().__init__()
        require_cross_attention(text)
        given, expected = adaptor.config.out_width, memory_width(text.config)
        if adaptor.config.in_width != tokenizer.dim or given != expected:
            raise ValueError(
                f"adaptor: expected {tokenizer.dim} to {expected} wide, from the image tokenizer "
                f"to the decoder's cross-attention, found {adaptor.config.in_width} to {given}"
            )
        self.tokenizer = tokenizer
        self.adaptor = adaptor
        self.text = text

    def parts(self) -> dict[str, nn.Module]:
        """The components by name, as stages and start-up tables speak of them."""
        return {"tokenizer": self.tokenizer, "adaptor": self.adaptor, "text": self.text}

    def forward(self, batch: Batch) -> Tensor:
        """Logits float[N, Z] at the scored positions only, row by row, each from the position
        before.

        Raises ValueError naming the rows that have no image, and for padding on the left.
        """
        return self.logits(self.states(batch))

    def states(self, batch: Batch) -> Tensor:
        """The final states float[N, D] that `forward` makes logits of, for losses that have no
        memory for all logits at once (`vlm.losses.token`). Raises ValueError as `forward` does."""
        if batch.bounds is not None:
            raise ValueError("encoder-decoders read rows of their own, found one packed row")
        if batch.padding == "left" and not bool(batch.valid.all()):
            raise ValueError("a decoder's rows are padded on the right, found padding on the left")
        groups, dummy_groups = batch.groups, batch.dummy_groups
        if not batch.scored.any() and not groups:  # nothing is asked of such rows
            groups, dummy_groups = dummy_groups[:1], dummy_groups[1:]
        require_images(groups, batch.names)
        memory = self.encode(groups)
        if dummy_groups:
            nothing = self.encode(dummy_groups).tokens[:0].sum()
            memory = memory._replace(tokens=memory.tokens + nothing)
        hidden = self.read(batch.ids, memory)
        return hidden[:, :-1][batch.scored[:, 1:]]

    def encode(self, groups: Sequence[ViewGroup]) -> Memory:
        """The image tokens of each example, views in order; encoded once, they serve any number of
        texts. Raises ValueError where there is no image."""
        if not groups:
            raise ValueError("expected the views of at least one image, found none")
        encoded = []
        for group in groups:
            images = self.tokenizer(group.pixels)
            encoded.append(self.adaptor(images.owned_by(group.owner)))
        if len(encoded) == 1 and _one_view_each(encoded[0]):
            return Memory(encoded[0].tokens, encoded[0].valid)
        return gather(*pack(encoded))

    def read(self, ids: Tensor, memory: Memory) -> Tensor:
        """The decoder's final states float[B, T, D] of streams int64[B, T], right padded.

        Padding needs no mask: under causal attention no real position sees a later one.
        """
        out = self.text.base_model(
            input_ids=ids,
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=None if memory.valid is None else memory.valid.long(),
            use_cache=False,
        )
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """The decoder's scores float[..., Z] of states float[..., D]."""
        return head_of(self.text)(hidden)


def gather(tokens: Tensor, example: Tensor) -> Memory:
    """Packed image tokens as a padded memory.

    tokens: float[P, D], by example; example: int64[P], rising, the example of each.

    >>> memory = gather(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 1]))
    >>> memory.tokens[..., 0].tolist(), memory.valid.tolist()
    ([[1.0, 0.0], [2.0, 3.0]], [[True, False], [True, True]])
    """
    counts = torch.bincount(example)
    B, L = len(counts), int(counts.max())
    if bool((counts == L).all()):
        return Memory(tokens.view(B, L, -1), None)
    starts = counts.cumsum(0) - counts
    position = torch.arange(len(example), device=example.device) - starts[example]
    padded = tokens.new_zeros(B, L, tokens.shape[-1]).index_put((example, position), tokens)
    return Memory(padded, torch.arange(L, device=counts.device) < counts[:, None])


def require_images(groups: Sequence[ViewGroup], names: Sequence[str]) -> None:
    """Raises ValueError naming every row without an image: its memory would be empty."""
    shown = {row for group in groups for row in group.owner[:, 0].tolist()}
    missing = [name for row, name in enumerate(names) if row not in shown]
    if missing:
        raise ValueError(
            f"expected an image in every row, found none in {len(missing)}: {missing[:10]}"
        )


def _one_view_each(images: ImageTokens) -> bool:
    """Whether view b is the only one of example b."""
    rows = images.owner[:, 0]
    return bool(torch.equal(rows, torch.arange(len(rows), device=rows.device)))
