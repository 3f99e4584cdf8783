"""vlm ocr: files and options are checked before a model is opened; results go where told."""

import json
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

import vlm
from tests.pages import PARAGRAPH, WidthReader, draw_lines, write_pdf
from vlm import cli
from vlm.ocr import pages as read
from vlm.ocr.results import Line, Reading, Token, Transcript
from vlm.pixels import decode


@pytest.fixture(autouse=True)
def _finds_lines_once(monkeypatch):
    """Many files are of one image here."""
    for name in ("find_lines", "runs_sideways"):
        find, found = getattr(read, name), {}

        def known(image, find=find, found=found):
            key = image.size, image.tobytes()
            return found[key] if key in found else found.setdefault(key, find(image))

        monkeypatch.setattr(read, name, known)


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
    assert out.splitlines() == [f"{p.width} {p.height}" for p in reader.images]
    assert len(reader.images) == 5
    assert reader.batches == [(5, 3, {"num_beams": 2})]
    assert err == ""


def test_texts_of_several_files_stand_under_their_names(reader, page, tmp_path, capsys):
    """And what has no text is named apart from what is read; one file and other formats have no
    such line."""
    blank, pdf = tmp_path / "blank.png", tmp_path / "two.pdf"
    Image.new("RGB", (60, 40), "white").save(blank)
    image = Image.open(page)
    image.save(pdf, "PDF", resolution=100, save_all=True, append_images=[image])
    cli.main(["ocr", str(page), str(blank), str(pdf), "--dpi", "100"])
    out, err = capsys.readouterr()
    first, second, third, fourth = out.split("\f")
    assert first.splitlines()[0] == f"==> {page} <=="
    assert len(first.splitlines()) == 6
    assert second == f"==> {blank} <==\n\n"
    assert third.splitlines()[0] == f"==> {pdf} <=="
    assert "==>" not in fourth
    assert err.splitlines()[-1] == f"{blank}: no text found"
    cli.main(["ocr", str(page), str(page), "--format", "json"])
    assert "==>" not in capsys.readouterr().out
    cli.main(["ocr", str(blank)])
    out, err = capsys.readouterr()
    assert (out, err) == ("\n", f"{blank}: no text found\n")


def test_unsure_lines_are_counted_on_the_error_stream(reader, page, capsys):
    cli.main(["ocr", str(page), "--format", "json", "--min-confidence", "0.5"])
    out, err = capsys.readouterr()
    (values,) = json.loads(out)
    assert [line["confidence"] for line in values["lines"]] == [0.9] * 3
    assert err == "2 lines of a confidence below 0.5 skipped\n"


def test_page_given_as_a_line_warns(reader, page, capsys):
    cli.main(["ocr", str(page), "--layout", "line"])
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {page}: 5 lines of text are found")
    assert err.count("\n") == 1


def test_pdf_pages_are_read_and_drawn(reader, page, tmp_path, capsys):
    pdf = tmp_path / "two.pdf"
    image = Image.open(page)
    image.save(pdf, "PDF", resolution=100, save_all=True, append_images=[image])
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
        assert Image.open(tmp_path / f"drawn-{number}.png").width > image.width


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
    text.write_text("no image")
    twin = tmp_path / "page.jpg"
    Image.new("RGB", (9, 9)).save(twin)
    for arguments, message in (
        ([], "name at least one image or PDF"),
        ([str(text)], "text.png: expected an image"),
        ([str(tmp_path / "gone.pdf")], "gone.pdf"),
        ([str(broken)], "broken.pdf: expected a whole PDF"),
        ([str(page), "--min-confidence", "2"], "--min-confidence: expected 0 to 1, found 2.0"),
        ([str(page), "--num-beams", "0"], "--num-beams must be at least 1, found 0"),
        ([str(page), "--batch-size", "0"], "--batch-size must be at least 1, found 0"),
        ([str(page), "--dpi", "0"], "--dpi must be at least 1, found 0"),
        ([str(page), "--draw", "a.jpg"], "--draw: expected a .png file"),
        (
            [str(page), "--out", str(tmp_path / "no" / "a.txt")],
            "--out: expected a path in a folder",
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


def test_a_model_of_whole_images_is_asked_for_its_reading(page, capsys, monkeypatch):
    class Whole:
        reads = "pages"

        class module:
            family = "prefix_decoder"

        def ocr(self, images, **options):
            asked.append(options)
            line = Line("all of it", 0.5, (), (0, 0, 9, 9), ((0, 0), (9, 0), (9, 9), (0, 9)))
            return (Reading((line,), image.data.size[::-1]) for image in images)

    asked = []
    monkeypatch.setattr(vlm, "load", lambda *_, **__: Whole(), raising=False)
    cli.main(["ocr", *[str(page)] * 3, "--batch-size", "2", "--prompt", "<s_x>"])
    assert capsys.readouterr().out == f"==> {page} <==\n" + "\f".join(["all of it\n"] * 3)
    assert asked == [{"stream": True, "batch_size": 2, "prompt": "<s_x>"}]
    with pytest.raises(SystemExit):
        cli.main(["ocr", str(page), "--layout", "line"])
    assert "reads an image as a whole" in capsys.readouterr().err


def many(folder, count):
    """Files of five lines each."""
    image = draw_lines(PARAGRAPH, px=20)[0]
    paths = [folder / f"scan-{number}.png" for number in range(count)]
    for path in paths:
        image.save(path)
    return paths


def test_what_was_read_is_written_before_the_next_pages_are_opened(
    reader, tmp_path, capsys, monkeypatch
):
    """Windows of four pages: 20 lines, where 16 batches of one are read together."""
    paths, out = many(tmp_path, 9), tmp_path / "out"
    out.mkdir()
    opened, seen = [], []
    open_image = decode.open_image
    monkeypatch.setattr(
        "vlm.ocr.documents.open_image", lambda path: opened.append(path) or open_image(path)
    )
    read_lines = reader.read_lines

    def watched(images, **options):
        seen.append((len(opened), sorted(path.name for path in out.iterdir())))
        return read_lines(images, **options)

    monkeypatch.setattr(reader, "read_lines", watched)
    arguments = [*map(str, paths), "--batch-size", "1", "--format", "json"]
    cli.main(["ocr", *arguments, "--out", str(out)])
    whole = [f"scan-{number}.json" for number in range(9)]
    # The last file of a window is known to be whole when a page of another comes.
    assert seen == [
        (4, []),
        (8, [*whole[:3], whole[3] + ".new"]),
        (9, [*whole[:7], whole[7] + ".new"]),
    ]
    assert sorted(path.name for path in out.iterdir()) == whole

    def interrupted(images, **options):
        if len(reader.batches) == 5:
            raise KeyboardInterrupt
        return read_lines(images, **options)

    monkeypatch.setattr(reader, "read_lines", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["ocr", *arguments, "--out", str(tmp_path / "all.json")])
    kept = json.loads((tmp_path / "all.json").read_text())
    assert [page["image"] for page in kept] == [str(path) for path in paths[:8]]


def test_files_that_cannot_be_read_are_all_named_before_a_model_is_opened(
    page, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(vlm, "load", lambda *_, **__: pytest.fail("opened"), raising=False)
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(SystemExit):
        cli.main(["ocr", str(tmp_path / "gone.png"), str(page), str(empty)])
    first, *faults = capsys.readouterr().err.splitlines()
    assert (
        first == "error: 2 of 3 files or pages cannot be read; --bad-pages skip reads the others:"
    )
    assert [fault.split(": ")[0].rpartition("/")[2] for fault in faults] == [
        "gone.png",
        "empty.png",
    ]
    with pytest.raises(SystemExit):
        cli.main(["ocr", str(empty), str(tmp_path / "gone.png"), "--bad-pages", "skip"])
    assert "2 of 2 files or pages cannot be read:\n" in capsys.readouterr().err


def damaged(folder):
    """An image whose header is sound, and a PDF whose second page of three is missing."""
    image = folder / "cut.png"
    whole = (folder / "page.png").read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    pdf = folder / "three.pdf"
    leaf = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 100] >>"
    write_pdf(
        pdf,
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R 9 0 R 4 0 R] /Count 3 >>",
        leaf,
        leaf,
    )
    return image, pdf


def test_damaged_pages_stop_the_reading_behind_what_is_written(reader, page, tmp_path, capsys):
    image, pdf = damaged(tmp_path)
    out = tmp_path / "all.json"
    for files, bad in (
        ((page, image, page), "cut.png: expected a whole PNG"),
        ((page, pdf, page), "three.pdf[2]: expected a page, found a broken one"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["ocr", *map(str, files), "--format", "json", "--out", str(out)])
        err = capsys.readouterr().err
        assert bad in err
        assert (
            "(what was read before it is written; --bad-pages skip passes over such pages)" in err
        )
        found = [values["image"] for values in json.loads(out.read_text())]
        assert found == [str(page), *([f"{pdf}[1]"] if pdf in files else [])]


def test_a_file_cut_short_by_a_damaged_page_replaces_no_whole_one(reader, page, tmp_path, capsys):
    _, pdf = damaged(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "three.txt").write_text("of an earlier reading")
    with pytest.raises(SystemExit):
        cli.main(["ocr", str(page), str(pdf), "--out", str(out)])
    assert (out / "three.txt").read_text() == "of an earlier reading"
    found = {path.name for path in out.iterdir()}
    assert found == {f"{page.stem}.txt", "three.txt", "three.txt.new"}


def test_damaged_pages_are_skipped_counted_and_named(reader, page, tmp_path, capsys):
    image, pdf = damaged(tmp_path)
    files = [tmp_path / "gone.png", page, image, pdf, page]
    cli.main(["ocr", *map(str, files), "--format", "json", "--bad-pages", "skip"])
    out, err = capsys.readouterr()
    found = [values["image"] for values in json.loads(out)]
    assert found == [str(page), f"{pdf}[1]", f"{pdf}[3]", str(page)]
    first, *faults, last = err.splitlines()
    assert first == "3 files or pages skipped:"
    assert last == f"{pdf}: no text found"
    assert [fault.split(": ")[0].rpartition("/")[2] for fault in faults] == [
        "gone.png", "cut.png", "three.pdf[2]",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main(["ocr", str(image), "--bad-pages", "skip"])
    assert "cut.png: expected a whole PNG" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["مرحبا بالعالم", "שלום עולם"])
def test_scripts_that_run_to_the_left_are_drawn(page, tmp_path, monkeypatch, capsys, text):
    class Other(WidthReader):
        def read_lines(self, images, batch_size):
            return [Transcript((Token(text, 0.5, (0.0, 1.0)),), 0.5) for _ in images]

    monkeypatch.setattr(vlm, "load", lambda *_, **__: Other(), raising=False)
    cli.main(["ocr", str(page), "--draw", str(tmp_path / "drawn.png")])
    assert capsys.readouterr().out == f"{text}\n" * 5
    assert Image.open(tmp_path / "drawn.png").width > Image.open(page).width
