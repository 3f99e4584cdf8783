"""The decoder-only family beside transformers' Llava class on the same weights."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from vlm.families.decoder_only import generate as engine
from vlm.losses.token import token_losses

PATH = Path(__file__).parents[2] / "eval/speed_training.py"
spec = importlib.util.spec_from_file_location("speed_training", PATH)
sys.path.insert(0, str(PATH.parent))  # as for a script, whose neighbours it finds
speed_training = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed_training)

VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
              image_size=32, patch_size=8)  # fmt: skip
TEXT = dict(vocab_size=120, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=3, num_key_value_heads=1, pad_token_id=2)  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def peer(request):
    text = {**TEXT, "tie_word_embeddings": request.param}
    return speed_training.llava(VISION, text, image_id=119)


def test_loss_and_adaptor_gradient_equal_llavas(peer):
    ours = speed_training.ours_from(peer)
    batch, theirs = speed_training.batch_for(peer, size=5)
    loss = token_losses(ours(batch), batch.targets).mean()
    expected = peer(**theirs).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    peer.zero_grad()
    expected.backward()
    projector = peer.model.multi_modal_projector
    pairs = (
        (ours.adaptor.layers[0], projector.linear_1),
        (ours.adaptor.layers[2], projector.linear_2),
    )
    for mine, its in pairs:
        torch.testing.assert_close(mine.weight.grad, its.weight.grad, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_scored_logits_equal_llavas_full_logits(peer):
    ours = speed_training.ours_from(peer)
    batch, theirs = speed_training.batch_for(peer, size=4)
    theirs.pop("labels")
    full = peer(**theirs).logits
    torch.testing.assert_close(ours(batch), full[:, :-1][batch.scored[:, 1:]], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_ids_equal_llavas(peer):
    """Rows of one length, since the peer's own left padding is not what is tested here."""
    ours = speed_training.ours_from(peer)
    batch, theirs = speed_training.batch_for(peer, size=3)
    T = 16 + 20
    prompt = {k: v if k == "pixel_values" else v[:, :T] for k, v in theirs.items() if k != "labels"}
    expected = peer.generate(**prompt, max_new_tokens=10, do_sample=False)[:, T:]
    rows = type(batch)(
        ids=batch.ids[:, :T],
        valid=batch.valid[:, :T],
        scored=batch.scored[:, :T],
        positions=batch.positions[:, :T],
        groups=batch.groups,
        names=batch.names,
        padding="left",
    )
    stops = peer.generation_config.eos_token_id
    written = engine.generate(
        ours, rows, [stops] if stops is not None else [], 2, max_new_tokens=10
    )
    for (ids, _), row in zip(written, expected.tolist()):
        assert ids == row[: len(ids)]
