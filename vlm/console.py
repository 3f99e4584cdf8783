"""What prints texts for people: as they stand, since names of data, rows and classes may hold what
rich would take for its markup ("[dim]") or for an emoji (":train:")."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """A console that writes texts as they are, in tables too. options: of rich's Console.

    >>> plain_console().print("sample:train:[b] 7")
    sample:train:[b] 7
    """
    return Console(markup=False, emoji=False, highlight=False, **options)
