import math

import pytest
import torch
import transformers
from PIL import Image

from tests.tokenizer_laws import check_laws, check_order, encode, one_image, spec
from vlm import adaptors, tokenizers
from vlm.config import from_dict, to_dict
from vlm.families.decoder_only.batch import Row
from vlm.families.decoder_only.module import ImageLayouts
from vlm.image_tokens import group_views, pack
from vlm.pixels import HALF, PixelSpec
from vlm.pixels.spec import box_of_patches
from vlm.tokenizers.naflex import NaflexConfig, build, load
from vlm.tokenizers.tiles import TilesSpec

TINY = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 16,
    "num_patches": 256,
    "vision_use_head": True,
}
SHAPES = [(480, 640), (640, 480), (300, 20), (20, 300), (1, 1), (5, 9), (3000, 4000), (16, 4096)]


def patches(box_hw=(256, 256), **changes):
    values = {"resample": "bilinear", "mean": HALF.mean, "std": HALF.std, "patch_px": 16}
    return PixelSpec(size_hw=box_hw, fit="patches", **(values | changes))


def tiny(pixel_spec=None, *, layer=-1, norm=True, pooled=False, **more):
    return NaflexConfig(
        vision_config=TINY | more,
        layer=layer,
        norm=norm,
        pooled=pooled,
        pixel_spec=pixel_spec or patches(),
    )


@pytest.mark.parametrize("image_hw", [(48, 80), (300, 20), (7, 9)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooled": True},
        {"norm": False},
        {"layer": -2, "norm": False},
        {"layer": 1},
        {"vision_use_head": False},
    ],
)
def test_naflex_tokenizer_keeps_the_laws(options, image_hw):
    """Counts, parts, rebuilding and gradients, each image in its own shape."""
    check_laws(build(tiny(patches((64, 96)), **options)), image_hw)


@pytest.mark.parametrize("size_hw", SHAPES)
def test_naflex_count_is_the_grid_and_never_above_the_budget(size_hw):
    tokenizer = build(tiny(num_hidden_layers=1))
    (tokens,) = encode(tokenizer, one_image(*size_hw))
    h, w = tokens.grid_hw
    assert tokenizer.tokens_for(size_hw) == tokens.tokens.shape[1] == h * w <= 256
    assert tokens.valid is None
    assert tokens.shape.prefix == 0


@pytest.mark.parametrize("size_hw", SHAPES)
def test_naflex_view_is_the_image_under_one_scale_and_fills_the_budget(size_hw):
    """Sides are rounded up to whole patches, so each leaves a range of scales: the two must meet.
    Only an image that would have to grow a hundredfold stays below the budget."""
    ((H, W),) = patches().view_sizes(size_hw)
    rows, columns = H // 16, W // 16
    low = max((H - 16) / size_hw[0], (W - 16) / size_hw[1])
    high = min(H / size_hw[0], W / size_hw[1])
    assert low < high
    grown = [math.ceil(side * (high + 1e-4) / 16) for side in size_hw]
    assert math.prod(grown) > 256 >= rows * columns or high >= 100


def test_naflex_views_have_the_expected_sides():
    assert patches().view_sizes((480, 640)) == ((224, 288),)
    assert patches((512, 512)).view_sizes((480, 640)) == ((432, 576),)
    assert patches().view_sizes((20, 300)) == ((64, 960),)
    assert patches().view_sizes((1, 1)) == ((112, 112),)
    assert patches().view_sizes((1, 9000)) == ((16, 4096),)


@pytest.mark.parametrize("size_hw", SHAPES)
def test_naflex_resize_record_sends_boxes_where_the_pixels_went_and_back(size_hw):
    """The whole image becomes the whole view; a white block lies where its box says."""
    record = patches().resize_record(size_hw)
    assert (record.output_hw,) == patches().view_sizes(size_hw)
    corners = [[0, 0, size_hw[1], size_hw[0]]]
    H, W = record.output_hw
    assert record.boxes(corners).round(9).tolist() == [[0, 0, W, H]]
    boxes = [[0.2, 0.5, 0.9, 0.7], [0.0, 0.0, 1.0, size_hw[0]]]
    back = record.invert_boxes(record.boxes(boxes))
    torch.testing.assert_close(torch.tensor(back), torch.tensor(boxes, dtype=torch.float64))


def test_naflex_resize_record_finds_a_block():
    image = Image.new("RGB", (300, 120))
    image.paste((255, 255, 255), (60, 30, 150, 90))
    for backend in ("torchvision", "pil"):
        white = patches(backend=backend).resize_u8(image)[0] > 127
        rows, columns = (torch.nonzero(white.any(axis)).flatten() for axis in (1, 0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        expected = patches().resize_record((120, 300)).boxes([[60, 30, 150, 90]])[0]
        assert all(abs(a - b) <= 1 for a, b in zip(map(int, found), expected))


def test_naflex_views_of_one_size_are_encoded_together_as_alone():
    """Images of many shapes become one group for each grid; no token depends on its company."""
    tokenizer = build(tiny(patches((64, 96)), pooled=True)).eval()
    images = [one_image(*size_hw) for size_hw in [(40, 90), (90, 40), (44, 99), (30, 30)]]
    no_ids = torch.zeros(0, dtype=torch.int64)
    rows = [
        Row(
            name="row",
            ids=no_ids,
            scored=no_ids.bool(),
            views=((tokenizer.pixel_spec(image)[0], (0, 0)),),
        )
        for image in images
    ]
    groups = group_views(rows)
    assert [group.owner[:, 0].tolist() for group in groups] == [[0, 2], [1], [3]]
    for group in groups:
        with torch.no_grad():
            together = tokenizer(group.pixels)
        for v, b in enumerate(group.owner[:, 0].tolist()):
            (alone,) = encode(tokenizer, images[b])
            torch.testing.assert_close(together.tokens[v], alone.tokens[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(together.pooled[v], alone.pooled[0], rtol=0, atol=1e-5)


def test_naflex_images_take_positions_in_a_stream_as_their_own_grids_are_large():
    """Counted before compute, and packed from groups of different lengths."""
    tokenizer = build(tiny(patches((64, 96)))).eval()
    bridge = adaptors.build(
        {"kind": "mlp", "in_width": 16, "depth": 1, "hidden_width": 8, "out_width": 8}
    )
    layout_for = ImageLayouts(tokenizer, bridge)
    sizes = [(90, 40), (40, 90), (30, 30)]
    encoded = []
    for b, size_hw in enumerate(sizes):
        (tokens,) = encode(tokenizer, one_image(*size_hw))
        encoded.append(bridge(tokens.owned_by(torch.tensor([[b, 0, 0]]))))
    packed, example = pack(encoded)
    counts = [layout_for(size_hw).length for size_hw in sizes]
    assert example.bincount().tolist() == counts == [tokenizer.tokens_for(hw) for hw in sizes]
    assert len(packed) == sum(counts)
    assert counts[0] == counts[1] != counts[2]


def test_naflex_tokens_follow_rows_then_columns():
    tokenizer = build(tiny(layer=0, norm=False)).eval()
    check_order(tokenizer)


def test_naflex_with_another_fit_gives_every_image_one_size():
    """The tower takes any grid, so a fixed size that is not square is as good."""
    tokenizer = build(tiny(spec(64, 96), pooled=True))
    check_laws(tokenizer, (50, 30))
    assert tokenizer.tokens_for((50, 30)) == tokenizer.tokens_for((300, 20)) == 24


def test_naflex_in_bfloat16_tells_and_gives_the_same_shape():
    tokenizer = build(tiny(pooled=True)).to(torch.bfloat16)
    tokens = tokenizer(torch.zeros(2, 3, 96, 64, dtype=torch.bfloat16))
    assert tokens.tokens.dtype == tokens.pooled.dtype == torch.bfloat16
    assert tokens.shape == build(tiny(spec(96, 64))).to(torch.bfloat16).shapes_for((5, 5))[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer": -5}, "layer -5 asked of a tower with 3 blocks"),
        ({"layer": -2, "pooled": True}, "normed output of all 3 blocks"),
        ({"norm": False, "pooled": True}, "norm=True, found layer -1 and norm=False"),
        ({"vision_use_head": False, "pooled": True}, "without a pooling"),
        ({"model_type": "siglip_vision_model"}, "'siglip2_vision_model', found 'siglip_vision"),
        ({"patch_size": 8}, "patches of 8 pixels, pixel_spec of 16"),
        ({"pixel_spec": spec(64, 100)}, r"whole patches of 16, found \(64, 100\)"),
    ],
)
def test_naflex_config_raises_when_the_tower_cannot(change, words):
    with pytest.raises(ValueError, match=words):
        tiny(**change)


def test_naflex_refuses_pixels_that_are_not_whole_patches():
    with pytest.raises(ValueError, match=r"whole patches of 16, found \(64, 90\)"):
        build(tiny())(torch.zeros(1, 3, 64, 90))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_px": None}, "patch_px must be a positive integer under fit 'patches', found None"),
        ({"box_hw": (250, 256)}, r"size_hw must be whole patches of 16.*\(250, 256\)"),
        ({"resize_hw": (64, 64)}, "resize_hw must be None under fit 'patches'"),
    ],
)
def test_patches_spec_refuses_bad_values_and_shows_them(changes, words):
    with pytest.raises(ValueError, match=words):
        patches(**changes)


def test_patch_side_belongs_to_fit_patches_alone():
    values = to_dict(spec(64, 96))
    assert values["patch_px"] is None
    with pytest.raises(ValueError, match="the fits patches, height, found 16 under 'str"):
        from_dict(PixelSpec, values | {"patch_px": 16})
    assert from_dict(PixelSpec, to_dict(patches())) == patches()


def test_tiles_refuse_a_view_without_a_size_of_its_own():
    with pytest.raises(ValueError, match="fit 'stretch' or 'pad'"):
        TilesSpec(tile=patches(), max_tiles=4, thumbnail=True)


@pytest.mark.parametrize("count", [1, 7, 24, 128, 256, 729, 1000, 1024])
def test_box_of_patches_holds_exactly_as_many(count):
    assert patches(box_of_patches(count, 16)).max_patches == count


def test_box_of_patches_refuses_none():
    with pytest.raises(ValueError, match="positive integers, found 0 and 16"):
        box_of_patches(0, 16)


def saved(folder, whole=True, **vision):
    """A tiny Siglip2 in `folder`, its image processor with 100 patches; returns its tower."""
    torch.manual_seed(0)
    vision = TINY | vision
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        text |= {"num_attention_heads": 2, "vocab_size": 99, "max_position_embeddings": 8}
        config = transformers.Siglip2Config(text_config=text, vision_config=vision)
        model = transformers.Siglip2Model(config)
        tower = model.vision_model
    else:
        tower = model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**vision))
    model.save_pretrained(folder)
    transformers.Siglip2ImageProcessor(max_num_patches=100).save_pretrained(folder)
    return tower.eval()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_naflex_load_reads_a_saved_folder_and_its_own_budget(whole, pooled, tmp_path):
    tower = saved(tmp_path, whole)
    tokenizer = tokenizers.load(f"naflex:{tmp_path}", norm=True, pooled=pooled)
    assert tokenizer.pixel_spec.max_patches == 100
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        theirs = tower(**processor(one_image(40, 70), return_tensors="pt"))
    (ours,) = encode(tokenizer, one_image(40, 70))
    L = ours.tokens.shape[1]
    torch.testing.assert_close(ours.tokens, theirs.last_hidden_state[:, :L], rtol=0, atol=1e-5)
    if pooled:
        torch.testing.assert_close(ours.pooled, theirs.pooler_output, rtol=0, atol=1e-5)
    values = tokenizers.config_to_dict(tokenizer)
    tokenizers.build(values).load_state_dict(tokenizer.state_dict(), strict=True)


def test_naflex_load_takes_another_budget_as_a_box(tmp_path):
    saved(tmp_path)
    tokenizer = load(str(tmp_path), norm=True, pooled=False, size_hw=(512, 512))
    assert tokenizer.pixel_spec.max_patches == 1024
    assert tokenizer.tokens_for((480, 640)) == 27 * 36


def test_naflex_load_names_what_the_folder_lacks(tmp_path):
    saved(tmp_path, whole=False, vision_use_head=False)
    load(str(tmp_path), norm=True, pooled=False)
    with pytest.raises(ValueError, match="without a pooling"):
        load(str(tmp_path), norm=True, pooled=True)
    with pytest.raises(OSError, match=r"cannot load '.*nothing here'.*Without a network"):
        load(str(tmp_path / "nothing here"), norm=True, pooled=False)


def test_naflex_load_refuses_the_fixed_size_towers_by_type(tmp_path):
    transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**TINY | {"model_type": "siglip_vision_model"})
    ).save_pretrained(tmp_path)
    transformers.SiglipImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'siglip2_vision_model', found 'siglip_vision_model'"):
        load(str(tmp_path), norm=True, pooled=False)
