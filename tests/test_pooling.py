import pytest
import torch
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from tests.tiny import Patches
from tests.towers import timm_vit, transformers_tower
from vlm import pooling
from vlm.image_tokens import ImageTokens

ATTENTION = dict(kind="attention", in_width=12, heads=3, mlp_width=20, eps=1e-3)
CONFIGS = [dict(kind="own"), dict(kind="class"), dict(kind="mean"), ATTENTION]


def images(prefix=1, masked=False, grid=(2, 3)):
    """Two views of 2 x 3 patches; where masked, the second has 4 valid ones."""
    tokens = torch.randn(2, prefix + 6, 12, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, prefix + 6, dtype=torch.bool)
    valid[1, -2:] = False
    return ImageTokens(tokens=tokens, grid_hw=grid, valid=valid if masked else None)


@pytest.mark.parametrize("values", CONFIGS, ids=lambda values: values["kind"])
def test_pool_configuration_round_trips(values):
    full = {**values}
    assert pooling.config_of(pooling.build(full)) == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(kind="max"), "'max' is not one of own, class, mean, attention"),
        (dict(kind="mean", heads=2), r"pool mean: unknown keys \['heads'\]"),
        (dict(kind="attention", heads=2), r"pool attention: .*missing keys \['in_width', 'mlp_wid"),
        (dict(ATTENTION, heads=5), "5 heads do not divide the width 12"),
    ],
)
def test_pool_refuses_a_bad_configuration(values, message):
    with pytest.raises(ValueError, match=message):
        pooling.build(values)


def test_class_pool_takes_the_first_token():
    given = images()
    assert torch.equal(pooling.ClassPool()(given), given.tokens[:, 0])


@pytest.mark.parametrize("prefix", [0, 1])
def test_mean_pool_leaves_out_prefix_and_padding(prefix):
    given = images(prefix, masked=True)
    expected = torch.stack(
        [given.tokens[0, prefix:].mean(0), given.tokens[1, prefix : prefix + 4].mean(0)]
    )
    torch.testing.assert_close(pooling.MeanPool()(given), expected)
    whole = images(prefix)
    torch.testing.assert_close(pooling.MeanPool()(whole), whole.tokens[:, prefix:].mean(1))


def test_mean_pool_of_tokens_without_a_grid_takes_all():
    given = images(0, grid=None)
    torch.testing.assert_close(pooling.MeanPool()(given), given.tokens.mean(1))


def test_own_pool_gives_what_the_tokenizer_pooled():
    given = ImageTokens(tokens=torch.zeros(2, 6, 12), grid_hw=(2, 3), pooled=torch.randn(2, 5))
    assert torch.equal(pooling.OwnPool()(given), given.pooled)


def test_attention_pool_matches_siglip_head():
    pool = pooling.build(ATTENTION)
    config = SiglipVisionConfig(
        hidden_size=12, intermediate_size=20, num_attention_heads=3, layer_norm_eps=1e-3
    )
    head = SiglipMultiheadAttentionPoolingHead(config)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        head.probe.copy_(pool.probe)
        head.attention.in_proj_weight.copy_(torch.cat([pool.query.weight, pool.key_value.weight]))
        head.attention.in_proj_bias.copy_(torch.cat([pool.query.bias, pool.key_value.bias]))
        head.attention.out_proj.load_state_dict(pool.out.state_dict())
        head.layernorm.load_state_dict(pool.norm.state_dict())
        head.mlp.fc1.load_state_dict(pool.mlp[0].state_dict())
        head.mlp.fc2.load_state_dict(pool.mlp[2].state_dict())
    given = images()
    torch.testing.assert_close(pool(given), head(given.tokens), atol=1e-6, rtol=1e-5)


def test_attention_pool_reads_no_padding():
    pool = pooling.build(ATTENTION)
    given = images(0, masked=True)
    short = ImageTokens(tokens=given.tokens[1:, :4], grid_hw=None)
    torch.testing.assert_close(pool(given)[1:], pool(short), atol=1e-6, rtol=1e-5)


def test_pool_says_its_width_before_compute():
    assert pooling.MeanPool().width(Patches()) == 12
    assert pooling.build(ATTENTION).width(Patches()) == 12
    assert transformers_tower("siglip_vision_model").dim == 24


@pytest.mark.parametrize(
    ("pool", "tokenizer", "message"),
    [
        (pooling.OwnPool(), Patches, "Patches has none: build it with pooled=True"),
        (pooling.ClassPool(), timm_vit, r"TokenShape\(length=6.*prefix='keep'"),
        (pooling.build(ATTENTION), timm_vit, "tokens 12 wide, the image tokenizer gives 24"),
    ],
)
def test_pool_refuses_a_tokenizer_that_lacks_what_it_reads(pool, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        pool.width(tokenizer())
