"""Decoder-only vision-language models: image tokens placed in a causal language model's stream.

LLaVA, DeepSeek-VL, Idefics2 and 3, and Qwen-VL are of this family. The parts arrive finished;
stages, learning rates, devices and sharding are unknown here.

Shapes: B example, T text position, V view, P packed image tokens, N scored position, D decoder
width, Z vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vlm.compat.transformers import has_multimodal_rotary
from vlm.families.decoder_only.batch import IMAGE, Batch, place
from vlm.families.decoder_only.docked_text import DockedText, blank_texts
from vlm.families.decoder_only.encoded_images import EncodedImages
from vlm.families.decoder_only.head import head_logits
from vlm.families.decoder_only.image_layout import Arrangement, ImageLayout, Sees
from vlm.families.decoder_only.view_order import InTurn, ViewOrder
from vlm.image_tokens import ImageTokenizer, ImageTokens, ViewGroup, meta_twin, pack
from vlm.kernels.packed_attention import read_segments


class ImageLayouts:
    """The layout of any image in the stream, before any compute.

    Holds shapes and no weights, so that a loader's workers carry it lightly.
    views: how the views of an image follow each other.
    """

    def __init__(
        self, tokenizer: ImageTokenizer, adaptor: nn.Module, views: ViewOrder | None = None
    ) -> None:
        self.tokenizer = meta_twin(tokenizer)
        self.adaptor = meta_twin(adaptor)
        self.views = views or InTurn()

    def __call__(self, size_hw: tuple[int, int]) -> ImageLayout:
        """The layout of an image of (rows, columns) pixels, exact to the token.

        Raises ValueError where the adaptor cannot take the image tokenizer's grid.
        """
        shapes = [self.adaptor.shape_for(shape) for shape in self.tokenizer.shapes_for(size_hw)]
        return self.views(size_hw, self.tokenizer.pixel_spec, shapes)


def packed_images(
    encoded: Sequence[ImageTokens], arrangement: Arrangement | None = None
) -> EncodedImages | None:
    """Encoded groups as `DecoderOnly.encode` gives them; None for none."""
    if not encoded:
        return None
    packed = pack(list(encoded))
    return EncodedImages(*(packed if arrangement is None else arrangement(*packed)))


class DecoderOnly(nn.Module):
    """An image tokenizer, an adaptor and a language model.

    tokenizer: gives image tokens.
    adaptor: brings them to the language model's width.
    text: any transformers causal language model (`AutoModelForCausalLM`).
    docked: a text encoder for the non-causal texts of rows; None where rows have none.
    """

    family = "decoder_only"
    sees: Sees = "causal"
    """What the positions of its rows see, as in `StreamLayout`."""
    through = ("text",)
    """Parts that gradients pass through where they do not learn."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        adaptor: nn.Module,
        text: nn.Module,
        docked: DockedText | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.adaptor = adaptor
        self.text = text
        self.docked = docked

    def parts(self) -> dict[str, nn.Module]:
        """The components by name, as stages and start-up tables speak of them."""
        parts = {"tokenizer": self.tokenizer, "adaptor": self.adaptor, "text": self.text}
        return parts if self.docked is None else parts | {"docked": self.docked}

    def forward(self, batch: Batch) -> Tensor:
        """Logits float[N, Z] at the scored positions only, row by row, each from the one before."""
        return self.logits(self.states(batch))

    def states(self, batch: Batch) -> Tensor:
        """The final states float[N, D] that `forward` makes logits of, for losses that have no
        memory for all logits at once (`vlm.losses.token`)."""
        dummies = batch.dummy_groups
        if self.docked is not None and not any(g.is_text for g in (*batch.groups, *dummies)):
            blank = blank_texts().to(batch.ids.device)  # its gradients are zero, not absent
            dummies = (*dummies, blank)
        calls = [(group, False) for group in batch.groups] + [(group, True) for group in dummies]
        calls.sort(key=lambda call: call[0].is_text)  # every rank calls images, then texts
        encoded = [(self.encode_group(group), is_dummy) for group, is_dummy in calls]
        own = [tokens for tokens, is_dummy in encoded if not is_dummy]
        images = packed_images(own, batch.arrangement)
        vectors = self.embed(batch.ids, images, batch.names, batch.bounds)
        for tokens, is_dummy in encoded:
            if is_dummy:
                vectors = vectors + tokens.tokens[:0].sum()
        return self.read(vectors, batch)[:, :-1][batch.scored[:, 1:]]

    def encode(
        self, groups: Sequence[ViewGroup], arrangement: Arrangement | None = None
    ) -> EncodedImages | None:
        """The image tokens of all views in stream order, those of non-causal texts among them; None
        where there is no view. Encoded once, they serve any number of prompts. arrangement: as in
        `Batch`."""
        return packed_images([self.encode_group(group) for group in groups], arrangement)

    def encode_group(self, group: ViewGroup) -> ImageTokens:
        """The tokens of the views of one group, at the language model's width."""
        if group.is_text:
            return self.docked(group.pixels).owned_by(group.owner)
        return self.adaptor(self.tokenizer(group.pixels).owned_by(group.owner))

    def hidden(self, images: EncodedImages | None, batch: Batch) -> Tensor:
        """The final states float[B, T, D] of a batch whose images are encoded."""
        return self.read(self.embed(batch.ids, images, batch.names, batch.bounds), batch)

    def prompt(self, images: EncodedImages | None, batch: Batch) -> dict[str, Any]:
        """What `generate` of the language model is given of a batch whose images are encoded."""
        return {"inputs_embeds": self.embed(batch.ids, images, batch.names)}

    def embed(
        self,
        ids: Tensor,
        images: tuple[Tensor, Tensor] | None,
        names: Sequence[str],
        bounds: Tensor | None = None,
    ) -> Tensor:
        """The stream float[B, T, D] that the language model reads; arguments as in `Batch`.

        Raises ValueError where image positions and image tokens of an example differ in number.
        """
        is_image = ids == IMAGE
        vectors = self.text.get_input_embeddings()(ids.masked_fill(is_image, 0))
        if images is None:
            nothing = vectors.new_zeros(0, vectors.shape[-1]), ids.new_zeros(0)
            return place(vectors, is_image, *nothing, names, bounds)
        return place(vectors, is_image, *images, names, bounds)

    def require_layout(self, batch: Batch) -> None:
        """Raises ValueError naming the row where rows are made for another family's mask, or for a
        language model whose position ids have more numbers."""
        if batch.sees != self.sees:
            raise ValueError(
                f"{batch.names[0]}: expected a {self.sees} row, as {self.family} reads, found a "
                f"{batch.sees} one"
            )
        if batch.position_numbers == 3 and not has_multimodal_rotary(self.text):
            raise ValueError(
                f"{batch.names[0]}: expected one number in a position id, as "
                f"{type(self.text).__name__} takes, found 3"
            )

    def read(self, vectors: Tensor, batch: Batch, **more: Any) -> Tensor:
        """The language model's final states float[B, T, D]. more: keywords of its decoder.

        Right padding needs no mask: under causal attention no real position sees a later one; and
        position ids of one number are then those that the language model counts by itself.
        Raises ValueError for a packed row where the language model cannot keep examples apart, and
        as `require_layout` does.
        """
        self.require_layout(batch)
        if batch.bounds is not None:
            return read_segments(self.text, vectors, batch.positions, batch.bounds, **more)
        where = {}
        if batch.padding == "left":
            where["attention_mask"] = batch.valid
        if batch.padding == "left" or batch.position_numbers == 3:
            where["position_ids"] = batch.positions
        out = self.text.get_decoder()(inputs_embeds=vectors, use_cache=False, **where, **more)
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """The language model's scores float[N, Z] of states float[N, D], with the scaling and
        capping of its own head."""
        return head_logits(self.text, hidden)
