"""Any source whose rows have boxes, asked where each of their labels is."""

from __future__ import annotations

from vlm.data.example import Example
from vlm.data.grounding import ground
from vlm.data.sources.base import Source


class Grounded(Source):
    """Another source's pictures and boxes as questions and boxes; what its rows say is left out.

    Reading a row without boxes raises BadRow.
    """

    def __init__(self, source: Source) -> None:
        self.name, self.source, self.files = source.name, source, source.files

    def __len__(self) -> int:
        return len(self.source)

    def row_name(self, row: int) -> str:
        return self.source.row_name(row)

    def read(self, row: int) -> Example:
        return ground(self.source.read(row))
