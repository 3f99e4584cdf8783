"""Generation and scoring for decoder families: one encoded image, any number of prompts.

Decoding itself is transformers' `generate`, on our parts. Batches are padded on the left, so that
every row's next token stands at the end; greedy ids in a batch equal those of a row alone.
`generate` sees no prompt ids, only vectors: `repetition_penalty` and `no_repeat_ngram_size` look at
what was written alone, and lengths (`length_penalty`, `min_new_tokens`) count it alone.

Shapes: B example, T text position, N scored position, D decoder width, Z vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from vlm.compat.transformers import BaseStreamer, prompt_position_ids
from vlm.families.decoder_only.batch import Batch
from vlm.families.decoder_only.encoded_images import EncodedImages
from vlm.families.decoder_only.module import DecoderOnly
from vlm.losses.token import state_losses, sum_by_row
from vlm.text.generation import Written

GREEDY = {"do_sample": False, "num_beams": 1, "max_new_tokens": 64}
"""What generation does where nothing is asked; names are transformers'."""


@torch.no_grad()
def generate(
    module: DecoderOnly,
    batch: Batch,
    stop_ids: Sequence[int],
    pad_id: int,
    banned: Sequence[int] = (),
    **options,
) -> list[Written]:
    """What is written after each row of a left-padded batch.

    banned, options: see `write`.
    Raises ValueError for a batch padded on the right, or an option that is refused.
    """
    check_options(options)
    if batch.bounds is not None or (batch.padding != "left" and not bool(batch.valid.all())):
        raise ValueError("generation continues at the end of rows: pad the batch on the left")
    images = module.encode(batch.groups, batch.arrangement)
    return write(module, images, batch, stop_ids, pad_id, banned, **options)


def check_options(options: dict, seed: int | None = None) -> None:
    """Raises ValueError for an option that cannot be, before anything is computed."""
    if seed is not None and (seed < 0 or not options.get("do_sample")):
        raise ValueError(f"seed: expected 0 or more, and do_sample=True to draw; found {seed}")
    for name in ("num_beams", "max_new_tokens"):
        if options.get(name, 1) < 1:
            raise ValueError(f"{name} must be at least 1, found {options[name]}")
    if options.get("num_return_sequences", 1) != 1:
        raise ValueError("num_return_sequences: there is one answer to each prompt; ask again")
    if options.get("use_cache") is False:
        raise ValueError("use_cache: prompts are vectors, which only a cache keeps; leave it out")
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if name in options:
            raise ValueError(f"{name} would count the prompt's tokens too: give {instead}")


@torch.no_grad()
def write(
    module: DecoderOnly,
    images: EncodedImages | None,
    batch: Batch,
    stop_ids: Sequence[int],
    pad_id: int,
    banned: Sequence[int] = (),
    **options,
) -> list[Written]:
    """What is written after each row of a batch whose images are encoded.

    images: as the module encoded them. batch: padded on the left. Position ids are those of its
        layouts, and what is written goes on at the largest number of each row + 1.
    banned: ids that are never written, besides those of an option `suppress_tokens`.
    options: transformers' names (`max_new_tokens`, `num_beams`, `do_sample`, `temperature`,
        `top_p`, ...), greedy by default; with `do_sample`, transformers' `top_k` is 50 unless
        given. `num_return_sequences`, `max_length` and `min_length` are refused.
    Raises ValueError for an option that is refused, and as `DecoderOnly.require_layout` does.
    """
    check_options(options)
    module.require_layout(batch)
    never = [*(options.pop("suppress_tokens", None) or ()), *banned]
    with prompt_position_ids(module.text, batch.positions) as where:
        out = module.text.generate(
            attention_mask=batch.valid.long(),
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
            suppress_tokens=never or None,
            return_dict_in_generate=True,
            output_logits=True,
            **module.prompt(images, batch),
            **where,
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


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws come from `seed`, and torch's global generators are put back afterwards; None draws
    from the global generators, as transformers does."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def stream(start: Callable[..., Written]) -> Generator[int, None, Written]:
    """Ids as they are written, one at a time; the value returned is that of `start`.

    start: generates one row, and hands `streamer` and `stopping_criteria` on to `write`. It runs
    in a thread of its own, which has ended when this generator has, however that comes: closed
    early, generation stops after the id in work. What `start` raises is raised here.
    """
    ids: SimpleQueue[int | None] = SimpleQueue()
    abandoned = Event()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="vlm-stream") as pool:
        try:
            done = pool.submit(
                start,
                streamer=_Queued(ids),
                stopping_criteria=StoppingCriteriaList([_Once(abandoned)]),
            )
            done.add_done_callback(lambda _: ids.put(None))
            while (id := ids.get()) is not None:
                yield id
            return done.result()
        finally:
            abandoned.set()


class _Queued(BaseStreamer):
    """Puts each id that transformers hands on into a queue. The prompt has none: it is vectors."""

    def __init__(self, ids: SimpleQueue) -> None:
        self.ids = ids

    def put(self, value: Tensor) -> None:
        for id in value.flatten().tolist():
            self.ids.put(id)

    def end(self) -> None:
        """The queue is ended when the thread is, errors included."""


class _Once(StoppingCriteria):
    """Stops every row once an event is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: object, **_) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@torch.no_grad()
def answer_losses(module: DecoderOnly, batch: Batch) -> Tensor:
    """Negative log-probability of each row's scored tokens in nats, fp32[B]."""
    losses = state_losses(module.logits, module.states(batch), batch.targets)
    return sum_by_row(losses, batch.target_rows, len(batch.names))


@torch.no_grad()
def image_gain(module: DecoderOnly, batch: Batch) -> tuple[Tensor, Tensor]:
    """How much the right image helps: (right, wrong), nats per row, fp32[B].

    right: each row's loss with its own images. wrong: with those of another row of the batch that
    takes as many positions; NaN where no other row does, or the row has no image.
    Each image is encoded once.
    """
    encoded = module.encode(batch.groups, batch.arrangement)
    right = _losses(module, batch, encoded)
    wrong = torch.full_like(right, float("nan"))
    if encoded is None:
        return right, wrong
    sizes = encoded.sizes(len(batch.names))
    source = list(range(len(sizes)))
    for size in {*sizes} - {0}:
        rows = [row for row, own in enumerate(sizes) if own == size]
        for row, other in zip(rows, rows[-1:] + rows[:-1]):
            source[row] = other
    parts = [encoded.of(row) for row in source]
    losses = _losses(module, batch, type(encoded).side_by_side(parts))
    moved = [row != other for row, other in enumerate(source)]
    return right, torch.where(torch.tensor(moved, device=losses.device), losses, wrong)


def _losses(module: DecoderOnly, batch: Batch, encoded: EncodedImages | None) -> Tensor:
    hidden = module.hidden(encoded, batch)
    states = hidden[:, :-1][batch.scored[:, 1:]]
    losses = state_losses(module.logits, states, batch.targets)
    return sum_by_row(losses, batch.target_rows, len(batch.names))
