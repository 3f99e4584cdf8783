"""A reader of lines of text, from drawn lines alone or from your own.

    accelerate launch recipes/line_reader.py

trains a small reader of English on lines that are drawn as it goes. A new script in one command,
and fine-tuning the shipped reader on lines of your own (a table of images and their texts):

    accelerate launch recipes/line_reader.py --start line-reader --alphabet cyrillic
        --lines-text ru_RU
    accelerate launch recipes/line_reader.py --start line-reader --train lines.tsv
        --held-out held.tsv --steps 200 --rate 3e-4
"""

from torch import nn

from vlm.families.line_reader.model import LineReaderModel
from vlm.training.objectives.ctc import Transcribe
from vlm.training.runs import launch
from vlm.training.runs.line_reader import LineReaderSettings as Settings
from vlm.training.runs.reading import run
from vlm.training.stages import Stage


def stage(settings: Settings, module: nn.Module, micro_batch: int) -> Stage:
    """The stage as a value: all of the reader learns at one rate."""
    rates = tuple((f"{part}.*", settings.rate) for part in module.parts())
    return settings.stage("reading", rates, micro_batch)


def objective(settings: Settings, model: LineReaderModel, stage: Stage) -> Transcribe:
    """CTC over the characters of each line."""
    return Transcribe()


if __name__ == "__main__":
    launch.start(Settings, run, stage, objective)
