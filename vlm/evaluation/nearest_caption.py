"""The caption baseline that needs no language model: the caption of the nearest known image.

Nearest is by the cosine of a pretrained backbone's features, averaged over their grid.

Shapes: B row, U feature width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from vlm.data.example import BadRow, Example, Skipped
from vlm.data.sources.base import Source
from vlm.families.decoder_only.batch import Row
from vlm.image_tokens import ImageTokenizer, group_views
from vlm.pixels import BadImage, open_image
from vlm.ranks import batches_of_rank, gather_in_order, gather_list


def views_of(tokenizer: ImageTokenizer, example: Example) -> Row:
    """The views of an example's images, as this tokenizer takes them. Raises BadImage."""
    views = [
        (pixels, (number, view))
        for number, image in enumerate(example.images)
        for view, pixels in enumerate(tokenizer.pixel_spec(open_image(image)))
    ]
    nothing = torch.zeros(0, dtype=torch.long)
    return Row(name=example.name, ids=nothing, scored=nothing.bool(), views=tuple(views))


@torch.no_grad()
def pooled_features(tokenizer: ImageTokenizer, rows: Sequence[Row]) -> Tensor:
    """One unit vector for each row, fp32[B, U]: image tokens averaged over the grid, then over the
    views of the row's images."""
    parameter = next(tokenizer.parameters())
    sums = torch.zeros(len(rows), tokenizer.dim, device=parameter.device)
    for group in group_views(rows):
        group = group.to(parameter.device, parameter.dtype)
        images = tokenizer(group.pixels)
        tokens = images.tokens.float()
        if images.valid is None:
            means = tokens.mean(1)
        else:
            weights = images.valid.to(tokens)[..., None]
            means = (tokens * weights).sum(1) / weights.sum(1)
        sums.index_add_(0, group.owner[:, 0], means)
    return torch.nn.functional.normalize(sums, dim=1).cpu()


def nearest_rows(
    tokenizer: ImageTokenizer,
    source: Source,
    rows: Sequence[int],
    known: Source,
    accelerator: Accelerator,
    *,
    batch: int,
    bad_rows: str = "raise",
) -> tuple[list[int], list[Skipped]]:
    """For each of some rows of `source`, the row of `known` with the nearest image (the first of
    equals); and the rows of `known` that are skipped. The same on every process.

    batch: rows at once. bad_rows: "raise" for the first row of `known` that cannot be used, or
        "skip".
    Raises ValueError where `known` has no row with an image and an answer.
    """
    found: list[tuple[int, Tensor]] = []
    for indices in batches_of_rank(accelerator, len(rows), batch, "features"):
        views = [views_of(tokenizer, source[rows[i]].question()) for i in indices]
        found += zip(indices, pooled_features(tokenizer, views))
    queries = torch.stack([vector for _, vector in gather_in_order(accelerator, found)])
    best = torch.full((len(queries),), -torch.inf)
    nearest = torch.full((len(queries),), -1)
    skipped: list[Skipped] = []
    for indices in batches_of_rank(accelerator, len(known), batch, "nearest neighbours"):
        usable, views = [], []
        for row in indices:
            try:
                example = known[row]
                if not example.images or not example.answer.strip():
                    raise BadRow(f"{example.name}: no image with an answer")
                views.append(views_of(tokenizer, example))
                usable.append(row)
            except (BadRow, BadImage) as error:
                if bad_rows == "raise":
                    raise
                skipped.append(Skipped(known.row_name(row), str(error)))
        if usable:
            scores = queries @ pooled_features(tokenizer, views).T
            top = scores.argmax(1)
            score = scores.gather(1, top[:, None])[:, 0]
            nearest = torch.where(score > best, torch.tensor(usable)[top], nearest)
            best = torch.maximum(best, score)
    all_best, all_rows = map(torch.stack, zip(*gather_list(accelerator, [(best, nearest)])))
    behind = all_best < all_best.max(0).values
    chosen = all_rows.masked_fill(behind, len(known)).min(0).values.tolist()
    if -1 in chosen:
        raise ValueError(
            f"--baseline {known.name}: expected rows with an image and an answer, found none"
        )
    return chosen, gather_list(accelerator, skipped)
