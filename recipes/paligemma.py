"""Transfer of a prefix model, PaliGemma or one of your own, to one task.

    accelerate launch recipes/paligemma.py --task detect --start FOLDER --held-out-rows 200
        --train "coco:instances_train2017.json?root=train2017"
        --held-out "coco:instances_val2017.json?root=val2017"

Tasks are caption, answer, detect and ocr, each put in PaliGemma's own words; training rows are an
image, one prompt and one answer. FOLDER is what transformers writes or the authors published of
PaliGemma 1 and 2, or the folder or run of a prefix model. Nothing is frozen, and rates, schedule
and batch are those that the authors transfer VQAv2 with (arXiv 2407.07726); state the steps.
`--start new` composes a model of any image tokenizer and language model instead, which needs no
hub, and learns from scratch what stands between them: give it higher rates, such as
--adaptor-rate 1e-3 --vision-rate 3e-4 --language-rate 3e-4.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import nn

from vlm.data.sources import Source
from vlm.data.sources.transfer import Detect, Prompted
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.prefix_decoder.module import PrefixDecoder
from vlm.systems.paligemma import PROMPTS, ask_as_published
from vlm.training.base_settings import Usual
from vlm.training.runs import launch
from vlm.training.runs.decoder_only import next_token as objective
from vlm.training.runs.decoder_only import run
from vlm.training.runs.decoder_only_settings import FromParts, load_stored, tuned
from vlm.training.stages import Stage

NEW = "new"
ASKED_BY = {
    "caption": "caption_prompt",
    "answer": "answer_prompt",
    "detect": "ground_prompt",
    "ocr": "ocr_prompt",
}
"""Task -> where a model keeps its prompt."""


@dataclass(frozen=True, kw_only=True)
class Settings(FromParts):
    """One task for a prefix model."""

    mask: ClassVar[str] = "prefix"

    task: Literal["caption", "answer", "detect", "ocr"] = "caption"
    """caption, ocr: the row's text is the answer. answer: the row's own question is asked. detect:
    where labels of the row's boxes are, one or several at once."""
    start: str = NEW
    """A prefix model's folder, run or hub id; "new" composes the parts below."""
    prompt: str | None = None
    """What is asked; None takes PaliGemma's words. {question} stands for the row's question, and
    with detect {phrase} for the labels."""
    frozen: tuple[Literal["tokenizer", "adaptor", "text"], ...] = ()
    """Parts that do not learn."""
    vision_rate: float = Usual(1e-5)
    """Peak learning rate of the image tokenizer."""
    adaptor_rate: float = Usual(1e-5)
    """Peak learning rate of the adaptor."""
    language_rate: float = Usual(1e-5)
    """Peak learning rate of the language model."""
    out: Path = Path("runs/paligemma")
    steps: int = 1000
    batch: int = 256
    min_lr_ratio: float = 0.0
    eval_every: int = 200
    save_every: int = 200

    @property
    def asked(self) -> str:
        """The task's prompt, with its place for what is asked."""
        return PROMPTS[self.task] if self.prompt is None else self.prompt

    @property
    def caption_prompt(self) -> str:
        return self.asked if self.task == "caption" else PROMPTS["caption"]

    def source(self, spec: str) -> Source:
        source = self.open(spec)
        if self.task == "detect":
            return Detect(source, self.asked, self.seed)
        return Prompted(source, self.asked)

    def unread_rates(self) -> dict[str, str]:
        names = {"tokenizer": "vision", "adaptor": "adaptor", "text": "language"}
        # With loc_bins the rows of the new tokens learn beside a frozen language model.
        frozen = [part for part in self.frozen if part != "text" or not self.loc_bins]
        return {f"{names[part]}_rate": f"{part} is frozen" for part in frozen}

    def build(self) -> DecoderOnlyModel:
        if self.start == NEW:
            model = self.compose()
            ask_as_published(model)
        else:
            self.require_no_parts()
            model = load_stored(self.start, self)
        if not isinstance(model.module, PrefixDecoder):
            raise ValueError(
                f"start {self.start!r}: expected a prefix model, found a {model.module.family} one"
            )
        setattr(model, ASKED_BY[self.task], self.asked)
        model.labelled_boxes |= self.task == "detect"
        if self.loc_bins:
            self.add_tokens(model, learned="text" not in self.frozen)
        return model


def stage(settings: Settings, module: nn.Module, micro_batch: int) -> Stage:
    """The stage as a value."""
    rates = {
        "tokenizer": settings.vision_rate,
        "adaptor": settings.adaptor_rate,
        "text": settings.language_rate,
    }
    patterns = [
        pattern
        for part, rate in rates.items()
        for pattern in tuned(module, part, "frozen" if part in settings.frozen else "full", rate)
    ]
    return settings.stage(f"paligemma: {settings.task}", tuple(patterns), micro_batch)


if __name__ == "__main__":
    launch.start(Settings, run, stage, objective)
