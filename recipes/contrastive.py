"""Contrastive training: images and captions in one space (CLIP, SigLIP, LiT).

    accelerate launch recipes/contrastive.py

trains a small model from scratch on the packaged drawings and measures retrieval on drawings by a
vendor that it never saw. Fine-tuning and a locked tower, for example:

    accelerate launch recipes/contrastive.py --start google/siglip-base-patch16-224
        --train shards/pairs-{0000..0099}.tar --image-rate 1e-5 --text-rate 1e-5 --layer-decay 0.7
    accelerate launch recipes/contrastive.py --vision timm:vit_base_patch16_224.augreg_in21k
        --pool class --lock-image --text google-bert/bert-base-uncased --text-pooling class
        --loss softmax
"""

import fnmatch

from torch import nn

from vlm.families.contrastive.model import ContrastiveModel
from vlm.training.layer_decay import layer_rates
from vlm.training.objectives.contrastive import Contrast
from vlm.training.runs import launch
from vlm.training.runs.contrastive import Settings, run
from vlm.training.stages import FROZEN, Stage


def stage(settings: Settings, module: nn.Module, micro_batch: int) -> Stage:
    """The stage as a value: locked towers frozen, the others' rates falling from layer to layer
    where the settings say so."""
    rates: list[tuple[str, float | None]] = []
    towers = (
        ("tokenizer", settings.lock_image, settings.image_rate),
        ("text", settings.lock_text, settings.text_rate),
    )
    for tower, locked, rate in towers:
        if locked:
            rates.append((f"{tower}.*", FROZEN))
        else:
            rates += layer_rates(module, tower, rate, settings.layer_decay)
    names = [name for name, _ in module.named_parameters()]
    for pattern in ("pool.*", "image_head.*", "text_head.*", "log_scale", "bias"):
        if fnmatch.filter(names, pattern):  # not every model has each
            rates.append((pattern, settings.head_rate))
    return settings.stage("contrastive", tuple(rates), micro_batch)


def objective(settings: Settings, model: ContrastiveModel, stage: Stage) -> Contrast:
    """Images and captions told apart, by the loss of the settings."""
    return Contrast(settings.loss)


if __name__ == "__main__":
    launch.start(Settings, run, stage, objective)
