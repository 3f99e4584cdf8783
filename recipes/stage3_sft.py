"""Stage 3: supervised fine-tuning of image tokenizer, adaptor and language model.

    accelerate launch recipes/stage3_sft.py

goes on from runs/stage2, on the packaged drawings. Conversations of several turns and images are
trained as they are; exactly the answers are scored. A high-resolution tower stays frozen.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vlm.training.base_settings import Augmentation, Usual
from vlm.training.runs import launch
from vlm.training.runs.decoder_only import next_token as objective
from vlm.training.runs.decoder_only import run
from vlm.training.runs.decoder_only_settings import (
    FromRun,
    Mode,
    high_resolution_frozen,
    tuned,
    tuned_docked,
)
from vlm.training.stages import FROZEN, Stage


@dataclass(frozen=True, kw_only=True)
class Settings(FromRun):
    """Stage 3 of DeepSeek-VL: all but the high-resolution tower learn from instructions."""

    follows = ("stage 2: joint", "stage 3: sft")

    previous: str = "runs/stage2"
    out: Path = Path("runs/stage3")
    text_train: tuple[str, ...] = ("python:train",)
    text_share: float = 0.03
    augment: Augmentation = "strong"
    text_held_out_rows: int = 100
    steps: int = 850
    batch: int = 16
    eval_every: int = 425
    vision: Mode = "full"
    vision_rate: float = Usual(3e-4)
    adaptor_rate: float = Usual(6e-4)
    language_rate: float = Usual(4e-4)


def stage(settings: Settings, module: nn.Module, micro_batch: int) -> Stage:
    """The stage as a value."""
    rates = (
        *high_resolution_frozen(module),
        *tuned(module, "tokenizer", settings.vision, settings.vision_rate),
        *tuned(module, "adaptor", settings.adaptor, settings.adaptor_rate),
        *tuned(module, "text", settings.language, settings.language_rate),
        *tuned_docked(
            settings,
            module,
            settings.adaptor_rate,
            settings.language_rate if settings.language == "full" else FROZEN,
        ),
    )
    return settings.stage("stage 3: sft", rates, micro_batch)


if __name__ == "__main__":
    launch.start(Settings, run, stage, objective)
