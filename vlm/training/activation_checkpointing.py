"""Less memory for training: activations that are computed again instead of kept, and memory that is
returned.

What is frozen below the first trainable parameter keeps no activations by itself: autograd keeps
only what a gradient needs. A frozen language model above a trained adaptor does keep them, since
the gradient passes through it; so it gains from checkpointing as a trained one does.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlm.compat.torch import base_of, checkpoint
from vlm.compat.transformers import GradientCheckpointingLayer
from vlm.image_tokens import ImageTokenizer, meta_pixels, meta_twin
from vlm.training.stages import FROZEN, Stage, assign_rates

LARGE = 2**21
M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h: blocks from this size on are mapped by themselves and returned when freed
(mmap threshold)."""
PROBE_HW = (256, 192)
"""Rows and columns of the image that shows what an image tokenizer keeps."""


def checkpoint_activations(module: nn.Module, parts: Sequence[str] = ("tokenizer", "text")) -> None:
    """Makes the blocks of the named parts keep their input alone and compute the rest again in the
    backward pass, in place: the loss and its gradients stay, in less memory and more time.

    It acts in training and evaluation mode alike (a frozen part is in the latter), and whether or
    not the input needs a gradient. module: of any family. parts: paths ("tokenizer", "text",
    "tokenizer.low"). Raises ValueError naming the part that leads nowhere, and the backbone that
    cannot: what an image tokenizer keeps is measured.
    """
    for path in parts:
        try:
            part = module.get_submodule(path)
        except AttributeError as error:
            raise ValueError(
                f"no part {path!r}: the parts are {sorted(module.parts())}, or paths below them"
            ) from error
        for name, owner in _owners(part):
            where = f"{path}.{name}" if name else path
            before = _kept(owner)
            if not _enable(owner) or (before and _kept(owner) >= before):
                raise ValueError(
                    f"{where}: {_kind(owner)} has no blocks whose activations can be computed "
                    "again, or they are so already; leave it out of the parts"
                )


def kept_parts(module: nn.Module, stage: Stage) -> list[str]:
    """The parts that keep activations for the backward pass, as `checkpoint_activations` takes
    them: language models and cross-attention blocks, since gradients pass through them or they
    learn, a contrastive model's text encoder where it learns, and image tokenizers that learn."""
    rates = assign_rates(module, stage.rates)
    learned = {name.split(".")[0] for name, (_, rate) in rates.items() if rate is not FROZEN}
    return [part for part in ("tokenizer", "cross", "text") if part in learned | {*module.through}]


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Counts what autograd keeps for the backward pass within the block, parameters excepted: a
    dict from a tensor's storage to its bytes, each storage once."""
    kept: dict[int, int] = {}
    held = []  # a storage that is freed could lend its address to another

    def pack(tensor: Tensor) -> Tensor:
        base = base_of(tensor)
        if not isinstance(base, nn.Parameter):
            storage = tensor.untyped_storage()
            key = id(base) if tensor.is_meta else storage.data_ptr()
            kept[key] = storage.nbytes()
            held.append(base)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _owners(part: nn.Module) -> list[tuple[str, nn.Module]]:
    """The image tokenizers in a part that hold no other, by name; the part itself without any."""
    found = [(n, m) for n, m in part.named_modules() if isinstance(m, ImageTokenizer)]
    leaves = [
        (n, m)
        for n, m in found
        if not any(isinstance(inner, ImageTokenizer) for inner in list(m.modules())[1:])
    ]
    return leaves or [("", part)]


def _enable(owner: nn.Module) -> bool:
    """Turns checkpointing on, where there are blocks for it; whether there are."""
    blocks = [m for m in owner.modules() if isinstance(m, GradientCheckpointingLayer)]
    for block in blocks:
        if checkpoint.state(block) is None:
            checkpoint(block)
    if blocks:
        return True
    switches = [m for m in owner.modules() if hasattr(m, "set_grad_checkpointing")]
    if not switches:
        return False
    try:
        switches[0].set_grad_checkpointing(True)  # timm and open_clip: the whole backbone
    except AssertionError:  # how timm says that a backbone cannot
        return False
    return True


def _kept(owner: nn.Module) -> int:
    """Bytes that one view of an image tokenizer keeps; 0 for other modules, which are not run."""
    if not isinstance(owner, ImageTokenizer):
        return 0
    twin = meta_twin(owner).requires_grad_(True)
    dtype = next(twin.parameters()).dtype
    with saved_bytes() as kept, torch.enable_grad():
        twin(meta_pixels(owner.pixel_spec.view_sizes(PROBE_HW)[0], dtype))
    return sum(kept.values())


def _kind(owner: nn.Module) -> str:
    inner = getattr(owner, "backbone", getattr(owner, "visual", owner))
    return type(inner).__name__


def set_mmap_threshold() -> None:
    """Makes malloc give each block of `LARGE` bytes or more back to the system when it is freed,
    for the whole process; unless the environment's MALLOC_MMAP_THRESHOLD_ says otherwise.

    glibc keeps them for later, but until 2.38 an aligned block, as all of torch's are, does not fit
    where one of its size was freed (its bug 14581): activations on CPUs then leave holes of half
    their size. To take memory from the system again costs a few per cent of a step's time.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE)
