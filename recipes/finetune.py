"""Fine-tuning of a published system, or of any model that writes text from images.

    accelerate launch recipes/finetune.py --model HuggingFaceTB/SmolVLM-256M-Instruct
        --train rows.jsonl --steps 1000

--model is a folder or hub id of SmolVLM, Idefics3, LLaVA, DeepSeek-VL, PaliGemma or another system
of `vlm systems`, or a run. Rows are those of LLaVA, of chat templates ("messages"), ShareGPT and
ms-swift, and detection data; they are put in the system's own template. The language model learns
by LoRA, the adaptor as a whole, cross-attention blocks too where there are some, and the image
tokenizer is frozen, which lets --token-cache FOLDER encode each image once. Rows of unequal length
take less time with --pack 2048.

`vlm export RUN --layout reference --out FOLDER` writes what transformers opens, LoRA merged.
"""

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from vlm.training.runs import launch
from vlm.training.runs.decoder_only import next_token as objective
from vlm.training.runs.decoder_only import run
from vlm.training.runs.decoder_only_settings import (
    FromModel,
    Mode,
    high_resolution_frozen,
    tuned,
    tuned_docked,
)
from vlm.training.stages import FROZEN, Stage

LOW_RANK = 2e-4
"""Peak learning rate of LoRA. Source: LLaVA 1.5, `scripts/v1_5/finetune_lora.sh`, whose schedule is
taken too."""
FULL = {"vision": 2e-6, "adaptor": 2e-5, "language": 2e-5}
"""Of components that learn as a whole. Source: LLaVA 1.5, `finetune_lora.sh` and `finetune.sh`; for
the image tokenizer Qwen2-VL-Finetune, `scripts/finetune.sh`: trained on far more images than a
fine-tuning has, it moves least."""


@dataclass(frozen=True, kw_only=True)
class Settings(FromModel):
    """Fine-tuning of a whole model."""

    model: str
    """The model to fine-tune: a folder, a run, or a hub id."""
    train: tuple[str, ...] = field()
    """Training data, any number of: PATH.jsonl, PATH.json, PATH-{0000..0009}.tar, FOLDER,
    coco:ANNOTATIONS.json, datasets:ORG/NAME:SPLIT, sample:train; options after "?":
    rows.tar?caption=text."""
    held_out: str = ""
    """Data to evaluate on, named as training data are; none evaluates nothing."""
    language: Mode = "lora"
    """What of the language model learns."""
    vision_rate: float | None = None
    """Peak learning rate of the image tokenizer; None takes 2e-4 for LoRA, 2e-6 for all of it."""
    adaptor_rate: float | None = None
    """Peak learning rate of the adaptor; None takes 2e-4 for LoRA, 2e-5 for all of it."""
    language_rate: float | None = None
    """Peak learning rate of the language model, and of the rows of new <loc> tokens; None takes
    2e-5 for all of it, else 2e-4."""
    out: Path = Path("runs/finetune")
    steps: int = 1000
    batch: int = 16
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.0
    eval_every: int = 200
    save_every: int = 200

    @property
    def base_model(self) -> str:
        return self.model

    def rate_of(self, part: str) -> float:
        """The peak learning rate of "vision", "adaptor" or "language", as it learns."""
        given = getattr(self, f"{part}_rate")
        if given is not None:
            return given
        return FULL[part] if getattr(self, part) == "full" else LOW_RANK


def stage(settings: Settings, module: nn.Module, micro_batch: int) -> Stage:
    """The stage as a value; a high-resolution tower stays frozen."""
    rates = (
        *high_resolution_frozen(module),
        *tuned(module, "tokenizer", settings.vision, settings.rate_of("vision")),
        *tuned(module, "adaptor", settings.adaptor, settings.rate_of("adaptor")),
        *tuned(module, "text", settings.language, settings.rate_of("language")),
        *tuned_docked(settings, module, settings.rate_of("adaptor"), FROZEN),
    )
    return settings.stage("finetune", rates, micro_batch)


if __name__ == "__main__":
    launch.start(Settings, run, stage, objective)
