"""Examples as rows, images decoded in the loader's workers."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from vlm.data.example import BadRow, Example, Skipped
from vlm.families.rows import EncodedRow
from vlm.pixels import BadImage


class Encoded(Dataset):
    """A dataset of examples as rows, images decoded here, in the loader's workers.

    examples: anything indexed that gives Example or Skipped. processor: of any family.
    on_bad_row says what a row does that cannot be read or has no answer: "raise" stops, naming it;
        "skip" gives Skipped, to be counted.
    """

    def __init__(self, examples, processor: Any, on_bad_row: str = "raise") -> None:
        if on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row is 'raise' or 'skip', found {on_bad_row!r}")
        self.examples = examples
        self.processor = processor
        self.on_bad_row = on_bad_row

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> EncodedRow | Skipped:
        example: Example | Skipped = self.examples[index]
        if isinstance(example, Skipped):
            return example
        try:
            return self.processor.encode(example)
        except (BadRow, BadImage) as error:
            if self.on_bad_row == "raise":
                raise
            return Skipped(example.name, str(error).removeprefix(f"{example.name}: "))
