"""An encoder-decoder reader of lines (TrOCR), from drawn lines or your own.

    accelerate launch recipes/trocr.py

trains a small one from scratch on lines that are drawn as it goes. From pretrained parts, in a new
script, and fine-tuned on a table of your own lines, for example:

    accelerate launch recipes/trocr.py --line-px 64 1024 --decoder FacebookAI/roberta-base
        --vision transformers:facebook/deit-small-distilled-patch16-224
    accelerate launch recipes/trocr.py --start microsoft/trocr-small-printed --text-tokenizer
        characters --alphabet greek --lines-text el_GR
    accelerate launch recipes/trocr.py --start microsoft/trocr-base-handwritten --train lines.tsv
        --held-out held.tsv --steps 500 --vision-rate 2e-5 --decoder-rate 5e-5
"""

import fnmatch

from torch import nn

from vlm.families.encoder_decoder.model import EncoderDecoderModel
from vlm.training.objectives.next_token import NextToken
from vlm.training.runs import launch
from vlm.training.runs.encoder_decoder import TranscriberSettings as Settings
from vlm.training.runs.reading import run
from vlm.training.stages import Stage


def stage(settings: Settings, module: nn.Module, micro_batch: int) -> Stage:
    """The stage as a value: the image tokenizer at one rate, what joins it and the decoder at
    another."""
    rates = [("tokenizer.*", settings.vision_rate), ("text.*", settings.decoder_rate)]
    if fnmatch.filter([name for name, _ in module.named_parameters()], "adaptor.*"):
        rates.append(("adaptor.*", settings.decoder_rate))  # TrOCR's has no weights
    return settings.stage("trocr", tuple(rates), micro_batch)


def objective(settings: Settings, model: EncoderDecoderModel, stage: Stage) -> NextToken:
    """Cross-entropy of the text's tokens."""
    return NextToken(model.processor.pad_id)


if __name__ == "__main__":
    launch.start(Settings, run, stage, objective)
