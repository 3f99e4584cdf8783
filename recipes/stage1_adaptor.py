"""Stage 1: train the adaptor between a frozen image tokenizer and a frozen language model.

    accelerate launch recipes/stage1_adaptor.py

needs no hub, no data and no argument: it trains on the packaged drawings and their captions, and
measures the image gain on drawings by a vendor that it never saw. With a hub, for example:

    accelerate launch recipes/stage1_adaptor.py --vision transformers:google/siglip-base-patch16-224
        --text HuggingFaceTB/SmolLM2-360M-Instruct --train shards/pairs-{0000..0099}.tar
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vlm.training.runs import launch
from vlm.training.runs.decoder_only import next_token as objective
from vlm.training.runs.decoder_only import run
from vlm.training.runs.decoder_only_settings import FromParts, tuned, tuned_docked
from vlm.training.stages import FROZEN, Stage


@dataclass(frozen=True, kw_only=True)
class Settings(FromParts):
    """Stage 1 of DeepSeek-VL: only the adaptor learns."""

    out: Path = Path("runs/stage1")
    steps: int = 160
    batch: int = 16
    rate: float = 3e-3
    """Peak learning rate of the adaptor."""


def stage(settings: Settings, module: nn.Module, micro_batch: int) -> Stage:
    """The stage as a value."""
    rates = (
        ("tokenizer.*", FROZEN),
        *tuned(module, "adaptor", "full", settings.rate),
        *tuned(module, "text", "frozen", settings.rate),
        *tuned_docked(settings, module, settings.rate, FROZEN),
    )
    return settings.stage("stage 1: adaptor", rates, micro_batch)


if __name__ == "__main__":
    launch.start(Settings, run, stage, objective)
