"""Insides of torch that are no public API, tested with 2.14.

- Operators without a public function: `linear_prepacked`, `prepack_linear`, `can_prepack`
  (weights in oneDNN's layout, `vlm.kernels.packed_linear`), `softmax_backward`
  (`vlm.kernels.attention`), `silu_backward` (`vlm.kernels.norm_mlp`), `gelu_`
  (`vlm.kernels.mlp_parts`), `multiply_all_` and `copy_all_` (clipping and compute copies), and
  those whose flops and shapes are counted by hand (`CPU_ATTENTION`, `CPU_ATTENTION_BACKWARD`,
  `CTC`, `CTC_BACKWARD`, `SCALAR`, `UNSAFE_INDEX`).
- Fake tensors, dispatch modes and trees of tensors: `vlm.training.memory.simulate`.
- What a tensor is made of: `base_of`, `version_of`.
- The tables of a module: `own_parameters`, `with_child`, `has_hooks`, `has_forward_pre_hook`.
- `BatchNormBase`: the class of all batch norms, synchronised ones included.
- `checkpoint`: activation checkpointing of a module in place
(`vlm.training.activation_checkpointing`).
- FSDP: `make_root`, `unsharded_class` (`vlm.training.sharding`).
- `stop_workers`: the end of a loader's processes (`vlm.training.loading.loader`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed._composable import checkpoint
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = [
    "CPU_ATTENTION",
    "CPU_ATTENTION_BACKWARD",
    "CTC",
    "CTC_BACKWARD",
    "SCALAR",
    "UNSAFE_INDEX",
    "BatchNormBase",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "base_of",
    "can_prepack",
    "checkpoint",
    "copy_all_",
    "gelu_",
    "has_forward_pre_hook",
    "has_hooks",
    "linear_prepacked",
    "make_root",
    "multiply_all_",
    "own_parameters",
    "prepack_linear",
    "silu_backward",
    "softmax_backward",
    "stop_workers",
    "tree_flatten",
    "tree_map",
    "tree_unflatten",
    "unset_fake_temporarily",
    "unsharded_class",
    "version_of",
    "with_child",
    "without_torch_functions",
]

_aten = torch.ops.aten
CPU_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
CTC = (_aten._ctc_loss.Tensor, _aten._ctc_loss.default)
CTC_BACKWARD = (_aten._ctc_loss_backward.Tensor, _aten._ctc_loss_backward.default)
SCALAR = _aten._local_scalar_dense.default
UNSAFE_INDEX = _aten._unsafe_index.Tensor

without_torch_functions = torch._C.DisableTorchFunction
"""Within `with without_torch_functions():` no mode of torch functions sees a call."""


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this CPU's oneDNN has products in a dtype, and layouts of its own for them."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def prepack_linear(weight: Tensor, rows: int) -> Tensor:
    """A linear layer's weight in the layout that oneDNN reads fastest for float[rows, ...]."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def linear_prepacked(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` with a weight of `prepack_linear`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def softmax_backward(grad: Tensor, shares: Tensor) -> Tensor:
    """The gradient of scores from that of their softmax `shares` over the last axis."""
    return torch._softmax_backward_data(grad, shares, -1, shares.dtype)


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of silu(x)."""
    return _aten.silu_backward(grad, x)


def gelu_(x: Tensor, approximate: str) -> Tensor:
    """GELU in place; the tensor itself."""
    return _aten.gelu_(x, approximate=approximate)


def multiply_all_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiplies all tensors in place."""
    torch._foreach_mul_(tensors, factor)


def copy_all_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target."""
    torch._foreach_copy_(targets, sources)


def base_of(tensor: Tensor) -> Tensor:
    """The tensor that this one is a view of; itself where it is none."""
    return tensor if tensor._base is None else tensor._base


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written into."""
    return tensor._version


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The very table of a module's own parameters: what is put into it is the module's."""
    return module._parameters


def with_child(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """The module with another child of this name; the given one, and its weights, stay."""
    module = copy(module)
    module._modules = {**module._modules, name: child}
    return module


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or after a module's forward or backward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
                module._backward_pre_hooks))  # fmt: skip


def has_forward_pre_hook(module: nn.Module, hook: Callable) -> bool:
    """Whether `hook` is called before the module's forward."""
    return hook in module._forward_pre_hooks.values()


def make_root(module: nn.Module) -> None:
    """Makes an FSDP module the root of those in it, which else is the first that is called."""
    module._get_fsdp_state()._lazy_init()


def unsharded_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before FSDP gave it one of its own."""
    return cls.__bases__[1]


def stop_workers(batches: object) -> None:
    """Ends the processes of a data loader's iterator, which else live until it is collected."""
    batches._shutdown_workers()
