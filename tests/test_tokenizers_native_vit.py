"""The native-size ViT: the laws of image tokenizers, and windows beside a mask."""

import pytest
import torch
from transformers.vision_utils import get_vision_window_index

from tests.tokenizer_laws import check_laws, spec
from vlm.pixels.area import AreaSpec
from vlm.tokenizers import native_vit
from vlm.tokenizers.native_vit import by_length, windows

PIXELS = AreaSpec(block=spec(8, 8), min_pixels=16 * 16, max_pixels=96 * 96)
WINDOWED = dict(norm="rms", mlp="gated_silu", window_px=16, whole_blocks=(1,))


def config(**changes):
    values = dict(width=16, depth=3, heads=2, mlp_width=24, patch_px=4, patch_frames=2,
                  norm="layer", mlp="quick_gelu", rotary_base=100.0, pixel_spec=PIXELS)  # fmt: skip
    return native_vit.Config(**values | changes)


@pytest.mark.parametrize("image_hw", [(48, 80), (90, 20), (7, 9)])
@pytest.mark.parametrize("changes", [{}, WINDOWED], ids=["whole", "windows"])
def test_native_vit_keeps_the_laws_of_image_tokenizers(changes, image_hw):
    torch.manual_seed(0)
    check_laws(native_vit.build(config(**changes)), image_hw)


GRIDS = [(4, 4), (8, 4), (5, 7), (11, 4), (3, 2), (1, 9), (12, 13)]
"""Of merged cells: sides that a window of 4 divides, and that it does not."""


@pytest.mark.parametrize("grid_hw", GRIDS)
def test_windows_are_those_of_qwen2_5_vl(grid_hw):
    h, w = grid_hw
    order, bounds = get_vision_window_index(
        torch.tensor([[1, 2 * h, 2 * w]]), spatial_merge_size=2, window_size=112, patch_size=14
    )
    ours = windows(grid_hw, 4)
    assert torch.equal(torch.cat(ours), order)
    assert [4 * len(cells) for cells in ours] == bounds.diff().tolist()
    patches = windows((2 * h, 2 * w), 8)
    blocks = torch.arange(4 * h * w).view(h, 2, w, 2).transpose(1, 2).flatten(2).flatten(0, 1)
    for cells, its_patches in zip(ours, patches, strict=True):
        assert sorted(blocks[cells].flatten().tolist()) == its_patches.tolist()


@pytest.mark.parametrize("grid_hw", GRIDS)
def test_windows_of_like_length_lie_together(grid_hw):
    order, runs = by_length(windows(grid_hw, 4))
    assert sorted(order.tolist()) == list(range(grid_hw[0] * grid_hw[1]))
    lengths = [length for _, length in runs]
    assert lengths == sorted(set(lengths))
    parts = order.split([length for count, length in runs for _ in range(count)])
    assert {tuple(part.tolist()) for part in parts} == {
        tuple(cells.tolist()) for cells in windows(grid_hw, 4)
    }


@torch.no_grad()
def masked_twin(tokenizer, pixels):
    """What the tokenizer gives, slowly: patches stay row by row, and a mask keeps windows apart."""
    _, _, H, W = pixels.shape
    h, w = grid_hw = (H // 4, W // 4)
    x = tokenizer.patch_embed(pixels)
    turns = native_vit.rotary_turns(grid_hw, 8, tokenizer.config.rotary_base, x.device)
    window = (torch.arange(h) // 4)[:, None] * w + torch.arange(w) // 4
    same = window.flatten()[:, None] == window.flatten()
    for number, block in enumerate(tokenizer.blocks):
        V, L, D = x.shape
        qkv = block.attn.qkv(block.norm1(x)).view(V, L, 3, 2, 8)
        query, key, value = qkv.unbind(2)
        query, key = native_vit.rotate(query, turns), native_vit.rotate(key, turns)
        scores = torch.einsum("vlaf,vmaf->valm", query, key) * 8**-0.5
        if number not in tokenizer.config.whole_blocks:
            scores = scores.masked_fill(~same, float("-inf"))
        read = torch.einsum("valm,vmaf->vlaf", scores.softmax(-1), value).reshape(V, L, D)
        x = x + block.attn.proj(read)
        x = x + block.mlp(block.norm2(x))
    return x


@pytest.mark.parametrize("size_hw", [(32, 48), (40, 24), (72, 16), (8, 56)])
@torch.no_grad()
def test_windows_attend_as_a_mask_says(size_hw):
    torch.manual_seed(0)
    tokenizer = native_vit.build(config(**WINDOWED))
    for parameter in tokenizer.parameters():
        parameter.mul_(3.0)  # attention that is not flat
    pixels = torch.randn(2, 3, *size_hw)
    found = tokenizer(pixels)
    assert found.grid_hw == (size_hw[0] // 4, size_hw[1] // 4)
    torch.testing.assert_close(found.tokens, masked_twin(tokenizer, pixels), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_windows_do_not_see_each_other():
    torch.manual_seed(0)
    tokenizer = native_vit.build(config(**WINDOWED | {"whole_blocks": ()}))
    pixels = torch.randn(1, 3, 24, 40)
    changed = pixels.clone()
    changed[..., 16:, 32:] += 1.0  # the last window, of what is left
    moved = (tokenizer(pixels).tokens != tokenizer(changed).tokens).any(-1).view(6, 10)
    expected = torch.zeros(6, 10, dtype=torch.bool)
    expected[4:, 8:] = True
    assert torch.equal(moved, expected)


@torch.no_grad()
def test_still_image_stands_for_every_frame():
    """The convolution over space and time, of an image that is doubled in time."""
    torch.manual_seed(0)
    embed = native_vit.build(config()).patch_embed
    pixels = torch.randn(2, 3, 16, 24)
    doubled = pixels[:, :, None].expand(-1, -1, 2, -1, -1)
    expected = embed.proj(doubled)[:, :, 0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(pixels), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batch"}, "norm must be one of layer, rms, found 'batch'"),
        ({"mlp": "relu"}, "mlp must be one of quick_gelu, gated_silu, found 'relu'"),
        ({"heads": 8}, "found width 16 and 8 heads"),
        ({"patch_px": 3}, "whole patches of 3 pixels, found 8"),
        ({"window_px": 12}, "window_px must be whole blocks of 8 pixels, found 12"),
        ({"window_px": 16, "whole_blocks": (3,)}, r"of the 3 blocks, .* found \(3,\)"),
        ({"whole_blocks": (1,)}, "window_px None"),
    ],
)
def test_native_vit_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": spec(8, 16)}, "block: expected a square by fit 'stretch'"),
        ({"block": spec(8, 8, "pad")}, "block: expected a square by fit 'stretch'"),
        ({"min_pixels": 0}, "found min_pixels 0"),
        ({"max_pixels": 9}, "min_pixels 256 and max_pixels 9"),
    ],
)
def test_area_spec_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        AreaSpec(**{"block": spec(8, 8), "min_pixels": 256, "max_pixels": 9216} | changes)
