import pytest
import torch

from vlm import adaptors
from vlm.image_tokens import ImageTokens, TokenShape

WIDTH, OUT = 6, 8
KINDS = {
    "linear": dict(kind="mlp", in_width=WIDTH, out_width=OUT, depth=1, hidden_width=OUT),
    "mlp3": dict(kind="mlp", in_width=WIDTH, out_width=OUT, depth=3, hidden_width=16),
    "split": dict(kind="split_mlp", high_width=4, low_width=2, hidden_width=10, out_width=OUT),
    "shuffle": dict(
        kind="pixel_shuffle", in_width=WIDTH, out_width=OUT, ratio=2, depth=2, hidden_width=OUT
    ),
    "resampler": dict(kind="resampler", in_width=WIDTH, out_width=OUT, queries=5, depth=2, heads=2),
    "latents": dict(kind="latent_attention", in_width=WIDTH, out_width=OUT, queries=5, heads=2),
}


def image_tokens(h=4, w=6, V=3):
    return ImageTokens(
        tokens=torch.randn(V, h * w, WIDTH),
        grid_hw=(h, w),
        owner=torch.tensor([[v, 0, 0] for v in range(V)]),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_adaptor_output_has_the_shape_promised_before_compute(kind):
    """A non-square grid gives exactly the token count that the prompt reserves."""
    adaptor, images = adaptors.build(KINDS[kind]), image_tokens()
    out = adaptor(images)
    assert out.shape == adaptor.shape_for(images.shape)
    assert out.tokens.shape[-1] == OUT
    assert torch.equal(out.owner, images.owner)


@pytest.mark.parametrize("kind", KINDS)
def test_adaptor_rebuilds_from_its_configuration(kind):
    adaptor, images = adaptors.build(KINDS[kind]), image_tokens()
    twin = adaptors.build(adaptors.config_of(adaptor))
    twin.load_state_dict(adaptor.state_dict())
    assert torch.equal(twin(images).tokens, adaptor(images).tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_adaptor_views_do_not_influence_each_other(kind):
    adaptor, images = adaptors.build(KINDS[kind]), image_tokens()
    alone = ImageTokens(tokens=images.tokens[1:2], grid_hw=images.grid_hw)
    torch.testing.assert_close(adaptor(alone).tokens[0], adaptor(images).tokens[1])


def test_pixel_shuffle_joins_neighbours_in_space():
    adaptor = adaptors.build(KINDS["shuffle"])
    seen = {}
    adaptor.mlp.register_forward_hook(lambda _, args, __: seen.update(blocks=args[0]))
    images = image_tokens(h=2, w=4, V=1)
    adaptor(images)
    left, right = images.tokens[0, [0, 1, 4, 5]].flatten(), images.tokens[0, [2, 3, 6, 7]].flatten()
    assert torch.equal(seen["blocks"][0], torch.stack([left, right]))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (TokenShape(15, (3, 5)), "does not divide the grid 3 x 5"),
        (TokenShape(25, (4, 6)), "without prefix tokens"),
        (TokenShape(24, None), "without prefix tokens"),
    ],
)
def test_pixel_shuffle_refuses_what_has_no_blocks(shape, message):
    with pytest.raises(ValueError, match=message):
        adaptors.build(KINDS["shuffle"]).shape_for(shape)


@pytest.mark.parametrize("kind", ["resampler", "latents"])
def test_queries_ignore_invalid_tokens(kind):
    adaptor = adaptors.build(KINDS[kind])
    images = image_tokens(V=1)
    valid = torch.ones(1, 24, dtype=torch.bool)
    valid[:, 12:] = False
    noisy = images.tokens.clone()
    noisy[:, 12:] = 99.0
    a, b = (
        adaptor(ImageTokens(tokens=t, grid_hw=(4, 6), valid=valid)) for t in (images.tokens, noisy)
    )
    torch.testing.assert_close(a.tokens, b.tokens)


def test_build_names_unknown_kinds_and_keys():
    with pytest.raises(ValueError, match=r"'perceiver' is not one of identity, mlp"):
        adaptors.build({"kind": "perceiver"})
    with pytest.raises(ValueError, match=r"unknown keys \['with'\], missing keys \['depth'\]"):
        adaptors.build({"kind": "mlp", "in_width": 1, "out_width": 1, "hidden_width": 1, "with": 1})
