import pytest
import torch

from tests.tokenizer_laws import check_laws, encode, one_image, spec
from tests.transformers_tokenizers import tiny
from vlm import tokenizers
from vlm.image_tokens import ImageTokens
from vlm.tokenizers.paired import AverageNeck, BilinearNeck, PairedSpec, PairedTokenizer
from vlm.tokenizers.transformers import build

NECKS = {"average": AverageNeck, "bilinear": BilinearNeck}


def pair(high_hw=(64, 96), low_hw=(32, 48), neck="average", low_from="picture", **low):
    """SAM at `high_hw` and SigLIP at `low_hw`, both 16 pixels a patch."""
    high = build(tiny("sam_vision_model", high_hw))
    low = build(tiny("siglip_vision_model", low_hw, **low))
    return PairedTokenizer(high, low, low_from=low_from, high_neck=NECKS[neck](high.dim))


@pytest.mark.parametrize("neck", NECKS)
@pytest.mark.parametrize("low_from", ["picture", "high"])
def test_paired_tokenizer_keeps_the_laws_on_non_square_pixels(neck, low_from):
    """Counts, parts, rebuilding and gradients, where rows and columns differ."""
    check_laws(pair(neck=neck, low_from=low_from))


@pytest.mark.parametrize(
    ("high_hw", "low_hw", "length"),
    [((448, 448), (384, 384), 576), ((256, 512), (96, 224), 84)],
)
def test_paired_count_equals_output_at_published_geometries(high_hw, low_hw, length):
    tokenizer = pair(high_hw, low_hw, pooled=True)
    (tokens,) = encode(tokenizer, one_image(30, 50))
    assert tokenizer.tokens_for((30, 50)) == tokens.tokens.shape[1] == length
    assert tokens.tokens.shape[2] == tokenizer.dim == tokenizer.high.dim + tokenizer.low.dim


def test_paired_tokens_are_high_then_low_features():
    """DeepSeek-VL joins high first."""
    tokenizer = pair((64, 96), (64, 96))
    image = one_image(50, 70)
    (fused,) = encode(tokenizer, image)
    (high,), (low,) = encode(tokenizer.high, image), encode(tokenizer.low, image)
    assert torch.equal(fused.tokens, torch.cat([high.tokens, low.tokens], -1))


@pytest.mark.parametrize("neck", NECKS)
def test_necks_keep_places_of_a_coarser_grid(neck):
    """A field that grows along rows, or columns, still does on the new grid."""
    rows = torch.arange(8.0)[:, None].expand(8, 4)
    columns = torch.arange(4.0)[None, :].expand(8, 4)
    field = torch.stack([rows, columns], -1).reshape(1, 32, 2)
    coarse = NECKS[neck](2)(ImageTokens(tokens=field, grid_hw=(8, 4)), (4, 2))
    rows, columns = coarse.reshape(4, 2, 2).unbind(-1)
    assert (rows.diff(dim=0) > 1).all()
    assert (columns.diff(dim=1) > 1).all()
    torch.testing.assert_close(rows[:, 0], rows[:, 1])


def test_paired_spec_makes_low_pixels_from_the_padded_high_image():
    """From the image the low tower sees it stretched, from high with its bars."""
    high, low = spec(64, 64, fit="pad"), spec(32, 32)
    image = one_image(64, 32).point(lambda value: 255)
    of_image = PairedSpec(high=high, low=low, low_from="picture")(image)[0][1]
    of_high = PairedSpec(high=high, low=low, low_from="high")(image)[0][1]
    assert (of_image == 1).all()
    assert (of_high[:, :, :6] == -1).all()
    assert (of_high[:, :, 12:20] == 1).all()
    assert (of_high[:, :, -6:] == -1).all()


def test_paired_tokenizer_raises_when_a_tower_keeps_its_prefix():
    high = build(tiny("sam_vision_model", (64, 96)))
    low = build(tiny("clip_vision_model", (32, 48), prefix="keep"))
    tokenizer = PairedTokenizer(high, low, low_from="picture", high_neck=AverageNeck(high.dim))
    with pytest.raises(ValueError, match=r"low tower .* without prefix tokens.*length=7"):
        tokenizer.tokens_for((10, 10))


def test_paired_tokenizer_accepts_any_finished_neck():
    class Double(torch.nn.Module):
        dim = 4

        def __init__(self, width):
            super().__init__()
            self.project = torch.nn.Linear(width, 4)

        def forward(self, tokens, grid_hw):
            return self.project(BilinearNeck(8)(tokens, grid_hw))

    plain = pair()
    tokenizer = PairedTokenizer(plain.high, plain.low, low_from="picture", high_neck=Double(8))
    (tokens,) = encode(tokenizer, one_image(20, 30))
    assert tokens.tokens.shape == (1, 6, 4 + plain.low.dim)
    assert "high_neck" in tokenizer.parts()
    with pytest.raises(ValueError, match=r"can name a Double; known necks are average, bilinear"):
        tokenizers.config_to_dict(tokenizer)
