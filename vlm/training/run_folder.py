"""A run's folder: settings, versions, metrics, plots, images, checkpoints and the model.

settings.json    every setting, defaults resolved
versions.json    Python, platform, device and library versions
metrics.jsonl    one line a step, and one for each evaluation
tensorboard/     the same for TensorBoard
loss.png         the loss curve
samples.png      held-out images with their true and generated captions
images/        a few of these images, to try the model on
result.json      the closing figures
checkpoints/     to resume from
model/           what `vlm.load` opens
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from vlm.compat.extras import MissingExtra, needs
from vlm.console import plain_console
from vlm.precision import device_name, instructions

LIBRARIES = ("vlm", "torch", "torchvision", "transformers", "accelerate", "timm", "open_clip_torch")


class Curves(NamedTuple):
    """What a run's plot shows besides the training loss.

    loss_unit: of the training loss. title, unit: of the held-out figures. count: which of them says
    on how many rows they are. lines: of each one its key, colour and label.
    """

    loss_unit: str
    title: str
    unit: str
    count: str
    lines: tuple[tuple[str, str, str], ...]


CAPTIONS = Curves(
    "nats per scored token",
    "held-out captions",
    "nats per caption",
    "captions",
    (("wrong", "#b5532a", "with another image"), ("right", "#1f4e8c", "with its own image")),
)


MARKS = ("o-", "D", "s")
"""How figures on the first number of rows are drawn, on the next, and on any other."""


class RunError(ValueError):
    """A run folder that cannot be used; the message names it and what to do."""


class Run:
    """The folder of one run. Only the main process writes.

    settings: all of them. deciding: those that decide what is learned; to resume, they must not
    have changed.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        deciding: dict[str, Any],
        *,
        main: bool = True,
        resume: bool = False,
        curves: Curves = CAPTIONS,
    ) -> None:
        self.curves = curves
        self.folder, self.settings, self.deciding, self.main = folder, settings, deciding, main
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise RunError(f"{folder}: expected a folder to write to, found the file {existing}")
        if resume and not self.checkpoints.is_dir():
            raise RunError(f"{folder}: nothing to resume, expected checkpoints/ in it")
        ended = (folder / "result.json").exists()
        if resume and main and ended and not any(self.checkpoints.iterdir()):
            raise RunError(
                f"{folder}: nothing to resume, the run has ended and its checkpoints are gone; "
                "name another --out"
            )
        if not resume and main and (folder / "metrics.jsonl").exists():
            raise RunError(
                f"{folder} already holds a run: continue it with --resume, or name another --out"
            )
        self._make_board = None
        self._board = None
        self._first_step = 0

    def open(self, step: int) -> None:
        """Begins to write, after `step` steps: settings and versions, and metrics.jsonl without
        the lines after that step (what a killed run logged beyond its checkpoint, the closing
        figures, and a last line that was cut). Files are replaced whole, as a run may be killed at
        any moment."""
        self._first_step = step + 1
        if not self.main:
            return
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._write("settings.json", self.settings)
        self._write("versions.json", versions())
        try:
            with needs("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter
            self._make_board = SummaryWriter
        except MissingExtra as error:
            print(f"curves are in metrics.jsonl alone: {error}", file=sys.stderr)
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                break
            if values["step"] <= step and "final" not in values:
                kept.append(line)
        replace(self.metrics, "".join(f"{line}\n" for line in kept))

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def log(self, step: int, figures: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same for TensorBoard where that is installed."""
        if not self.main:
            return
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._make_board is None:
            return
        if self._board is None:
            folder = str(self.folder / "tensorboard")
            self._board = self._make_board(folder, purge_step=self._first_step)
        flat = {f"eval/{k}": v for k, v in figures.get("eval", {}).items()} | figures
        for name, value in flat.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl holds the figures of an evaluation after step `step`."""
        return any(line["step"] == step and "eval" in line for line in self.history())

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def table(self, rows: list[tuple[str, ...]], precision: str) -> None:
        """Prints the start-up table of components, and below it the precision that the run computes
        in, with the reason that its settings state."""
        if not self.main:
            return
        table = Table("component", "parameters", "trainable", "learning rate", "dtype")
        for row in rows:
            table.add_row(*row)
        reason = self.settings.get("precision_reason")
        table.caption = f"computes in {precision}" + (f": {reason}" if reason else "")
        table.caption_justify = "left"
        plain_console(file=sys.stderr).print(table)

    def say(self, line: str) -> None:
        """Shows a line that people should see."""
        if self.main:
            plain_console(file=sys.stderr, soft_wrap=True).print(line, style="yellow")

    def write_result(self, result: dict[str, Any]) -> None:
        """The run's closing figures, as result.json."""
        if self.main:
            self._write("result.json", result)

    def close(self) -> None:
        """Draws the loss curve and closes the logs."""
        if not self.main:
            return
        if self._board is not None:
            self._board.close()
        plot_loss(self.history(), self.folder / "loss.png", self.curves)

    def _write(self, name: str, values: dict[str, Any]) -> None:
        replace(self.folder / name, json.dumps(values, indent=2, default=str) + "\n")


def replace(path: Path, text: str) -> None:
    """Writes a file that holds what it held before until it holds all of `text`."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def versions() -> dict[str, str]:
    """Python, platform, the device that computes, and the libraries that results depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(),
        **{name: version(name) for name in LIBRARIES},
    }


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return device_name("cuda")
    return f"{device_name('cpu')} ({instructions()})"


def plot_loss(history: list[dict[str, Any]], path: Path, curves: Curves = CAPTIONS) -> None:
    """The training loss (raw and smoothed) and the held-out figures over steps, as a PNG.

    Figures on the same number of rows make a line; the closing ones, where they are on more rows,
    stand as marks of their own, since other rows have other figures whatever was learned.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train = [(line["step"], line["loss"]) for line in history if "loss" in line]
    key = curves.lines[0][0]  # a run may evaluate texts alone
    held = [(line["step"], line["eval"]) for line in history if key in line.get("eval", ())]
    figure, axes = plt.subplots(1, 2 if held else 1, figsize=(11 if held else 6, 4), squeeze=False)
    left = axes[0, 0]
    if train:
        steps, losses = zip(*train)
        smooth, mean = [], losses[0]
        for loss in losses:
            mean = 0.9 * mean + 0.1 * loss
            smooth.append(mean)
        left.plot(steps, losses, color="#b9c6d8", linewidth=0.8, label="step")
        left.plot(steps, smooth, color="#1f4e8c", label="smoothed")
        left.legend(frameon=False)
    left.set(xlabel="step", ylabel=curves.loss_unit, title="training loss")
    if held:
        right = axes[0, 1]
        counts = list(dict.fromkeys(figures.get(curves.count) for _, figures in held))
        for key, colour, label in curves.lines:
            for number, count in enumerate(counts):
                points = [(at, f[key]) for at, f in held if f.get(curves.count) == count]
                on = f"{label}, {count} {curves.count}" if len(counts) > 1 else label
                look = {"markerfacecolor": "white", "markersize": 9} if number else {}
                form = MARKS[min(number, len(MARKS) - 1)]
                right.plot(*zip(*points), form, color=colour, label=on, **look)
        right.legend(frameon=False)
        right.set(xlabel="step", ylabel=curves.unit, title=curves.title)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_captions(
    images: list, true: list[str], generated: list[str], path: Path, columns: int = 4
) -> None:
    """A page of images, each with its true and its generated caption, as a PNG.

    images: PIL images.
    """
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3.1 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, said, wrote in zip(axes.flat, images, true, generated):
        axis.imshow(image)
        same = said.strip().lower() == wrote.strip().lower()
        axis.set_title(_plain(textwrap.fill(said, 32)), fontsize=9, color="#444444")
        axis.text(
            0.5, -0.04, _plain(textwrap.fill(wrote or "(nothing)", 32)), fontsize=9,
            transform=axis.transAxes, ha="center", va="top",
            color="#1f7a3d" if same else "#1f4e8c",
        )  # fmt: skip
    figure.suptitle("above: true caption; below: generated (green where equal)", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.99), h_pad=1.5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plain(text: str) -> str:
    """Text that matplotlib draws as it is: a dollar sign would start a formula, and control
    characters have no glyph."""
    shown = "".join(c if c.isprintable() or c == "\n" else "\u00b7" for c in text)
    return shown.replace("$", r"\$").replace("\ufffd", "?")
