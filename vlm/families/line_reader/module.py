"""Readers of single lines: image tokens along the line, and what each of them says.

Each token names a character or nothing (the blank); what is read is the row of names with
repetitions joined and blanks skipped (CTC, Graves et al. 2006). There is no decoder that writes
one character after another, so a line is read in one pass, and each character has a position.

Shapes: V view (a line), L image tokens, D width, Z characters and the blank.
"""

from __future__ import annotations

from torch import Tensor, nn

from vlm.families.line_reader.batch import LineBatch
from vlm.image_tokens import ImageTokenizer


class LineReader(nn.Module):
    """An image tokenizer and a linear layer that names characters.

    tokenizer: gives tokens in reading order (`vlm.tokenizers.columns`). head: to the scores of the
        blank and the characters.
    """

    family = "line_reader"
    through = ()
    """Parts that gradients pass through where they do not learn."""

    def __init__(self, tokenizer: ImageTokenizer, head: nn.Linear) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.head = head

    def parts(self) -> dict[str, nn.Module]:
        """The components by name, as stages and start-up tables speak of them."""
        return {"tokenizer": self.tokenizer, "head": self.head}

    def forward(self, batch: LineBatch) -> Tensor:
        """Scores float[V, L, Z] of every token."""
        return self.head(self.tokenizer(batch.pixels).tokens)
