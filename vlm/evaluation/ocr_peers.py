"""Other projects' readers, to compare with: tesseract and rapidocr. Neither is needed otherwise.

A reader has a `name`, says `about` itself what a result depends on, and reads in one or several
`ways`, which differ in speed alone. `prepare` brings decoded images into the form that it takes,
and is not timed; `read` is. A way that cannot read what was prepared gives None.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image


class Said(NamedTuple):
    """What a reader says of an image. confidence: in 0 to 1, that the text is right as a whole;
    words: of each its text and confidence. None and () where the reader does not say."""

    text: str
    confidence: float | None = None
    words: tuple[tuple[str, float], ...] = ()


RAPIDOCR_MODELS = {
    "Det": "PP-OCRv6_det_small.onnx",
    "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
    "Rec": "PP-OCRv6_rec_small.onnx",
}
"""The files of rapidocr 3.10's default models, which lie in its package, by its settings' parts."""


class Reader(Protocol):
    name: str
    ways: tuple[str, ...]

    def about(self) -> dict[str, Any]: ...

    def prepare(self, images: Sequence[Image.Image]) -> Any: ...

    def read(self, prepared: Any, way: str) -> list[Said] | None: ...


class Tesseract:
    """The program `tesseract`, run as its users run it: `tesseract IMAGE stdout --psm 7 -l eng`,
    with PNG files.

    cores: how many it may use. language: of -l. page: whole pages (--psm 3), not lines (--psm 7).
    Ways: a process an image, one after another, with threads on all cores; the same, but one
    process of one thread on each core; and one process of one thread on each core that is given a
    list of images, so that models are loaded once.
    Raises ValueError where the program or the language's data are not there.
    """

    name = "tesseract"
    ways = ("one by one", "one on each core", "a list on each core")

    def __init__(self, cores: int, language: str = "eng", page: bool = False) -> None:
        program = shutil.which("tesseract")
        if program is None:
            raise ValueError(
                "--peer tesseract: expected the program tesseract on the PATH, found none; install "
                "it with the system's packages, such as apt install tesseract-ocr"
            )
        self.program, self.cores, self.language, self.page = program, cores, language, page
        known = self._output(["--list-langs"]).split("\n")[1:]
        if language not in known:
            raise ValueError(
                f"--peer tesseract: expected its data for {language!r}, found {' '.join(known)}; "
                f"install them, such as apt install tesseract-ocr-{language}"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="vlm-ocr-")
        self._failed: set[str] = set()

    def about(self) -> dict[str, Any]:
        return {
            "version": self._output(["--version"]).split("\n")[0].removeprefix("tesseract "),
            "command": " ".join(["tesseract", "IMAGE", "stdout", *self._options]),
            "cores": self.cores,
            "failed": len(self._failed),
        }

    def prepare(self, images: Sequence[Image.Image]) -> list[str]:
        """A PNG file of each image; those of the last call are gone."""
        folder = Path(self._folder.name)
        for old in folder.iterdir():
            old.unlink()
        paths = [str(folder / f"{number}.png") for number in range(len(images))]
        for image, path in zip(images, paths):
            image.save(path, compress_level=1)
        return paths

    def read(self, prepared: list[str], way: str) -> list[Said] | None:
        """An empty text where tesseract fails, as with images that are too small for it."""
        if way == "one by one":
            texts = [self._one(path, self.cores) for path in prepared]
        elif way == "one on each core":
            with ThreadPoolExecutor(self.cores) as pool:
                texts = list(pool.map(self._one, prepared))
        else:
            size = -(-len(prepared) // self.cores)
            parts = [prepared[start : start + size] for start in range(0, len(prepared), size)]
            with ThreadPoolExecutor(self.cores) as pool:
                found = list(pool.map(self._list, range(len(parts)), parts))
            if any(len(texts) != len(part) for texts, part in zip(found, parts)):
                return None
            texts = [text for part in found for text in part]
        return [Said(text) for text in texts]

    @property
    def _options(self) -> list[str]:
        return ["--psm", "3" if self.page else "7", "-l", self.language]

    def _one(self, path: str, threads: int = 1) -> str:
        done = self._run([path, "stdout", *self._options], threads)
        if done.returncode:
            self._failed.add(path)
            return ""
        return done.stdout.replace("\f", "").strip()

    def _list(self, number: int, paths: Sequence[str]) -> list[str]:
        listed = Path(self._folder.name) / f"list-{number}.txt"
        listed.write_text("\n".join(paths) + "\n")
        done = self._run([str(listed), "stdout", *self._options], threads=1)
        listed.unlink()
        texts = done.stdout.split("\f")  # between pages, or after each: versions differ
        if len(texts) == len(paths) + 1:
            del texts[-1]
        return [text.strip() for text in texts]

    def _run(self, arguments: list[str], threads: int) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_THREAD_LIMIT": str(threads)}
        return subprocess.run(
            [self.program, *arguments],
            capture_output=True, encoding="utf-8", errors="replace", env=environment, check=False,
        )  # fmt: skip

    def _output(self, arguments: list[str]) -> str:
        done = subprocess.run(
            [self.program, *arguments], capture_output=True, encoding="utf-8", check=False
        )
        return (done.stdout or done.stderr).strip()


class RapidOcr:
    """The package rapidocr with the models inside it: PP-OCRv6 small, its detector before it.

    cores: how many threads it may use. page: whole pages, whose lines are on lines of their own in
    its own order; else the texts of a line's boxes are joined from left to right by a space.
    detects: whether its detector looks for text first; where not, an image is read as one line.
    Raises ValueError where the package, or what it computes with, or its models are not there;
    nothing is fetched.
    """

    ways = ("one by one",)

    def __init__(self, cores: int, page: bool = False, detects: bool = True) -> None:
        if page and not detects:
            raise ValueError("--peer rapidocr-lines: expected lines, found --page")
        missing = [name for name in ("rapidocr", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise ValueError(
                f"--peer rapidocr: expected the packages rapidocr and onnxruntime, found no "
                f"{' and no '.join(missing)}; pip install rapidocr onnxruntime"
            )
        folder = Path(find_spec("rapidocr").submodule_search_locations[0]) / "models"
        lacking = [name for name in RAPIDOCR_MODELS.values() if not (folder / name).is_file()]
        if lacking:
            raise ValueError(
                f"--peer rapidocr: expected the models {', '.join(lacking)} in the package, found "
                f"none in {folder}; rapidocr 3.10 has them inside"
            )
        import cv2
        from rapidocr import RapidOCR

        cv2.setNumThreads(cores)
        self.name = "rapidocr" if detects else "rapidocr-lines"
        self.cores, self.page, self.detects = cores, page, detects
        paths = {f"{part}.model_path": str(folder / name) for part, name in RAPIDOCR_MODELS.items()}
        threads = {"EngineConfig.onnxruntime.intra_op_num_threads": cores}
        self._engine = RapidOCR(params={"Global.log_level": "critical", **paths, **threads})

    def about(self) -> dict[str, Any]:
        return {
            "version": version("rapidocr"),
            "onnxruntime": version("onnxruntime"),
            "models": [m for k, m in RAPIDOCR_MODELS.items() if self.detects or k == "Rec"],
            "cores": self.cores,
        }

    def prepare(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        return list(images)

    def read(self, prepared: Sequence[Image.Image], way: str) -> list[Said]:
        return [self._one(image) for image in prepared]

    def _one(self, image: Image.Image) -> Said:
        steps = {} if self.detects else {"use_det": False, "use_cls": False}
        found = self._engine(image, **steps)
        if not found.txts:
            return Said("")
        if self.page or not self.detects:
            return Said("\n".join(found.txts))
        placed = sorted(zip((box[:, 0].min() for box in found.boxes), found.txts))
        return Said(" ".join(text for _, text in placed))


PEERS: dict[str, Callable[..., Reader]] = {
    "tesseract": Tesseract,
    "rapidocr": RapidOcr,
    "rapidocr-lines": partial(RapidOcr, detects=False),
}
