"""SigLIP with bucketed positions, and the quarters of an image."""

from dataclasses import replace

import pytest
import torch

from tests.tokenizer_laws import check_laws, check_order, encode, one_image, spec
from tests.transformers_tokenizers import TINY
from vlm.pixels import BadImage
from vlm.tokenizers import bucketed
from vlm.tokenizers.quarters import QuartersSpec, QuartersTokenizer

SHRINK = replace(spec(100, 100), fit="shrink", min_side_px=20)
VISION = TINY | {"model_type": "siglip_vision_model"}


def tokenizer(pixel_spec=SHRINK, **more):
    config = bucketed.Config(vision_config=VISION | more, pixel_spec=pixel_spec)
    return bucketed.build(config)


@pytest.mark.parametrize("image_hw", [(48, 80), (300, 90), (9, 7)])
def test_bucketed_tokenizer_keeps_the_laws_on_non_square_images(image_hw):
    check_laws(tokenizer(), image_hw)


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("image_hw", [(300, 91), (41, 80), (2, 3)])
def test_quarters_tokenizer_keeps_the_laws_on_non_square_images(image_hw, splits):
    check_laws(QuartersTokenizer(tokenizer(), splits=splits), image_hw)


def test_bucketed_tokens_follow_rows_then_columns():
    check_order(tokenizer(num_hidden_layers=0))


@torch.no_grad()
def test_bucketed_tokens_read_no_pixel_beyond_whole_patches():
    tower = tokenizer().eval()
    pixels = torch.randn(2, 3, 40, 70)
    tokens = tower(pixels).tokens
    assert tokens.shape[1] == 2 * 4
    assert torch.equal(tower(pixels[:, :, :32, :64]).tokens, tokens)


@torch.no_grad()
def test_bucketed_tokens_of_the_own_grid_are_the_towers():
    """Patches of 16 on 64 x 64, whose fractions fp32 holds exactly."""
    tower = tokenizer().eval()
    pixels = torch.randn(1, 3, 64, 64)
    expected = tower.backbone(pixels).last_hidden_state
    torch.testing.assert_close(tower(pixels).tokens, expected)


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2]),
                                                 (8, [0, 0, 1, 1, 2, 2, 3, 3])])  # fmt: skip
def test_bucketed_positions_spread_over_the_table(count, expected):
    assert bucketed.bucketed_positions((count, 1), 4).tolist() == [4 * row for row in expected]
    assert bucketed.bucketed_positions((1, count), 4).tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip_vision_model"}, "must be 'siglip_vision_model', found 'clip"),
        ({"image_size": [64, 32]}, r"one number each, found \[\[64, 32\], 16\]"),
        ({"patch_size": 32}, "min_side_px of pixel_spec must be at least a patch of 32, found 20"),
    ],
)
def test_bucketed_refuses_what_has_no_positions(change, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(**change)


def test_bucketed_refuses_pixels_of_less_than_a_patch():
    with pytest.raises(ValueError, match=r"one patch of 16 pixels, found \(8, 40\)"):
        tokenizer()(torch.zeros(1, 3, 8, 40))


def test_quarters_are_the_image_and_the_odd_pixel_is_the_seconds():
    views = QuartersSpec(view=replace(SHRINK, min_side_px=1), splits=True)
    image = one_image(31, 44)
    first, second, third, fourth, whole = views(image)
    assert first.shape == (3, 15, 22)
    assert fourth.shape == (3, 16, 22)
    above, below = torch.cat([first, second], dim=2), torch.cat([third, fourth], dim=2)
    assert torch.equal(torch.cat([above, below], dim=1), whole)
    sizes = [tuple(view.shape[1:]) for view in views(image)]
    assert sizes == list(views.view_sizes((31, 44)))
    assert len(QuartersSpec(view=SHRINK, splits=False)(image)) == 1


def test_quarters_refuse_an_image_that_has_none():
    with pytest.raises(BadImage, match="at least 2 x 2 pixels, which has quarters, found 1 x 9"):
        QuartersSpec(view=SHRINK, splits=True)(one_image(1, 9))


def test_boxes_follow_the_whole_of_quarters():
    made = QuartersTokenizer(tokenizer(), splits=True)
    record = made.pixel_spec.resize_record((300, 200))
    assert record.output_hw == (100, 66)
    assert tuple(encode(made, one_image(300, 200))[-1].grid_hw) == (6, 4)
    assert record.boxes([[0, 0, 200, 300]]).tolist() == [[0, 0, 66, 100]]
