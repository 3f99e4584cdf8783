"""The head of a language model: what its own forward makes of its decoder's final states.

Training and scores need logits at some positions alone, so `head_logits` makes them here, while
generation takes the language model's own forward. What heads do beside their product differs by
the type of language model; `require_own_logits` refuses those whose logits would differ.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from vlm.compat.torch import with_child

SCALES = ("logit_scale", "lm_head_multiplier")
"""Fields of configurations by which logits are multiplied: Cohere's, Falcon-H1's."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Fields that bound logits by a tanh: of Gemma and NanoChat, RecurrentGemma, xLSTM."""
TRIED = (3, 8)
"""Positions and rows of a head by which logits are compared."""


def head_logits(text: nn.Module, states: Tensor) -> Tensor:
    """A causal language model's logits float[..., Z] of its decoder's final states float[..., D],
    with the scaling and capping of its own head."""
    return _scaled(text.get_output_embeddings()(states), text.config.get_text_config())


def _scaled(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:  # a name of two meanings: Granite divides
        multiplies = config.model_type == "hyperclovax"
        logits = logits * scaling if multiplies else logits / scaling
    for name in SCALES:
        scale = getattr(config, name, None)
        if scale is not None:
            logits = logits * scale
    for name in CAPS:
        cap = getattr(config, name, None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def require_own_logits(text: nn.Module) -> None:
    """Raises ValueError naming the type of a language model whose own forward makes other logits of
    final states than `head_logits`; warns where it cannot be called.

    Both are tried on random states and a head of a few random rows, in place of its decoder and its
    head: no weight is read, so that it takes milliseconds at any size, wherever the weights are.
    """
    kind = text.config.get_text_config().model_type
    decoder, head = text.get_decoder(), text.get_output_embeddings()
    positions, rows = TRIED
    width = next(head.parameters()).shape[-1]
    states, weight = _random(1, positions, width), 4 * width**-0.5 * _random(rows, width)
    tried = nn.Linear(width, rows, bias=False, device="meta")
    tried.weight = nn.Parameter(weight)
    twin = _with(text, {decoder: _Given(decoder, states), head: tried})
    try:
        own = type(text).forward(twin, inputs_embeds=states, use_cache=False).logits
    except Exception as error:  # of whatever its own forward does besides
        warnings.warn(
            f"{kind}: whether training and generation have the same logits is not known, since "
            f"{type(text).__name__} could not be tried: {error}",
            stacklevel=2,
        )
        return
    ours = head_logits(twin, states)
    if own.shape != ours.shape or not torch.allclose(own.float(), ours, rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"{kind}: expected a language model whose logits are its head's, with the scaling of "
            f"{', '.join(('logits_scaling', *SCALES, *CAPS))} in its configuration; "
            f"{type(text).__name__} makes others of its final states, so that training and "
            "generation would differ"
        )


def _random(*shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _with(module: nn.Module, others: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with others in place of some that are in it; the given one stays as it is."""
    if module in others:
        return others[module]
    for name, child in module.named_children():
        changed = _with(child, others)
        if changed is not child:
            module = with_child(module, name, changed)
    return module


class _Given(nn.Module):
    """A decoder that gives these final states; its other attributes are those of the real one."""

    def __init__(self, real: nn.Module, states: Tensor) -> None:
        super().__init__()
        self.real = (real,)  # in a tuple, so that it is no part of this one
        self.states = states

    def __getattr__(self, name: str):
        return getattr(self.real[0], name)

    def forward(self, *_, **__) -> BaseModelOutputWithPast:
        return _Output(last_hidden_state=self.states)


class _Output(BaseModelOutputWithPast):
    """Final states alone; what else decoders give, such as the weights of a router, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
