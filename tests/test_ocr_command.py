"""vlm ocr: files and options are judged before a model is opened; results go where told."""

import json
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

import vlm
from tests.pages import PARAGRAPH, WidthReader, draw_lines
from vlm import cli
from vlm.inference.reading import Line, Reading


@pytest.fixture
def reader(monkeypatch):
    reader = WidthReader(confidences=(0.9, 0.2))
    monkeypatch.setattr(vlm, "load", lambda source, **_: reader, raising=False)
    return reader


@pytest.fixture
def page(tmp_path):
    draw_lines(PARAGRAPH, px=20)[0].save(tmp_path / "page.png")
    return tmp_path / "page.png"


def test_text_goes_to_the_terminal_in_order(reader, page, capsys):
    cli.main(["ocr", str(page), "--num-beams", "2", "--batch-size", "3"])
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{p.width} {p.height}" for p in reader.pictures]
    assert len(reader.pictures) == 5
    assert reader.batches == [(5, 3, {"num_beams": 2})]
    assert err == ""


def test_unsure_lines_are_counted_on_the_error_stream(reader, page, capsys):
    cli.main(["ocr", str(page), "--format", "json", "--min-confidence", "0.5"])
    out, err = capsys.readouterr()
    (values,) = json.loads(out)
    assert [line["confidence"] for line in values["lines"]] == [0.9] * 3
    assert err == "2 lines of a confidence below 0.5 left out\n"


def test_page_given_as_a_line_warns(reader, page, capsys):
    cli.main(["ocr", str(page), "--layout", "line"])
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {page}: 5 lines of text are found")
    assert err.count("\n") == 1


def test_pdf_pages_are_read_and_drawn(reader, page, tmp_path, capsys):
    pdf = tmp_path / "two.pdf"
    picture = Image.open(page)
    picture.save(pdf, "PDF", resolution=100, save_all=True, append_images=[picture])
    out = tmp_path / "all.hocr"
    drawing = tmp_path / "drawn.png"
    arguments = ["--format", "hocr", "--out", str(out), "--draw", str(drawing), "--dpi", "100"]
    cli.main(["ocr", str(page), str(pdf), *arguments])
    assert capsys.readouterr().out == ""
    text = out.read_text()
    ET.fromstring(text)
    assert text.count('class="ocr_page"') == 3
    assert text.count('class="ocr_line"') == 15
    assert f"{pdf}[2]" in text
    for number in (1, 2, 3):
        assert Image.open(tmp_path / f"drawn-{number}.png").width > picture.width


def test_folder_gets_a_file_for_each_input(reader, page, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (50, 80), "white").save(other)
    folder = tmp_path / "out"
    folder.mkdir()
    cli.main(["ocr", str(page), str(other), "--format", "alto", "--out", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == ["other.xml", "page.xml"]
    for path in folder.iterdir():
        ET.parse(path)


def test_bad_input_ends_with_one_line_before_a_model_is_opened(page, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vlm, "load", lambda *_, **__: pytest.fail("opened"), raising=False)
    broken = tmp_path / "broken.pdf"
    broken.write_bytes(b"%PDF-1.4 nothing")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    twin = tmp_path / "page.jpg"
    Image.new("RGB", (9, 9)).save(twin)
    for arguments, message in (
        ([], "name at least one picture or PDF"),
        ([str(text)], "text.png: expected a picture"),
        ([str(tmp_path / "gone.pdf")], "gone.pdf"),
        ([str(broken)], "broken.pdf: expected a whole PDF"),
        ([str(page), "--min-confidence", "2"], "--min-confidence: expected 0 to 1, found 2.0"),
        ([str(page), "--num-beams", "0"], "--num-beams must be at least 1, found 0"),
        ([str(page), "--batch-size", "0"], "--batch-size must be at least 1, found 0"),
        ([str(page), "--dpi", "0"], "--dpi must be at least 1, found 0"),
        ([str(page), "--draw", "a.jpg"], "--draw: expected a .png file"),
        (
            [str(page), "--out", str(tmp_path / "no" / "a.txt")],
            "--out: expected a place in a folder",
        ),
        ([str(page), str(twin), "--out", str(tmp_path)], "several files would be written to"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["ocr", *arguments])
        assert stopped.value.code == 1
        found = capsys.readouterr().err
        assert found.startswith("error: ")
        assert message in found
        assert found.count("\n") == 1


def test_model_of_another_family_is_named(page, capsys, monkeypatch):
    class Other:
        class module:
            family = "contrastive"

    monkeypatch.setattr(vlm, "load", lambda *_, **__: Other(), raising=False)
    with pytest.raises(SystemExit):
        cli.main(["ocr", str(page), "--model", "clip"])
    assert "clip: a contrastive model reads no text" in capsys.readouterr().err


def test_a_model_of_whole_pictures_is_asked_for_its_reading(page, capsys, monkeypatch):
    class Whole:
        class module:
            family = "prefix_decoder"

        def ocr(self, images, batch_size, **options):
            line = Line("all of it", 0.5, (), (0, 0, 9, 9), ((0, 0), (9, 0), (9, 9), (0, 9)))
            return [Reading((line,), (image.height, image.width)) for image in images]

    monkeypatch.setattr(vlm, "load", lambda *_, **__: Whole(), raising=False)
    cli.main(["ocr", str(page)])
    assert capsys.readouterr().out == "all of it\n"
    with pytest.raises(SystemExit):
        cli.main(["ocr", str(page), "--layout", "line"])
    assert "reads a picture as a whole" in capsys.readouterr().err
