"""Commands of models that write text: caption, answer, chat, ground."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.commands.model import WRITING, UsesModel, open_model
from vlm.config import require_least

if TYPE_CHECKING:
    from vlm.families.decoder_only.model import DecoderOnlyModel


@dataclass(frozen=True, kw_only=True)
class UsesDecoder(UsesModel):
    """What commands share whose model writes text."""

    def load(self, images: tuple[Path, ...]) -> DecoderOnlyModel:
        """The model, once its options are known to be in range and every image to be one."""
        from vlm.pixels import open_image

        require_least(self, **{k: low for k, low in WRITING.items() if hasattr(self, k)})
        for path in images:
            open_image(path)
        return open_model(
            self.model, "chat", "does not support text generation", self.device, self.dtype
        )


@dataclass(frozen=True, kw_only=True)
class Caption(UsesDecoder):
    """Caption images with a trained model."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files."""
    prompt: str | None = None
    """The question that asks for the caption; by default the one it was trained on."""
    max_new_tokens: int = 64
    """Longest caption."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    batch_size: int = 16
    """Images captioned at once."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """One JSON object a line instead of text."""

    def run(self) -> None:
        if not self.images:
            raise ValueError("name at least one image")
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
class Answer(UsesDecoder):
    """Answer one question about each image, or about all of them together."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files."""
    question: str
    """What to ask."""
    together: bool = False
    """Ask once, about all the images in their order."""
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
            raise ValueError("name at least one image")
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


CHAT_HELP = "/image PATH adds an image, /reset begins anew, /quit leaves"


@dataclass(frozen=True, kw_only=True)
class Chat(UsesDecoder):
    """Talk with a model about images: /image PATH adds one, /reset begins anew, /quit leaves.

    Each image is encoded once and stands before the next question. At a terminal answers appear
    as they are written. From a pipe each line that is not blank is a question, and each answer one
    line (its line breaks become spaces); the first fault ends it.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Image files to begin with; /reset begins with them again."""
    max_new_tokens: int = 256
    """Longest answer."""

    def run(self) -> None:
        from vlm.families.decoder_only.chat import Chat as Conversation

        conversation = Conversation(self.load(self.images))
        waiting = list(self.images)  # images that stand before the next question
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
                        waiting.append(_image_of(line))
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

    def _ask(self, conversation, images: list[Path], question: str, terminal: bool) -> None:
        content = [{"type": "image", "image": path} for path in images]
        content.append({"type": "text", "text": question})
        answer = conversation.ask(content, stream=terminal, max_new_tokens=self.max_new_tokens)
        if not terminal:
            print(" ".join(answer.split()), flush=True)
            return
        for piece in answer:
            print(piece, end="", flush=True)
        print()


def _image_of(line: str) -> Path:
    """The image that a line adds to a chat. Raises ValueError where it is another command."""
    from vlm.pixels import open_image

    command, _, path = line.partition(" ")
    if command != "/image" or not path.strip():
        raise ValueError(f"{line}: {CHAT_HELP}")
    open_image(path.strip())
    return Path(path.strip())


@dataclass(frozen=True, kw_only=True)
class Ground(UsesDecoder):
    """Find phrases in an image: boxes as x0 y0 x1 y1 in its pixels, with scores."""

    image: Annotated[Path, tyro.conf.Positional]
    """An image file."""
    phrases: Annotated[tuple[str, ...], tyro.conf.Positional]
    """What to look for, each phrase by itself."""
    draw: Path | None = None
    """Draw the boxes on the image into this PNG file."""
    prompt: str | None = None
    """The question, with {phrase} in it; by default the one it was trained on."""
    constrained: bool = False
    """Let the model write nothing but whole boxes, of <loc> tokens."""
    max_new_tokens: int | None = None
    """Longest answer; None has room for 32 boxes, which are four tokens each where they are <loc>
    tokens."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """One JSON object a phrase and line instead of text."""

    def run(self) -> None:
        if not self.phrases:
            raise ValueError("name at least one phrase")
        if self.draw is not None and (
            self.draw.suffix.lower() != ".png" or not self.draw.absolute().parent.is_dir()
        ):
            raise ValueError(f"--draw: expected a .png file in a folder, found {self.draw}")
        from vlm.families.decoder_only.ground import find, require_prompt

        if self.prompt is not None:
            require_prompt(self.prompt)
        model = self.load((self.image,))
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
