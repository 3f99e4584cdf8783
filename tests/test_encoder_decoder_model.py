"""Encoder-decoder models as readers: options, honest confidences, and whole pages."""

import json
import math

import pytest
import torch

import vlm
from tests import line_readers, tiny
from tests.reference import tiny_donut, tiny_trocr
from vlm import cli
from vlm.families.encoder_decoder.model import EncoderDecoderModel
from vlm.metrics.calibration import Temperatures
from vlm.ocr import tagged_text
from vlm.pixels import BadImage
from vlm.systems import donut
from vlm.text.generation import Generation

IMAGES = [tiny.image(i, (12, 71)) for i in range(8)]


def written_folder(folder, kind):
    write = {"donut": tiny_donut, "trocr": tiny_trocr}[kind].write_folder
    return write(folder)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return written_folder(tmp_path_factory.mktemp("trocr"), "trocr")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return written_folder(tmp_path_factory.mktemp("donut"), "donut")


def load(folder):
    return vlm.load(folder, "cpu", "float32")


def test_fitted_temperatures_change_confidences_and_no_text(lines):
    model = load(lines)
    before = model.read_lines(IMAGES)
    for read in before:  # 1 leaves the model's own
        assert 0 <= read.confidence <= math.prod(t.confidence for t in read.tokens) + 1e-6
    truths = [read.text if i % 4 == 0 else "a truth" for i, read in enumerate(before)]
    fitted = model.fit_temperatures(IMAGES, truths)
    assert fitted == model.temperatures
    assert fitted.line != 1 != fitted.token
    after = model.read_lines(IMAGES)
    assert [read.text for read in after] == [read.text for read in before]
    assert [read.confidence for read in after] != [read.confidence for read in before]
    assert model.fit_temperatures(IMAGES, truths) == fitted  # from the model's own anew
    rank = [sorted(range(8), key=lambda i: reads[i].confidence) for reads in (before, after)]
    assert rank[0] == rank[1]
    for beams in (1, 2):
        for read in model.read_lines(IMAGES[:2], num_beams=beams):
            assert 0 <= read.confidence <= 1
            assert all(0 <= token.confidence <= 1 for token in read.tokens)


def test_temperatures_are_kept_in_our_own_layout_alone(lines, tmp_path):
    model = load(lines)
    model.temperatures = Temperatures(line=2.0, token=1.5)
    model.save(tmp_path / "native")
    again = load(tmp_path / "native")
    assert again.temperatures == model.temperatures
    assert again.read_lines(IMAGES[:2]) == model.read_lines(IMAGES[:2])
    again.save(tmp_path / "reference", "reference")
    names = {path.name for path in lines.iterdir()}
    assert {path.name for path in (tmp_path / "reference").iterdir()} == names
    for path in (tmp_path / "reference").glob("*.json"):
        assert json.loads(path.read_text()) == json.loads((lines / path.name).read_text())
    assert load(tmp_path / "reference").temperatures == Temperatures()


def test_options_that_reading_does_not_have_are_named(lines):
    model = load(lines)
    for read in (model.ocr, model.read_lines, model.generate):
        with pytest.raises(
            ValueError, match=r"\(layout, .*such as max_new_tokens\), found beams, colour"
        ):
            read(IMAGES[:1], beams=2, colour="red")
    with pytest.raises(ValueError, match="prompt: expected None, as this model reads lines"):
        model.ocr(IMAGES[:1], prompt="<s>")
    reader = line_readers.parts()
    with pytest.raises(ValueError, match=r"min_confidence, stream\), found max_new_tokens"):
        reader.ocr(IMAGES[:1], max_new_tokens=3)


@pytest.mark.parametrize("name", ["caption", "chat"])
def test_other_tasks_name_the_families_that_do_them(lines, name):
    with pytest.raises(
        AttributeError, match="done by models of the family decoder_only or prefix_decoder"
    ):
        getattr(load(lines), name)


CORD = "<s_menu><s_nm>green tea</s_nm><sep/><s_nm>pie</s_nm></s_menu><s_sum><yes/></s_sum>"


def says(model, text, monkeypatch):
    """Lets the model write a text, each id with probability 0.9; gives what it is asked."""
    ids = [*model.processor.text_ids(text), *model.end_ids]
    asked = []

    def write(rows, num_beams, **options):
        asked.append((len(rows), num_beams, options))
        return [(ids, [math.log(0.9)] * len(ids))] * len(rows)

    monkeypatch.setattr(model, "_write", write)
    return asked


def test_a_page_model_is_shown_the_page_and_answers_with_values(pages, monkeypatch):
    model = load(pages)
    assert (model.reads, model.prompt) == ("pages", donut.PROMPTS["cord"])
    asked = says(model, CORD, monkeypatch)
    readings = model.ocr(IMAGES[:3], batch_size=2, num_beams=3, max_new_tokens=30)
    assert asked == [(2, 3, {"max_new_tokens": 30}), (1, 3, {"max_new_tokens": 30})]
    first = readings[0]
    assert first.values == {"menu": [{"nm": "green tea"}, {"nm": "pie"}], "sum": "yes"}
    assert [line.text for line in first.lines] == ["green tea", "pie", "yes"]
    assert first.size_hw == (12, 71)
    assert {line.xyxy_px for line in first.lines} == {(0, 0, 71, 12)}
    tea, pie, yes = first.lines  # each with the tag that ends it; letters are bytes here
    assert pie.confidence == pytest.approx(0.9**4)
    assert yes.confidence == pytest.approx(0.9**2)
    assert [word.text for word in tea.words] == ["green", "tea"]
    assert tea.words[0].confidence == pytest.approx(0.9**5)
    assert readings == model.ocr(IMAGES[:3], layout="page")
    with pytest.warns(UserWarning, match="image 1: 1 lines of a confidence below 0.6 skipped"):
        (unsure,) = model.ocr(IMAGES[:1], min_confidence=0.6)
    assert unsure.text == "pie\nyes"
    assert unsure.values == first.values


def test_readings_of_pages_are_yielded_before_the_next_batch_is_opened(pages, monkeypatch):
    model, taken = load(pages), []
    says(model, CORD, monkeypatch)
    images = (taken.append(number) or image for number, image in enumerate(IMAGES[:5]))
    stream = model.ocr(images, batch_size=2, stream=True)
    assert taken == []
    assert [(len(taken), reading.text) for reading in stream] == [
        (count, "green tea\npie\nyes") for count in (2, 2, 4, 4, 5)
    ]


def test_pages_before_a_damaged_one_are_read(pages, tmp_path, monkeypatch):
    model = load(pages)
    says(model, CORD, monkeypatch)
    (tmp_path / "bad.png").write_text("no image")
    images = [IMAGES[0], tmp_path / "bad.png", IMAGES[1]]
    with pytest.raises(BadImage, match=r"bad\.png"):  # before anything is read
        model.ocr(images, stream=True)
    stream = model.ocr(iter(images), stream=True)
    assert next(stream).values["sum"] == "yes"
    with pytest.raises(BadImage, match=r"bad\.png"):
        next(stream)


def test_a_page_model_reads_by_its_own_weights(pages):
    model = load(pages)
    (reading,) = model.ocr(IMAGES[:1], max_new_tokens=12)
    (written,) = model.generate(IMAGES[:1], ["<s_cord-v2>"], max_new_tokens=12)
    assert reading.values == tagged_text.read_json(model.processor, written.ids)
    joined = "".join(tagged_text.pieces(model.processor, written.ids))
    assert reading.text.split() == joined.split()


def test_the_command_gives_a_page_model_whole_pages(pages, tmp_path, capsys):
    path = tmp_path / "page.png"
    IMAGES[0].save(path)
    options = ["--model", str(pages), "--device", "cpu", "--dtype", "float32", "--format", "json"]
    cli.main(["ocr", str(path), *options])
    (values,) = json.loads(capsys.readouterr().out)
    (reading,) = load(pages).ocr([path])
    assert values["values"] == reading.values
    assert [line["text"] for line in values["lines"]] == [line.text for line in reading.lines]


def test_a_page_model_refuses_lines_and_misses_its_question(pages):
    model = load(pages)
    with pytest.raises(ValueError, match=r"layout: expected auto or page, as .* found 'line'"):
        model.ocr(IMAGES[:1], layout="line")
    model.prompt = donut.PROMPTS["answer"]
    with pytest.raises(ValueError, match=r"trained to answer questions; .*<s_docvqa>"):
        model.ocr(IMAGES[:1])


def test_an_answer_holds_the_fields_that_its_prompt_begins(pages):
    model = load(pages)
    ids = tuple(model.processor.text_ids("tea</s_nm></s_menu>"))
    written = Generation("", ids, (0.0,) * len(ids))
    reading = model._page(written, "<s_cord-v2><s_menu><s_nm>", (4, 6))
    assert reading.values == {"menu": {"nm": "tea"}}
    assert reading.text == "tea"


def test_a_page_model_stays_one_in_our_own_layout(pages, tmp_path):
    model = load(pages)
    model.save(tmp_path / "native")
    again = load(tmp_path / "native")
    assert (again.reads, again.prompt) == ("pages", "<s_cord-v2>")
    assert isinstance(again, EncoderDecoderModel)


@pytest.mark.parametrize(
    ("start", "tokens", "expected"),
    [
        ("<s>", ["<s_iitcdip>", "<s_synthdog>"], "read"),
        ("<s>", ["<s_synthdog>", "<s_rvlcdip>"], "class"),
        ("<s>", ["<s_synthdog>", "<s_docvqa>"], "answer"),
        ("<s_docvqa>", ["<s_docvqa>", "<s_cord-v2>"], "answer"),
        ("<s_own>", ["<s_own>", "<s_synthdog>"], None),
        ("<s>", [], None),
    ],
)
def test_the_prompt_of_a_page_is_the_one_that_a_folder_was_trained_on(
    pages, start, tokens, expected
):
    processor = load(pages).processor
    processor.text_tokenizer = tiny_trocr.text_tokenizer()
    processor.text_tokenizer.add_tokens(tokens)
    processor.start_ids = (processor.text_tokenizer.convert_tokens_to_ids(start),)
    found = donut.page_prompt(processor)
    assert found == (None if expected is None else donut.PROMPTS[expected])


@torch.no_grad()
def test_pieces_of_plain_text_are_the_text(pages):
    processor = load(pages).processor
    ids = processor.text_ids("two lines\nof text, no tags")
    assert "".join(tagged_text.pieces(processor, ids)) == "two lines\nof text, no tags"
    assert tagged_text.read_json(processor, ids) == {"text_sequence": "two lines\nof text, no tags"}
