"""FLOP cost of examples in a decoder-only model, known before anything is computed.

The one measure by which rows are balanced over processes and by which the speed of a step is
measured. It compares costs, and is no forecast of time: a multiplication counts the same wherever
it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vlm.families.decoder_only.batch import Batch, Row
from vlm.image_tokens import Pixels, is_text, map_pixels, meta_twin, pixel_shape
from vlm.training.flops import flop_counter
from vlm.training.stages import FROZEN, assign_rates


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopCost:
    """Operations of a step on examples, forward and backward, in whole numbers.

    position: of one position of the text stream. pair: of one position for each position of its own
        row, which is attention. target: of the scores of the vocabulary at one scored position.
        view: of the pixels of one view, without a view axis, in the image tokenizer and the
        adaptor, or of a non-causal text in the docked encoder; None where views cost nothing.
    By default one for each position: the measure where nothing is known of the model.

    >>> from vlm.families.decoder_only.batch import collate_packed
    >>> ids = torch.arange(5)
    >>> row = Row(name="row", ids=ids, scored=ids > 2, views=())
    >>> cost = FlopCost(position=100, pair=1, target=10)
    >>> cost.of_row(row), cost.of_batch(collate_packed([row, row]))
    (545, 1090)
    """

    position: int = 1
    pair: int = 0
    target: int = 0
    view: Callable[[Pixels], int] | None = None

    def of_row(self, row: Row) -> int:
        """The cost of a row by itself. Its pixels may be without values."""
        views = ((pixels, 1) for pixels, _ in (*row.views, *row.texts))
        return self._of([len(row.ids)], int(row.scored[1:].sum()), views)

    def of_batch(self, batch: Batch) -> int:
        """The cost of a batch, its padding included."""
        B, T = batch.ids.shape
        lengths = [T] * B if batch.bounds is None else batch.bounds.diff().tolist()
        views = (
            (map_pixels(lambda stacked: stacked[0], group.pixels), len(group.owner))
            for group in batch.groups
        )
        return self._of(lengths, int(batch.scored.sum()), views)

    def _of(self, lengths: Sequence[int], targets: int, views: Iterable[tuple[Pixels, int]]) -> int:
        text = sum(length * (self.position + self.pair * length) for length in lengths)
        seen = 0 if self.view is None else sum(self.view(pixels) * count for pixels, count in views)
        return text + self.target * targets + seen


def flop_cost_of(
    module: nn.Module, rates: tuple[tuple[str, float | None], ...], views: bool = True
) -> FlopCost:
    """The cost of examples in a decoder-only or prefix model of which `rates` say what learns, as a
    `Stage` has them. views: whether images go through the image tokenizer.

    A weight costs a multiplication and an addition at each position forward, as much for the
    gradient of its input, and where it learns for its own. Of attention half the pairs count. All
    experts of a mixture count, and nothing that is computed again.
    Raises StageError where the rates do not fit the module.
    Source: arXiv 2001.08361 (Kaplan et al., "Scaling Laws"), section 2.1.
    """
    chosen = assign_rates(module, rates)
    learned = {id(p) for n, p in module.named_parameters() if chosen[n][1] is not FROZEN}
    text, config = module.text, module.text.config.get_text_config()
    head = list(text.get_output_embeddings().parameters())
    beside = {id(p) for p in (*head, *text.get_input_embeddings().parameters())}
    body = [p for p in text.parameters() if id(p) not in beside]
    if "cross" in module.parts():
        body += module.cross.parameters()  # at each position, whether it sees an image or not
    # Recurrent models, for one, have no attention to count.
    wide = getattr(config, "hidden_size", 0) * getattr(config, "num_hidden_layers", 0)
    return FlopCost(
        position=2 * (2 * _count(body) + _count(body, learned)),
        pair=3 * 2 * wide,
        target=2 * (2 * _count(head) + _count(head, learned)),
        view=_Views(module, learned) if views else None,
    )


class _Views:
    """Operations of one view in the image tokenizer and the adaptor: those of the pass forward as
    torch counts them on tensors without values, remembered for each pixel size. Of a non-causal
    text in the docked encoder: by weights, as of positions."""

    def __init__(self, module: nn.Module, learned: set[int]) -> None:
        parts, docked = [module.tokenizer, module.adaptor], getattr(module, "docked", None)
        self.twins = [meta_twin(part).float() for part in parts]
        self.passes, reached = [], False
        for part in parts:
            own = list(part.parameters())
            share = _count(own, learned) / max(_count(own), 1)
            reached = reached or share > 0
            self.passes.append(1 + reached + share)
        self.known: dict[tuple, int] = {}
        self.token = 0
        if docked is not None:
            table = {id(p) for p in docked.encoder.backbone.get_input_embeddings().parameters()}
            own = [p for p in docked.parameters() if id(p) not in table]
            self.token = 2 * (2 * _count(own) + _count(own, learned))

    def __call__(self, pixels: Pixels) -> int:
        shape = pixel_shape(pixels)
        if is_text(pixels):
            return self.token * shape[-1]
        if shape not in self.known:
            self.known[shape] = self._counted(pixels)
        return self.known[shape]

    @torch.no_grad()
    def _counted(self, pixels: Pixels) -> int:
        value = map_pixels(lambda view: torch.empty(1, *view.shape, device="meta"), pixels)
        flops = 0
        for twin, passes in zip(self.twins, self.passes):
            with flop_counter() as counter:
                value = twin(value)
            flops += round(passes * counter.get_total_flops())
        return flops


def _count(parameters: Iterable[nn.Parameter], among: set[int] | None = None) -> int:
    """How many weights there are, or of them those whose id is `among` some. A byte of 4-bit ones
    holds two."""
    return sum(
        p.numel() * (1 if p.is_floating_point() else 2)
        for p in parameters
        if among is None or id(p) in among
    )
