"""Phrases to boxes: reading answers, encoding each image once, drawing, the command and the
evaluation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import vlm
from tests import tiny, training
from tests.results import read_result
from tests.runs import on_two_processes
from vlm import adaptors, cli, tokenizers
from vlm.box_codecs import MALFORMED, NO_AREA, NO_BOX, QWEN2_VL, LocTokens
from vlm.config import to_dict
from vlm.data.example import Box, Example, Turn
from vlm.data.grounding import ground
from vlm.data.sources import open_source
from vlm.draw import draw_boxes, draw_page
from vlm.evaluation import base
from vlm.evaluation.grounding import GroundingEvaluation, Settings
from vlm.families.decoder_only.ground import AnswerReader, find
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly
from vlm.pixels import BadImage, PixelSpec
from vlm.systems.compose import add_loc_tokens

ROOT = Path(__file__).parent.parent


def model(bins=16, **options):
    """A tiny random model that knows location tokens."""
    made = training.model(**options)
    add_loc_tokens(made, LocTokens(bins=bins))
    return made


def questions():
    """Images of several shapes, with phrases of several lengths and numbers."""
    return [
        (tiny.image(1), ["cat", "a long red dog", "it"]),
        (tiny.image(2, (30, 5)), "bird"),
        (tiny.image(3, (3, 40)), []),
        (tiny.image(4, (12, 12)), ["cat", "cat"]),
        (tiny.image(5, (20, 21)), ["the second shape from the left"]),
    ]


def listed(phrases):
    return [phrases] if isinstance(phrases, str) else phrases


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_answers_equal_those_of_one_phrase_at_a_time(kind, constrained):
    """The slow twin: each phrase asked alone of its image."""
    made = model(kind=kind)
    images, phrases = zip(*questions())
    options = {"constrained": constrained, "max_new_tokens": 8}
    for batch_size in (2, 16):
        together = find(made, images, phrases, batch_size, **options)
        assert [len(answers) for answers in together] == [3, 1, 0, 2, 1]
        for image, asked, answers in zip(images, phrases, together):
            for phrase, answer in zip(listed(asked), answers):
                ((alone,),) = find(made, [image], [phrase], **options)
                assert (answer.phrase, answer.text, answer.fault) == (
                    phrase, alone.text, alone.fault,
                )  # fmt: skip
                for box, same in zip(answer.boxes, alone.boxes, strict=True):
                    assert (box.image, box.xyxy_px, box.label) == (0, same.xyxy_px, phrase)
                    assert box.score == pytest.approx(same.score, abs=1e-5)
                if not constrained:
                    question = made.ground_prompt.format(phrase=phrase)
                    assert made.answer([image], [question], max_new_tokens=8) == [answer.text]


def test_each_image_is_encoded_once_for_all_its_phrases():
    made = model()
    images, phrases = zip(*questions())
    seen = []
    made.module.tokenizer.register_forward_pre_hook(lambda _, pixels: seen.append(len(pixels[0])))
    made.ground(images, phrases, batch_size=2, max_new_tokens=4)
    assert sum(seen) == 4  # of five images one has no phrase


def test_constrained_answers_are_whole_boxes():
    made = model(seed=3)
    images, phrases = zip(*questions())
    free = [a for row in find(made, images, phrases, max_new_tokens=12) for a in row]
    assert {answer.fault for answer in free} != {None}
    options = {"constrained": True, "max_new_tokens": 12}
    for more in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 1}):
        bound = find(made, images, phrases, **options, **more)
        for answer in (answer for row in bound for answer in row):
            assert answer.fault in (None, NO_AREA, NO_BOX)
            assert answer.text.count("<loc") % 4 == 0
            assert not answer.text.replace("<loc", "").strip("0123456789>")
            assert all(0 <= box.score <= 1 for box in answer.boxes)
    assert [[b for a in row for b in a.boxes] for row in bound] == made.ground(
        images, phrases, **options, **more
    )


SPECS = {
    "stretch": dict(size_hw=(48, 64), fit="stretch"),
    "pad": dict(size_hw=(64, 64), fit="pad"),
    "crop": dict(size_hw=(64, 48), fit="crop"),
}


def written_boxes(made, boxes, resize):
    """What a model that knows the boxes would write, each id with probability 0.81."""
    text = made.processor.box_codec.write(boxes, resize)
    ids = made.processor.text_tokenizer(text)["input_ids"] + [made.processor.end_id]
    return ids, [math.log(0.81)] * len(ids)


def read(made, written, resize):
    return AnswerReader(made.processor).read("cat", written, resize)


@pytest.mark.parametrize("frame", ["input", "image"])
@pytest.mark.parametrize("fit", SPECS)
def test_boxes_come_back_in_the_callers_pixels(fit, frame):
    """Images and views that are not square; half a bin is lost at most."""
    made = training.model()
    loc = LocTokens(bins=256, frame=frame)
    add_loc_tokens(made, loc)
    spec = PixelSpec(**SPECS[fit], resample="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    for size_hw in ((150, 300), (301, 97)):
        height, width = size_hw
        resize = spec.resize_record(size_hw)
        seen = resize.invert_boxes([[0, 0, *spec.size_hw[::-1]]], clip=True)[0]
        truth = np.array(
            [
                [0.40 * width, 0.41 * height, 0.55 * width, 0.66 * height],
                [seen[0], seen[1], 0.60 * width, seen[3]],
            ]
        )
        found = read(made, written_boxes(made, truth, resize), resize)
        assert found.fault is None
        boxes = np.array([box.xyxy_px for box in found.boxes])
        scale = resize.scale_xy if frame == "input" else (1, 1)
        bin_px = [
            (spec.size_hw[1 - axis] if frame == "input" else size_hw[1 - axis]) / 256 / scale[axis]
            for axis in (0, 1)
        ]
        assert (np.abs(boxes - truth) <= np.tile(bin_px, 2) / 2 + 1e-9).all()
        assert boxes.min() >= 0
        assert (boxes <= [width, height, width, height]).all()
        assert [box.score for box in found.boxes] == pytest.approx([0.81, 0.81])


def test_score_is_the_geometric_mean_of_the_boxs_own_tokens():
    made = model(bins=256)
    resize = made.processor.pixel_spec.resize_record((20, 30))
    ids, _ = written_boxes(made, [(1, 2, 20, 10), (3, 4, 25, 19)], resize)
    probabilities = [0.9, 0.5, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0, 0.001]
    found = read(made, (ids, [math.log(p) for p in probabilities]), resize)
    assert found.boxes[0].score == pytest.approx((0.9 * 0.5 * 0.8) ** 0.25)
    assert found.boxes[1].score == 1.0  # the end token is no part of a box


@pytest.mark.parametrize(
    ("text", "count", "fault"),
    [
        ("", 0, NO_BOX),
        ("it is on the left", 0, NO_BOX),
        ("<loc0001><loc0001><loc0009>", 0, MALFORMED),
        ("<loc0001><loc0001><loc0009><loc0009><loc0001>", 0, MALFORMED),
        ("<loc0001><loc0001> <loc0009><loc0009>", 0, MALFORMED),
        ("<loc0009><loc0001><loc0001><loc0009>", 0, NO_AREA),
        ("<loc0001><loc0001><loc0001><loc0009>", 0, NO_AREA),
        ("<loc0009><loc0001><loc0001><loc0009><loc0001><loc0002><loc0003><loc0004>", 1, NO_AREA),
        ("<loc0001><loc0002><loc0003><loc0004>", 1, None),
        ("<loc0001><loc0002><loc0003><loc0004><loc0001><loc0001><loc0009><loc0009>", 2, None),
        ("a <loc0001><loc0002><loc0003><loc0004>; <loc0001><loc0001><loc0009><loc0009>", 2, None),
    ],
)
def test_answer_that_cannot_be_read_gives_no_box_and_says_why(text, count, fault):
    made = model()
    ids = made.processor.text_tokenizer(text)["input_ids"] + [made.processor.end_id]
    resize = made.processor.pixel_spec.resize_record((20, 30))
    found = read(made, (ids, [-1.0] * len(ids)), resize)
    assert (len(found.boxes), found.fault, found.text) == (count, fault, text.strip())
    assert found.phrase == "cat"


def test_box_in_the_padding_is_left_out():
    made = model()
    spec = PixelSpec(**SPECS["pad"], resample="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    text = "<loc0000><loc0001><loc0001><loc0009>"  # above a wide image, in yxyx
    ids = made.processor.text_tokenizer(text)["input_ids"]
    found = read(made, (ids, [-1.0] * 4), spec.resize_record((10, 100)))
    assert (found.boxes, found.fault) == ((), NO_AREA)


def test_bad_arguments_name_what_was_expected(tmp_path):
    made, image = model(), tiny.image()
    for arguments, message in (
        ((["a.png"], []), "there are 1 images and 0 entries of phrases"),
        (("a.png", ["x"]), "images and phrases are lists"),
        (([image], "x"), "images and phrases are lists"),
        (([[image, image]], ["x"]), r"images\[0\]: expected one image"),
        (([image], [["x", " "]]), r"phrases\[0\]: expected a text to look for, found ' '"),
        (([image], [[3]]), r"phrases\[0\]: expected a text to look for, found 3"),
        (([image], ["x"], 0), "batch_size must be at least 1, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            made.ground(*arguments)
    for prompt in ("Where?", "Where is {phrase} in {it}?", "{phrase", "{}", "{phrase.x}"):
        with pytest.raises(ValueError, match=r"expected a prompt with \{phrase\} where"):
            made.ground([image], ["x"], prompt=prompt)
    with pytest.raises(BadImage, match=r"gone\.png"):
        made.ground([tmp_path / "gone.png"], ["x"])
    with pytest.raises(ValueError, match="num_beams must be at least 1, found 0"):
        made.ground([image], ["x"], num_beams=0)
    with pytest.raises(ValueError, match="ground: this model writes no boxes"):
        training.model().ground([image], ["x"])


def test_phrase_is_asked_as_in_training():
    """The prompt's ids are those before the answer in a training row of the same phrase."""
    made = model()
    box = Box(0, (1.0, 2.0, 9.0, 7.0), "a red {star}")
    example = ground(Example("r", (Turn("user", (None,)),), (tiny.image(),), (box,)))
    row = made.processor.encode(example)
    asked = []
    embed = made.module.embed
    made.module.embed = lambda ids, *rest: asked.append(ids) or embed(ids, *rest)
    made.ground([tiny.image()], [box.label], max_new_tokens=1)
    first = int(row.scored.nonzero()[0])
    assert asked[0][0].tolist() == row.ids[:first].tolist()


# Drawing


def test_boxes_are_drawn_where_they_are():
    """The outline's pixels are the box's outermost ones: its end is exclusive."""
    image = Image.new("RGB", (600, 500), "black")
    drawn = np.asarray(draw_boxes(image, [Box(0, (100, 200, 300, 400), "cat", 0.5)])).astype(int)
    colour = drawn[300, 100]
    assert colour.tolist() != [0, 0, 0]
    for y, x in ((300, 100), (300, 299), (399, 200), (200, 250)):
        assert (drawn[y, x] == colour).all()
    for y, x in ((300, 90), (300, 310), (410, 200), (300, 200)):
        assert (drawn[y, x] == 0).all()
    assert np.asarray(image).max() == 0  # the given image stays as it is


def test_small_images_are_enlarged_and_odd_boxes_drawn():
    boxes = [
        Box(0, (0, 0, 1, 1), "a" * 300, 1.0),
        Box(0, (29.9, 19.9, 30, 20), "edge", 0.1),
        *[Box(0, (3, 3, 20, 12), f"label {i}", i / 20) for i in range(20)],
    ]
    drawn = draw_boxes(tiny.image(0, (20, 30)), boxes, [Box(0, (1, 1, 8, 9), "犬 $x$")])
    assert drawn.size == (480, 320)
    assert draw_boxes(Image.new("RGB", (1, 1)), [Box(0, (0, 0, 1, 1), "x", 1.0)]).size == (480, 480)


def test_page_holds_every_drawing(tmp_path):
    drawings = [Image.new("RGB", size, "red") for size in ((700, 300), (50, 480), (480, 480))]
    draw_page(drawings, ["a", "b" * 200, "c"], tmp_path / "page.png", columns=2)
    page = np.asarray(Image.open(tmp_path / "page.png"))
    red = (page == [255, 0, 0]).all(-1).sum()
    assert red == pytest.approx(480 * 206 + 50 * 480 + 480 * 480, rel=0.01)
    with pytest.raises(ValueError, match="expected drawings with titles, found 0, 0"):
        draw_page([], [], tmp_path / "none.png")


# The command


def test_ground_command_prints_boxes_and_draws_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlm, "load", lambda *_, **__: model(), raising=False)
    tiny.image(0, (40, 60)).save(tmp_path / "a.png")
    common = ["--model", "x", "--constrained"]
    image, drawn = str(tmp_path / "a.png"), tmp_path / "drawn.png"
    cli.main(["ground", image, "cat", "red dog", *common, "--json", "--draw", str(drawn)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["phrase"] for line in lines] == ["cat", "red dog"]
    expected = model().ground([image], [["cat", "red dog"]], constrained=True)[0]
    found = [tuple(box["xyxy_px"]) for line in lines for box in line["boxes"]]
    assert found == [box.xyxy_px for box in expected]
    assert Image.open(drawn).size == (480, 320)
    cli.main(["ground", image, "cat", *common])
    assert capsys.readouterr().out.startswith("cat: ")


def test_ground_command_checks_its_input_before_the_model(tmp_path, capsys):
    tiny.image().save(tmp_path / "a.png")
    for arguments, message in (
        ([str(tmp_path / "gone.png"), "cat"], "gone.png"),
        ([str(tmp_path / "a.png")], "name at least one phrase"),
        ([str(tmp_path / "a.png"), "cat", "--draw", "a.jpg"], "--draw: expected a .png file"),
        ([str(tmp_path / "a.png"), "cat", "--draw", "none/a.png"], "--draw: expected a .png file"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["ground", *arguments, "--model", "nowhere"])
        assert message in capsys.readouterr().err


# The evaluation


def saved_model(folder):
    """A tiny model of kinds that can be rebuilt, with location tokens, in its folder."""
    torch.manual_seed(0)
    spec = tiny.Patches(size_hw=(32, 48)).pixel_spec
    tokenizer = tokenizers.build(
        {
            "kind": "timm", "name": "vit_tiny_patch16_224", "level": -1, "prefix": "drop",
            "model_args": {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": [32, 48]},
            "norm": True, "pooled": False, "pixel_spec": to_dict(spec),
        }
    )  # fmt: skip
    adaptor = adaptors.build(
        {"kind": "mlp", "in_width": 24, "out_width": 32, "depth": 2, "hidden_width": 32}
    )
    module = DecoderOnly(tokenizer, adaptor, tiny.text_model()).eval()
    processor = tiny.processor(module)
    parts = DecoderOnlyModel(module=module, processor=processor, stop_ids=(processor.end_id,))
    add_loc_tokens(parts, LocTokens(bins=64))
    parts.save(folder)


@pytest.fixture(autouse=True)
def as_before():
    """What an evaluation sets for its process is put back."""
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def knows(made, source, noise=0.0):
    """Makes a model answer with the true boxes of the rows' phrases, moved by `noise` pixels."""
    rows = [source[row] for row in range(len(source))]
    asked = iter(
        (example, label)
        for example in rows
        for label in dict.fromkeys(box.label for box in example.boxes)
    )

    def answers(module, questions, batch_size, options):
        for question in questions:
            example, label = next(asked)
            assert label == question.phrase
            boxes = [box.xyxy_px for box in example.boxes if box.label == label]
            yield question, written_boxes(made, np.array(boxes) + noise, question.resize)

    return answers


def evaluate(monkeypatch, tmp_path, data, answers=None, codec=None, **settings):
    made = model(bins=1024, size_hw=(64, 64))
    if codec is not None:
        made.processor.box_codec = codec
    monkeypatch.setattr(vlm, "load", lambda *_, **__: made, raising=False)
    if answers is not None:
        monkeypatch.setattr("vlm.families.decoder_only.ground._answers", answers(made))
    return run(Settings(model="tiny", data=data, out=tmp_path / "out", images=2, **settings))


def run(settings):
    return base.run(GroundingEvaluation(settings))


@pytest.mark.parametrize("codec", [None, QWEN2_VL], ids=["loc", "text"])
def test_evaluation_of_a_model_that_knows_is_perfect(monkeypatch, tmp_path, capsys, codec):
    """Boxes through tokens or text and back, images of many sizes; 11 rows in batches of 4."""
    data = "scenes:11:seed=77:size=mixed"
    source = open_source(data)
    options = {"codec": codec, "batch": 4}
    result = evaluate(monkeypatch, tmp_path, data, lambda made: knows(made, source), **options)
    figures = result["metrics"]
    assert figures["accuracy"] == 1.0
    assert figures["ap"] == pytest.approx(1.0)
    assert figures["images"] == 11
    assert figures["predicted_boxes"] == figures["true_boxes"] > 11
    assert figures["unreadable_answers"] == 0
    assert "phrases found, IoU ≥ 0.5" in capsys.readouterr().out
    out = tmp_path / "out"
    assert read_result(out) == json.loads(json.dumps(result))
    assert (result["task"], result["options"]["batch"]) == ("grounding", 4)
    for key in ("model", "data", "prompt", "preprocessing", "versions", "box_codec"):
        assert result[key] is not None
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 11
    assert Image.open(out / "images.png").format == "PNG"
    far = evaluate(monkeypatch, tmp_path, data, lambda made: knows(made, source, noise=-60.0))
    assert far["metrics"]["accuracy"] < 0.2
    assert far["metrics"]["ap"] < 0.2


def test_evaluation_of_a_coco_file_asks_for_all_labels_when_told(monkeypatch, tmp_path):
    for name in ("a", "b"):
        tiny.image(0, (30, 40)).save(tmp_path / f"{name}.png")
    image = {"height": 30, "width": 40}
    box = {"category_id": 1, "bbox": [1, 2, 10, 20], "iscrowd": 0}
    values = {
        "images": [{"id": i, "file_name": f"{n}.png", **image} for i, n in enumerate("ab")],
        "categories": [{"id": k, "name": n} for k, n in enumerate(("dog", "cat", "cow"))],
        "annotations": [
            {"id": 1, "image_id": 0, **box},
            {"id": 2, "image_id": 1, **box},
            {"id": 3, "image_id": 1, **box, "category_id": 2, "iscrowd": 1},
        ],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(values))
    data = f"coco:{tmp_path / 'boxes.json'}"
    options = {"max_new_tokens": 8, "constrained": True}
    present = evaluate(monkeypatch, tmp_path, data, **options)["metrics"]
    assert (present["phrases_asked"], present["n"]) == (2, 2)
    every = evaluate(monkeypatch, tmp_path, data, ask="all", **options)["metrics"]
    assert (every["phrases_asked"], every["n"], every["crowds"]) == (6, 2, 1)
    with pytest.raises(ValueError, match="--ask all: expected a COCO file"):
        evaluate(monkeypatch, tmp_path, "scenes:2", ask="all")


@pytest.mark.parametrize("empty_first", [True, False])
def test_rows_without_boxes_are_counted_wherever_they_stand(monkeypatch, tmp_path, empty_first):
    images = [tiny.image(seed, (30, 40)) for seed in range(2)]
    for name, one_image in zip("ab", images):
        one_image.save(tmp_path / f"{name}.png")
    rows = [
        {"image": "a.png", "question": "where?", "answers": ["nowhere"]},
        {
            "image": "b.png",
            "caption": "a dog",
            "boxes": [{"image": 0, "xyxy": [1, 2, 10, 20], "label": "dog"}],
        },
    ]
    lines = map(json.dumps, rows if empty_first else rows[::-1])
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    options = {"max_new_tokens": 8, "constrained": True}
    result = evaluate(monkeypatch, tmp_path, str(tmp_path / "rows.jsonl"), rows=9, **options)
    assert (result["rows"], result["skipped"], result["metrics"]["images"]) == (2, 1, 1)
    assert result["metrics"]["rows_without_boxes"] == 1


def test_evaluation_names_what_cannot_be(monkeypatch, tmp_path):
    for data, settings, message in (
        ("sample:val", {"rows": 5}, "^sample:val: expected boxes to find, found none in 5 rows$"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(monkeypatch, tmp_path, data, **settings)
    monkeypatch.setattr(vlm, "load", lambda *_, **__: pytest.fail("the model was opened"))
    for settings, message in (
        ({"rows": 0}, "--rows must be at least 1, found 0"),
        ({"batch": 0}, "--batch must be at least 1, found 0"),
        ({"prompt": "where?"}, "expected a prompt with {phrase}"),
    ):
        with pytest.raises(ValueError, match=message):
            run(Settings(model="x", data="scenes:3", out=tmp_path / "out", **settings))
    with pytest.raises(ValueError, match="--out: name a folder for the result"):
        run(Settings(model="none/none", data="scenes:3"))


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path):
    """Seven batches of rows on two ranks, the last one short; nothing twice, nothing lost."""
    saved_model(tmp_path / "run/model")
    settings = Settings(
        model=str(tmp_path / "run"), data="scenes:20:seed=3:size=mixed", rows=13,
        batch=2, max_new_tokens=8, constrained=True, images=0,
    )  # fmt: skip
    one = run(settings)
    out = tmp_path / "run/grounding"
    lines = (out / "predictions.jsonl").read_text()
    on_two_processes(
        "eval/grounding.py", "--model", settings.model, "--data", settings.data, "--rows", "13",
        "--batch", "2", "--max-new-tokens", "8", "--constrained",
        "--images", "0",
    )  # fmt: skip
    two = json.loads((out / "result.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["metrics"] == json.loads(json.dumps(one["metrics"]))
    before, after = (
        [json.loads(line) for line in text.splitlines()]
        for text in (lines, (out / "predictions.jsonl").read_text())
    )
    assert len({line["name"] for line in before}) == len(before) == 13
    for line, other in zip(before, after, strict=True):
        assert [a["text"] for a in line["answers"]] == [a["text"] for a in other["answers"]]
        assert line["name"] == other["name"]
