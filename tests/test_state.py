"""The training state, assembled once, and the few calls from a recipe to a module's forward."""

import copy
import dataclasses
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import training
from tests.contrastive_runs import SHORT, TINY
from tests.runs import stage_of
from vlm.families.contrastive.module import Contrastive
from vlm.losses.token import token_losses
from vlm.training.fit import LoopConfig
from vlm.training.objectives.base import sum_totals
from vlm.training.runs import launch
from vlm.training.stages import FROZEN
from vlm.training.state import build_state

ROOT = Path(__file__).parent.parent
STAGE = dataclasses.replace(
    training.STAGE, rates=(("adaptor.*", 1e-2), ("text.*", 1e-2), ("*", FROZEN)), clip=0.5
)


def test_state_of_bf16_has_fp32_masters_and_bf16_copies():
    state = build_state(training.model().module, STAGE, torch.bfloat16)
    trained = {id(p) for p in state.trained}
    for name, parameter in state.module.named_parameters():
        learns = not name.startswith("tokenizer.")
        assert (id(parameter) in trained) == learns, name
        assert parameter.dtype == (torch.float32 if learns else torch.bfloat16), name
    assert {copied.dtype for copied in state.copies.copies} == {torch.bfloat16}
    assert trained == {id(p) for group in state.optimizer.param_groups for p in group["params"]}


def test_step_of_a_state_is_a_plain_step_of_torch():
    """Mean cross-entropy of one padded batch, gradients clipped, AdamW."""
    chosen = training.model()
    plain = copy.deepcopy(chosen.module)
    rows = [chosen.processor.encode(example) for example in training.examples()[:3]]
    objective = training.objective_for(chosen, None, None)
    batches = objective.collate(rows)
    totals = sum_totals(objective.totals, [objective.count(batch) for batch in batches])
    state = build_state(chosen.module, STAGE, torch.float32)
    loss = state.learn(objective, batches, totals, nullcontext)

    plain.tokenizer.requires_grad_(False)
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=STAGE.betas, weight_decay=0.0)
    losses = torch.cat([token_losses(plain(batch), batch.targets) for batch in batches])
    losses.mean().backward()
    norm = float(nn.utils.clip_grad_norm_(trained, STAGE.clip))
    optimizer.step()
    assert norm > STAGE.clip
    assert loss == pytest.approx(float(losses.mean().detach()), rel=1e-6)
    learned = dict(state.module.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(learned[name].detach(), parameter.detach(), atol=2e-6, rtol=1e-4)
    assert all(parameter.grad is None for parameter in state.trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision is one of .*, found 'fp8'"),
        ({"change": ("steps",)}, r"change \['steps'\] goes with resume"),
        ({"token_cache": Path("kept"), "shard": "all"}, "token_cache kept: .* or --shard"),
    ],
)
def test_loop_config_names_what_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        LoopConfig(**options)


def test_a_recipe_is_five_calls_from_a_forward_pass(tmp_path, monkeypatch):
    """launch.start, run, fit, a step, the objective's backward, and so the module."""
    chains, forward = [], Contrastive.forward

    def seen(self, *given):
        calls = [
            frame.name
            for frame in traceback.extract_stack()
            if Path(frame.filename).is_relative_to(ROOT / "vlm")
        ]
        chains.append([*calls, "forward"])
        return forward(self, *given)

    monkeypatch.setattr(Contrastive, "forward", seen)
    settings = TINY | SHORT | {"eval_every": 0, "held_out_rows": 0, "out": tmp_path / "run"}
    words = [
        word
        for key, value in settings.items()
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]
    monkeypatch.setattr(sys, "argv", ["contrastive.py", *words])
    recipe = stage_of("contrastive")
    launch.start(recipe.Settings, recipe.run, recipe.stage, recipe.objective)
    assert ["start", "run", "fit", "__call__", "backward", "forward"] in chains
    assert (tmp_path / "run/model").is_dir()
