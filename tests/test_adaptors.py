import pytest
import torch

from vlm import adaptors
from vlm.image_tokens import ImageTokens, TokenShape

WIDTH, OUT = 6, 8
GATED = dict(kind="gated_mlp", in_width=WIDTH, hidden_width=10, out_width=OUT)
PERCEIVER = dict(kind="perceiver", width=OUT, latents=5, depth=2, heads=4, kv_heads=2, head_width=3,
                 mlp="gated", mlp_width=12, norm="rms", eps=1e-5)  # fmt: skip
KINDS = {
    "linear": dict(kind="mlp", in_width=WIDTH, out_width=OUT, depth=1, hidden_width=OUT),
    "mlp3": dict(kind="mlp", in_width=WIDTH, out_width=OUT, depth=3, hidden_width=16),
    "split": dict(kind="split_mlp", high_width=4, low_width=2, hidden_width=10, out_width=OUT),
    "shuffle": dict(
        kind="pixel_shuffle", in_width=WIDTH, out_width=OUT, ratio=2, depth=2, hidden_width=OUT
    ),
    "normed_shuffle": dict(
        kind="normed_shuffle", in_width=WIDTH, out_width=OUT, ratio=2, norm="rms", eps=1e-6
    ),
    "resampler": dict(kind="resampler", in_width=WIDTH, out_width=OUT, queries=5, depth=2, heads=2),
    "grid": dict(kind="grid_resampler", in_width=WIDTH, out_width=OUT, queries_hw=(2, 3), heads=2),
    "gated": GATED,
    "perceiver": dict(kind="chain", parts=[GATED, PERCEIVER]),
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


@pytest.mark.parametrize("shape", [TokenShape(25, (4, 6)), TokenShape(24, None)])
def test_grid_resampler_refuses_tokens_without_a_place(shape):
    with pytest.raises(ValueError, match="without prefix tokens"):
        adaptors.build(KINDS["grid"]).shape_for(shape)


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


@pytest.mark.parametrize("kind", ["resampler", "grid", "perceiver", "latents"])
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


def test_queries_are_all_valid_also_where_they_are_as_many_as_the_tokens():
    adaptor = adaptors.build(KINDS["resampler"] | {"queries": 24})
    valid = torch.ones(1, 24, dtype=torch.bool)
    valid[:, 12:] = False
    images = ImageTokens(tokens=image_tokens(V=1).tokens, grid_hw=(4, 6), valid=valid)
    assert adaptor(images).valid is None


def test_build_names_unknown_kinds_and_keys():
    with pytest.raises(ValueError, match=r"'pooler' is not one of identity, mlp"):
        adaptors.build({"kind": "pooler"})
    with pytest.raises(ValueError, match=r"unknown keys \['with'\], missing keys \['depth'\]"):
        adaptors.build({"kind": "mlp", "in_width": 1, "out_width": 1, "hidden_width": 1, "with": 1})


@pytest.mark.parametrize("size_hw", [(1, 1), (3, 5), (7, 2)])
def test_perceiver_gives_as_many_tokens_for_any_grid(size_hw):
    h, w = size_hw
    out = adaptors.build(KINDS["perceiver"])(image_tokens(h, w))
    assert out.tokens.shape == (3, 5, OUT)
    assert out.grid_hw is None


def test_perceiver_latents_read_each_other():
    """Beside a context that says nothing, a latent changes with another."""
    adaptor = adaptors.build(PERCEIVER)
    images = ImageTokens(tokens=torch.zeros(1, 4, OUT), grid_hw=(2, 2))
    before = adaptor(images).tokens
    with torch.no_grad():
        adaptor.latents[0] += torch.randn(OUT)
    assert (adaptor(images).tokens != before).any(-1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": "swish"}, "mlp must be one of gated, relu, squared_relu, gelu, found 'swish'"),
        ({"norm": "batch"}, "norm must be one of layer, rms, found 'batch'"),
        ({"kv_heads": 3}, "kv_heads must divide heads, found kv_heads 3 and heads 4"),
        ({"latents": 0}, "latents and depth must be at least 1, found 0 and 2"),
    ],
)
def test_perceiver_refuses_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        adaptors.build(PERCEIVER | change)


def test_chain_refuses_widths_that_differ_and_no_parts():
    chained = adaptors.build(KINDS["perceiver"])
    assert (chained.config.in_width, chained.config.out_width) == (WIDTH, OUT)
    with pytest.raises(ValueError, match=r"parts\[1\]: expected in_width 8, .* found 6"):
        adaptors.build({"kind": "chain", "parts": [GATED, GATED]})
    with pytest.raises(ValueError, match="expected an adaptor or more, found none"):
        adaptors.build({"kind": "chain", "parts": []})
