"""`vlm inspect-batch`: what a batch really holds, before any training. Each family shows its rows
in its own way, see `vlm.families.inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vlm.families.registry import FAMILIES

if TYPE_CHECKING:
    from rich.console import Console

    from vlm.data.example import Skipped
    from vlm.families.base import Model
    from vlm.families.rows import EncodedRow


@dataclass(frozen=True, kw_only=True)
class InspectBatch:
    """Print the first rows that a recipe would train on, and train nothing.

    Scored tokens are green (in [[brackets]] without colour), answers that are not scored struck out
    (in [unscored: ...]), image runs collapsed with their token counts; the system message
    above, masks and boxes below. All other options are the recipe's own settings: with its --pack N
    the rows are packed as one micro-batch, and show who shares a row and where the borders are.
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    """A recipe's file, such as recipes/stage1_adaptor.py."""
    rows: int = 4
    """How many rows."""
    plain: bool = False
    """No colours, for files."""
    draw: Path | None = None
    """Draw the images, as the model sees them, into this PNG file; with --pack the packed rows,
    position by position, over them."""

    def run(self, rest: list[str]) -> None:
        from vlm.console import plain_console
        from vlm.kernels.packed_attention import require_segments
        from vlm.training.loading.encoded import Encoded
        from vlm.training.runs.launch import read_settings, recipe_in

        if self.rows < 1:
            raise ValueError(f"--rows must be at least 1, found {self.rows}")
        if self.draw is not None and (
            self.draw.suffix.lower() != ".png" or not self.draw.absolute().parent.is_dir()
        ):
            raise ValueError(f"--draw: expected a .png file in a folder, found {self.draw}")
        module = recipe_in(self.recipe)
        prog = f"vlm inspect-batch {self.recipe}"
        settings = read_settings(module.Settings, rest, module.__doc__, prog)
        data = settings.data()
        model = settings.build()
        if settings.pack is not None:
            require_segments(model.module.text)
        encoded = Encoded(data, model.processor, settings.bad_rows)
        console = plain_console(no_color=self.plain, force_terminal=False if self.plain else None)
        rows = [encoded[i] for i in range(self.rows)]
        show_rows(rows, model, console, settings.pack)
        if self.draw is not None:
            draw_rows(rows, model, self.draw, settings.pack)


def show_rows(
    rows: Sequence[EncodedRow | Skipped], model: Model, console: Console, pack: int | None = None
) -> Any:
    """Prints rows as a model is trained on them, by its family; gives the batches that they make,
    None where every row was skipped. pack: the most positions of a packed row; None packs none."""
    from rich.text import Text

    kept, skipped = _parted(rows)
    for row in skipped:
        console.print(Text(f"skipped {row.name}: {row.reason}", style="bold red"))
    if not kept:
        return None
    return _view(model).show(kept, model.processor, console, **_packed(pack))


def draw_rows(
    rows: Sequence[EncodedRow | Skipped], model: Model, path: Path, pack: int | None = None
) -> None:
    """Draws the images of rows as a PNG, as the model's family draws them.

    Raises ValueError where there is nothing to draw.
    """
    kept, _ = _parted(rows)
    if not kept:
        raise ValueError("expected a row to draw, found none")
    _view(model).draw(kept, model.processor, path, **_packed(pack))


def _view(model: Model) -> Any:
    """The module that shows the rows of a model's family."""
    return import_module(FAMILIES[model.module.family].inspect)


def _packed(pack: int | None) -> dict[str, int]:
    """The option of families whose rows may be packed."""
    return {} if pack is None else {"pack": pack}


def _parted(rows: Sequence[EncodedRow | Skipped]) -> tuple[list[EncodedRow], list[Skipped]]:
    """The rows that can be used, and those that were skipped."""
    from vlm.data.example import Skipped

    skipped = [row for row in rows if isinstance(row, Skipped)]
    return [row for row in rows if not isinstance(row, Skipped)], skipped
