"""Cross-attention towers: gated blocks before layers of a causal language model read image tokens.

Mllama, Flamingo and Idefics v1 are of this family. The text stream has one position for each image,
its mark; image tokens stand beside it, as the memory of the blocks. Rows are those of decoder-only
models, whose IMAGE is here where a mark stands. The parts arrive finished; stages, learning rates,
devices and sharding are unknown here.

A block is called before its layer by a hook of the layer, so that the language model keeps its
classes and the names of its weights: what trains, shards, checkpoints or saves it finds it as it
was. What is seen travels as the keyword `memory`, which these models' decoders hand on to their
layers, as llama, qwen2, qwen3, gemma2, gemma3_text, mistral, gpt_neox, smollm3, phi3 and granite
do; in generation it is in the cache.

Shapes: B example, T text position, P packed image tokens, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vlm.compat.transformers import CACHE
from vlm.families.cross_attended.blocks import GatedBlock, GatedBlockConfig
from vlm.families.cross_attended.memory import (
    Blind,
    ImagesSeen,
    Memory,
    MemoryView,
    pack_memory,
    view_of,
)
from vlm.families.decoder_only.batch import IMAGE, Batch
from vlm.families.decoder_only.image_layout import Arrangement
from vlm.families.decoder_only.module import DecoderOnly
from vlm.image_tokens import ImageTokenizer, ViewGroup

MEMORY = "memory"
"""The keyword that takes a MemoryView from the decoder to its layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossConfig:
    """The gated blocks of a model, and what they see.

    block: what each is. before: the numbers of the language model's layers that have one before
        them, from 0, in order.
    sees: which images a text position sees. blind: what is done for one that sees none.
    mark_id: the id in the language model's vocabulary whose vector stands at an image's mark; None:
        a vector of its own, `cross.mark`, which learns with the blocks.
    Raises ValueError for layers that are not in order.
    """

    block: GatedBlockConfig
    before: tuple[int, ...]
    sees: ImagesSeen
    blind: Blind = "nothing"
    mark_id: int | None = None

    def __post_init__(self) -> None:
        if not self.before or list(self.before) != sorted({*self.before}) or self.before[0] < 0:
            raise ValueError(
                f"before: expected numbers of layers from 0, in order, found {self.before}"
            )


class Cross(nn.Module):
    """The gated blocks, one for each of `config.before`, and the image mark's own vector if any.

    The blocks are not called from here, but each before its layer.
    """

    Config = CrossConfig

    def __init__(self, config: CrossConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(GatedBlock(config.block) for _ in config.before)
        own = config.mark_id is None
        self.mark = nn.Parameter(torch.zeros(config.block.width)) if own else None


class CrossAttended(DecoderOnly):
    """An image tokenizer, an adaptor, gated cross-attention blocks and a causal language model.

    tokenizer: gives image tokens. adaptor: brings them to `cross.config.block.memory_width`.
    cross: the blocks. text: a transformers causal language model whose decoder has `layers` and
        hands keywords on to them. It is this family's from now on: its layers call the blocks.
    Raises ValueError naming the layers that it does not have, or widths that differ.
    """

    family = "cross_attended"
    through = ("text", "cross")

    def __init__(
        self, tokenizer: ImageTokenizer, adaptor: nn.Module, cross: Cross, text: nn.Module
    ) -> None:
        super().__init__(tokenizer, adaptor, text)
        self.cross = cross
        layers, config = getattr(text.get_decoder(), "layers", None), cross.config
        if layers is None:
            raise ValueError(
                "expected a language model whose decoder has `layers` for blocks to stand before, "
                f"found {type(text).__name__}"
            )
        if config.before[-1] >= len(layers):
            raise ValueError(
                f"before: expected layers 0 to {len(layers) - 1}, which the language model has, "
                f"found {config.before}"
            )
        width = text.get_input_embeddings().weight.shape[1]
        if config.block.width != width:
            raise ValueError(
                f"expected blocks of the language model's width {width}, found {config.block.width}"
            )
        text.get_decoder().register_forward_pre_hook(_from_cache, with_kwargs=True)
        blocks = dict(zip(config.before, cross.blocks))
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(_Before(blocks.get(number)), with_kwargs=True)

    def parts(self) -> dict[str, nn.Module]:
        """The components by name, as stages and start-up tables speak of them."""
        return {
            "tokenizer": self.tokenizer,
            "adaptor": self.adaptor,
            "cross": self.cross,
            "text": self.text,
        }

    def encode(
        self, groups: Sequence[ViewGroup], arrangement: Arrangement | None = None
    ) -> Memory | None:
        """The memory of all views, whose owners' examples are counted to the last one with an
        image; None where there is no image. Encoded once, it serves any number of prompts.
        arrangement: unused, since no image token stands in the stream."""
        if not groups:
            return None
        encoded = [self.encode_group(group) for group in groups]
        examples = 1 + max(int(group.owner[:, 0].max()) for group in groups)
        return pack_memory(encoded, examples, self.cross.config.blind == "unmasked")

    def embed(
        self,
        ids: Tensor,
        images: Memory | None = None,
        names: Sequence[str] = (),
        bounds: Tensor | None = None,
    ) -> Tensor:
        """The stream float[B, T, D] that the language model reads, with the mark's vector at IMAGE.
        The other arguments are unused: image tokens are not in the stream."""
        is_image = ids == IMAGE
        mark_id, mark = self.cross.config.mark_id, self.cross.mark
        vectors = self.text.get_input_embeddings()(ids.masked_fill(is_image, mark_id or 0))
        if mark is None:
            return vectors
        return torch.where(is_image[..., None], mark.to(vectors.dtype), vectors)

    def view(self, images: Memory | None, batch: Batch) -> MemoryView:
        """What each position of a batch sees. images: as `encode` gave them.

        Raises ValueError where marks and images of an example differ in number.
        """
        config = self.cross.config
        if images is None:
            dtype = next(self.text.get_input_embeddings().parameters()).dtype
            shape = (0, config.block.memory_width)
            tokens = torch.zeros(shape, dtype=dtype, device=batch.ids.device)
            images = Memory(tokens=tokens, bounds=((0,),))
        return view_of(
            images.for_examples(len(batch.names)),
            batch.ids == IMAGE,
            batch.valid,
            batch.names,
            batch.bounds,
            sees=config.sees,
            blind=config.blind,
        )

    def states(self, batch: Batch) -> Tensor:
        """The final states float[N, D] that `forward` makes logits of."""
        memory = self.encode(batch.groups)
        if batch.dummy_groups:
            dummy = pack_memory([self.encode_group(g) for g in batch.dummy_groups], examples=1)
            if memory is None:  # nobody sees it, but every weight of the blocks is called
                memory = replace(dummy, bounds=((0,),))
            else:
                memory = replace(memory, tokens=memory.tokens + dummy.tokens[:0].sum())
        return self.hidden(memory, batch)[:, :-1][batch.scored[:, 1:]]

    def hidden(self, images: Memory | None, batch: Batch) -> Tensor:
        """The final states float[B, T, D] of a batch whose images are encoded."""
        view = self.view(images, batch)
        out = self.read(self.embed(batch.ids), batch, **{MEMORY: view})
        if len(view.reached) < len(self.cross.blocks):
            raise ValueError(
                f"{type(self.text).__name__} does not hand keywords on to its layers: "
                f"{len(view.reached)} of {len(self.cross.blocks)} blocks were reached, so images "
                "would not be seen; take another language model"
            )
        return out

    def prompt(self, images: Memory | None, batch: Batch) -> dict[str, Any]:
        """What `generate` of the language model is to be given of a batch whose images are encoded:
        the prompts' vectors, and a cache that holds what their positions see."""
        view = replace(self.view(images, batch), kept={})
        return {
            "inputs_embeds": self.embed(batch.ids),
            CACHE: MemoryCache(view, self.text.config),
        }


class MemoryCache(DynamicCache):
    """A decoder's cache in generation, with the memory of its prompts: keys and values of the
    blocks are computed once for all steps and beams.

    view: of the prompts' positions, with `kept`. config: of the language model.
    """

    def __init__(self, view: MemoryView, config: Any) -> None:
        super().__init__(config=config)
        self.view = view


def _from_cache(
    decoder: nn.Module, arguments: tuple, options: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Gives a decoder the view of its present positions where its cache has one of all."""
    cache = options.get(CACHE)
    if not isinstance(cache, MemoryCache):
        return None
    given = options.get("inputs_embeds")
    if given is None:
        given = options["input_ids"] if "input_ids" in options else arguments[0]
    before = int(cache.get_seq_length())
    view = cache.view.at(before, before + given.shape[1], rows=len(given))
    return arguments, options | {MEMORY: view}


class _Before:
    """Calls a block before a decoder layer, where there is one, and takes the keyword off."""

    def __init__(self, block: GatedBlock | None) -> None:
        self.block = block

    def __call__(
        self, layer: nn.Module, arguments: tuple, options: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if MEMORY not in options:
            return None
        options = dict(options)
        view = options.pop(MEMORY)
        if self.block is None:
            return arguments, options
        hidden, *others = arguments
        hidden = self.block(hidden, view)
        view.reached.add(self.block)
        return (hidden, *others), options
