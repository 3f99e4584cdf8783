"""Insides of accelerate that are no public API, tested with 1.15: what `accelerate launch` tells
the processes that it starts (`vlm.training.launch`)."""

import os


def asked_for_fsdp() -> bool:
    """Whether accelerate's configuration asks for FSDP; on CPUs it makes replicas of that."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
