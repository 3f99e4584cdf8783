"""Settings of a run that trains a line reader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm.families.line_reader import layout as line_reader
from vlm.families.line_reader.model import LineReaderModel
from vlm.training.runs.reading import NEW, ReadingSettings


@dataclass(frozen=True, kw_only=True)
class LineReaderSettings(ReadingSettings):
    """Settings of a run that trains a line reader: a fresh one, or one to go on from."""

    reads_prompts = False
    out: Path = Path("runs/line_reader")
    start: str = NEW
    """new, or a line reader to go on from: "line-reader" (the shipped one), a run or a folder.
    Characters that it lacks are added to it, and its strokes are kept."""
    height_px: int = 32
    """Rows that a line of a new reader is brought to."""
    width: int = 192
    """Width of a new reader's tokens, a multiple of 64."""
    depth: int = 6
    """Its layers along the line."""
    rate: float = 1.5e-3
    """Peak learning rate."""
    steps: int = 2000

    def build(self) -> LineReaderModel:
        """The reader to train. Raises ValueError for settings of a new reader beside one to go on
        from."""
        if self.start != NEW:
            self.require_not_given(f"start {self.start!r}", ("height_px", "width", "depth"))
        characters = self.characters()
        if self.start == NEW:
            return line_reader.build(
                characters,
                height_px=self.height_px,
                width=self.width,
                layers=self.depth,
                seed=self.seed,
            )
        import vlm

        model = vlm.load(self.start, device="cpu", dtype="float32")
        if not isinstance(model, LineReaderModel):
            raise ValueError(
                f"start {self.start!r}: expected a line reader, found a {model.module.family} model"
            )
        known = model.processor.characters
        new = "".join(c for c in characters if c not in known)
        return line_reader.with_characters(model, known + new, self.seed)
