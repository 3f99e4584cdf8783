"""Generation and scoring for decoder families: one encoded image, any number of prompts.

Decoding itself is transformers' `generate`, on our parts. Batches are padded on the left, so that
every row's next token stands at the end; greedy ids in a batch equal those of a row alone.

Shapes: B example, T text position, N scored place, Z vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.families.decoder_only import DecoderOnly
from vlm.losses.token import sum_by_row, token_losses
from vlm.placement import Batch

GREEDY = {"do_sample": False, "num_beams": 1, "max_new_tokens": 64}
"""What generation does where nothing is asked; names are transformers'."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote.

    text: special tokens left out. ids: with the end token, where one was written.
    logprobs: log-probability of each id in nats, under the model's own (unscaled) distribution.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@torch.no_grad()
def generate(
    module: DecoderOnly, batch: Batch, stop_ids: Sequence[int], pad_id: int, **options
) -> list[tuple[list[int], list[float]]]:
    """Ids and log-probabilities written after each row of a left-padded batch.

    options: transformers' names (`max_new_tokens`, `num_beams`, `do_sample`, `temperature`,
        `top_p`, ...), greedy by default.
        `num_return_sequences` is refused: there is one answer to each row.
    Raises ValueError for a batch padded on the right, or an option that is refused.
    """
    for name in ("num_beams", "max_new_tokens"):
        if options.get(name, 1) < 1:
            raise ValueError(f"{name} must be at least 1, found {options[name]}")
    if options.get("num_return_sequences", 1) != 1:
        raise ValueError("num_return_sequences: there is one answer to each prompt; ask again")
    if batch.padding != "left" and not bool(batch.valid.all()):
        raise ValueError("generation continues at the end of rows: pad the batch on the left")
    vectors = module.embed(batch.ids, module.encode(batch.groups), batch.names)
    out = module.text.generate(
        inputs_embeds=vectors,
        attention_mask=batch.valid.long(),
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
        return_dict_in_generate=True,
        output_logits=True,
        **{**GREEDY, **options},
    )
    logprobs = module.text.compute_transition_scores(
        out.sequences,
        tuple(logits.float() for logits in out.logits),
        getattr(out, "beam_indices", None),
        normalize_logits=True,
    )
    rows = []
    for ids, row in zip(out.sequences.tolist(), logprobs.tolist()):
        ends = [t for t, id in enumerate(ids) if id in stop_ids]
        length = ends[0] + 1 if ends else len(ids)
        rows.append((ids[:length], row[:length]))
    return rows


@torch.no_grad()
def answer_losses(module: DecoderOnly, batch: Batch) -> Tensor:
    """Negative log-probability of each row's scored tokens in nats, fp32[B]."""
    losses = token_losses(module(batch), batch.targets)
    return sum_by_row(losses, batch.target_rows, len(batch.names))


@torch.no_grad()
def image_gain(module: DecoderOnly, batch: Batch) -> tuple[Tensor, Tensor]:
    """How much the right image helps: (right, wrong), nats per row, fp32[B].

    right: each row's loss with its own images. wrong: with those of another row of the batch that
    takes as many places; NaN where no other row does, or the row has no image.
    Each image is encoded once.
    """
    encoded = module.encode(batch.groups)
    right = _losses(module, batch, encoded)
    wrong = torch.full_like(right, float("nan"))
    if encoded is None:
        return right, wrong
    tokens, example = encoded
    counts = torch.bincount(example, minlength=len(batch.names))
    source = torch.arange(len(batch.names), device=tokens.device)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        if count:
            source[rows] = rows.roll(1)
    swapped = torch.cat([tokens[example == row] for row in source.tolist()])
    losses = _losses(module, batch, (swapped, example))
    moved = source != torch.arange(len(source), device=source.device)
    return right, torch.where(moved, losses, wrong)


def _losses(module: DecoderOnly, batch: Batch, encoded) -> Tensor:
    hidden = module.read(module.embed(batch.ids, encoded, batch.names), batch)
    logits = module.logits(hidden[:, :-1][batch.scored[:, 1:]])
    return sum_by_row(token_losses(logits, batch.targets), batch.target_rows, len(batch.names))
