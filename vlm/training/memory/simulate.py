"""A simulated training step with fake tensors: what it would hold in memory, and when.

The objective and the state that learns (`vlm.training.state`) are those of a run, and so is the
model's code; torch's fake tensors, which have shapes and no data, stand for every weight, pixel
and activation, so that a step of any size runs in seconds and in no memory. Ids, masks and
positions are real: they decide shapes. Every storage is counted from its allocation to its release,
in the backward pass too.

What it cannot see is what kernels take for themselves and give back (workspaces of convolutions
and matrix products), and what an allocator holds without using it.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vlm.compat.torch import (
    CTC,
    CTC_BACKWARD,
    SCALAR,
    UNSAFE_INDEX,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    tree_flatten,
    tree_map,
    tree_unflatten,
    unset_fake_temporarily,
    without_torch_functions,
)
from vlm.kernels.attention import as_on_gpus
from vlm.kernels.norm_mlp import memory_efficient_kernels
from vlm.training.flops import flop_counter
from vlm.training.objectives.base import Objective
from vlm.training.stages import Stage
from vlm.training.state import build_state

aten = torch.ops.aten

KINDS = ("weights", "gradients", "optimizer", "activations", "logits")


class Held(NamedTuple):
    """Bytes by what they are for. weights: frozen ones, fp32 masters and bf16 compute copies.
    activations: all that is neither a part of the model's state nor logits, pixels included.
    logits: float tensors with one number for each class that the loss tells apart."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(self)


class StepMemory(NamedTuple):
    """One step of one process. peak: what is held when most is. passing: the most that activations
    and logits come to at any time, whatever else is held then. flops: operations, forward and
    backward, recomputation included; None where they were not counted."""

    peak: Held
    passing: Held
    flops: int | None


class SimulatedStep:
    """Steps of a module, simulated on a copy of it with fake tensors; the module stays as it is.

    objective: what a run minimises. dtype: what the step computes in, as `fit` is told.
    gpu: whether autocast is that of GPUs, which takes norms and softmaxes to fp32.
    Raises StageError as `prepare` does, and ValueError for weights packed in 4 bits.
    """

    def __init__(
        self, module: nn.Module, stage: Stage, objective: Objective, dtype: torch.dtype, gpu: bool
    ) -> None:
        packed = [name for name, p in module.named_parameters() if not p.is_floating_point()]
        if packed:
            raise ValueError(f"weights packed in few bits cannot be planned, found {packed[:4]}")
        self.dtype, self.gpu = dtype, gpu
        self.objective = objective.alone()  # wherever a run is, one process simulates by itself
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        kernels = memory_efficient_kernels(module)  # tried on its values
        self.module = self._without_values(module)
        with self.fake:
            self.state = build_state(self.module, stage, dtype, kernels=kernels)
        self.trained = self.state.trained
        self.frozen = [p for p in self.module.parameters() if not p.requires_grad]
        with self._booked(_Ledger(self.fake, None)):
            self._update()  # so that the moments are there, as in every step but the first

    def run(self, micro_batches: Sequence[Sequence[Any]], count: bool = False) -> StepMemory:
        """What a step over micro-batches of rows holds and costs.

        micro_batches: rows as a run's loader makes them, pixels without values allowed. count:
        whether operations are counted, which takes longer.
        Raises ValueError where the model asks for values, which are not there.
        """
        collated = [self.objective.collate(self._shapes_of(rows)) for rows in micro_batches]
        batches = [batch for part in collated for batch in part]
        ledger = _Ledger(self.fake, self.objective.classes(self.module))
        for tensor in self._held_between_steps():
            ledger.note(tensor)
        for batch in collated[0]:  # the next ones are in the host's memory
            for tensor in _tensors(batch):
                ledger.note(tensor)
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: ledger.mark("gradients", p.grad))
            for p in self.trained
        ]
        counter = flop_counter() if count else None
        try:
            with self._booked(ledger, counter):
                with self.state.computing():
                    totals = dict.fromkeys(self.objective.totals, 1)
                    self.objective.backward(self.module, batches, totals, self._autocast)
                for parameter in self.trained:
                    ledger.mark("gradients", parameter.grad)
                self._update()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"{type(self.module).__name__} asks for the values of its states ({error.func}), "
                "so its step cannot be simulated without them"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        for tensor in self._held_between_steps():
            ledger.mark("weights", tensor)
        for tensor in self._moments():
            ledger.mark("optimizer", tensor)
        return StepMemory(*ledger.peaks(), counter.get_total_flops() if counter else None)

    def _shapes_of(self, rows: Sequence[Any]) -> list[Any]:
        known: dict[int, Any] = {}  # a sample's rows may come many times
        return [known.setdefault(id(row), without_values(row, self.fake)) for row in rows]

    def _update(self) -> None:
        """The end of a step, as `fit` has it."""
        self.state.fill_absent_gradients()
        self.state.clip_gradients()
        self.state.update()

    def _moments(self) -> list[Tensor]:
        return [t for state in self.state.optimizer.state.values() for t in state.values()]

    def _held_between_steps(self) -> list[Tensor]:
        own = [*self.module.parameters(), *self.module.buffers()]
        return [*own, *self.state.copies.copies, *self._moments()]

    def _without_values(self, module: nn.Module) -> nn.Module:
        """A copy whose floating-point parameters and buffers have shapes alone, all on the CPU; one
        that has several names stays one."""
        memo: dict[int, Tensor] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_floating_point():
                memo[id(tensor)] = tensor.detach().cpu().clone()
                continue
            with self.fake:
                shape = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    shape = nn.Parameter(shape, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = shape
        return copy.deepcopy(module, memo)

    @contextmanager
    def _booked(self, ledger: _Ledger, counter: FlopCounterMode | None = None) -> Iterator[None]:
        """Within, tensors that are made have shapes alone, and the ledger sees them."""
        counting = nullcontext() if counter is None else counter
        way = as_on_gpus() if self.gpu else nullcontext()
        # Otherwise the backward pass would run in threads of its own, which no mode reaches.
        with self.fake, torch.autograd.set_multithreading_enabled(False), ledger, counting, way:
            yield

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        low = self.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if low and self.gpu:
                with _GpuAutocast():
                    yield
            else:
                yield


class _Ledger(TorchDispatchMode):
    """Books every storage in and out. Ops on real integers are really computed; an op that needs
    both kinds sees the shapes of the real ones."""

    def __init__(self, fake: FakeTensorMode, classes: int | None) -> None:
        super().__init__()
        self.fake, self.classes = fake, classes
        self.kinds: dict[int, str] = {}
        self.changes: list[tuple[int, int]] = []
        self.keys: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.keys:
            return
        key, size = len(self.changes), storage.nbytes()
        self.keys[storage] = key
        self.changes.append((key, size))
        weakref.finalize(storage, self.changes.append, (key, -size)).atexit = False
        if tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[-1] == self.classes:
            self.kinds[key] = "logits"

    def mark(self, kind: str, tensor: Any) -> None:
        """Says what a tensor that was noted is for."""
        key = self.keys.get(tensor.untyped_storage()) if isinstance(tensor, Tensor) else None
        if key is not None:
            self.kinds[key] = kind

    def peaks(self) -> tuple[Held, Held]:
        """What was held when most was, and the most that activations and logits came to."""
        now = dict.fromkeys(KINDS, 0)
        most = passing = Held(**now)
        for key, change in list(self.changes):
            now[self.kinds.get(key, "activations")] += change
            held = Held(**now)
            if held.total > most.total:
                most = held
            if held.activations + held.logits > passing.activations + passing.logits:
                passing = held
        return most, passing

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with without_torch_functions():  # the model's own calls are cast, not torch's below
            out = self._run(func, args, kwargs or {})
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return out

    def _run(self, func, args: tuple, kwargs: dict) -> Any:
        flat, form = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in tensors):
            if func in ANSWERS:
                return ANSWERS[func](*args, **kwargs)
            if func in MASKED:
                args = (args[0], self._indices(args[1]), *args[2:])
                flat, form = tree_flatten((args, kwargs))
            return self._on_shapes(func, flat, form)
        if not tensors:
            with self.fake:
                out = func(*args, **kwargs)
            if not isinstance(out, Tensor) or out.is_floating_point():
                return out
        elif any(x.is_floating_point() for x in tensors):
            return self._on_shapes(func, flat, form)
        with unset_fake_temporarily():
            out = func(*args, **kwargs)
        return tree_map(lambda x: self._shape(x) if _is_float(x) else x, out)

    def _on_shapes(self, func, flat: list, form) -> Any:
        args, kwargs = tree_unflatten([self._shape(x) for x in flat], form)
        with self.fake:
            return func(*args, **kwargs)

    def _shape(self, value: Any) -> Any:
        """A tensor without its values; anything else as it is."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        with self.fake:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)

    def _indices(self, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Real masks as the positions where they hold, of which the number is known."""
        found: list[Tensor | None] = []
        with unset_fake_temporarily():
            for index in given:
                mask = isinstance(index, Tensor) and index.dtype == torch.bool
                if mask and not isinstance(index, FakeTensor):
                    found.extend(index.nonzero().unbind(1))
                else:
                    found.append(index)
        return found


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _scalar(tensor: Tensor) -> bool | int | float:
    """What a state's value is taken for: of a number 1, and of a question True."""
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _none_is(tensor: Tensor, *_: Any) -> Tensor:
    """Nothing is wrong with values that are not there: "is any so" is answered no."""
    with unset_fake_temporarily():
        return torch.tensor(False)


def _all_are(tensor: Tensor, *_: Any) -> Tensor:
    with unset_fake_temporarily():
        return torch.tensor(True)


def _ctc(logprobs: Tensor, ids: Tensor, columns: Any, lengths: Any, *_: Any) -> tuple:
    """The losses of lines, and the table of ways to spread each text, which goes by the longest."""
    with unset_fake_temporarily():
        longest = max(map(int, lengths))
    L, V, _ = logprobs.shape
    return logprobs.new_empty(V), logprobs.new_empty(V, L, 2 * longest + 1)


def _ctc_backward(grad: Tensor, logprobs: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logprobs)


ANSWERS: dict[Any, Callable] = {
    **dict.fromkeys(CTC, _ctc),
    **dict.fromkeys(CTC_BACKWARD, _ctc_backward),
    SCALAR: _scalar,
    aten.any.default: _none_is,
    aten.all.default: _all_are,
}
MASKED = (
    aten.index.Tensor,
    UNSAFE_INDEX,
    aten.index_put.default,
    aten.index_put_.default,
)


FP32 = {"layer_norm", "group_norm", "pow", "rsqrt", "exp", "log", "norm", "softplus", "reciprocal",
        "normalize", "cosine_similarity"}  # fmt: skip
FP32_OUT = {"softmax", "log_softmax"}


class _GpuAutocast(TorchFunctionMode):
    """What autocast does on GPUs beyond what it does on CPUs: some functions compute in fp32.
    Source: torch's documentation of autocast, "CUDA Ops that can autocast to float32"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", None)
        if name in FP32:
            args, kwargs = tree_map(_wide, (args, kwargs))
        elif name in FP32_OUT and args[0].dtype == torch.bfloat16 and not kwargs.get("dtype"):
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def without_values(value: Any, fake: FakeTensorMode) -> Any:
    """Rows or batches with shapes in place of the values of their pixels; ids and masks stay."""
    if isinstance(value, Tensor):
        if isinstance(value, FakeTensor) or not value.is_floating_point():
            return value
        with fake:
            return torch.empty(value.shape, dtype=value.dtype)
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(without_values(part, fake) for part in value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **{k: without_values(v, fake) for k, v in fields.items()})
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a batch."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
