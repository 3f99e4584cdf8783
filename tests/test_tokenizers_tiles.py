import pytest
import torch

from tests.tokenizer_laws import check_laws, encode, one_image, spec
from tests.transformers_tokenizers import tiny
from vlm.tokenizers.tiles import TilesSpec, TilesTokenizer, tile_grid
from vlm.tokenizers.transformers import build


def tiled(tile_hw=(32, 48), *, max_tiles=6, thumbnail=True, model_type="siglip_vision_model"):
    inner = build(tiny(model_type, tile_hw, prefix="keep"))
    return TilesTokenizer(inner, max_tiles=max_tiles, thumbnail=thumbnail)


@pytest.mark.parametrize("thumbnail", [True, False])
@pytest.mark.parametrize("image_hw", [(300, 200), (90, 700), (20, 20)])
def test_tiles_tokenizer_keeps_the_laws_on_non_square_images(image_hw, thumbnail):
    """Counts, parts, rebuilding and gradients, where rows and columns differ."""
    check_laws(tiled(thumbnail=thumbnail), image_hw)


@pytest.mark.parametrize(
    ("model_type", "tile_px", "patch_px", "image_hw", "length"),
    [
        ("siglip_vision_model", 384, 14, (800, 1200), 7 * 729),
        ("clip_vision_model", 224, 16, (250, 1300), 6 * 197),
    ],
)
def test_tiles_count_equals_output_at_published_geometries(
    model_type, tile_px, patch_px, image_hw, length
):
    """Tiles in rows and columns, and a thumbnail."""
    more = {"image_size": tile_px, "patch_size": patch_px, "num_hidden_layers": 1}
    inner = build(tiny(model_type, (tile_px, tile_px), prefix="keep", **more))
    tokenizer = TilesTokenizer(inner, max_tiles=6, thumbnail=True)
    given = encode(tokenizer, one_image(*image_hw))
    assert tokenizer.tokens_for(image_hw) == sum(t.tokens.shape[1] for t in given) == length


@pytest.mark.parametrize(
    ("size_hw", "max_tiles", "expected"),
    [
        ((800, 800), 1, (1, 1)),
        ((800, 800), 4, (2, 2)),
        ((400, 1200), 6, (1, 3)),
        ((1200, 400), 6, (3, 1)),
        ((900, 1300), 6, (2, 3)),
        ((100, 100), 9, (1, 1)),
        ((1, 10_000), 4, (1, 4)),
    ],
)
def test_tile_grid_follows_the_aspect_within_the_maximum(size_hw, max_tiles, expected):
    assert tile_grid(size_hw, (384, 384), max_tiles) == expected


def test_tile_grid_counts_the_aspect_of_the_tile():
    """Tiles of 2 to 1 cover a square in two rows."""
    assert tile_grid((800, 800), (200, 400), 2) == (2, 1)


def test_tiles_join_to_the_resized_image_row_by_row():
    tiles = TilesSpec(tile=spec(32, 48), max_tiles=6, thumbnail=True)
    image = one_image(64, 144)
    views = tiles(image)
    assert tiles.layout((64, 144)) == (2, 3)
    assert len(views) == len(tiles.view_sizes((64, 144))) == 7
    rows = [torch.cat(views[3 * row : 3 * row + 3], dim=2) for row in range(2)]
    assert torch.equal(torch.cat(rows, dim=1), spec(64, 144)(image)[0])
    assert torch.equal(views[-1], spec(32, 48)(image)[0])


def test_tiles_of_one_tile_have_no_thumbnail():
    tiles = TilesSpec(tile=spec(32, 48), max_tiles=6, thumbnail=True)
    assert len(tiles(one_image(16, 24))) == len(tiles.view_sizes((16, 24))) == 1


def test_tiles_do_not_see_each_other():
    tokenizer = tiled()
    views = torch.stack(tokenizer.pixel_spec(one_image(64, 144)))
    with torch.no_grad():
        together = tokenizer.eval()(views).tokens
        alone = tokenizer(views[2:3]).tokens
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-5)


def test_tiles_refuse_a_preprocessing_that_crops():
    with pytest.raises(ValueError, match="shows the whole image"):
        TilesSpec(tile=spec(32, 48, fit="crop"), max_tiles=2, thumbnail=True)


def test_tiles_refuse_no_tiles():
    with pytest.raises(ValueError, match="max_tiles must be at least 1, found 0"):
        tiled(max_tiles=0)
