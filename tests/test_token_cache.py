"""Kept image tokens: the same numbers as computed ones, and never those of anything else."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny, training
from vlm.tokenizers.paired import AverageNeck, PairedTokenizer
from vlm.training.checkpoints.checkpoint import Checkpoints
from vlm.training.loading.token_cache import cached_tokens, fingerprint

PIXELS = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def tokenizer(seed=0):
    return tiny.decoder_only(seed=seed).tokenizer.requires_grad_(False)


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_kept_tokens_are_the_computed_ones_to_the_bit(tmp_path):
    chosen = tokenizer()
    expected = chosen(PIXELS)
    with cached_tokens(chosen, tmp_path) as uses:
        first, again = chosen(PIXELS), chosen(PIXELS.flip(0))
    assert (uses.read, uses.kept) == (3, 3)
    assert torch.equal(first.tokens, expected.tokens)
    assert torch.equal(again.tokens, expected.tokens.flip(0))
    assert first.grid_hw == again.grid_hw == expected.grid_hw
    assert len(files(tmp_path)) == 3
    assert torch.equal(chosen(PIXELS).tokens, expected.tokens)  # afterwards it computes again


def test_another_image_or_other_weights_are_never_read_from_the_cache(tmp_path):
    for chosen in (tokenizer(0), tokenizer(1)):
        expected = chosen(PIXELS).tokens
        with cached_tokens(chosen, tmp_path) as uses:
            assert torch.equal(chosen(PIXELS).tokens, expected)
            changed = PIXELS.clone()
            changed[1, 0, 0, 0] += 1e-6
            assert torch.equal(chosen(changed).tokens, chosen(changed).tokens)
        assert uses.kept == 4
    a, b = tokenizer(0), tokenizer(0)
    assert fingerprint(a) == fingerprint(b)
    next(iter(b.parameters())).data.flatten()[0] += 1e-6
    assert fingerprint(a) != fingerprint(b)
    c = tokenizer(0)
    c.register_buffer("mean", torch.zeros(2))
    before = fingerprint(c)
    c.mean[0] = 1  # as of a batch norm
    assert fingerprint(c) != before
    with cached_tokens(a, tmp_path) as uses, torch.autocast("cpu", torch.bfloat16):
        a(PIXELS)
    assert uses.kept == 3  # of another precision


def test_a_file_that_was_cut_is_computed_anew(tmp_path):
    chosen = tokenizer()
    with cached_tokens(chosen, tmp_path):
        expected = chosen(PIXELS).tokens
    victim = files(tmp_path)[0]
    victim.write_bytes(victim.read_bytes()[:40])
    with cached_tokens(chosen, tmp_path) as uses:
        assert torch.equal(chosen(PIXELS).tokens, expected)
    assert (uses.read, uses.kept) == (2, 1)
    with cached_tokens(chosen, tmp_path) as uses:
        chosen(PIXELS)
    assert uses.read == 3


def test_a_tokenizer_that_learns_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"found \d+ of its weights learning"),
        cached_tokens(tokenizer().requires_grad_(True), tmp_path),
    ):
        pass
    with (
        pytest.raises(ValueError, match="found training mode"),
        cached_tokens(tokenizer().train(), tmp_path),
    ):
        pass


def test_a_tokenizer_without_a_configuration_is_refused(tmp_path):
    """A neck of the caller's own: its weights do not say what it computes."""

    class Doubled(AverageNeck):
        def forward(self, tokens, grid_hw):
            return 2 * super().forward(tokens, grid_hw)

    high, low = tokenizer(), tokenizer()
    paired = PairedTokenizer(high, low, low_from="picture", high_neck=Doubled(high.dim)).eval()
    with (
        pytest.raises(ValueError, match=r"tokens of PairedTokenizer cannot be kept: .* Doubled"),
        cached_tokens(paired, tmp_path / "tokens"),
    ):
        pass
    assert not (tmp_path / "tokens").exists()


def test_tokenizer_is_afterwards_what_it_was_before(tmp_path):
    """One cache within another: the outer one goes on when the inner one has ended."""
    chosen = tokenizer()
    with cached_tokens(chosen, tmp_path / "outer") as outer:
        with cached_tokens(chosen, tmp_path / "inner") as inner:
            chosen(PIXELS)
        chosen(PIXELS)
    assert (inner.kept, outer.kept, outer.read) == (3, 3, 3)
    assert "forward" not in vars(chosen)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_with_kept_tokens_is_the_same_training(tmp_path, dropout):
    """The dropout is the adaptor's, which reads kept tokens."""
    stage = dataclasses.replace(training.STAGE, steps=8)
    plain, _, expected = training.train(tmp_path / "plain", stage, dropout=dropout)
    kept, _, found = training.train(
        tmp_path / "kept", stage, dropout=dropout, token_cache=tmp_path / "tokens"
    )
    # Kept tokens were made among other images, and products round by how many there are.
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
    for name, weight in training.weights(plain).items():
        torch.testing.assert_close(training.weights(kept)[name], weight, atol=1e-6, rtol=1e-5)
    assert 0 < len(files(tmp_path / "tokens")) <= 10  # one of each image, whatever the epochs


def test_training_in_bf16_keeps_tokens_of_bf16(tmp_path):
    """From the first step on, whose operations are counted by a pass of their own."""
    _, _, expected = training.train(tmp_path / "plain", precision="bf16")
    _, _, found = training.train(
        tmp_path / "kept", precision="bf16", token_cache=tmp_path / "tokens"
    )
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
    for path in files(tmp_path / "tokens"):
        assert load_file(path)["tokens"].dtype == torch.bfloat16


def test_run_with_kept_tokens_resumes_to_the_same_losses(tmp_path, monkeypatch):
    """Whichever step a process begins with, dropout of the adaptor draws the same numbers."""
    kept = {"token_cache": tmp_path / "tokens", "dropout": 0.3, "save_every": 3}
    _, _, expected = training.train(tmp_path / "whole", **kept)
    save = Checkpoints.save

    def save_and_die(self, progress):
        save(self, progress)
        self.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            training.train(tmp_path / "cut", **kept)
    _, _, found = training.train(tmp_path / "cut", resume=True, **kept)
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
