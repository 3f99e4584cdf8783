"""What evaluations share: their start, the folder of their results, the rows they left out."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from vlm import assets


def require_writable(out: Path) -> None:
    """Makes the folder of the results. Raises ValueError where they could not be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out {out}: expected a folder to write to ({error})") from error


def show_left_out(result: dict[str, Any], console: Console) -> None:
    """How many rows could not be used, and why the first of them."""
    left_out = result["skipped"]
    console.print(f"{left_out} of {result['rows']} rows left out" + (":" if left_out else ""))
    for line in result["examples_skipped"][:5]:
        console.print(f"  {line}", markup=False)


def start(
    settings_type: type,
    evaluate: Callable[[Any], Any],
    description: str,
    arguments: Sequence[str] | None,
) -> None:
    """One evaluation with settings from the command line (None) or from `arguments`; a fault of the
    input ends it with one line."""
    settings = tyro.cli(settings_type, args=arguments, description=description)
    try:
        evaluate(settings)
    except (ValueError, OSError, assets.FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
