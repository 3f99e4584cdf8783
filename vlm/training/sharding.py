"""Sharding: each process keeps a part of every weight, its gradient and its optimizer's state.

torch's `fully_shard` (FSDP2) takes the blocks of each part of a model one by one: a block's weights
are gathered when it computes and released after it, so that a process holds one whole block at a
time beside its own parts. What is trained has fp32 masters and fp32 sums of gradients, and computes
in 16 bits; frozen weights are held and gathered in 16 bits.

Gathering is done by all processes together, so all must make the same calls: `level` sees to it. A
process whose rows hold no image, or which has fewer batches, sends dummy inputs through the same
parts, of which nothing enters the loss.

Source: arXiv 2304.11277 (FSDP).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from vlm.compat.torch import make_root, multiply_all_, own_parameters, unsharded_class
from vlm.compat.transformers import GradientCheckpointingLayer
from vlm.families.decoder_only.batch import Batch
from vlm.families.decoder_only.docked_text import blank_texts
from vlm.image_tokens import ImageTokenizer, ViewGroup, blank_pixels
from vlm.training.activation_checkpointing import PROBE_HW
from vlm.training.stages import StageError, hold_in
from vlm.weights import castable

Shard = Literal["no", "all", "node"]
"""Over which processes weights are sharded: none; all; or those of one machine, with a copy on each
machine, so that only sums of gradients travel between machines."""
METHODS = ("states",)
"""What objectives call on a module beside `forward`."""


def mesh_for(shard: Shard, device: torch.device) -> DeviceMesh:
    """The processes as sharding sees them.

    Raises ValueError where the processes of a machine, which the launcher states as
    LOCAL_WORLD_SIZE, do not divide all, or are one.
    """
    ranks = dist.get_world_size()
    if shard == "all":
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local < 2 or ranks % local:
        raise ValueError(
            f"shard node: expected several processes on each machine that divide all {ranks}, "
            f"found LOCAL_WORLD_SIZE {local}"
        )
    return init_device_mesh(
        device.type, (ranks // local, local), mesh_dim_names=("replicate", "shard")
    )


def shard_module(
    module: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype, device: torch.device
) -> None:
    """Shards a module's weights over a mesh, in place; what it computes stays the same.

    module: of any family, as `vlm.training.stages.choose_trained` left it, in whatever dtypes, on
        whatever device. Block by block, it gets the dtypes of `hold_in` and comes to `device`, and
        each process keeps its own part. Weights that are loaded as they are stored lie in their
        mapped files until then, so that no process has all of them in memory. Weights that work in
        fp32 whatever the rest does (batch norms, scalars) stay whole on each process.
    Raises StageError naming weights that cannot be sharded, and trainable ones that are not fp32
    afterwards.
    """
    packed = [name for name, p in module.named_parameters() if not p.is_floating_point()]
    if packed:
        raise StageError(
            f"{len(packed)} weights are packed to fewer bits and cannot be sharded: {packed[:5]}; "
            "train this model on replicas (--shard no, and no FSDP in accelerate's configuration)"
        )
    able = {id(p) for p in castable(module)}
    alone = {p for p in module.parameters() if id(p) not in able}
    for parameter in alone:
        parameter.data = parameter.data.to(device, torch.float32)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options = {
        "mesh": mesh,
        "mp_policy": policy,
        "ignored_params": alone,
    }
    for part in (*units_of(module), module):
        hold_in(part, compute_dtype)
        fully_shard(part, **options)
    for method in METHODS:
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)
    for part in module.modules():
        if isinstance(part, FSDPModule):  # the loss is a sum over ranks; gloo has no other
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
    # torch warns where views are given, that none be written into; no objective does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    make_root(module)  # an evaluation may call a part first
    _require_masters(module)


def allow_unused(module: nn.Module) -> None:
    """From now on a weight may get no gradient on some ranks: zeros stand for it. Until then the
    absence shows, for `audit_gradients`."""
    if is_sharded(module):
        module.set_reduce_scatter_unused_params(True)


def units_of(module: nn.Module) -> list[nn.Module]:
    """What is gathered at a time, inner ones first: each block of each part, and of image
    tokenizers and adaptors what lies beside their blocks. The rest of the module, such as the
    embeddings of a language model, is one more.

    A block is a layer of transformers, or else one of several of a kind in a list.
    """
    units = []
    for name, part in module.parts().items():
        units += [block for block in _blocks(part) if any(True for _ in block.parameters())]
        called = isinstance(part, ImageTokenizer) or name == "adaptor"  # by its forward
        if called and part not in units and any(True for _ in part.parameters()):
            units.append(part)
    return units


def _blocks(part: nn.Module) -> list[nn.Module]:
    layers = [m for m in part.modules() if isinstance(m, GradientCheckpointingLayer)]
    if layers:
        return layers
    alike = len({type(child) for child in part.children()}) == 1
    if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part) > 1 and alike:
        return list(part)
    return [block for child in part.children() for block in _blocks(child)]


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard_module` was here."""
    return isinstance(module, FSDPModule)


def _require_masters(module: nn.Module) -> None:
    wrong = [
        f"{name} ({str(p.dtype).removeprefix('torch.')})"
        for name, p in module.named_parameters()
        if p.requires_grad and p.dtype != torch.float32
    ]
    if wrong:
        raise StageError(
            f"{len(wrong)} trainable weights are not fp32 after sharding: {wrong[:10]}; the "
            "optimizer would lose small steps"
        )


def level(module: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """This rank's batches, with as many dummy ones after them, and in each as many dummy views, as
    it takes for every rank to make the same calls. Called on all ranks together."""
    own = [_calls(batch) for batch in batches]
    everyone: list[list[tuple[int, int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    passes = max(map(len, everyone))
    spec = module.tokenizer.pixel_spec
    levelled = [*batches, *(_dummy_batch(module) for _ in range(passes - len(batches)))]
    for number, batch in enumerate(levelled):
        calls = [own[number] for own in everyone if number < len(own)]
        images, texts = (max(kind) - had for kind, had in zip(zip(*calls), _calls(batch)))
        views = [_dummy_views(spec) for _ in range(images)]
        dummies = (*views, *(blank_texts() for _ in range(texts)))
        levelled[number] = replace(batch, dummy_groups=dummies)
    return levelled


def _calls(batch: Batch) -> tuple[int, int]:
    """How many groups a batch has of images, and of non-causal texts."""
    texts = sum(group.is_text for group in batch.groups)
    return len(batch.groups) - texts, texts


def passes_of_ranks(own: int) -> list[int]:
    """How many batches each rank has. Called on all ranks together."""
    everyone: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def _dummy_batch(module: nn.Module) -> Batch:
    """One row of two tokens, none of them scored."""
    return Batch(
        ids=torch.zeros(1, 2, dtype=torch.long),
        valid=torch.ones(1, 2, dtype=torch.bool),
        scored=torch.zeros(1, 2, dtype=torch.bool),
        positions=torch.arange(2)[None],
        groups=(),
        names=("dummy",),
        sees=module.sees,
    )


def _dummy_views(spec) -> ViewGroup:
    pixels = blank_pixels(spec.view_sizes(PROBE_HW)[0])
    return ViewGroup(pixels=pixels, owner=torch.zeros(1, 3, dtype=torch.long))


def sum_unsharded(parameters: Sequence[nn.Parameter]) -> None:
    """Adds up the gradients of those weights that every process holds whole."""
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> float:
    """The norm of all gradients, sharded or whole, which are scaled down to `largest` where it is
    above, as `torch.nn.utils.clip_grad_norm_` does for whole ones."""
    grads = [p.grad for p in parameters]
    sharded = [g for g in grads if isinstance(g, DTensor)]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    squares = torch.zeros(2, dtype=torch.float64, device=local[0].device)
    for own, grad in zip(local, grads):
        norm = own.norm(dtype=torch.float64) if own.numel() else squares.new_zeros(())
        squares[int(isinstance(grad, DTensor))] += norm**2
    if sharded:
        mesh = sharded[0].device_mesh
        group = mesh.get_group("shard") if mesh.ndim > 1 else mesh.get_group()
        sharded = squares[1:].to(torch.float64)
        dist.all_reduce(sharded, group=group)
        squares[1:] = sharded
    norm = float(squares.sum().sqrt())
    factor = largest / (norm + 1e-6)
    if factor < 1:
        multiply_all_(local, factor)
    return norm


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within, every process holds the whole module as it computes, so that each may call it as it
    likes, or not at all. Nothing happens to a module that is not sharded."""
    if not is_sharded(module):
        yield
        return
    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not module, recurse=False)
        # Forgets the order of the calls within, which the next backward pass would go by.
        module.reset_iter_state()


@contextmanager
def whole_on_first(module: nn.Module) -> Iterator[None]:
    """Within, the first process holds the whole weights in its host's memory, each in its own
    dtype, as what writes a model needs them; the others hold nothing to write."""
    if not is_sharded(module):
        yield
        return
    first = dist.get_rank() == 0
    owners = [
        (owner, leaf, parameter)
        for owner in module.modules()
        for leaf, parameter in own_parameters(owner).items()
        if isinstance(parameter, DTensor)
    ]
    whole: dict[int, nn.Parameter] = {}
    for _, _, parameter in owners:
        if id(parameter) not in whole:  # tied weights are one
            full = parameter.detach().full_tensor()
            kept = full.cpu() if first else full.new_empty(0)
            whole[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
    for owner, leaf, parameter in owners:
        own_parameters(owner)[leaf] = whole[id(parameter)]
    # Sharding makes a class of its own of each unit's, and what writes a model goes by the latter.
    classes = [(part, type(part)) for part in module.modules() if isinstance(part, FSDPModule)]
    for part, sharded in classes:
        part.__class__ = unsharded_class(sharded)
    try:
        yield
    finally:
        for part, sharded in classes:
            part.__class__ = sharded
        for owner, leaf, parameter in owners:
            own_parameters(owner)[leaf] = parameter
