"""Which rows of a source are evaluated, and whether they can be: found out before any training."""

from __future__ import annotations

from typing import NamedTuple

from tqdm import tqdm

from vlm.data.example import BadRow, Skipped
from vlm.data.sources.base import Source
from vlm.pixels import BadImage


def held_out_rows(source: Source, count: int) -> list[int]:
    """`count` rows spread evenly over a source; all of them where it has fewer.

    >>> from vlm.data.sources import open_source
    >>> held_out_rows(open_source("scenes:10"), 4)
    [0, 2, 5, 7]
    """
    count = min(count, len(source))
    return [i * len(source) // count for i in range(count)]


class Usable(NamedTuple):
    """Rows of a source that can be evaluated, and how many of their text tokens are cut."""

    rows: list[int]
    cut: int


def usable_rows(model, source: Source, rows: list[int], bad_rows: str, say) -> Usable:
    """Those of the held-out rows that can be evaluated: readable, short enough, with an image.

    model: what `vlm.load` gives. say: prints a text, as rich's `Console.print` does.
    What is skipped or cut is said. Raises BadRow or BadImage for the first unreadable one unless
    `bad_rows` is "skip", and ValueError where fewer than two are left.
    """
    usable, reasons, cut = [], [], 0
    for row in tqdm(rows, desc="reading held-out rows", disable=len(rows) < 1000, leave=False):
        try:
            encoded = model.processor.encode(source[row])
        except (BadRow, BadImage) as error:
            if bad_rows == "raise":
                raise
            name = source.row_name(row)
            encoded = Skipped(name, str(error).removeprefix(f"{name}: "))
        if isinstance(encoded, Skipped):
            reasons.append(f"{encoded.name}: {encoded.reason}")
        elif not encoded.views:
            reasons.append(f"{encoded.name}: no image")
        else:
            usable.append(row)
            cut += encoded.cut
    if reasons:
        lines = [f"{len(reasons)} of {len(rows)} held-out rows skipped, such as:", *reasons[:3]]
        say("\n  ".join(lines), highlight=False, markup=False)
    if cut:
        say(f"{cut} text tokens of the held-out rows cut to fit the context")
    if rows and len(usable) < 2:
        raise ValueError(
            f"{source.name}: expected at least two held-out rows with an image, found "
            f"{len(usable)} of {len(rows)}; name others with --held-out, or evaluate none with "
            "--held-out-rows 0"
        )
    return Usable(usable, cut)
