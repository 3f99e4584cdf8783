"""Boxes as <loc> tokens: there and back in every frame and order, one id each, scored like text."""

from dataclasses import replace

import numpy as np
import pytest

from tests import tiny
from tests.boxes import RECORDS, random_boxes
from tests.folders import write_parts
from vlm.box_codecs import LocTokens
from vlm.data.example import BadRow, Box, Example, Turn
from vlm.data.grounding import ground
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.systems.compose import add_loc_tokens
from vlm.vocabulary import grow


@RECORDS
@pytest.mark.parametrize("order", ["yxyx", "xyxy"])
@pytest.mark.parametrize("frame", ["input", "image"])
def test_boxes_come_back_within_half_a_bin(record, order, frame):
    """Images that are not square, cropped, padded and stretched."""
    loc = LocTokens(bins=100, order=order, frame=frame)
    boxes = random_boxes(record.input_hw)
    back = loc.decode(loc.encode(boxes, record), record)
    frame_wh = np.array((record.output_hw if frame == "input" else record.input_hw)[::-1])
    scale = np.array(record.scale_xy) if frame == "input" else np.ones(2)
    half_bin = np.tile(frame_wh / 100 / 2 / scale, 2)
    seen = boxes
    if frame == "input":  # what was cropped away cannot come back
        limits = np.tile(record.output_hw[::-1], 2)
        seen = record.invert_boxes(record.boxes(boxes).clip(0, limits), clip=True)
    assert (np.abs(back - seen) <= half_bin + 1e-6).all()


def test_order_is_that_of_the_tokens():
    from vlm.geometry import Resize

    same = Resize((100, 200), (100, 200), (1, 1), (0, 0))
    box = (20, 10, 160, 90)  # x 0.1 to 0.8, y 0.1 to 0.9
    assert LocTokens(bins=10).write([box], same) == "<loc0001><loc0001><loc0009><loc0008>"
    assert (
        LocTokens(bins=10, order="xyxy").write([box], same)
        == "<loc0001><loc0001><loc0008><loc0009>"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bins": 1}, "bins"), ({"order": "xywh"}, "order"), ({"frame": "page"}, "frame")],
)
def test_bad_codec_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        LocTokens(**options)


def boxed(box=(2, 1, 9, 8)):
    turns = (Turn("user", (None, "where?")), Turn("assistant", ("at ", 0)))
    return Example("row", turns, (tiny.image(size_hw=(9, 17)),), (Box(0, box, "cat"),))


def with_loc(bins=16):
    module = tiny.decoder_only(vocab=259)
    parts = DecoderOnlyModel(module=module, processor=tiny.processor(module), stop_ids=(258,))
    add_loc_tokens(parts, LocTokens(bins=bins))
    return parts


def test_answer_holds_one_id_for_each_loc_token():
    """The box is written as ids of its own, scored with the end token after it."""
    parts = with_loc()
    row = parts.processor.encode(boxed())
    written = parts.processor.text_tokenizer.decode(row.ids[row.scored])
    resize = parts.processor.pixel_spec.resize_record((9, 17))
    assert written == "at " + parts.processor.box_codec.write([(2, 1, 9, 8)], resize) + "<|im_end|>"
    assert int(row.scored.sum()) == len("at ") + 4 + 1
    assert int(row.ids.max()) < parts.module.text.config.vocab_size


def test_model_with_loc_tokens_survives_saving(tmp_path):
    """Ids, rows and the codec."""
    import vlm

    vision, text = write_parts(tmp_path, "siglip", "llama")
    model = vlm.build(vision=vision, text=text, adaptor="linear")
    add_loc_tokens(model, LocTokens(bins=1024))
    model.save(tmp_path / "model")
    again = vlm.load(tmp_path / "model")
    assert again.processor.box_codec == LocTokens(bins=1024)
    tokens = again.processor.box_codec.tokens
    ids = [again.processor.text_tokenizer(t, add_special_tokens=False)["input_ids"] for t in tokens]
    assert ids == [[259 + i] for i in range(1024)]
    assert [again.processor.decode(i) for i in ids] == list(tokens)
    assert again.module.text.config.vocab_size == 259 + 1024
    rows = [m.processor.encode(boxed()).ids.tolist() for m in (model, again)]
    assert rows[0] == rows[1]


def test_codec_without_its_tokens_is_refused():
    processor = tiny.processor(tiny.decoder_only())
    with pytest.raises(ValueError, match=r"16 of 16 box tokens with several ids"):
        processor.box_codec = LocTokens(bins=16)
    with pytest.raises(BadRow, match=r"row: the answers hold boxes.*--loc-bins"):
        processor.encode(boxed())


def test_one_model_writes_boxes_in_one_way():
    parts = with_loc(16)
    with pytest.raises(ValueError, match="writes boxes as"):
        add_loc_tokens(parts, LocTokens(bins=32))
    assert grow(parts.module.text, parts.processor.text_tokenizer, ("<loc0003>",)) == (262,)


@pytest.mark.parametrize(
    "box", [(2, 1, 30, 8), (9, 1, 2, 8), (2, 1, 2, 8), (float("nan"), 1, 9, 8)],
    ids=["outside", "inverted", "no area", "NaN"],
)  # fmt: skip
def test_bad_box_stops_before_any_compute(box):
    with pytest.raises(BadRow, match=r"row: box 0 \('cat'\)"):
        with_loc().processor.encode(boxed(box))


def test_bad_box_is_named_where_no_turn_writes_it():
    shown = replace(tiny.example(), boxes=(Box(0, (2, 1, 30, 8), "cat"),))
    with pytest.raises(BadRow, match=r"row: box 0 \('cat'\): expected a box inside"):
        tiny.processor(tiny.decoder_only()).encode(shown)


def test_grounding_asks_once_for_each_label():
    boxes = (Box(0, (0, 5, 2, 7), "b"), Box(0, (1, 1, 2, 2), "a"), Box(0, (0, 1, 1, 2), "b"))
    asked = ground(Example("r", (Turn("user", (None,)),), (tiny.image(),), boxes), at_most=2)
    assert [turn.content for turn in asked.turns] == [
        (None, "Where is b?"), (2, 0), ("Where is a?",), (1,),
    ]  # fmt: skip
    first = asked.question()
    assert first.turns[-1].content == ("Where is a?",)
    with pytest.raises(BadRow, match="expected boxes"):
        ground(tiny.example())
