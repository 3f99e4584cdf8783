"""The `vlm` command: vision-language models built from shared image tokenizers."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from vlm import assets
from vlm.commands import all_commands
from vlm.compat.extras import MissingExtra
from vlm.compat.versions import warn_untested
from vlm.families.registry import named


def commands() -> dict[str, type]:
    """Name of a command -> its options, of which `run` does it."""
    return {command.name: named(command.options) for command in all_commands()}


def command_type() -> Any:
    """All commands as one type, for tyro."""
    kinds = (Annotated[cls, tyro.conf.subcommand(name)] for name, cls in commands().items())
    return Union[tuple(kinds)]  # noqa: UP007, of types that are known when it runs


def recipe_help(command: str, path: Path) -> None:
    """Prints what a recipe's own settings mean, ahead of the command's help."""
    from vlm.training.runs.launch import recipe_in

    with contextlib.suppress(SystemExit):  # help ends a program
        tyro.cli(recipe_in(path).Settings, args=["--help"], prog=f"vlm {command} {path}")


def run(arguments: list[str]) -> None:
    """Does what one command line asks for. A command's own options alone are read, and its module
    alone is imported; what is no command's name gets the list of them."""
    name, rest = (arguments[0] if arguments else ""), arguments[1:]
    options = {command.name: command.options for command in all_commands()}
    if name not in options:
        tyro.cli(command_type(), args=arguments, prog="vlm", description=__doc__.partition(":")[2])
        return
    kind, prog = named(options[name]), f"vlm {name}"
    if name in ("launch", "eval"):  # all after it is accelerate's and the recipe's, or a task's own
        kind().run(rest)
    elif name in ("inspect-batch", "plan"):  # a recipe's settings come with theirs
        if rest and {"-h", "--help"} & set(rest) and Path(rest[0]).is_file():
            recipe_help(name, Path(rest[0]))
        command, others = tyro.cli(kind, args=rest, prog=prog, return_unknown_args=True)
        command.run(others)
    else:
        tyro.cli(kind, args=rest, prog=prog).run()


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; a fault of the input ends it with one line and exit code 1."""
    warn_untested()
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, MissingExtra, assets.FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
