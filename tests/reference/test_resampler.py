"""Perceivers beside transformers' own: Idefics v1's and Idefics2's, on the same weights."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

from vlm import adaptors
from vlm.image_tokens import ImageTokens
from vlm.resampler import SquaredReLU

WIDTH, LATENTS, DEPTH, HEADS, HEAD_WIDTH = 12, 5, 2, 4, 6
SHAPE = dict(kind="perceiver", width=WIDTH, latents=LATENTS, depth=DEPTH, heads=HEADS,
             head_width=HEAD_WIDTH)  # fmt: skip
V1 = {
    "0.latents_layer_norm.": "norm_latents.",
    "0.context_layer_norm.": "norm_context.",
    "0.q_layer_norm.": "norm_query.",
    "0.k_layer_norm.": "norm_key.",
    "0.q_proj.": "query.",
    "0.k_proj.": "key.",
    "0.v_proj.": "value.",
    "0.output_proj.": "out.",
    "1.ln.": "norm_mlp.",
    "1.fc.": "mlp.0.",
    "1.c_proj.": "mlp.2.",
}
"""Names within a block: Idefics v1's, ours."""
ACTIVATIONS = {"relu": nn.ReLU, "squared_relu": SquaredReLU, "gelu": nn.GELU}


def context(views=3, tokens=8, grid_hw=(2, 4)):
    generator = torch.Generator().manual_seed(0)
    return ImageTokens(tokens=torch.randn(views, tokens, WIDTH, generator=generator),
                       grid_hw=grid_hw)  # fmt: skip


def moved(module, seed=0):
    """A module whose every weight is drawn, norms and latents too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module.eval()


@pytest.mark.parametrize("head_norm", [False, True])
@pytest.mark.parametrize("mlp", ACTIVATIONS)
@torch.no_grad()
def test_perceiver_matches_that_of_idefics_1(mlp, head_norm):
    config = transformers.IdeficsConfig(
        vision_config={"embed_dim": WIDTH},
        perceiver_config={"qk_layer_norms_perceiver": head_norm},
    )
    peer = moved(IdeficsPerceiverResampler(config, WIDTH, DEPTH, HEADS, HEAD_WIDTH, LATENTS))
    for block in peer.blocks:
        block[1].act = ACTIVATIONS[mlp]()
    ours = adaptors.build(
        SHAPE | dict(kv_heads=HEADS, mlp=mlp, mlp_width=4 * WIDTH, norm="layer", eps=1e-5,
                     head_norm=head_norm)
    )  # fmt: skip
    state = {}
    for name, tensor in peer.state_dict().items():
        for theirs, own in V1.items():
            name = name.replace(theirs, own)
        state[name.replace("layer_norm.", "norm.")] = tensor
    ours.load_state_dict(state, strict=True)
    images = context()
    torch.testing.assert_close(ours(images).tokens, peer(images.tokens), rtol=0, atol=1e-5)


@torch.no_grad()
def test_perceiver_matches_that_of_idefics_2_with_and_without_padding():
    config = transformers.models.idefics2.Idefics2PerceiverConfig(
        hidden_size=WIDTH, rms_norm_eps=1e-3, resampler_n_latents=LATENTS, resampler_depth=DEPTH,
        resampler_n_heads=HEADS, resampler_head_dim=HEAD_WIDTH, num_key_value_heads=2,
    )  # fmt: skip
    peer = moved(Idefics2PerceiverResampler(config))
    ours = adaptors.build(
        SHAPE | dict(kv_heads=2, mlp="gated", mlp_width=4 * WIDTH, norm="rms", eps=1e-3)
    )
    names = {"layers.": "blocks.", "input_latents_norm": "norm_latents",
             "input_context_norm": "norm_context", "self_attn.q_proj": "query",
             "self_attn.k_proj": "key",
             "self_attn.v_proj": "value", "self_attn.o_proj": "out",
             "post_attention_layernorm": "norm_mlp"}  # fmt: skip
    state = {}
    for name, tensor in peer.state_dict().items():
        for theirs, own in names.items():
            name = name.replace(theirs, own)
        state[name] = tensor
    ours.load_state_dict(state, strict=True)
    images = context()
    whole = torch.ones(images.tokens.shape[:2], dtype=torch.bool)
    expected = peer(images.tokens, whole)
    torch.testing.assert_close(ours(images).tokens, expected, rtol=0, atol=1e-5)
    part = whole.clone()
    part[0, 5:] = False
    padded = ImageTokens(tokens=images.tokens, grid_hw=images.grid_hw, valid=part)
    expected = peer(images.tokens, part)
    torch.testing.assert_close(ours(padded).tokens, expected, rtol=0, atol=1e-5)
    alone = ImageTokens(tokens=images.tokens[:1, :5], grid_hw=(1, 5))
    torch.testing.assert_close(ours(alone).tokens, expected[:1], rtol=0, atol=1e-5)
