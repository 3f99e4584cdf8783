"""Ways of writing boxes: there and back through resizes, published forms, what cannot be read,
rows, saved folders."""

import json
import re

import numpy as np
import pytest
from rich.console import Console
from transformers.models.kosmos2 import processing_kosmos2 as kosmos2

import vlm
from tests import tiny, training
from tests.boxes import PAD, STRETCH, random_boxes
from tests.folders import write_parts
from vlm import box_codecs
from vlm.box_codecs import (
    KOSMOS2,
    MALFORMED,
    NO_AREA,
    NO_BOX,
    QWEN2_VL,
    QWEN25_VL,
    QWEN25_VL_PROMPT,
    QWEN_VL,
    JsonBoxes,
    LocTokens,
    PatchTokens,
    TaggedBoxes,
)
from vlm.data.example import BadRow, Box, Example, Turn
from vlm.data.grounding import GROUND_PROMPT, ground
from vlm.families.decoder_only import inspect
from vlm.geometry import Resize
from vlm.systems.compose import add_loc_tokens
from vlm.training.runs.decoder_only import ask_as_rows, require_box_codec

SAME = Resize((100, 200), (100, 200), (1.0, 1.0), (0.0, 0.0))
SMART = Resize((150, 301), (140, 308), (308 / 301, 140 / 150), (0.0, 0.0))
"""Each side to a multiple of 28, as Qwen2-VL resizes."""
LETTERBOX = Resize((100, 300), (448, 448), (448 / 300, 149 / 100), (0.0, 149.0))
RESIZES = {"same": SAME, "smart": SMART, "letterbox": LETTERBOX, "stretch": STRETCH, "pad": PAD}
CODECS = {
    "loc": LocTokens(bins=1024),
    "qwen_vl": QWEN_VL,
    "qwen2_vl": QWEN2_VL,
    "qwen25_vl": QWEN25_VL,
    "kosmos2": KOSMOS2,
}
EVERY = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def cell_px(name, resize):
    """One step of what a codec writes, x and y in the pixels of the image as it came."""
    width, height = resize.input_hw[::-1]
    across, down = resize.output_hw[::-1]
    step = {
        "loc": (across / 1024 / resize.scale_xy[0], down / 1024 / resize.scale_xy[1]),
        "qwen_vl": (width / 999, height / 999),
        "qwen2_vl": (width / 1000, height / 1000),
        "qwen25_vl": (1 / resize.scale_xy[0], 1 / resize.scale_xy[1]),
        "kosmos2": (width / 32, height / 32),
    }[name]
    return np.tile(step, 2)


@pytest.mark.parametrize("resize", RESIZES.values(), ids=RESIZES)
@pytest.mark.parametrize("name", CODECS)
def test_box_comes_back_within_half_a_cell(name, resize):
    """Written and read as text, in the pixels of the image as it came; large boxes and small."""
    boxes = random_boxes(resize.input_hw)
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) > 2 * cell_px(name, resize)[:2]).all(1)]
    assert len(boxes) > 20
    codec = CODECS[name]
    read = codec.read(codec.write(boxes, resize, ["cat"] * len(boxes)), resize)
    assert read.fault is None
    found = np.array([box.xyxy_px for box in read.boxes])
    assert (np.abs(found - boxes) <= cell_px(name, resize) / 2 + 1e-6).all()


def test_patches_in_one_row_or_column_give_their_outer_edges():
    """Off by a patch at most, and never empty: the smallest box is one whole patch."""
    boxes = np.array([[10.0, 10.0, 12.0, 90.0], [30.0, 40.0, 190.0, 41.0], [77, 33, 77.5, 33.5]])
    read = KOSMOS2.read(KOSMOS2.write(boxes, SAME), SAME)
    found = np.array([box.xyxy_px for box in read.boxes])
    assert (found[:, :2] <= boxes[:, :2]).all()
    assert (found[:, 2:] >= boxes[:, 2:]).all()
    assert (np.abs(found - boxes) <= cell_px("kosmos2", SAME) + 1e-9).all()


def test_patches_are_those_of_the_reference():
    """Indices, coordinates and the entities found in a text, in an image that is not square."""
    boxes = random_boxes(SAME.input_hw, n=200)
    shares = boxes / [200, 100, 200, 100]
    indices = KOSMOS2.encode(boxes, SAME)
    assert indices.tolist() == [
        list(kosmos2.coordinate_to_patch_index(tuple(box), 32)) for box in shares.tolist()
    ]
    theirs = [kosmos2.patch_index_to_coordinate(a, b, 32) for a, b in indices.tolist()]
    np.testing.assert_allclose(
        KOSMOS2.decode(indices, SAME), np.array(theirs) * [200, 100, 200, 100], atol=1e-9
    )
    text = KOSMOS2.write(boxes[:1], SAME, ["a snowman"], "An image of a snowman")
    text = KOSMOS2.write(boxes[1:3], SAME, ["a fire"] * 2, f"{text} warming himself by a fire")
    clean, entities = kosmos2.clean_text_and_extract_entities_with_bboxes(text)
    assert clean == "An image of a snowman warming himself by a fire"
    assert [(name, len(found)) for name, _, found in entities] == [("a snowman", 1), ("a fire", 2)]
    ours = [box.xyxy_px for box in KOSMOS2.read(text, SAME).boxes]
    theirs = np.array([box for _, _, found in entities for box in found]) * [200, 100, 200, 100]
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_published_forms():
    """As the systems' papers, tokenizers and pages show them."""
    boxes, labels = [(133.4, 43.7, 152.2, 87.5), (101.3, 7.5, 116.5, 94.7)], ["tower", "pearl"]
    assert QWEN_VL.write(boxes, SAME, labels) == (
        "<ref>tower</ref><box>(666,437),(760,874)</box>"
        "<ref>pearl</ref><box>(506,75),(582,946)</box>"
    )
    assert QWEN2_VL.write([(35.2, 10.6, 46.4, 16)], SAME, ["the eyes on a giraffe"]) == (
        "<|object_ref_start|>the eyes on a giraffe<|object_ref_end|>"
        "<|box_start|>(176,106),(232,160)<|box_end|>"
    )
    written = QWEN25_VL.write(boxes, SMART, labels)
    assert json.loads(written) == [
        {"bbox_2d": [137, 41, 156, 82], "label": "tower"},
        {"bbox_2d": [104, 7, 119, 88], "label": "pearl"},
    ]
    assert KOSMOS2.write([(75, 3.2, 199, 82)], SAME, ["a snowman"]) == (
        "<phrase>a snowman</phrase><object><patch_index_0044><patch_index_0863></object>"
    )


@EVERY
def test_whole_image_and_what_reaches_beyond_it_are_cut_at_the_border(codec):
    text = codec.write([(-40, -30, 900, 700)], LETTERBOX)
    (box,) = codec.read(text, LETTERBOX).boxes
    assert min(box.xyxy_px) >= 0
    assert (np.array(box.xyxy_px) <= [300, 100, 300, 100]).all()
    assert codec.read(codec.write([(0, 0, 300, 100)], LETTERBOX), LETTERBOX).fault is None


def test_numbers_far_beyond_the_image_never_raise():
    huge = "9" * 400
    for codec, text in (
        (QWEN_VL, f"<box>(1,2),({huge},{huge})</box>"),
        (QWEN25_VL, f'[{{"bbox_2d": [1, 2, {huge}, {huge}]}}]'),
    ):
        (box,) = codec.read(text, SAME).boxes
        assert box.xyxy_px[2:] == (200.0, 100.0)
    assert QWEN_VL.read("<box>(5000,5000),(6000,6000)</box>", SAME).fault == NO_AREA
    assert QWEN25_VL.read('{"bbox_2d": [-9, -9, -5, -5]}', SAME).fault == NO_AREA


QWEN_BOX, QWEN2_BOX = "<box>(10,20),(300,400)</box>", "<|box_start|>(1,2),(30,40)<|box_end|>"
JSON_BOX = '{"bbox_2d": [1, 2, 30, 40], "label": "cat"}'
PATCHES = "<patch_index_0044><patch_index_0863>"


@pytest.mark.parametrize(
    ("codec", "text", "count", "fault"),
    [
        (QWEN_VL, "", 0, NO_BOX),
        (QWEN_VL, "There is (1, 2) of them.", 0, NO_BOX),
        (QWEN_VL, QWEN_BOX, 1, None),
        (QWEN_VL, f"<ref>a</ref>{QWEN_BOX} and <ref>b</ref>{QWEN_BOX}{QWEN_BOX}", 3, None),
        (QWEN_VL, "<box> (10, 20), (300, 400) </box>", 1, None),
        (QWEN_VL, "(10,20),(300,400)</box>", 1, None),
        (QWEN_VL, "<box>(10,20),(300,400)", 1, None),
        (QWEN_VL, f"{QWEN_BOX}<box>(10,20),(300", 1, MALFORMED),
        (QWEN_VL, f"<box>(10,20)</box>{QWEN_BOX}", 1, MALFORMED),
        (QWEN_VL, "<box>(1,2),(3,4),(5,6),(7,8)</box>", 0, MALFORMED),
        (QWEN_VL, "<box>(a,b),(c,d)</box>", 0, MALFORMED),
        (QWEN_VL, "<box>(300,20),(10,400)</box>", 0, NO_AREA),
        (QWEN_VL, f"{QWEN_BOX}<box>(5,5),(5,9)</box>", 1, NO_AREA),
        (QWEN_VL, QWEN2_BOX, 0, NO_BOX),
        (QWEN2_VL, QWEN2_BOX * 2, 2, None),
        (QWEN2_VL, "<|box_start|>(1,2)", 0, MALFORMED),
        (QWEN25_VL, "none here", 0, NO_BOX),
        (QWEN25_VL, "[]", 0, NO_BOX),
        (QWEN25_VL, f"[{JSON_BOX}, {JSON_BOX}]", 2, None),
        (QWEN25_VL, f"```json\n[\n\t{JSON_BOX},\n\t{JSON_BOX}\n]\n```", 2, None),
        (QWEN25_VL, '{\n"bbox_2d": [1, 2, 30, 40]\n}', 1, None),
        (QWEN25_VL, '[{"bbox_2d": [1.5, 2, 30.25, 40], "label": "c', 1, None),
        (QWEN25_VL, f'[{JSON_BOX}, {{"bbox_2d": [1, 2, 3', 1, MALFORMED),
        (QWEN25_VL, '[{"bbox_2d": [1, 2, 3], "label": "cat"}]', 0, MALFORMED),
        (QWEN25_VL, '[{"bbox_2d": [1, 2, 3, 4, 5]}]', 0, MALFORMED),
        (QWEN25_VL, '[{"bbox_2d": ["1", 2, 3, 4]}]', 0, MALFORMED),
        (QWEN25_VL, '[{"bbox_2d": [NaN, 2, 3, 4]}]', 0, MALFORMED),
        (QWEN25_VL, '[{"bbox_2d": [30, 2, 1, 40]}]', 0, NO_AREA),
        (KOSMOS2, "a snowman", 0, NO_BOX),
        (KOSMOS2, f"<phrase> it</phrase><object>{PATCHES}</object>", 1, None),
        (KOSMOS2, f"<object>{PATCHES}</delimiter_of_multi_objects/>{PATCHES}</object>", 2, None),
        (KOSMOS2, "<object> <patch_index_0044> <patch_index_0863> </object>", 1, None),
        (KOSMOS2, f"<object>{PATCHES}{PATCHES}</object>", 0, MALFORMED),
        (KOSMOS2, f"<object>{PATCHES}</object><object><patch_index_0001>", 1, MALFORMED),
        (KOSMOS2, "<object><patch_index_0044><patch_index_1024></object>", 0, MALFORMED),
        (KOSMOS2, "<object><patch_index_0863><patch_index_0044></object>", 0, NO_AREA),
    ],
)
def test_answer_that_cannot_be_read_gives_no_box_and_says_why(codec, text, count, fault):
    read = codec.read(text, SAME)
    assert (len(read.boxes), read.fault) == (count, fault)


@EVERY
def test_spans_are_the_characters_of_the_numbers(codec):
    """Those and no others: digits, or the tokens that stand for them."""
    text = codec.write([(20, 10, 160, 90), (100, 30, 180, 70)], SAME, ["a 1", "b (2,3)"], "at 5: ")
    read = codec.read(text, SAME)
    assert len(read.boxes) == 2
    for box in read.boxes:
        written = [text[start:end] for start, end in box.spans]
        assert len(written) == (2 if codec is KOSMOS2 else 4)
        assert all(re.fullmatch(r"\d+|<loc\d{4}>|<patch_index_\d{4}>", part) for part in written)
    starts = [start for box in read.boxes for start, _ in box.spans]
    assert starts == sorted(set(starts))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchTokens(side=0), "side must be 1 to 100, found 0"),
        (lambda: TaggedBoxes(largest=0, ref=("a", "b"), box=("c", "d")), "largest must be at"),
        (lambda: TaggedBoxes(largest=9, ref=("a", ""), box=("c", "d")), "ref must be two tags"),
        (lambda: box_codecs.build({"kind": "yolo"}), "box codec 'yolo' is not one of loc, tagged"),
        (lambda: box_codecs.build({"bins": 9}), "box codec None is not one of"),
    ],
)
def test_bad_codec_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@EVERY
def test_codec_is_its_configuration(codec):
    values = json.loads(json.dumps(box_codecs.config_of(codec)))
    assert box_codecs.build(values) == codec


# In rows


TAGS = (*QWEN2_VL.tags, *QWEN_VL.tags)


def processor(codec, **options):
    """Of a tiny model whose text tokenizer has the tags as special tokens, one id each."""
    tokenizer = tiny.text_tokenizer((*TAGS, *KOSMOS2.tags, *KOSMOS2.tokens))
    return tiny.processor(tiny.decoder_only(), text_tokenizer=tokenizer, box_codec=codec, **options)


def row(content, boxes, images=1, size_hw=(28, 56)):
    seen = tuple(tiny.image(i, size_hw) for i in range(images))
    turns = (Turn("user", (*[None] * images, "where?")), Turn("assistant", content))
    return Example("row", turns, seen, boxes)


def scored(made, example):
    encoded = made.encode(example)
    return made.text_tokenizer.decode(encoded.ids[encoded.scored]).removesuffix("<|im_end|>")


CAT, DOG = Box(0, (14, 7, 42, 21), "cat"), Box(0, (0, 0, 28, 28), "dog")


@pytest.mark.parametrize(
    ("codec", "content", "written"),
    [
        (QWEN_VL, (0,), "<ref>cat</ref><box>(250,250),(749,749)</box>"),
        (QWEN_VL, (0, 0), "<ref>cat</ref>" + "<box>(250,250),(749,749)</box>" * 2),
        (QWEN_VL, ("A cat", 0, " here."), "A <ref>cat</ref><box>(250,250),(749,749)</box> here."),
        (QWEN_VL, ("Both: ", 0, 1), "Both: <ref>cat</ref><box>(250,250),(749,749)</box>"
                                    "<ref>dog</ref><box>(0,0),(500,999)</box>"),
        (QWEN2_VL, (1,), "<|object_ref_start|>dog<|object_ref_end|>"
                         "<|box_start|>(0,0),(500,1000)<|box_end|>"),
        (QWEN25_VL, (0, 1), '[{"bbox_2d": [3, 2, 9, 6], "label": "cat"}, '
                            '{"bbox_2d": [0, 0, 6, 8], "label": "dog"}]'),
        (QWEN25_VL, ('[{"bbox_2d": ', 0, ', "label": "cat"}]'),
         '[{"bbox_2d": [3, 2, 9, 6], "label": "cat"}]'),
        (KOSMOS2, ("It is a cat", 0), "It is a <phrase>cat</phrase><object><patch_index_0264>"
                                      "<patch_index_0759></object>"),
    ],
)  # fmt: skip
def test_rows_are_written_in_the_models_own_way(codec, content, written):
    """An image of 28 x 56 pixels, of which the model sees 8 x 12."""
    assert scored(processor(codec), row(content, (CAT, DOG))) == written


def test_grounding_rows_name_a_label_once_for_all_its_boxes():
    example = ground(row((), (CAT, DOG, Box(0, (1, 2, 9, 9), "cat"))))
    assert scored(processor(QWEN2_VL), example).count("<|object_ref_start|>cat<") == 1
    read = QWEN2_VL.read(scored(processor(QWEN2_VL), example), SAME)
    assert (len(read.boxes), read.fault) == (3, None)


def test_boxes_of_two_images_are_written_apart():
    second = Box(1, (14, 7, 42, 21), "cat")
    written = scored(processor(QWEN25_VL), row((0, 1), (CAT, second), images=2))
    assert written == '[{"bbox_2d": [3, 2, 9, 6], "label": "cat"}]' * 2


def test_box_without_a_label_is_written_without_one():
    bare = Box(0, CAT.xyxy_px, "")
    assert scored(processor(QWEN_VL), row((0,), (bare,))) == "<box>(250,250),(749,749)</box>"
    assert scored(processor(QWEN25_VL), row((0,), (bare,))) == '[{"bbox_2d": [3, 2, 9, 6]}]'


def test_tags_are_one_id_each_where_the_text_tokenizer_has_them():
    encoded = processor(QWEN2_VL).encode(row((0,), (CAT,)))
    tokens = processor(QWEN2_VL).text_tokenizer.convert_ids_to_tokens(
        encoded.ids[encoded.scored].tolist()
    )
    assert [tokens.count(tag) for tag in QWEN2_VL.tags] == [1] * 4


def test_codec_of_tokens_that_the_text_tokenizer_lacks_is_refused():
    with pytest.raises(ValueError, match=r"1024 of 1024 box tokens with several ids, such as <p"):
        tiny.processor(tiny.decoder_only(), box_codec=KOSMOS2)
    with pytest.raises(BadRow, match=r"row: the answers hold boxes.*writes none.*--loc-bins"):
        tiny.processor(tiny.decoder_only()).encode(row((0,), (CAT,)))


def test_inspected_rows_show_boxes_as_they_are_written(capsys):
    made = processor(QWEN2_VL)
    encoded = made.encode(row((0,), (CAT, DOG)))
    inspect.show([encoded], made, Console(no_color=True, width=500))
    shown = capsys.readouterr().out
    text = QWEN2_VL.write([CAT.xyxy_px], made.pixel_spec.resize_record((28, 56)), ["cat"])
    assert f"[[{text}<|im_end|>]]" in shown
    assert "box on image 0: 'cat' x 14–42, y 7–21 px" in shown


# In folders


@pytest.fixture
def composed(tmp_path):
    vision, text = write_parts(tmp_path, "siglip", "llama")
    return vlm.build(vision=vision, text=text, adaptor="linear")


@pytest.mark.parametrize("codec", [None, QWEN_VL, QWEN25_VL], ids=["none", "tagged", "json"])
def test_codec_is_saved_with_the_model(composed, tmp_path, codec):
    composed.processor.box_codec = codec
    composed.save(tmp_path / "model")
    assert vlm.load(tmp_path / "model").processor.box_codec == codec


@pytest.mark.parametrize("loc", [None, {"bins": 16, "order": "xyxy", "frame": "image"}])
def test_older_folders_still_open(composed, tmp_path, loc):
    """Those whose config.json has <loc> tokens under a key of their own."""
    if loc is not None:
        add_loc_tokens(composed, LocTokens(**loc))
    composed.save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    del values["box_codec"]
    path.write_text(json.dumps(values | {"loc": loc}))
    expected = None if loc is None else LocTokens(**loc)
    assert vlm.load(tmp_path / "model").processor.box_codec == expected


def test_model_that_writes_boxes_as_text_gets_no_loc_tokens():
    made = training.model()
    made.processor.box_codec = JsonBoxes()
    with pytest.raises(ValueError, match=r"writes boxes as JsonBoxes\(\), not as LocTokens"):
        add_loc_tokens(made, LocTokens(bins=16))


# In runs


@pytest.mark.parametrize(
    ("rows", "asks"),
    [
        ([ground(row((), (CAT,)))], GROUND_PROMPT),
        ([tiny.example(), ground(row((), (CAT, DOG)))], QWEN25_VL_PROMPT),  # the first row says
        ([ground(row((), (CAT,)), QWEN25_VL_PROMPT)], QWEN25_VL_PROMPT),
        ([row((0,), (CAT,))], QWEN25_VL_PROMPT),
    ],
)
def test_model_asks_for_boxes_as_its_rows_did(rows, asks):
    made = training.model()
    made.ground_prompt = QWEN25_VL_PROMPT
    ask_as_rows(training.dataset(rows), made, "raise")
    assert made.ground_prompt == asks


def test_source_with_boxes_is_refused_where_the_model_writes_none():
    data = training.dataset([row((0,), (CAT,))])
    with pytest.raises(ValueError, match=r"tiny: its answers hold boxes.*--loc-bins 1024"):
        require_box_codec(data, training.model(), "raise")
    made = training.model()
    made.processor.box_codec = QWEN25_VL
    require_box_codec(data, made, "raise")
