"""Images in the text stream: spans, the text between them, what joined tiles leave out."""

import pytest
import torch

from tests import tiny
from vlm import adaptors
from vlm.families.decoder_only import view_order
from vlm.families.decoder_only.batch import IMAGE, Row, collate, collate_packed
from vlm.families.decoder_only.image_layout import ImageLayout, Span, StreamLayout
from vlm.families.decoder_only.module import ImageLayouts
from vlm.families.decoder_only.view_order import Fenced, InTurn, Joined, Tagged, unpadded
from vlm.image_tokens import ImageTokens, TokenShape
from vlm.tokenizers.edge_tiles import EdgeTilesSpec
from vlm.tokenizers.pinpoint_tiles import PinpointTilesSpec, best_resolution

TAGS = Tagged(mark="<m>", tile="<r{row}c{column}>", whole="<all>")


class Views:
    """A preprocessing of which only the number of tiles counts."""

    def __init__(self, rows, columns):
        self.grid = rows, columns

    def layout(self, size_hw):
        return self.grid


def test_layout_raises_when_spans_and_tokens_differ():
    span = Span(length=4, grid_hw=(2, 2))
    with pytest.raises(ValueError, match="expected spans of 5 image tokens in all, found 4"):
        ImageLayout(pieces=(span,), encoded=5)
    with pytest.raises(ValueError, match="expected spans of 3 image tokens in all, found 4"):
        ImageLayout(pieces=(span,), encoded=9, source=(1, 2, 3))


def test_tagged_views_are_tiles_by_row_then_the_whole():
    shapes = [TokenShape(4, (2, 2))] * 7
    layout = TAGS((1, 1), Views(2, 3), shapes)
    assert layout.marked("*") == (
        "<m><r1c1>*<m><r1c2>*<m><r1c3>*\n<m><r2c1>*<m><r2c2>*<m><r2c3>*\n\n<m><all>*<m>"
    )
    assert layout.length == layout.encoded == 28
    assert TAGS((1, 1), Views(1, 1), shapes[:1]).marked("*") == "<m><all>*<m>"
    with pytest.raises(ValueError, match="expected 2 x 2 tiles and the whole image, found 7 views"):
        TAGS((1, 1), Views(2, 2), shapes)


def test_fenced_views_have_a_mark_before_between_and_after():
    shapes = [TokenShape(4, (2, 2)), TokenShape(6, (2, 3)), TokenShape(5, None)]
    layout = Fenced(mark="<f>")((1, 1), Views(1, 1), shapes)
    assert layout.marked("*") == "<f>*<f>*<f>*<f>"
    assert [span.grid_hw for span in layout.spans] == [(2, 2), (2, 3), None]
    assert layout.encoded == 15


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ((None, None), "~#~#~"),
        (("a", None, "", None, None, "b"), "a~#~#~#~ b"),
        ((None, " ", None, "\n", None, "<"), "~#~ ~#~\n~#~<"),
        ((None, "b", None), "~#~ b~#~"),
    ],
)
def test_fences_meet_where_no_text_stands_between_images(content, expected):
    """One is left of two; a word after one begins with a space, for rows to learn from too."""
    model = tiny.decoder_only()
    processor = tiny.processor(model)
    processor.layout_for = ImageLayouts(model.tokenizer, model.adaptor, Fenced(mark="~"))
    row = processor.encode(tiny.example(content=content, answer="cat"))
    prompt = processor.encode_prompt(tiny.example(content=content).question())
    decode = processor.text_tokenizer.decode
    said = "".join("#" if id == IMAGE else decode([id]) for id in row.ids)
    assert f"user\n{expected.replace('#', '######')}<|im_end|>" in said
    assert torch.equal(row.ids[: len(prompt.ids)], prompt.ids)
    assert decode(row.ids[row.scored]) == "cat<|im_end|>"


def test_fence_keeps_an_answer_right_after_an_image_scored():
    """In a literal prompt that ends with its image; the space stands before the answer."""
    model = tiny.decoder_only()
    processor = tiny.processor(model)
    processor.layout_for = ImageLayouts(model.tokenizer, model.adaptor, Fenced(mark="~"))
    row = processor.encode_literal([tiny.image()], "a <image>", "cat")
    decode = processor.text_tokenizer.decode
    assert decode(row.ids[-5:]) == " cat<|im_end|>"
    assert decode(row.ids[row.scored]) == "cat<|im_end|>"


def test_joined_views_follow_the_rows_of_the_image():
    """Tiles of 2 x 2 tokens, two side by side and two below; the newline is each view's first
    token. A wide image reaches the two middle rows of four."""
    shapes = [TokenShape(5, (2, 2))] * 5
    layout = Joined()((100, 200), Views(2, 2), shapes)
    assert [span.grid_hw for span in layout.spans] == [(2, 2), (2, 5)]
    whole, second, third = [1, 2, 3, 4], [8, 9, 13, 14, 5], [16, 17, 21, 22, 5]
    assert list(layout.source) == whole + second + third
    with pytest.raises(ValueError, match="expected 5 views of a newline token and a grid"):
        Joined()((100, 200), Views(2, 2), [TokenShape(6, (2, 2))] * 5)


@pytest.mark.parametrize("size_hw", [(100, 300), (300, 100), (100, 100), (7, 5), (1, 99)])
def test_unpadded_grid_is_what_is_not_padding(size_hw):
    """Beside marking the pixels of an image in a square that it is put in the middle of: rows that
    hold no pixel of it are skipped, and of those that hold some at most the outermost."""
    side, (H, W) = 16, size_hw
    scale = side / max(H, W)
    rows, columns = unpadded(size_hw, (side, side))
    for lines, length in ((rows, H * scale), (columns, W * scale)):
        start = (side - length) / 2
        assert abs(lines.start - start) < 1
        assert abs(lines.stop - (start + length)) < 1
        assert lines.start == side - lines.stop


def test_batch_arranges_tokens_and_counts_positions():
    """Rows side by side and end to end, one of them in another order than it is encoded in."""
    span = Span(length=2, grid_hw=(1, 2))
    turned = ImageLayout(pieces=(span,), encoded=3, source=(2, 0))
    plain = ImageLayout(pieces=(span,), encoded=2)
    ids = torch.tensor([7, IMAGE, IMAGE, 8])
    rows = [
        Row(name=name, ids=ids, scored=ids == 8, views=(), layout=StreamLayout(images=(image,)))
        for name, image in (("a", plain), ("b", turned))
    ]
    for batch in (collate(rows, 0), collate_packed(rows)):
        assert batch.arrangement.source.tolist() == [0, 1, 4, 2]
        assert batch.arrangement.encoded == 5
        assert batch.positions.flatten().tolist() == [0, 1, 2, 3] * 2
        tokens, example = torch.arange(5.0)[:, None], torch.tensor([0, 0, 1, 1, 1])
        tokens, example = batch.arrangement(tokens, example)
        assert (tokens[:, 0].tolist(), example.tolist()) == ([0, 1, 4, 2], [0, 0, 1, 1])
        with pytest.raises(ValueError, match="expected 5 image tokens, as the layout says, found"):
            batch.arrangement(torch.zeros(4, 1), torch.zeros(4))
    assert collate(rows[:1], 0).arrangement is None


def test_batch_raises_for_rows_of_two_masks_and_models_for_the_others():
    model = tiny.decoder_only()
    causal = tiny.processor(model).encode(tiny.example("one"))
    prefix = tiny.processor(model, prefix=True).encode(tiny.example("two"))
    with pytest.raises(ValueError, match="two: expected a causal row, as one is, found a prefix"):
        collate([causal, prefix], 256)
    with pytest.raises(ValueError, match="two: expected a causal row, as decoder_only reads"):
        model(collate([prefix], 256))


def test_layout_text_becomes_ids_and_is_not_scored():
    """Tags and line breaks stand between runs of image tokens, for prompts and training rows alike,
    and a shrunk row keeps whole images."""
    model = tiny.decoder_only()
    layouts = ImageLayouts(model.tokenizer, model.adaptor, Tagged(mark="[", tile="", whole="*"))
    processor = tiny.processor(model)
    processor.layout_for = layouts
    row = processor.encode(tiny.example(content=("a", None, "b", None), answer="cat"))
    prompt = processor.encode_prompt(tiny.example(content=("a", None, "b", None)).question())
    said = "".join("#" if id == IMAGE else processor.text_tokenizer.decode([id]) for id in row.ids)
    assert "a[*######[b[*######[<|im_end|>" in said
    assert torch.equal(row.ids[: len(prompt.ids)], prompt.ids)
    assert processor.text_tokenizer.decode(row.ids[row.scored]) == "cat<|im_end|>"


def test_newline_mlp_gives_a_learned_token_before_each_view():
    config = dict(kind="newline_mlp", in_width=4, out_width=6, depth=2, hidden_width=5)
    adaptor = adaptors.build(config)
    images = ImageTokens(tokens=torch.randn(3, 8, 4), grid_hw=(2, 4))
    out = adaptor(images)
    assert out.shape == adaptor.shape_for(images.shape) == TokenShape(9, (2, 4))
    assert torch.equal(out.tokens[:, 0], adaptor.newline.expand(3, -1))
    assert torch.equal(out.tokens[:, 1:], adaptor.layers(images.tokens))
    out.tokens[:, 0].sum().backward()
    assert adaptor.newline.grad.tolist() == [3.0] * 6
    assert adaptors.config_of(adaptor) == config | {"bias": True}


def test_orders_of_views_are_rebuilt_from_their_configurations():
    for order in (InTurn(), TAGS, Joined(), Fenced(mark="~")):
        assert view_order.build(view_order.config_of(order)) == order
    with pytest.raises(ValueError, match="'x' is not one of in_turn, tagged, joined"):
        view_order.build({"kind": "x"})


def square(side):
    """The preprocessing of one view."""
    return tiny.Patches(size_hw=(side, side)).pixel_spec


def test_edge_tiles_are_refused_unless_square_and_cover_the_image():
    with pytest.raises(ValueError, match="tile: expected a square by fit 'stretch'"):
        EdgeTilesSpec(tile=tiny.Patches().pixel_spec, long_px=8, splits=True)
    spec = EdgeTilesSpec(tile=square(8), long_px=20, splits=True)
    for size_hw in ((9, 17), (17, 9), (100, 3), (1, 1)):
        views = spec(tiny.image(0, size_hw))
        rows, columns = spec.layout(size_hw)
        assert [tuple(view.shape[1:]) for view in views] == list(spec.view_sizes(size_hw))
        assert len(views) == rows * columns + 1
        resize = spec.resize_record(size_hw)
        assert resize.scale_xy == (columns * 8 / size_hw[1], rows * 8 / size_hw[0])
    assert len(EdgeTilesSpec(tile=square(8), long_px=20, splits=False)(tiny.image())) == 1


def test_pinpoint_tiles_put_the_image_in_the_middle():
    """What is not the image is black, and the record says where its pixels lie."""
    spec = PinpointTilesSpec(tile=square(8), resolutions=((8, 16), (16, 8), (16, 16)))
    for size_hw in ((9, 17), (17, 9), (30, 29), (2, 9)):
        _, *tiles = spec(tiny.image(0, size_hw))
        rows, columns = spec.layout(size_hw)
        assert len(tiles) == rows * columns == len(spec.view_sizes(size_hw)) - 1
        joined = torch.stack(tiles).view(rows, columns, 3, 8, 8).permute(2, 0, 3, 1, 4)
        seen = (joined.flatten(3).flatten(1, 2) > -1).any(0).nonzero()
        resize = spec.resize_record(size_hw)
        (left, top), (sx, sy) = resize.offset_xy, resize.scale_xy
        assert seen.min(0).values.tolist() == [top, left]
        bottom, right = (seen.max(0).values + 1).tolist()
        assert bottom == pytest.approx(top + sy * size_hw[0])
        assert right == pytest.approx(left + sx * size_hw[1])
    with pytest.raises(ValueError, match=r"in whole tiles of 8, found \[\(8, 12\)\]"):
        PinpointTilesSpec(tile=square(8), resolutions=((8, 12),))


def test_best_resolution_keeps_most_pixels_and_wastes_fewest():
    resolutions = ((16, 16), (8, 16), (16, 8), (16, 32))
    assert best_resolution((16, 16), resolutions) == (16, 16)
    assert best_resolution((4, 8), resolutions) == (8, 16)
    assert best_resolution((100, 200), resolutions) == (16, 32)
