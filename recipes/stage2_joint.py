"""Stage 2: train the adaptor and the language model together, with text-only data mixed in.

    accelerate launch recipes/stage2_joint.py

goes on from runs/stage1, on the packaged drawings and Python's own manual. Data with images rise
from none to their share while training warms up, so that the language model keeps what it knows.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vlm.training.base_settings import Augmentation, Usual
from vlm.training.runs import launch
from vlm.training.runs.decoder_only import next_token as objective
from vlm.training.runs.decoder_only import run
from vlm.training.runs.decoder_only_settings import FromRun, tuned, tuned_docked
from vlm.training.stages import FROZEN, Stage


@dataclass(frozen=True, kw_only=True)
class Settings(FromRun):
    """Stage 2 of DeepSeek-VL: adaptor and language model learn jointly."""

    follows = ("stage 1: adaptor", "stage 2: joint")

    previous: str = "runs/stage1"
    out: Path = Path("runs/stage2")
    text_train: tuple[str, ...] = ("python:train",)
    text_share: float = 0.03
    modality_warmup: float = 0.05
    augment: Augmentation = "light"
    text_held_out_rows: int = 100
    steps: int = 340
    batch: int = 16
    eval_every: int = 170
    adaptor_rate: float = Usual(1e-3)
    language_rate: float = Usual(5e-4)


def stage(settings: Settings, module: nn.Module, micro_batch: int) -> Stage:
    """The stage as a value."""
    rates = (
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
    return settings.stage("stage 2: joint", rates, micro_batch)


if __name__ == "__main__":
    launch.start(Settings, run, stage, objective)
