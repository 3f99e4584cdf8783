import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import vlm
from tests import tiny, training
from tests.folders import public
from tests.results import read_result
from tests.rows import CAPTIONS, retrieval_folder
from tests.runs import on_two_processes
from vlm.data.example import BadRow
from vlm.evaluation import main
from vlm.metrics.retrieval import retrieval
from vlm.retrieval.embed_captions import _read_captions

PATH = Path(__file__).parents[1] / "eval/retrieval.py"

SHOWN = (0, 1, 2, 0, 3, 1, 0, 2, 3)
TEXTS = ("a cat", "dogs", "a fox", "one cat", "red", "two dogs", "cat", "the fox", "red things")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A saved tiny model, and nine rows of four different images."""
    folder = tmp_path_factory.mktemp("eval")
    public().save(folder / "model")
    for i in set(SHOWN):
        tiny.image(i, (20, 30)).save(folder / f"{i}.png")
    write_rows(folder, [{"image": f"{i}.png", "caption": text} for i, text in zip(SHOWN, TEXTS)])
    return folder


def write_rows(folder, rows, name="rows"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(made, out, *more):
    return [
        "--model", str(made / "model"), "--data", str(made / "rows.jsonl"), "--out", str(out),
        "--batch", "4", "--workers", "0", "--threads", "1", "--draws", "20", *more,
    ]  # fmt: skip


def run(made, out, *more):
    main("retrieval", arguments(made, out, *more))
    return read_result(out)


def figures_of(made, images, texts, owner):
    """Those of the public model's vectors."""
    model = vlm.load(made / "model", device="cpu")
    found = retrieval(model.embed_images(images), model.embed_texts(texts), owner, draws=20)
    return found.metrics()


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(made, tmp_path, capsys):
    """Nine rows in batches of four do not divide over the two, and the four images are one
    batch, so that the second process has none."""
    one = run(made, tmp_path / "one", "--workers", "1")
    on_two_processes(PATH, *arguments(made, tmp_path / "two"))
    two = json.loads((tmp_path / "two/result.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["metrics"] == two["metrics"]
    pages = [(tmp_path / run / "hits.png").read_bytes() for run in ("one", "two")]
    assert pages[0] == pages[1]
    assert (one["metrics"]["images"], one["metrics"]["texts"], one["rows"]) == (4, 9, 9)
    assert "4 images and 9 texts" in capsys.readouterr().out


def test_figures_are_those_of_the_public_models_vectors(made, tmp_path):
    result = run(made, tmp_path)
    images = [made / f"{i}.png" for i in range(4)]
    expected = json.loads(json.dumps(figures_of(made, images, TEXTS, SHOWN)))
    assert {key: result["metrics"][key] for key in expected} == expected
    chance = result["chance"]
    assert [chance[f"text_to_image_recall_at_{k}"] for k in (1, 5, 10)] == [0.25, 1.0, 1.0]
    counts = [SHOWN.count(i) for i in range(4)]
    assert chance["image_to_text_recall_at_1"] == pytest.approx(sum(counts) / 4 / 9)


def test_result_says_what_was_compared_and_how(made, tmp_path):
    result = run(made, tmp_path, "--rows", "5", "--seed", "3", "--template", "a photo of {}")
    assert result["rows"] == 5
    assert result["options"]["template"] == "a photo of {}"
    assert result["text"]["length"] == 12
    assert result["options"]["seed"] == 3
    assert result["precision"] == "float32"
    assert result["preprocessing"]["size_hw"]
    assert {"torch", "vlm", "transformers"} <= set(result["versions"])
    assert result["skipped"] == 0
    assert Image.open(tmp_path / "hits.png").width > 600


def test_captions_beyond_the_context_are_cut_and_counted(made, tmp_path, capsys):
    """Of 12 tokens one is the end."""
    result = run(made, tmp_path, "--template", "12345678{}")
    expected = [max(0, 8 + len(text) - 11) for text in TEXTS]
    assert result["tokens_cut"] == sum(expected)
    assert result["texts_cut"] == sum(map(bool, expected))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{result['texts_cut']} of 9 texts were longer than 12 tokens" in shown


def test_rows_may_have_several_captions_in_any_form(made, tmp_path):
    """A list, several answers, a file of equal bytes under another name, and images in shards."""
    (made / "copy.png").write_bytes((made / "0.png").read_bytes())
    turns = [("user", "<image>"), ("assistant", "dogs"), ("user", "?"), ("assistant", "two dogs")]
    rows = [
        {"image": "0.png", "caption": ["a cat", "one cat"]},
        {"image": "1.png", "messages": [{"role": r, "content": text} for r, text in turns]},
        {"image": "copy.png", "caption": "cat"},
    ]
    data = write_rows(made, rows, "many")
    result = run(made, tmp_path / "a", "--data", str(data))
    texts = ["a cat", "one cat", "dogs", "two dogs", "cat"]
    images = [made / "0.png", made / "1.png"]
    expected = json.loads(json.dumps(figures_of(made, images, texts, [0, 0, 1, 1, 0])))
    assert {key: result["metrics"][key] for key in expected} == expected

    shards = retrieval_folder(tmp_path / "wds")
    result = run(made, tmp_path / "b", "--data", f"clip_benchmark:{shards}:test")
    assert (result["metrics"]["images"], result["metrics"]["texts"]) == (3, 6)
    texts = [text for said in CAPTIONS for text in said]
    source = vlm.data.sources.open_source(f"clip_benchmark:{shards}")
    images = [source[row].images[0].data for row in (0, 2, 3)]
    expected = json.loads(json.dumps(figures_of(made, images, texts, [0, 0, 1, 2, 2, 2])))
    assert {key: result["metrics"][key] for key in expected} == expected


def test_tables_with_lists_of_captions_are_read(made, tmp_path):
    from datasets import Dataset

    images = [{"bytes": (made / f"{i}.png").read_bytes(), "path": None} for i in range(2)]
    table = Dataset.from_dict({"image": images, "caption": [["a cat", "cat"], ["dogs"]]})
    table.save_to_disk(tmp_path / "table")
    figures = run(made, tmp_path / "out", "--data", str(tmp_path / "table"))["metrics"]
    assert (figures["images"], figures["texts"]) == (2, 3)


def unusable(made):
    """Of seven rows two can be used: the broken image is shown by two."""
    (made / "bad.png").write_bytes(b"no image")
    rows = [
        {"image": "0.png", "caption": "a cat"},
        {"image": "1.png", "caption": " "},
        {"image": "bad.png", "caption": "broken"},
        {"image": "2.png"},
        {"image": "bad.png", "caption": "broken too"},
        {"image": "none.png", "caption": "gone"},
        {"image": "3.png", "caption": "red"},
    ]
    return write_rows(made, rows, "bad")


def test_rows_that_cannot_be_used_are_named_or_left_out_and_counted(made, tmp_path, capsys):
    options = ["--data", str(unusable(made))]
    with pytest.raises(SystemExit):
        run(made, tmp_path, *options)
    error = capsys.readouterr().err.splitlines()[-1].strip()
    path = tmp_path / "bad.jsonl"
    found = "error: bad.jsonl:2: expected a caption, found an empty text (in "
    assert error.startswith(found)
    assert error.endswith(f"/{path.name})")
    result = run(made, tmp_path, *options, "--bad-rows", "skip")
    assert result["skipped"] == 5
    names = [line.split(": ")[0] for line in result["examples_skipped"]]
    assert names == [f"bad.jsonl:{line}" for line in (2, 3, 4, 5, 6)]
    assert "bad.png" in result["examples_skipped"][1]
    assert "expected one of the keys" in result["examples_skipped"][2]
    expected = figures_of(made, [made / "0.png", made / "3.png"], ["a cat", "red"], [0, 1])
    expected = json.loads(json.dumps(expected))
    assert {key: result["metrics"][key] for key in expected} == expected
    assert "5 of 7 rows skipped" in capsys.readouterr().out


def test_images_that_cannot_be_decoded_stop_it_with_their_row(made, tmp_path, capsys):
    data = write_rows(made, [{"image": "bad.png", "caption": "a"}], "broken")
    unusable(made)
    for more in ((), ("--workers", "1")):
        with pytest.raises(SystemExit):
            run(made, tmp_path, "--data", str(data), *more)
        error = capsys.readouterr().err.splitlines()[-1].strip()
        assert "error: broken.jsonl:1: " in error
        assert "bad.png" in error
    with pytest.raises(SystemExit):
        run(made, tmp_path, "--data", str(data), "--bad-rows", "skip")
    assert "none of 1 rows can be used, such as broken.jsonl:1" in capsys.readouterr().err
    data = write_rows(made, [{"image": "0.png", "caption": ""}] * 2, "empty")
    with pytest.raises(SystemExit):
        run(made, tmp_path, "--data", str(data), "--bad-rows", "skip")
    assert "none of 2 rows can be used, such as empty.jsonl:1" in capsys.readouterr().err


def test_models_of_other_families_are_named(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlm, "load", lambda *_, **__: training.model())
    with pytest.raises(SystemExit):
        run(made, tmp_path)
    error = capsys.readouterr().err
    assert f"--model {made / 'model'}: expected a model of the family contrastive" in error
    assert "to evaluate retrieval; found a decoder_only one" in error


def test_vectors_without_direction_are_named_by_their_row(made, tmp_path, capsys):
    model = public()
    with torch.no_grad():
        model.module.text_head.weight.fill_(torch.nan)
    model.save(tmp_path / "model")
    with pytest.raises(SystemExit):
        run(made, tmp_path / "out", "--model", str(tmp_path / "model"))
    error = capsys.readouterr().err
    assert "vectors that are zero or not finite for ['rows.jsonl:1', 'rows.jsonl:2'," in error


def test_bad_arguments_are_one_line(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlm, "load", lambda *_, **__: pytest.fail("the model was opened"))
    for more, message in (
        (["--data", "nothing"], "--data nothing: expected a source"),
        (["--batch", "0"], "--batch must be at least 1, found 0"),
        (["--draws", "0"], "--draws must be at least 1, found 0"),
        (["--template", "a photo"], "--template: expected {} at the caption's place, found 'a ph"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(made, tmp_path, *more)
        assert stopped.value.code == 1
        found = capsys.readouterr().err
        assert message in found
        assert "Traceback" not in found


def test_a_place_that_cannot_be_written_to_is_named_before_the_model_is_opened(
    made, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(vlm, "load", lambda *_, **__: pytest.fail("the model was opened"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc")):
        with pytest.raises(SystemExit):
            run(made, out)
        assert f"error: --out {out}: expected a folder to write to" in capsys.readouterr().err


def test_figures_stay_where_a_image_is_gone_when_hits_are_drawn(
    made, tmp_path, monkeypatch, capsys
):
    rows = [{"image": str(tmp_path / f"{i}.png"), "caption": TEXTS[i]} for i in range(3)]
    for row in rows:
        tiny.image(0, (20, 30)).resize((20 + rows.index(row), 30)).save(row["image"])

    def measured(*given, **options):
        (tmp_path / "1.png").unlink()
        return retrieval(*given, **options)

    monkeypatch.setattr("vlm.evaluation.retrieval.retrieval", measured)
    with pytest.raises(SystemExit):
        run(made, tmp_path / "out", "--data", str(write_rows(tmp_path, rows)))
    shown = capsys.readouterr()
    assert "1.png" in shown.err
    assert "3 images and 3 texts" in shown.out
    assert json.loads((tmp_path / "out/result.json").read_text())["metrics"]["images"] == 3


def test_caption_of_which_the_model_reads_nothing_is_named():
    """As SigLIP's tokenizer leaves punctuation out."""
    processor = training.contrastive_model().processor
    processor.unread = lambda texts: [i for i, text in enumerate(texts) if text == "!!!"]
    row = tiny.example("r", (None,), "!!!", images=(tiny.image(0),))
    with pytest.raises(BadRow, match=r"r: expected a caption, found '!!!', of which the model"):
        _read_captions(processor, row)
