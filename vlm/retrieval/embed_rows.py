"""The rows of a source as vectors: streamed, and shared among processes.

Batches are shared as `vlm.ranks` says; a process that gets none takes part all the same. Of an
image or a text only its vector is kept.

Shapes: N row, U shared embedding width, n text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlm.data.example import BadRow, Example, Skipped
from vlm.data.sources.base import Source
from vlm.families.base import evaluating
from vlm.families.contrastive.batch import Pair
from vlm.families.contrastive.model import ContrastiveModel, require_directions
from vlm.families.contrastive.processor import PairProcessor
from vlm.image_tokens import ViewGroup, group_views
from vlm.pixels import BadImage
from vlm.ranks import gather_in_order, reduce_sum, share

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How rows are read.

    batch: rows at once. workers: processes that read and decode, for each process that computes.
    bad_rows: a row that cannot be read stops everything and is named, or is skipped.
    """

    batch: int = 64
    workers: int = 1
    bad_rows: Literal["raise", "skip"] = "raise"


class Batch(NamedTuple, Generic[T]):
    """What was read of some rows: `items` of the rows at `indices`, and what was skipped."""

    indices: list[int]
    items: T
    skipped: list[tuple[int, Skipped]]


class Images(NamedTuple):
    """The images of rows.

    vectors: float32[N, U], unit norm, zero for rows that are skipped, on the model's device.
    kept: bool[N], False for rows that are skipped. beside: what else was kept of each row that
    is not. skipped: those that are, by their indices in the rows.
    """

    vectors: Tensor
    kept: Tensor
    beside: list[Any]
    skipped: list[tuple[int, Skipped]]


def read_batches(
    source: Source,
    rows: Sequence[int],
    read: Callable[[Example], T],
    accelerator: Accelerator,
    reading: Reading,
    what: str,
    collate: Callable[[list[T]], Any] = list,
) -> Iterator[Batch]:
    """This process's share of the batches of rows, with a bar over all of them on the first.

    read: what is taken of an example; it raises BadRow or BadImage for one that will not do.
    what: the bar's name. collate: what becomes of the items of a batch; it runs in the workers, as
    `read` does.
    Raises BadRow for the first row that will not do, unless `reading` says to skip it.
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    batches = list(share(len(rows), reading.batch, rank, ranks))
    loader = DataLoader(
        _Rows(source, rows, read),
        batch_sampler=batches,
        num_workers=min(reading.workers, len(batches)),
        collate_fn=_Collate(collate),
    )
    with tqdm(total=len(rows), desc=what, disable=rank > 0, leave=False) as bar:
        for batch in loader:
            if batch.skipped and reading.bad_rows == "raise":
                row = batch.skipped[0][1]
                raise BadRow(f"{row.name}: {row.reason}")
            yield batch
            bar.update(min(ranks * reading.batch, len(rows) - bar.n))


@torch.no_grad()
def embed_images(
    model: ContrastiveModel,
    source: Source,
    rows: Sequence[int],
    accelerator: Accelerator,
    reading: Reading,
    beside: Callable[[Example], Any] | None = None,
) -> Images:
    """The vector of the one image of each row, the same on every process.

    beside: what else is kept of a row, such as its label, if anything; it raises BadRow for one
    that will not do, before its image is decoded.
    Raises BadRow as `read_batches`, and ValueError naming rows whose vector has no direction.
    """
    read = partial(_read_image, model.processor, beside)
    dtype = next(model.module.tokenizer.parameters()).dtype
    vectors = torch.zeros(len(rows), model.module.dim, device=model.device)
    found, skipped = [], []
    with evaluating(model.module):
        for batch in read_batches(source, rows, read, accelerator, reading, "images", _stack):
            skipped += batch.skipped
            if batch.indices:
                groups, names, kept = batch.items
                groups = [group.to(model.device, dtype) for group in groups]
                embedded = model.module.embed_images(groups).float()
                require_directions(embedded, names)
                vectors[batch.indices] = embedded
                found += zip(batch.indices, kept)
    found = gather_in_order(accelerator, found)
    kept = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    kept[[index for index, _ in found]] = True
    return Images(
        reduce_sum(accelerator, vectors),
        kept,
        [value for _, value in found],
        gather_in_order(accelerator, skipped),
    )


@torch.no_grad()
def embed_texts(
    model: ContrastiveModel, texts: Sequence[str], names: Sequence[str]
) -> tuple[Tensor, tuple[int, ...]]:
    """The vectors of a batch of texts, float32[n, U], unit norm, on the model's device; and how
    many tokens of each were cut. The model is in evaluation mode already.

    Raises ValueError with the `names` of texts whose vector has no direction.
    """
    ids, valid, cut = model.processor.texts(texts)
    vectors = model.module.embed_texts(ids.to(model.device), valid.to(model.device)).float()
    require_directions(vectors, names)
    return vectors, cut


def only_image(example: Example):
    """The one image of an example. Raises BadRow where it has none or several."""
    if len(example.images) != 1:
        raise BadRow(f"{example.name}: expected one image, found {len(example.images)}")
    return example.images[0]


class _Rows(Dataset):
    """What `read` takes of each row, or Skipped, with the row's index."""

    def __init__(self, source: Source, rows: Sequence[int], read: Callable) -> None:
        self.source, self.rows, self.read = source, rows, read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        row = self.rows[index]
        try:
            return index, self.read(self.source[row])
        except (BadRow, BadImage) as error:
            name = self.source.row_name(row)
            return index, Skipped(name, str(error).removeprefix(f"{name}: "))


class _Collate:
    def __init__(self, collate: Callable[[list], Any]) -> None:
        self.collate = collate

    def __call__(self, found: list[tuple[int, Any]]) -> Batch:
        skipped = [(index, item) for index, item in found if isinstance(item, Skipped)]
        kept = [(index, item) for index, item in found if not isinstance(item, Skipped)]
        return Batch([index for index, _ in kept], self.collate([i for _, i in kept]), skipped)


def _read_image(
    processor: PairProcessor, beside: Callable[[Example], Any] | None, example: Example
) -> tuple[Pair, Any]:
    """The image of an example as a pair without its text, and what is kept beside it."""
    kept = None if beside is None else beside(example)
    views = processor.views(only_image(example), example.name)
    return Pair(name=example.name, ids=torch.empty(0), views=views), kept


def _stack(items: list[tuple[Pair, Any]]) -> tuple[tuple[ViewGroup, ...], list[str], list[Any]]:
    pairs = [pair for pair, _ in items]
    return group_views(pairs), [pair.name for pair in pairs], [kept for _, kept in items]
