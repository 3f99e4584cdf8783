"""Writing and scoring for encoder-decoder models: one encoded image, any number of texts.

Greedy writing is our own, for speed: one id of each row at a time
(`vlm.families.encoder_decoder.cached_decoder`), rows that have ended leave the batch, and no
processor touches the logits. Its slow twin, `greedy_plain`, computes the whole stream anew for
each id. Beams are transformers'.

Shapes: B example, Z vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache

from vlm.compat.transformers import CACHE
from vlm.families.decoder_only.batch import Batch
from vlm.families.decoder_only.generate import answer_losses, check_options
from vlm.families.encoder_decoder.cached_decoder import IMAGE_ROWS, stepper_of
from vlm.families.encoder_decoder.module import EncoderDecoder, Memory
from vlm.image_tokens import ViewGroup, map_pixels
from vlm.kernels.mlp_parts import mlps_in_parts
from vlm.kernels.packed_linear import packed_layers
from vlm.text.decoders import first_position, positions_of
from vlm.text.generation import Written

LEAVE = 8
"""Rows leave once they are at least 1 in this many: each leaving copies what the others need."""
VIEWS = 4
"""Views that a CPU encodes at a time: what is in work for them still lies in its caches."""


@torch.no_grad()
def encode(module: EncoderDecoder, groups: Sequence[ViewGroup]) -> Memory:
    """The memory of the examples' views, `VIEWS` of them at a time on a CPU."""
    parts = []
    for group in groups:
        step = VIEWS if group.owner.device.type == "cpu" else max(1, len(group.owner))
        for start in range(0, len(group.owner), step):
            rows = slice(start, start + step)
            pixels = map_pixels(lambda part, rows=rows: part[rows], group.pixels)
            parts.append(ViewGroup(pixels=pixels, owner=group.owner[rows]))
    with packed_layers(module.tokenizer, IMAGE_ROWS), mlps_in_parts(module.tokenizer):
        return module.encode(parts)


@torch.no_grad()
def greedy(
    module: EncoderDecoder,
    groups: Sequence[ViewGroup],
    start_ids: Sequence[int],
    end_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]] | None = None,
    banned: Sequence[int] = (),
) -> list[Written]:
    """The likeliest next id, again and again, for each example's image.

    groups: the examples' views. start_ids: what each row begins with; prompts: what each begins
        with instead, of any lengths. end_ids: ids that end a row. pad_id: never read where an
        image or a text is. banned: ids that are never generated.
    Returns for each row the generated ids, the end included where one was, and the log-probability
    of each in nats under the model's own distribution, banned ids included.
    Raises ValueError where the decoder has fewer positions than prompt and text may take, and for
    an option that cannot be.
    """
    memory = encode(module, groups)
    starts = _starts(memory, start_ids, prompts)
    return greedy_from(module, memory, starts, end_ids, pad_id, max_new_tokens, banned)


@torch.no_grad()
def greedy_from(
    module: EncoderDecoder,
    memory: Memory,
    starts: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    banned: Sequence[int] = (),
) -> list[Written]:
    """`greedy` from a memory that was encoded before; starts: what each row begins with."""
    longest = _longest_start(module, starts, max_new_tokens)
    device = memory.tokens.device
    shortest = min(len(start) for start in starts)
    given = torch.full((len(starts), longest), pad_id)
    for row, start in enumerate(starts):
        given[row, : len(start)] = torch.tensor(start)
    given = given.to(device)
    lengths = torch.tensor([len(start) for start in starts], device=device)
    ends = torch.tensor(sorted(set(end_ids)), device=device)
    forbidden = torch.tensor(sorted(set(banned)), dtype=torch.long, device=device)

    generated = given.new_zeros(len(starts), max_new_tokens)
    logprobs = torch.zeros(len(starts), max_new_tokens, device=device)
    counts = torch.zeros_like(lengths)
    active = torch.arange(len(starts), device=device)  # the rows that the stepper holds
    done = torch.zeros(len(starts), dtype=torch.bool, device=device)  # of these
    stepper = stepper_of(module, memory)
    ids = given[:, 0]
    for position in range(longest + max_new_tokens):
        hidden = stepper.step(ids, position)
        chosen = given[active, min(position + 1, longest - 1)]
        if position + 1 >= shortest:
            best, logprob = _choose(stepper.logits(hidden), forbidden)
            writes = (position + 1 >= lengths[active]) & ~done
            chosen = torch.where(writes, best, chosen)
            rows = active[writes]
            generated[rows, counts[rows]] = best[writes]
            logprobs[rows, counts[rows]] = logprob[writes]
            counts[rows] += 1
            done |= writes & (torch.isin(best, ends) | (counts[active] == max_new_tokens))
            left = len(done) - int(done.sum())
            if not left:
                break
            if (len(done) - left) * LEAVE >= len(done):
                kept = (~done).nonzero()[:, 0]
                stepper.keep(kept)
                active, chosen, done = active[kept], chosen[kept], done[kept]
        ids = chosen
    return [
        (ids[:count], values[:count])
        for ids, values, count in zip(generated.tolist(), logprobs.tolist(), counts.tolist())
    ]


@torch.no_grad()
def greedy_plain(
    module: EncoderDecoder,
    groups: Sequence[ViewGroup],
    start_ids: Sequence[int],
    end_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]] | None = None,
    banned: Sequence[int] = (),
) -> list[Written]:
    """The slow twin of `greedy`: the module's own forward over the whole stream for each id."""
    memory = module.encode(groups)
    starts = _starts(memory, start_ids, prompts)
    _longest_start(module, starts, max_new_tokens)
    rows = []
    for row, start in enumerate(starts):
        own = memory.rows(torch.tensor([row], device=memory.tokens.device))
        stream, logprobs = list(start), []
        for _ in range(max_new_tokens):
            ids = torch.tensor([stream], device=memory.tokens.device)
            logits = module.logits(module.read(ids, own)[:, -1]).float()
            allowed = logits.clone()
            allowed[:, list(banned)] = float("-inf")
            best = int(allowed.argmax())
            stream.append(best)
            logprobs.append(float(logits.log_softmax(-1)[0, best]))
            if best in end_ids:
                break
        rows.append((stream[len(start) :], logprobs))
    return rows


@torch.no_grad()
def beam(
    module: EncoderDecoder,
    groups: Sequence[ViewGroup],
    start_ids: Sequence[int],
    end_ids: Sequence[int],
    pad_id: int,
    prompts: Sequence[Sequence[int]] | None = None,
    banned: Sequence[int] = (),
    **options,
) -> list[Written]:
    """What transformers' `generate` writes on our text model, beams or samples.

    options: transformers' names (`num_beams`, `max_new_tokens`, `length_penalty`,
        `no_repeat_ngram_size`, `do_sample`, ...). The other arguments are those of `greedy`;
        prompts of several lengths are generated in groups of one length.
    Returns, as `greedy` does, ids and the log-probability of each under the model's own
    distribution, before any of the options bends it: a row's sum is the log-probability of its
    text, whatever search found it.
    """
    check_options(options)
    memory = encode(module, groups)
    starts = _starts(memory, start_ids, prompts)
    _longest_start(module, starts, options.get("max_new_tokens", 1))
    rows: list[Written | None] = [None] * len(starts)
    for length in sorted({len(start) for start in starts}):
        chosen = [row for row, start in enumerate(starts) if len(start) == length]
        own = memory.rows(torch.tensor(chosen, device=memory.tokens.device))
        ids = torch.tensor([starts[row] for row in chosen], device=memory.tokens.device)
        for row, found in zip(
            chosen, _generate(module, own, ids, end_ids, pad_id, banned, **options), strict=True
        ):
            rows[row] = found
    return rows


def _generate(
    module: EncoderDecoder,
    memory: Memory,
    ids: Tensor,
    end_ids: Sequence[int],
    pad_id: int,
    banned: Sequence[int],
    **options,
) -> list[Written]:
    valid = memory.valid
    first = first_position(module.text)
    if first:  # transformers would count from 0
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        options["position_ids"] = positions.expand_as(ids)
    out = module.text.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),  # a start id may be the pad id
        encoder_hidden_states=memory.tokens,
        encoder_attention_mask=None if valid is None else valid.long(),
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
        bad_words_ids=[[id] for id in banned] or None,
        return_dict_in_generate=True,
        output_logits=True,
        # transformers would take a cache for a text alone, and mix image keys into it
        **{CACHE: EncoderDecoderCache(DynamicCache(), DynamicCache())},
        **{"do_sample": False, "num_beams": 1, **options},
    )
    logprobs = module.text.compute_transition_scores(
        out.sequences,
        tuple(logits.float() for logits in out.logits),
        getattr(out, "beam_indices", None),
        normalize_logits=True,
    )
    rows = []
    generated = out.sequences[:, ids.shape[1] :].tolist()
    for row_ids, row in zip(generated, logprobs.tolist()):
        ends = [t for t, id in enumerate(row_ids) if id in end_ids]
        length = ends[0] + 1 if ends else len(row_ids)
        rows.append((row_ids[:length], row[:length]))
    return rows


@torch.no_grad()
def score(module: EncoderDecoder, batch: Batch) -> Tensor:
    """Log-probability of each row's scored ids, its answer and the end, in nats, fp32[B]."""
    return -answer_losses(module, batch)


def _starts(
    memory: Memory, start_ids: Sequence[int], prompts: Sequence[Sequence[int]] | None
) -> list[list[int]]:
    count = len(memory.tokens)
    starts = [list(start_ids)] * count if prompts is None else [list(ids) for ids in prompts]
    if len(starts) != count:
        raise ValueError(f"there are {len(starts)} prompts and images of {count} examples")
    if not all(starts):
        raise ValueError("expected at least one id to begin with in every row, found none")
    return starts


def _longest_start(
    module: EncoderDecoder, starts: Sequence[Sequence[int]], max_new_tokens: int
) -> int:
    """The longest of `starts`. Raises ValueError where the decoder has too few positions; the last
    id that is generated needs none."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    longest = max(len(start) for start in starts)
    positions = positions_of(module.text.config)
    if positions is not None and longest + max_new_tokens - 1 > positions:
        raise ValueError(
            f"max_new_tokens: the decoder has {positions} positions, {longest} ids to begin with "
            f"leave {positions - longest + 1}, found {max_new_tokens}"
        )
    return longest


def _choose(logits: Tensor, forbidden: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest id that is not forbidden, int64[B], and its log-probability, fp32[B], of logits
    float[B, Z]."""
    logits = logits.float()
    best = (logits.index_fill(1, forbidden, float("-inf")) if len(forbidden) else logits).argmax(-1)
    return best, -F.cross_entropy(logits, best, reduction="none")
