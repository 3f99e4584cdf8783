"""Mllama's image tokenizer beside transformers' vision model and image processor."""

from dataclasses import replace

import pytest
import torch
import transformers

from tests.tiny import image
from tests.tokenizer_laws import check_laws, encode, one_image
from vlm.pixels import HALF, OPENAI, PixelSpec, tile_from_transformers
from vlm.pixels.canvas import CanvasSpec, layouts
from vlm.tokenizers import mllama

SIDE, PATCH = 28, 7
SIZES = {
    "portrait 3:1": (150, 50),
    "landscape": (40, 90),
    "tiny": (20, 20),
    "tiny and narrow": (3, 20),
    "large": (700, 430),
    "strip": (9, 400),
    "column": (400, 9),
    "square": (56, 56),
    "one tile": (28, 28),
}
THEIRS = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_global_layers=2,
              attention_heads=2, intermediate_layers_indices=[0, 2], vision_output_dim=48,
              norm_eps=1e-3)  # fmt: skip


def tile(side=SIDE, statistics=HALF):
    return PixelSpec(
        size_hw=(side, side), fit="stretch", resample="bilinear",
        mean=statistics.mean, std=statistics.std,
    )  # fmt: skip


def config(side=SIDE, patch=PATCH, **more):
    values = dict(width=16, heads=2, mlp_width=24, depth=3, global_depth=2, taken=(0, 2),
                  patch_px=patch, max_tiles=4, pixel_spec=tile(side), eps=1e-3)  # fmt: skip
    return mllama.Config(**values | more)


def peer_of(side=SIDE, patch=PATCH):
    """transformers' vision model with all gates open."""
    torch.manual_seed(0)
    peer = transformers.MllamaVisionModel(
        transformers.models.mllama.MllamaVisionConfig(**THEIRS, image_size=side, patch_size=patch)
    )
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return peer.eval()


def tokenizer_of(peer, settings):
    """Ours with the weights of transformers' vision model, whose names it has."""
    tokenizer = mllama.build(settings).eval()
    tokenizer.load_state_dict(peer.state_dict())
    return tokenizer


def tiles_of(canvas, side, count=4):
    """The tiles of a canvas as transformers has them: absent ones are zeros."""
    rows, columns = canvas.shape[1] // side, canvas.shape[2] // side
    tiles = torch.zeros(count, 3, side, side)
    for number in range(rows * columns):
        y, x = divmod(number, columns)
        tiles[number] = canvas[:, y * side : (y + 1) * side, x * side : (x + 1) * side]
    return tiles, layouts(count).index((rows, columns)) + 1


@pytest.mark.parametrize("max_tiles", [4, 2])
@pytest.mark.parametrize("kind", ["MllamaImageProcessor", "MllamaImageProcessorPil"])
@pytest.mark.parametrize("size", SIZES)
def test_canvas_pixels_and_ids_are_those_of_the_reference(size, kind, max_tiles):
    processor = getattr(transformers, kind)(
        size={"height": 56, "width": 56}, max_image_tiles=max_tiles,
        image_mean=list(OPENAI.mean), image_std=list(OPENAI.std),
    )  # fmt: skip
    spec = CanvasSpec(tile=tile_from_transformers(processor, 56), max_tiles=max_tiles)
    seen = image(3, SIZES[size])
    inputs = processor([[seen]], return_tensors="pt")
    (canvas,) = spec(seen)
    assert (tuple(canvas.shape[1:]),) == spec.view_sizes(SIZES[size])
    tiles, id = tiles_of(canvas, 56, max_tiles)
    assert id == int(inputs["aspect_ratio_ids"])
    torch.testing.assert_close(tiles, inputs["pixel_values"][0, 0], rtol=0, atol=1e-6)
    shown = spec.unnormalise(tiles)
    assert torch.equal(shown, spec.unnormalise(inputs["pixel_values"][0, 0]))


def test_canvas_layouts_are_those_of_the_reference_for_all_sizes():
    from transformers.models.mllama.image_processing_mllama import get_optimal_tiled_canvas

    spec = CanvasSpec(tile=tile(560), max_tiles=4)
    sides = [*range(1, 2400, 97), 560, 1120, 1680, 2240]
    for H in sides:
        for W in sides:
            canvas = get_optimal_tiled_canvas(H, W, 4, 560)
            assert spec.view_sizes((H, W)) == (tuple(map(int, canvas)),)


def test_canvas_record_says_where_pixels_go():
    """A white square in black lies in the view where the record puts it."""
    spec = CanvasSpec(tile=tile(40), max_tiles=4)
    seen = image(0, (60, 150))
    seen.paste((0, 0, 0), (0, 0, 150, 60))
    seen.paste((255, 255, 255), (90, 30, 120, 60))
    (canvas,) = spec(seen)
    white = (canvas[0] > 0.5).nonzero()
    (x0, y0, x1, y1) = spec.resize_record((60, 150)).boxes([[90, 30, 120, 60]])[0]
    assert abs(white[:, 1].min() - x0) <= 1
    assert abs(white[:, 1].max() + 1 - x1) <= 1
    assert abs(white[:, 0].min() - y0) <= 1
    assert abs(white[:, 0].max() + 1 - y1) <= 1


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("patches", [4, 5, 6])
@torch.no_grad()
def test_mllama_tokens_match_reference(patches, absent):
    """For every layout; a tile has 17, 26 or 37 places, filled up by 7, 6 or 3."""
    side = patches * PATCH
    peer = peer_of(side)
    tokenizer = tokenizer_of(peer, config(side, absent=absent))
    for number, (h, w) in enumerate(layouts(4)):
        pixels = torch.randn(2, 3, h * side, w * side, generator=torch.Generator().manual_seed(1))
        tiles = torch.stack([tiles_of(canvas, side)[0] for canvas in pixels])[:, None]
        expected = peer(
            pixel_values=tiles,
            aspect_ratio_ids=torch.full((2, 1), number + 1),
            aspect_ratio_mask=(torch.arange(4) < h * w).long().expand(2, 1, 4),
        ).last_hidden_state[:, 0]
        images = tokenizer(pixels)
        count = 4 if absent else h * w
        expected = expected[:, :count].flatten(1, 2)
        torch.testing.assert_close(images.tokens, expected, rtol=0, atol=1e-4)
        if absent:
            places = patches**2 + 1
            assert images.valid.sum(1).tolist() == [h * w * places] * 2
            assert images.valid[:, : h * w * places].all()
        else:
            assert images.valid is None


def test_mllama_tokenizer_keeps_the_laws():
    for settings in (config(), config(absent=True), config(taken=())):
        check_laws(mllama.build(settings), (30, 90))


@torch.no_grad()
def test_mllama_tokens_do_not_depend_on_the_batch():
    tokenizer = tokenizer_of(peer_of(), config())
    (alone,) = encode(tokenizer, one_image(30, 80))
    (pixels,) = tokenizer.pixel_spec(one_image(30, 80))
    together = tokenizer(torch.stack([torch.zeros_like(pixels), pixels]))
    torch.testing.assert_close(together.tokens[1], alone.tokens[0])


@pytest.mark.parametrize("hw", [(28, 140), (84, 56), (30, 28)])
def test_mllama_tokenizer_raises_for_more_tiles_than_it_has_and_for_parts_of_tiles(hw):
    with pytest.raises(
        ValueError, match=f"1 to 4 whole tiles of 28 pixels, found {hw[0]} x {hw[1]}"
    ):
        mllama.build(config())(torch.zeros(1, 3, *hw))


WRONG = {
    "3 heads do not divide the width 16": {"heads": 3},
    r"taken: expected layers of 3, found \(1, 3\)": {"taken": (1, 3)},
    "patches of 29 pixels do not fit": {"patch_px": 29},
}


@pytest.mark.parametrize("message", WRONG)
def test_mllama_config_refuses_what_does_not_fit(message):
    with pytest.raises(ValueError, match=message):
        config(**WRONG[message])


def test_canvas_spec_refuses_tiles_that_are_not_square_and_no_tile():
    with pytest.raises(ValueError, match="expected a square by fit 'stretch'"):
        CanvasSpec(tile=replace(tile(), size_hw=(28, 56)), max_tiles=4)
    with pytest.raises(ValueError, match="max_tiles must be at least 1, found 0"):
        CanvasSpec(tile=tile(), max_tiles=0)
