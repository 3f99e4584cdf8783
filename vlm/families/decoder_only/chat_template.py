"""A language model's own chat template, with images and answers marked in what it writes.

Marks are private-use characters, a character each, that stand where an image and where an answer
begins and ends; `vlm.families.decoder_only.marked_text` takes them out again. So what the model
reads is what its template writes, and a text that spells "<image>" stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm.data.example import BadRow, Turn

SLOT, ANSWER, END, CONTEXT = map(chr, range(0xE5C0, 0xE5C4))
"""An image; the start of an answer that is scored, the end of an answer, the start of one that is
context alone."""

PROBE = (Turn("user", ("a",)), Turn("assistant", ("b",)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """How a chat template is used.

    parts: whether it takes a message's content as a list of parts of type text or image; else it
        takes one text. answer_end: written after each answer, for templates that end none.
    special_tokens: whether the text tokenizer adds to what it writes the token that begins texts.
    """

    parts: bool = False
    answer_end: str = ""
    special_tokens: bool = False


class ChatTemplate:
    """Writes conversations by the chat template of a text tokenizer.

    text_tokenizer: a transformers tokenizer with a chat template. usage: how that is used.
    system: as in `vlm.families.decoder_only.processor.Processor`; becomes None where the template
        takes no system message and an empty one was asked for.
    Raises ValueError where there is no chat template, BadRow where it writes another text before an
    answer than it does to ask for one.
    """

    def __init__(self, text_tokenizer, usage: Template, system: str | None) -> None:
        if not text_tokenizer.chat_template:
            raise ValueError(
                "the text tokenizer has no chat template, so answers cannot be told from prompts; "
                "set `text_tokenizer.chat_template`, or name a language model tuned to chat"
            )
        self.text_tokenizer = text_tokenizer
        self.usage = usage
        self.system = system
        self._options: dict[str, bool] = {}
        self._fit()

    def render(self, turns: Sequence[Turn], name: str, open_answer: bool = False) -> str:
        """What the chat template writes, with images and answers still marked.

        open_answer: whether it ends with the opening of the assistant's turn.
        Raises BadRow naming the row where a text holds a mark, an answer is empty, or the template
        refuses the conversation or leaves its system message out.
        """
        messages = []
        if self.system is not None and turns[0].role != "system":
            messages.append({"role": "system", "content": self._content((self.system,))})
        for turn in turns:
            if any(mark in turn.text for mark in (SLOT, ANSWER, END, CONTEXT)):
                raise BadRow(f"{name}: the text holds one of the private characters U+E5C0-U+E5C3")
            content = turn.content
            if turn.role == "assistant":
                if not (turn.text.strip() or open_answer):  # a model may have answered nothing
                    raise BadRow(f"{name}: expected an answer, found an empty assistant turn")
                said = "".join(SLOT if part is None else part for part in content).strip()
                mark = ANSWER if turn.scored else CONTEXT
                content = (f"{mark}{said}{END}{self.usage.answer_end}",)
            messages.append({"role": turn.role, "content": self._content(content)})
        try:
            text = self.text_tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_answer, **self._options
            )
        except Exception as error:  # templates raise their own kinds of error
            raise BadRow(f"{name}: the chat template refuses this conversation: {error}") from error
        system = turns[0].text if turns[0].role == "system" else self.system or ""
        if system.strip() not in text:
            raise BadRow(
                f"{name}: the chat template writes no system message, and would leave out "
                f"{system[:60]!r}; put it into the user's text, or take it out"
            )
        return text

    def _content(self, content: Sequence[str | None]) -> str | list[dict[str, str]]:
        """A message's texts and images (None) as the chat template takes them."""
        if not self.usage.parts:
            return "".join(SLOT if part is None else part for part in content)
        return [
            {"type": "image"} if part is None else {"type": "text", "text": part}
            for part in content
        ]

    def _fit(self) -> None:
        """Finds how the template writes a prompt exactly as it writes the text before an answer.

        Some take no system message, which an empty one does without; some open the answer with an
        empty line of thought unless they are told that thinking is off (Qwen3).
        Raises BadRow where prompt and training row would differ all the same.
        """
        if self.system == "":
            try:
                self.render(PROBE, "chat template")
            except BadRow:
                self.system = None
        for options in ({}, {"enable_thinking": False}):
            self._options = options
            trained = self.render(PROBE, "chat template").partition(ANSWER)[0]
            prompted = self.render(PROBE[:1], "chat template", open_answer=True)
            if trained.rstrip() == prompted.rstrip():
                return
        raise BadRow(
            "chat template: before an answer it writes "
            f"{trained!r}, but to ask for one {prompted!r}; a model trained on the first would not "
            "know the second. Set `text_tokenizer.chat_template`"
        )


def user_turn(prompt: str, image_mark: str) -> Turn:
    """A literal prompt as the user's message, each mark standing for an image."""
    first, *others = prompt.split(image_mark)
    return Turn("user", (first, *(part for text in others for part in (None, text))))
