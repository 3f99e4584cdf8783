"""The public line reader: images of lines, or of pages that are found out in lines, in; readings
with confidences out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlm.families.line_reader.batch import LineRow, collate_lines
from vlm.families.line_reader.module import LineReader
from vlm.families.line_reader.processor import LineProcessor
from vlm.families.text_reader import TextReader
from vlm.metrics.calibration import apply_temperature
from vlm.ocr import ctc_decode as ctc
from vlm.ocr.results import Token, Transcript


@dataclass(kw_only=True, eq=False)
class LineReaderModel(TextReader):
    """A line reader with its processor, ready to use.

    processor: its preprocessing and characters.
    """

    module: LineReader
    processor: LineProcessor
    reads: ClassVar[str] = "lines"

    def _encode(self, image, name: str) -> LineRow:
        return self.processor.encode_image(image, name)

    def _read(self, rows: Sequence[LineRow], num_beams: int) -> list[Transcript]:
        weight = self.module.head.weight
        logits = self.module(collate_lines(rows).to(weight.device, weight.dtype))
        read = ctc.greedy(logits) if num_beams == 1 else ctc.beam(logits, num_beams)
        return [self._transcript(line, logits.shape[1]) for line in read]

    def _transcript(self, line: ctc.Written, columns: int) -> Transcript:
        temperatures = self.temperatures
        tokens = tuple(
            Token(
                self.processor.decode([id]),
                apply_temperature(logprob, temperatures.token),
                (start / columns, end / columns),
            )
            for id, logprob, (start, end) in zip(line.ids, line.logprobs, line.spans)
        )
        return Transcript(tokens, apply_temperature(line.logprob, temperatures.line))
