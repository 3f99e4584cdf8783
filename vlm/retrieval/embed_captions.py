"""Images with captions as vectors to retrieve among: each different image once, each caption.

Rows that show the same image (a file, or bytes, of equal content) are one image with several
captions, and so is a row with several answers. Texts are embedded as rows are read, images in a
second pass, when it is known which rows show the same; how both are shared among processes says
`vlm.retrieval.embed_rows`.

Shapes: N image, M text, U shared embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from vlm.data.example import BadRow, Example, Skipped
from vlm.data.sources.base import Source
from vlm.families.base import evaluating
from vlm.families.contrastive.model import ContrastiveModel
from vlm.families.contrastive.processor import PairProcessor
from vlm.pixels.image_ref import ImageRef
from vlm.ranks import gather_list, reduce_sum
from vlm.retrieval.embed_rows import (
    Reading,
    embed_images,
    embed_texts,
    only_image,
    read_batches,
)


class Found(NamedTuple):
    """What retrieval compares: vectors of images and texts, and where they come from.

    images: float32[N, U]; texts: float32[M, U]; unit norm, on the model's device.
    image_of_text: int64[M], on the CPU. image_row: the row that shows each image first. text_row:
    for each text its row, and which of the row's captions it is.
    texts_cut, tokens_cut: how many captions were longer than the context, and by how much together.
    skipped: the rows that are skipped.
    """

    images: Tensor
    texts: Tensor
    image_of_text: Tensor
    image_row: list[int]
    text_row: list[tuple[int, int]]
    texts_cut: int
    tokens_cut: int
    skipped: list[Skipped]


def embed_pairs(
    model: ContrastiveModel,
    source: Source,
    rows: Sequence[int],
    template: str,
    accelerator: Accelerator,
    reading: Reading,
) -> Found:
    """Every caption in its template, and every different image once; the same on every process.

    template: what a caption is put into, where "{}" stands.
    Raises BadRow for the first row that will not do, unless `reading` says to skip it; ValueError
    where no row is left, and naming rows whose vectors have no direction.
    """
    captions = _embed_captions(model, source, rows, template, accelerator, reading)
    number: dict[bytes, int] = {}  # of each image, in the order in which rows show them
    image_of_index = {p: number.setdefault(d, len(number)) for p, d in captions.image.items()}
    first: dict[int, int] = {}
    for index, image in image_of_index.items():
        first.setdefault(image, rows[index])
    images = embed_images(model, source, list(first.values()), accelerator, reading)

    # Rows of an image that cannot be decoded are skipped, all of them.
    lost = {image: row.reason for image, row in images.skipped}
    skipped = captions.skipped + [
        (index, Skipped(source.row_name(rows[index]), lost[image]))
        for index, image in image_of_index.items()
        if image in lost
    ]
    skipped = [row for _, row in sorted(skipped, key=lambda item: item[0])]
    if not images.kept.any():
        reason = f"{skipped[0].name}: {skipped[0].reason}"
        raise ValueError(f"{source.name}: none of {len(rows)} rows can be used, such as {reason}")
    kept = images.kept.cpu()
    image_of_text = torch.tensor([image_of_index[p] for p in captions.row_index.tolist()])
    left = kept[image_of_text]
    new_number = kept.cumsum(0) - 1
    index = captions.row_index[left].tolist()
    nth = [0] * len(index)
    for i in range(1, len(index)):
        nth[i] = nth[i - 1] + 1 if index[i] == index[i - 1] else 0
    return Found(
        images=images.vectors[images.kept],
        texts=captions.vectors[left.to(model.device)],
        image_of_text=new_number[image_of_text[left]],
        image_row=[row for image, row in first.items() if kept[image]],
        text_row=[(rows[p], n) for p, n in zip(index, nth)],
        texts_cut=captions.cut,
        tokens_cut=captions.cut_tokens,
        skipped=skipped,
    )


def captions_of(example: Example) -> tuple[str, ...]:
    """Every answer of an example, as it is embedded."""
    return tuple(turn.text.strip() for turn in example.turns if turn.role == "assistant")


class _Captioned(NamedTuple):
    """What is read of a row: which image it shows, and what is said of it."""

    image: bytes
    captions: tuple[str, ...]


class _Captions(NamedTuple):
    """The captions of all rows, in their order.

    vectors: float32[M, U]. row_index: int64[M], of each caption's row in the rows.
    image: of each row that has captions, by its index, which image it shows.
    cut, cut_tokens: how many captions were longer than the context, and by how much together.
    """

    vectors: Tensor
    row_index: Tensor
    image: dict[int, bytes]
    cut: int
    cut_tokens: int
    skipped: list[tuple[int, Skipped]]


@torch.no_grad()
def _embed_captions(
    model: ContrastiveModel,
    source: Source,
    rows: Sequence[int],
    template: str,
    accelerator: Accelerator,
    reading: Reading,
) -> _Captions:
    """The vector of every caption in its template, the same on every process."""
    vectors: list[Tensor] = []
    found: list[tuple[int, bytes, int]] = []
    skipped: list[tuple[int, Skipped]] = []
    cut: list[tuple[int, int]] = []
    with evaluating(model.module):
        read = partial(_read_captions, model.processor)
        for batch in read_batches(source, rows, read, accelerator, reading, "captions"):
            skipped += batch.skipped
            texts, names = [], []
            for index, item in zip(batch.indices, batch.items):
                found.append((index, item.image, len(item.captions)))
                texts += [template.replace("{}", caption) for caption in item.captions]
                names += [source.row_name(rows[index])] * len(item.captions)
            if texts:
                embedded, gone = embed_texts(model, texts, names)
                vectors.append(embedded)
                cut.append((sum(map(bool, gone)), sum(gone)))
    mine = {index for index, _, _ in found}
    found = sorted(gather_list(accelerator, found))
    counts = torch.tensor([count for _, _, count in found], dtype=torch.long)
    index = torch.tensor([p for p, _, _ in found], dtype=torch.long).repeat_interleave(counts)
    all_vectors = torch.zeros(len(index), model.module.dim, device=model.device)
    if vectors:
        here = torch.tensor([p in mine for p, _, _ in found]).repeat_interleave(counts)
        all_vectors[here.to(model.device)] = torch.cat(vectors)
    cut = gather_list(accelerator, cut)
    return _Captions(
        vectors=reduce_sum(accelerator, all_vectors),
        row_index=index,
        image={index: image for index, image, _ in found},
        cut=sum(texts for texts, _ in cut),
        cut_tokens=sum(tokens for _, tokens in cut),
        skipped=sorted(gather_list(accelerator, skipped)),
    )


def _read_captions(processor: PairProcessor, example: Example) -> _Captioned:
    """The image and captions of a row. Raises BadRow where one is missing, or nothing of it is
    read."""
    image = only_image(example)
    captions = captions_of(example)
    if not all(captions) or not captions:
        found = "an empty text" if captions else "none"
        raise BadRow(f"{example.name}: expected a caption, found {found}")
    if unread := processor.unread(captions):
        raise BadRow(
            f"{example.name}: expected a caption, found {captions[unread[0]]!r}, of which the "
            "model reads nothing"
        )
    return _Captioned(_identity(image, example.name), captions)


def _identity(image: ImageRef, name: str) -> bytes:
    """Equal for images of equal bytes. Raises BadRow for a file that cannot be read."""
    if isinstance(image.data, bytes):
        return hashlib.sha256(image.data).digest()
    try:
        with open(image.data, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise BadRow(f"{name}: {image.data} cannot be read: {error.strerror}") from error
