"""Any source whose rows have boxes, asked where each of their labels is."""

from __future__ import annotations

from vlm.data.example import Example
from vlm.data.grounding import ground
from vlm.data.sources.base import Derived


class Grounded(Derived):
    """Another source's images and boxes as questions and boxes; what its rows say is ignored.

    Reading a row without boxes raises BadRow.
    """

    def read(self, row: int) -> Example:
        return ground(self.source.read(row))
