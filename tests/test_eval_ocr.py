import hashlib
import importlib.util
import json
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from tests.results import read_result
from tests.runs import on_two_processes
from vlm.data.example import caption_example
from vlm.data.sources import ListSource
from vlm.draw import draw_lines
from vlm.evaluation import main, ocr_peers, ocr_reading
from vlm.metrics.calibration import calibration
from vlm.metrics.text import compare_texts
from vlm.ocr.results import Line, Reading, Token, Transcript, Word
from vlm.pixels.image_ref import ImageRef
from vlm.tokenizers.columns import line_spec

ROOT = Path(__file__).parents[1]

TRUTHS = ("Hello world", "one two three", "a", "Zebra 42", "the quick brown fox jumps", "no?")
READS = ("Hello world", "one too three", "a", "Zebra 4z", "the quick brown fox jump", "no?")
SURE = (0.99, 0.4, 0.9, 0.3, 0.6, 0.8)


def line_image(text, size=32):
    """A text in Pillow's own font, black on white."""
    font = ImageFont.load_default(size)
    image = Image.new("RGB", (int(font.getlength(text)) + 24, size + 24), "white")
    ImageDraw.Draw(image).text((12, 8), text, fill="black", font=font)
    return image


def digest(image):
    return hashlib.md5(image.tobytes()).hexdigest()


def reading(*texts, confidence=1.0):
    """What is read of an image, a line each."""
    place = {"xyxy_px": (0, 0, 9, 9), "corners_px": ((0, 0), (9, 0), (9, 9), (0, 9))}
    lines = [Line(text, confidence, (Word(text, confidence),), **place) for text in texts]
    return Reading(tuple(lines), (9, 9))


def parts_of(family):
    """What evaluations ask of a model of a family, besides reading."""
    module = nn.Linear(1, 1)
    module.family, module.parts = family, dict
    return {"module": module, "processor": SimpleNamespace(pixel_spec=line_spec(32))}


class FakeReader:
    """Reads what a file says of the images: digests to (text, confidence)."""

    def __init__(self, path):
        self.known = json.loads(Path(path).read_text())
        vars(self).update(parts_of("line_reader"))

    def read_lines(self, images, batch_size):
        found = []
        for image in images:
            text, sure = self.known[digest(image)]
            words = text.split(" ")
            tokens = [
                Token(" " * (i > 0) + w, sure ** (1 / len(words))) for i, w in enumerate(words)
            ]
            found.append(Transcript(tuple(tokens), sure))
        return found


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A list of line images, and a model that reads them with faults."""
    known, rows = {}, ["image\ttext"]
    for number, (truth, read, sure) in enumerate(zip(TRUTHS, READS, SURE)):
        image = line_image(truth)
        image.save(tmp_path / f"{number}.png")
        known[digest(image)] = (read, sure)
        rows.append(f"{number}.png\t{truth}")
    (tmp_path / "known.json").write_text(json.dumps(known))
    (tmp_path / "rows.tsv").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr("vlm.load", lambda name, **_: FakeReader(tmp_path / "known.json"))
    return tmp_path


def arguments(made, out, *more):
    return ["--model", "fake", "--data", str(made / "rows.tsv"), "--out", str(out),
            "--threads", "1", "--draws", "50", "--repeats", "1", *more]  # fmt: skip


def run(made, *more):
    main("ocr", arguments(made, made / "out", *more))
    return read_result(made / "out")


class Peer:
    """Reads everything as one text, in two ways, of which the second cannot."""

    name = "tesseract"
    ways = ("one", "other")

    def __init__(self, cores, language, page):
        self.page, self.prepared = page, 0

    def about(self):
        return {"version": "5"}

    def prepare(self, images):
        self.prepared += 1
        return images

    def read(self, prepared, way):
        return [ocr_peers.Said("Hello") for _ in prepared] if way == "one" else None


def test_figures_are_those_of_the_metrics(made, capsys):
    result = run(made)
    metrics, groups = result["metrics"], result["groups"]
    compared = compare_texts(TRUTHS, READS)
    expected = json.loads(json.dumps(compared.result(draws=50).metrics()))
    assert {key: metrics[key] for key in expected} == expected
    assert (metrics["n"], metrics["exact_match"]) == (6, 0.5)
    assert metrics["ece_lines"] == pytest.approx(calibration(SURE, compared.exact).error)
    assert metrics["ece_words"] > 0
    assert set(groups) == {"length"}
    assert list(groups["length"]) == ["1 to 10", "11 to 20", "21 to 40"]
    assert groups["length"]["11 to 20"]["n"] == 2
    assert ["o", "w", 1] not in result["confusions"]
    assert ["2", "z", 1] in result["confusions"]
    assert result["speed"]["lines_per_second"] > 0
    lines = [json.loads(line) for line in (made / "out/lines.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == list(TRUTHS)
    assert [line["read"]["fake"]["text"] for line in lines] == list(READS)
    assert lines[1]["read"]["fake"]["cer"] == pytest.approx(1 / 13)
    assert lines[0]["row"] == "rows.tsv:2"
    shown = capsys.readouterr().out
    assert "6 lines" in shown
    assert "CER" in shown


def test_result_says_what_was_asked_and_how(made):
    result = run(made, "--normalise", "lower", "--rows", "3")
    assert (result["rows"], result["metrics"]["n"], result["options"]["repeats"]) == (3, 3, 1)
    assert result["data"] == ["rows.tsv"]
    assert result["normalisation"] == {
        "name": "lower", "meaning": "Unicode NFC, lower case, white space joined",
    }  # fmt: skip
    assert result["reader"]["dtype"] == "float32"
    assert result["reader"]["batch"] == 32
    for name in ("torch", "vlm", "jiwer"):
        assert name in result["versions"]


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(made, monkeypatch, tmp_path):
    """Six lines in runs of two do not divide over the two."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}]\n"
        "import vlm\n"
        "from vlm.evaluation import main, ocr_reading\n"
        "from tests.test_eval_ocr import FakeReader\n"
        "ocr_reading.UNIT = 2\n"
        f"vlm.load = lambda name, **_: FakeReader({str(made / 'known.json')!r})\n"
        "main('ocr')\n"
    )
    monkeypatch.setattr(ocr_reading, "UNIT", 2)
    one = run(made, "--normalise", "none")
    on_two_processes(script, *arguments(made, tmp_path / "two", "--normalise", "none"))
    two = json.loads((tmp_path / "two/result.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    for key in ("metrics", "groups", "confusions"):
        assert one[key] == two[key]
    lines = [(folder / "lines.jsonl").read_text() for folder in (made / "out", tmp_path / "two")]
    assert lines[0] == lines[1]


def test_lines_are_told_apart_by_font_where_the_source_says(made, monkeypatch):
    source = ListSource(
        [
            caption_example(f"line {i}", ImageRef(made / f"{i}.png", str(i)), text, "")
            for i, text in enumerate(TRUTHS)
        ],
        "drawn",
    )
    source.font_of = lambda row: ("serif", "brush")[row % 2]
    source.hand_of = lambda row: row % 2 == 1
    monkeypatch.setattr("vlm.evaluation.base.open_source", lambda text, **_: source)
    found = run(made)["groups"]
    assert list(found["font"]) == ["brush", "serif"]
    assert list(found["kind"]) == ["handwriting", "printed"]
    assert found["kind"]["handwriting"]["cer"] == compare_texts(
        TRUTHS[1::2], READS[1::2]
    ).result().cer.rate  # fmt: skip
    lines = (made / "out/lines.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["hand"] is True


def test_peer_reads_the_same_lines_and_is_compared(made, monkeypatch, capsys):
    monkeypatch.setitem(ocr_peers.PEERS, "tesseract", Peer)
    result = run(made, "--peer", "tesseract")
    peer = result["baselines"]["tesseract"]
    assert peer["metrics"]["cer"] == compare_texts(TRUTHS, ["Hello"] * 6).result().cer.rate
    assert (peer["metrics"]["ece_lines"], peer["reader"]) == (None, {"version": "5"})
    assert (peer["speed"]["way"], list(peer["speed"]["ways"])) == ("one", ["one"])
    rate, (low, high) = peer["cer_difference"], peer["cer_difference_ci"]
    assert peer["compared_to"] == "fake"
    assert low <= rate <= high < 0
    assert rate == pytest.approx(result["metrics"]["cer"] - peer["metrics"]["cer"])
    assert "fake less tesseract" in capsys.readouterr().out
    alone = ["--data", str(made / "rows.tsv"), "--out", str(made / "peer"), "--repeats", "2"]
    main("ocr", [*alone, "--peer", "tesseract", "--draws", "5"])
    result = read_result(made / "peer")
    assert (result["model"], result["metrics"], result["groups"]) == (None, None, {})
    assert result["baselines"]["tesseract"]["metrics"]["n"] == 6


def test_pages_are_compared_as_whole_texts_with_their_breaks_as_spaces(made, monkeypatch):
    readings = [reading("Hello", "world"), reading("two", "", "lines")]
    seen = {}

    def ocr(images, batch_size, layout):
        seen.update(layout=layout, count=len(images))
        return readings

    def read_lines(images, batch_size):
        raise AssertionError("pages were read as lines")

    model = SimpleNamespace(ocr=ocr, read_lines=read_lines, **parts_of("line_reader"))
    monkeypatch.setattr("vlm.load", lambda name, **_: model)
    monkeypatch.setattr(ocr_reading, "WARM_UP", 2)
    rows = "image\ttext\n0.png\tHello\\nworld\n1.png\tone\\nlines\n"
    (made / "pages.tsv").write_text(rows)
    result = run(made, "--data", str(made / "pages.tsv"), "--page")
    assert seen == {"layout": "page", "count": 2}
    figures = result["metrics"]
    assert (figures["exact_match"], figures["words"]) == (0.5, 4)
    assert figures["wer"] == 0.25
    assert not (made / "out/worst.png").exists()


def test_model_without_lines_is_asked_for_the_image(made, monkeypatch):
    """Its lines' confidences together are that of the text."""
    readings = [reading(text, confidence=sure) for text, sure in zip(READS, SURE)]
    readings[0] = reading("Hello", "world", confidence=0.9)
    model = SimpleNamespace(
        ocr=lambda images, batch_size: readings[: len(images)], **parts_of("prefix_decoder")
    )
    monkeypatch.setattr("vlm.load", lambda name, **_: model)
    result = run(made)
    assert result["metrics"]["cer"] == compare_texts(TRUTHS, READS).result().cer.rate
    sure = (0.81, *SURE[1:])
    expected = calibration(sure, compare_texts(TRUTHS, READS).exact).error
    assert result["metrics"]["ece_lines"] == pytest.approx(expected)


def test_page_of_worst_lines_shows_them_worst_first(made, monkeypatch):
    drawn = []
    monkeypatch.setattr("vlm.evaluation.ocr.draw_lines", lambda *given: drawn.append(given))
    run(made)
    images, truths, reads, path, notes = drawn[0]
    assert len(images) == 3
    assert sorted(truths) == sorted(t for t, r in zip(TRUTHS, READS) if t != r)
    assert all(note.endswith("1 edits") for note in notes)
    assert reads[0] == "one too three"
    assert path.name == "worst.png"


def test_drawings_are_images(made):
    run(made)
    for name in ("worst.png", "reliability-lines.png", "reliability-words.png"):
        pixels = np.asarray(Image.open(made / "out" / name).convert("RGB"))
        assert pixels.shape[1] > 300
        assert pixels.std() > 5


def test_only_what_is_wrong_is_coloured_on_the_page(tmp_path):
    def colours(truth, read):
        """Whether a page has green (of the truth) and red (of what was read) ink."""
        draw_lines([line_image("x")], [truth], [read], tmp_path / "page.png", ["note"])
        pixels = np.asarray(Image.open(tmp_path / "page.png")).astype(int)
        red, green, blue = pixels.transpose(2, 0, 1)
        return bool((green > red + 60).any()), bool((red > np.maximum(green, blue) + 60).any())

    assert colours("cat", "cat") == (False, False)
    assert colours("cat", "cot") == (True, True)
    assert colours("cat", "at") == (True, True)  # with a caret where the c is skipped
    assert colours("a cat", "acat") == (True, True)
    assert colours("cat", "cats") == (False, True)
    with pytest.raises(ValueError, match="found 1, 1, 0 and 1"):
        draw_lines([line_image("x")], ["x"], [], tmp_path / "page.png")


def test_rows_left_out_are_counted_and_named(made, capsys):
    with (made / "rows.tsv").open("a") as file:
        file.write("none.png\tx\n0.png\n")
    with pytest.raises(SystemExit):
        main("ocr", arguments(made, made / "out"))
    assert "error: rows.tsv:8: image file 'none.png'" in capsys.readouterr().err
    result = run(made, "--bad-rows", "skip")
    assert (result["rows"], result["metrics"]["n"], result["skipped"]) == (8, 6, 2)
    assert any("found 1: '0.png'" in line for line in result["examples_skipped"])


def test_bad_arguments_are_one_line(made, monkeypatch, capsys):
    for more, message in (
        (["--data", "nothing"], "--data nothing: expected a source"),
        (["--repeats", "0"], "--repeats must be at least 1, found 0"),
        (["--rows", "0"], "--rows must be at least 1, found 0"),
    ):
        with pytest.raises(SystemExit):
            main("ocr", [*arguments(made, made / "out"), *more])
        found = capsys.readouterr().err
        assert message in found
        assert "Traceback" not in found
    with pytest.raises(SystemExit):
        main("ocr", ["--data", str(made / "rows.tsv"), "--out", str(made / "out")])
    assert "expected --model, or --peer, or both, found neither" in capsys.readouterr().err
    other = SimpleNamespace(module=SimpleNamespace(family="contrastive"))
    monkeypatch.setattr("vlm.load", lambda name, **_: other)
    with pytest.raises(SystemExit):
        main("ocr", arguments(made, made / "out"))
    found = capsys.readouterr().err
    assert "expected a model of the family prefix_decoder (PaliGemma" in found
    assert "to evaluate ocr; found a contrastive one" in found


# Peers

PROGRAM = """#!/bin/sh
case "$1" in
  --version) echo "tesseract 5.9.9"; echo " leptonica" ;;
  --list-langs) echo 'List of available languages in "/x" (1):'; echo eng ;;
  *.txt) while read -r path; do basename "$path"; printf '\\f'; done < "$1" ;;
  *) basename "$1"; echo "$OMP_THREAD_LIMIT $2 $3 $4 $5 $6"; printf '\\f' ;;
esac
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program in tesseract's place that says what it was asked."""
    path = tmp_path / "bin/tesseract"
    path.parent.mkdir()
    path.write_text(PROGRAM)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


def test_tesseract_is_run_as_its_users_run_it(program):
    peer = ocr_peers.Tesseract(3)
    assert peer.about() == {
        "version": "5.9.9", "cores": 3, "failed": 0,
        "command": "tesseract IMAGE stdout --psm 7 -l eng",
    }  # fmt: skip
    prepared = peer.prepare([line_image("x")] * 4)
    assert [Image.open(path).size for path in prepared] == [line_image("x").size] * 4
    for way, threads in (("one by one", 3), ("one on each core", 1)):
        said = peer.read(prepared, way)
        assert [one.text for one in said] == [
            f"{i}.png\n{threads} stdout --psm 7 -l eng" for i in range(4)
        ]
    said = peer.read(prepared, "a list on each core")
    assert [one.text for one in said] == [f"{i}.png" for i in range(4)]
    after = "basename \"$path\"; printf '\\f'"
    program.write_text(PROGRAM.replace(after, "printf \"$mark$path\"; mark='\\f'"))
    said = peer.read(prepared, "a list on each core")
    assert [Path(one.text).name for one in said] == [f"{i}.png" for i in range(4)]
    page = ocr_peers.Tesseract(1, page=True)
    assert "--psm 3" in page.read(page.prepare([line_image("x")]), "one by one")[0].text


def test_tesseract_that_fails_reads_nothing_and_counts_it(program):
    program.write_text(PROGRAM.replace("  *) basename", "  *1.png) exit 1 ;;\n  *) basename"))
    peer = ocr_peers.Tesseract(2)
    said = peer.read(peer.prepare([line_image("x")] * 3), "one by one")
    assert [bool(one.text) for one in said] == [True, False, True]
    assert peer.about()["failed"] == 1
    program.write_text(PROGRAM.replace("basename \"$path\"; printf '\\f'", "exit 1"))
    assert peer.read(peer.prepare([line_image("x")] * 3), "a list on each core") is None


def test_missing_peers_say_how_to_get_them(made, program, monkeypatch, capsys):
    with pytest.raises(ValueError, match="its data for 'deu', found eng; install them, such as"):
        ocr_peers.Tesseract(1, language="deu")
    monkeypatch.setenv("PATH", str(made))
    monkeypatch.setattr(ocr_peers, "find_spec", lambda name: None)
    for name, message in (
        ("tesseract", "--peer tesseract: expected the program tesseract on the PATH, found none"),
        ("rapidocr", "no rapidocr and no onnxruntime; pip install rapidocr onnxruntime"),
    ):
        with pytest.raises(SystemExit):
            main("ocr", arguments(made, made / "out", "--peer", name))
        assert message in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="tesseract is not installed")
def test_tesseract_reads_a_drawn_line_alike_in_all_ways():
    peer = ocr_peers.Tesseract(1)
    prepared = peer.prepare([line_image("Hello world"), line_image("one two three")])
    for way in peer.ways:
        said = peer.read(prepared, way)
        assert [one.text for one in said] == ["Hello world", "one two three"], way


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("rapidocr", "onnxruntime"))), reason="no rapidocr here"
)
def test_rapidocr_reads_a_drawn_line_with_the_models_in_its_package(monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    peer = ocr_peers.RapidOcr(1)
    blank = Image.new("RGB", (80, 40), "white")
    said = peer.read(peer.prepare([line_image("Hello world"), blank]), "one by one")
    assert [" ".join(one.text.split()) for one in said] == ["Hello world", ""]
    assert len(peer.about()["models"]) == 3
    alone = ocr_peers.PEERS["rapidocr-lines"](1)
    said = alone.read(alone.prepare([line_image("Hello world")]), "one by one")
    assert " ".join(said[0].text.split()) == "Hello world"
    assert (alone.name, alone.about()["models"]) == ("rapidocr-lines", ["PP-OCRv6_rec_small.onnx"])
    with pytest.raises(ValueError, match="rapidocr-lines: expected lines, found --page"):
        ocr_peers.PEERS["rapidocr-lines"](1, page=True)
