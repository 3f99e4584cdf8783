"""The command of models that read text: ocr.

It prints what `model.ocr(..., stream=True)` yields: pages are opened as they are needed and results
written as they are there, so that neither the number of files nor that of their pages fills the
memory, and what was read stays where it stops.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vlm.commands.model import open_model
from vlm.config import require_least

if TYPE_CHECKING:
    from vlm.ocr.documents import Page
    from vlm.ocr.results import Reading

PAGES_AT_ONCE = 8
"""Pages that a model of whole pages is given together, at most."""


@dataclass(frozen=True, kw_only=True)
class Ocr:
    """Read the text of images and PDFs, line by line in reading order."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(name="images")]
    """Image and PDF files."""
    model: str = "line-reader"
    """The reader: the one that comes with the package, a run folder, a model folder or a hub id."""
    layout: Literal["auto", "line", "page"] = "auto"
    """page finds the lines; line takes each image as one; auto decides by what is on it. Models
    of whole pages (Donut, PaliGemma) are shown the page."""
    prompt: str | None = None
    """What a model of whole pages is asked, literally; by default what it was trained on."""
    format: Literal["text", "json", "hocr", "alto"] = "text"
    """json has boxes, confidences and words, and Donut's answers as values; hocr and alto are
    XML."""
    out: Path | None = None
    """Where to write instead of the terminal: a file for all, or a folder for one file each. Both
    grow as pages are read; in a folder a file ends in .new until it is whole."""
    bad_pages: Literal["raise", "skip"] = "raise"
    """Files and pages that cannot be read: stop and name them, those that are missing or neither
    image nor PDF before any is read; or skip them, and name them at the end."""
    draw: Path | None = None
    """Draw lines, their confidences and texts into this PNG file; of several pages into files with
    -1, -2 and so on before .png."""
    min_confidence: float = 0.0
    """Lines below it are skipped, and counted; 0 to 1."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    batch_size: int = 16
    """Lines, or whole pages, read at once."""
    dpi: int = 200
    """Pixels to the inch at which PDFs are drawn."""
    password: str | None = None
    """Of an encrypted PDF."""
    device: str = "auto"
    """auto takes a GPU where there is one."""
    dtype: str = "auto"
    """auto keeps the model's own where the device is fast in it, else takes float32; or float32,
    bfloat16, float16."""

    def run(self) -> None:
        self._check()
        from vlm.ocr.documents import check_files
        from vlm.ocr.output import Output
        from vlm.ocr.streaming import filter_by_confidence

        files, total, skipped = check_files(self.files, self.password)
        skip = self.bad_pages == "skip"
        if skipped and not (skip and files):
            raise ValueError(_together(skipped, len(self.files)))
        model = open_model(self.model, "ocr", "reads no text", self.device, self.dtype)
        self._check_model(model)
        count, unsure = 0, 0
        has_text: dict[Path, bool] = {}
        with Output(self.out, self.format, headed=len(self.files) > 1) as output:
            for page, reading in self._readings(model, files, total, skipped):
                has_text[page.file] = has_text.get(page.file, False) or bool(reading.text.strip())
                reading, dropped = filter_by_confidence(reading, self.min_confidence)
                count, unsure = count + 1, unsure + dropped
                output.add(page.file, page.name, reading)
                if self.draw is not None:
                    from vlm.draw import draw_reading

                    draw_reading(page.image, reading).save(self._drawing(count, total))
            cut = skipped and skipped[-1].startswith(f"{output.file}[")  # at a page of this file
            if skip or not cut:
                output.finish()
        if unsure:
            print(
                f"{unsure} lines of a confidence below {self.min_confidence:g} skipped",
                file=sys.stderr,
            )
        if skipped and not skip:
            raise ValueError(
                f"{skipped[0]} (what was read before it is written; --bad-pages skip passes over "
                "such pages)"
            )
        if skipped and not count:
            raise ValueError(_together(skipped, len(skipped)))
        if skipped:
            print(f"{len(skipped)} files or pages skipped:", *skipped, sep="\n  ", file=sys.stderr)
        for file in (file for file, some in has_text.items() if not some):
            print(f"{file}: no text found", file=sys.stderr)

    def _readings(
        self, model: Any, files: list[Path], total: int, skipped: list[str]
    ) -> Iterator[tuple[Page, Reading]]:
        """Each page with what is read on it, under a progress bar; warnings stand above it."""
        from tqdm import tqdm

        from vlm.ocr.documents import open_pages
        from vlm.pixels.image_ref import ImageRef

        asked: deque[Page] = deque()  # pages whose readings are still to come

        def images() -> Iterator[ImageRef]:
            skip = self.bad_pages == "skip"
            for page in open_pages(files, skipped, skip, self.dpi, self.password):
                asked.append(page if self.draw is not None else page._replace(image=None))
                yield ImageRef(page.image, page.name)

        options: dict[str, Any] = {"num_beams": self.num_beams} if self.num_beams > 1 else {}
        if model.reads == "lines":
            options |= {"layout": self.layout, "batch_size": self.batch_size}
        else:
            options["batch_size"] = min(self.batch_size, PAGES_AT_ONCE)
            if self.prompt is not None:
                options["prompt"] = self.prompt
        # Between texts on a terminal a bar would only stand in the way.
        seen = self.out is None and sys.stdout.isatty()
        bar = tqdm(total=total, unit="page", disable=True if seen or total == 1 else None)
        with bar, warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: bar.write(
                f"warning: {message}", file=sys.stderr
            )
            for reading in model.ocr(images(), stream=True, **options):
                yield asked.popleft(), reading
                bar.update()

    def _check(self) -> None:
        """Raises ValueError for options that cannot be."""
        if not self.files:
            raise ValueError("name at least one image or PDF")
        require_least(self, num_beams=1, batch_size=1, dpi=1)
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"--min-confidence: expected 0 to 1, found {self.min_confidence}")
        if self.draw is not None and (
            self.draw.suffix.lower() != ".png" or not self.draw.absolute().parent.is_dir()
        ):
            raise ValueError(f"--draw: expected a .png file in a folder, found {self.draw}")
        if self.out is None:
            return
        if not self.out.absolute().parent.is_dir():
            raise ValueError(f"--out: expected a path in a folder, found {self.out}")
        if self.out.is_dir():
            names = Counter(path.stem for path in self.files)
            name, times = names.most_common(1)[0]
            if times > 1:
                raise ValueError(f"--out: several files would be written to {name} in {self.out}")

    def _check_model(self, model: Any) -> None:
        """Raises ValueError for a model that does not read as it is asked to."""
        if model.reads == "pages" and self.layout == "line":
            raise ValueError(f"--layout line: {self.model} reads an image as a whole")
        if model.reads == "lines" and self.prompt is not None:
            raise ValueError(f"--prompt: {self.model} reads lines, and is asked nothing")

    def _drawing(self, number: int, pages: int) -> Path:
        if pages == 1:
            return self.draw
        return self.draw.with_name(f"{self.draw.stem}-{number}{self.draw.suffix}")


def _together(faults: list[str], count: int) -> str:
    """One message of all faults among so many files or pages."""
    hint = "--bad-pages skip reads the others"
    if len(faults) == 1:
        return faults[0] if count == 1 else f"{faults[0]} ({hint})"
    listed = "\n  ".join(faults)
    hint = "" if len(faults) == count else f"; {hint}"
    return f"{len(faults)} of {count} files or pages cannot be read{hint}:\n  {listed}"
