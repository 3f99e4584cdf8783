import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlm
from tests import tiny, training
from tests.folders import public
from tests.reference import tiny_siglip
from tests.results import read_result
from tests.rows import NAMES, classification_folder
from tests.runs import on_two_processes
from vlm.evaluation import main, zero_shot
from vlm.metrics.classification import classification

PATH = Path(__file__).parents[1] / "eval/zero_shot.py"

KINDS = ("cat", "dog", "cat", "fox", "dog", "cat", "fox", "cat", "dog")
CLASSES = ["cat", "dog", "fox"]
TEMPLATES = ("{}", "a {c}", "many {}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A saved tiny model, and nine rows of images with a class under a key of its own."""
    folder = tmp_path_factory.mktemp("eval")
    public().save(folder / "model")
    for i in range(len(KINDS)):
        tiny.image(i, (20, 30)).save(folder / f"{i}.png")
    write_rows(folder, KINDS)
    return folder


def write_rows(folder, kinds, name="rows"):
    rows = [{"image": f"{i}.png", "caption": f"no {i}", "kind": x} for i, x in enumerate(kinds)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(made, out, *more):
    return [
        "--model", str(made / "model"), "--data", str(made / "rows.jsonl"), "--label", "kind",
        "--out", str(out), "--batch", "4", "--workers", "0", "--threads", "1", *more,
    ]  # fmt: skip


def run(made, out, *more):
    main("zero-shot", arguments(made, out, *more))
    return read_result(out)


def refusal(made, out, capsys, *more):
    with pytest.raises(SystemExit) as stopped:
        run(made, out, *more)
    assert stopped.value.code == 1
    found = capsys.readouterr().err
    assert "Traceback" not in found
    return found


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(made, tmp_path, capsys):
    """Nine images in batches of four do not divide over the two; the prompts of three
    classes are one batch, so that the second process has none."""
    more = ("--templates", *TEMPLATES)
    one = run(made, tmp_path / "one", *more, "--workers", "1")
    on_two_processes(PATH, *arguments(made, tmp_path / "two", *more))
    two = json.loads((tmp_path / "two/result.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["metrics"] == two["metrics"]
    assert one["confusions"] == two["confusions"]
    assert "9 images" in capsys.readouterr().out


@pytest.mark.parametrize("bias", [None, -10.0])
def test_figures_are_those_of_the_public_models_scores(made, tmp_path, bias):
    """A bias, which all classes share, changes none."""
    given = public(bias=bias)
    given.save(tmp_path / "model")
    more = ("--model", str(tmp_path / "model"), "--templates", *TEMPLATES)
    result = run(made, tmp_path / "out", *more)
    images = [made / f"{i}.png" for i in range(9)]
    templates = [template.replace("{c}", "{}") for template in TEMPLATES]
    scores = given.classify(images, CLASSES, templates).numpy()
    right = np.array([CLASSES.index(kind) for kind in KINDS])
    expected = classification(scores, right, scale=1.0).metrics()
    for key, value in expected.items():
        assert result["metrics"][key] == pytest.approx(value, abs=1e-5), key
    assert result["classes"] == CLASSES
    assert result["chance"] == {
        "accuracy": 1 / 3, "accuracy_top5": 1.0, "accuracy_mean_per_class": 1 / 3,
    }  # fmt: skip
    most_frequent = result["baselines"]["most_frequent_class"]["metrics"]
    assert most_frequent == {"accuracy": 4 / 9}
    chosen = scores.argmax(1)
    missed = sum(pair["count"] for pair in result["confusions"])
    assert missed == (chosen != right).sum()
    for pair in result["confusions"]:
        a, b = CLASSES.index(pair["class"]), CLASSES.index(pair["taken_for"])
        assert pair["count"] == ((right == a) & (chosen == b)).sum()
        assert pair["share"] == pytest.approx(pair["count"] / (right == a).sum())


def test_result_says_what_was_asked_and_how(made, tmp_path, capsys):
    result = run(made, tmp_path, "--rows", "5", "--templates", "{} in a very long prompt")
    assert result["rows"] == 5
    assert result["label"] == "kind"
    assert result["templates"] == ["{} in a very long prompt"]
    assert result["task"] == "zero-shot"
    assert result["precision"] == "float32"
    assert result["preprocessing"]["size_hw"]
    assert {"torch", "vlm", "transformers"} <= set(result["versions"])
    assert set(result["groups"]["class"]) == set(result["classes"])
    assert result["prompts_cut"] == len(result["classes"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "prompts were longer than the context" in shown
    assert Image.open(tmp_path / "reliability.png").height > 300


def test_templates_and_classes_may_lie_in_files(made, tmp_path):
    """A label is read as the name after its tab; classes without images are candidates too."""
    (tmp_path / "templates.txt").write_text("a {c}\nan {}\n\n")
    (tmp_path / "classes.txt").write_text("fox\tred fox\ncat\ndog\twild dog\nhorse\n")
    result = run(
        made, tmp_path / "out", "--templates", str(tmp_path / "templates.txt"),
        "--classes", str(tmp_path / "classes.txt"),
    )  # fmt: skip
    assert result["templates"] == ["a {}", "an {}"]
    assert result["classes"] == ["red fox", "cat", "wild dog", "horse"]
    assert result["metrics"]["classes_without_examples"] == 1
    assert result["groups"]["class"]["horse"] == {"n": 0, "accuracy": None}
    assert result["chance"]["accuracy"] == 0.25
    images = [made / f"{i}.png" for i in range(9)]
    scores = vlm.load(made / "model", device="cpu").classify(
        images, result["classes"], result["templates"]
    )
    right = np.array([{"fox": 0, "cat": 1, "dog": 2}[kind] for kind in KINDS])
    expected = classification(scores, right, scale=1.0).metrics()
    assert result["metrics"]["accuracy"] == expected["accuracy"]


def test_clip_benchmark_brings_its_classes_and_templates(made, tmp_path):
    folder = classification_folder(tmp_path / "wds", zeroshot_classification_templates="one {c}\n")
    data = f"clip_benchmark:{folder}:test"
    arguments = ["--model", str(made / "model"), "--data", data, "--out", str(tmp_path / "out")]
    main("zero-shot", [*arguments, "--workers", "0", "--threads", "1"])
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["classes"] == NAMES
    assert result["templates"] == ["one {}"]
    assert result["metrics"]["n"] == 4


def test_classes_of_a_image_folder_are_its_folders(made, tmp_path):
    for i in range(4):
        (tmp_path / "data" / CLASSES[i % 2]).mkdir(parents=True, exist_ok=True)
        tiny.image(i, (20, 30)).save(tmp_path / f"data/{CLASSES[i % 2]}/{i}.png")
    arguments = ["--model", str(made / "model"), "--data", str(tmp_path / "data")]
    arguments += ["--out", str(tmp_path / "out"), "--workers", "0", "--threads", "1"]
    main("zero-shot", arguments)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["classes"] == ["cat", "dog"]
    assert result["metrics"]["n"] == 4


def test_classes_of_equal_names_are_refused_or_merged(made, tmp_path, capsys):
    """ImageNet's list has such."""
    names = ["sunglasses", "cat", "sunglasses"]
    folder = classification_folder(tmp_path / "wds", names=names)
    more = ["--data", f"clip_benchmark:{folder}"]
    arguments = ["--model", str(made / "model"), "--out", str(tmp_path / "out"), "--threads", "1"]
    with pytest.raises(SystemExit):
        main("zero-shot", [*arguments, *more])
    error = capsys.readouterr().err
    assert "found the same at several places of the list: {'sunglasses': [1, 3]}" in error
    assert "--same-names merge" in error
    main("zero-shot", [*arguments, *more, "--same-names", "merge", "--workers", "0"])
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["classes"] == ["sunglasses", "cat"]
    assert result["classes_merged"] == 1
    assert "merged with others of their name: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n\ndog\n", "classes.txt:2: expected class names, found an empty line"),
        ("cat\ndog\t \nfox", "classes.txt:2: expected a name after 'dog'"),
        ("cat\ndog\ncat\n", "found the same at several places of the list: {'cat': [1, 3]}"),
        ("cat\ta\ncat\tb\n", "expected each label once, found 'cat' with two names"),
        ("", "classes.txt: expected class names, one a line, found none"),
        ("cat\ndog", "rows.jsonl:4: expected one of the 2 classes of"),
    ],
)
def test_class_lists_that_do_not_fit_are_named(made, tmp_path, capsys, text, message):
    (tmp_path / "classes.txt").write_text(text)
    more = ("--classes", str(tmp_path / "classes.txt"))
    assert message in refusal(made, tmp_path / "out", capsys, *more)


def test_rows_without_a_class_are_named_or_left_out_and_counted(made, tmp_path, capsys):
    data = str(write_rows(made, ["cat", " ", None, "dog", 3], "bad"))
    error = refusal(made, tmp_path, capsys, "--data", data)
    assert "error: bad.jsonl:2: expected a caption, found an empty text" in error
    result = run(made, tmp_path, "--data", data, "--bad-rows", "skip")
    assert result["skipped"] == 3
    assert [line.split(": ")[0] for line in result["examples_skipped"]] == [
        "bad.jsonl:2", "bad.jsonl:3", "bad.jsonl:5",
    ]  # fmt: skip
    assert result["metrics"]["n"] == 2
    assert "3 of 5 rows skipped" in capsys.readouterr().out


def test_bad_arguments_are_one_line(made, tmp_path, monkeypatch, capsys):
    for more, message in (
        (["--data", "nothing"], "--data nothing: expected a source"),
        (["--batch", "0"], "--batch must be at least 1, found 0"),
        (["--rows", "0"], "--rows must be at least 1, found 0"),
        (["--templates", "a cat"], "--templates: expected {} at the name's place, found ['a cat']"),
        (["--classes", str(tmp_path / "none.txt")], "none.txt"),
        (["--label", "colour"], "rows.jsonl:1: expected one of the keys colour, found"),
        (["--rows", "1"], "expected two classes or more, found ['cat']"),
    ):
        assert message in refusal(made, tmp_path / "out", capsys, *more)
    monkeypatch.setattr(vlm, "load", lambda *_, **__: training.model())
    error = refusal(made, tmp_path / "out", capsys)
    assert "expected a model of the family contrastive" in error
    assert "to evaluate zero-shot; found a decoder_only one" in error


def test_a_place_that_cannot_be_written_to_is_named_before_the_model_is_opened(
    made, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(vlm, "load", lambda *_, **__: pytest.fail("the model was opened"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc")):
        error = refusal(made, out, capsys)
        assert f"error: --out {out}: expected a folder to write to" in error


def test_what_reads_rows_travels_to_workers(made, tmp_path, monkeypatch):
    """Spawned ones get it pickled."""
    embed_images, travelled = zero_shot.embed_images, []

    def embed(*given):
        travelled.append(pickle.loads(pickle.dumps(given[-1])))
        return embed_images(*given[:-1], travelled[0])

    monkeypatch.setattr(zero_shot, "embed_images", embed)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    for more in ((), ("--classes", str(tmp_path / "classes.txt"))):
        assert run(made, tmp_path / "out", *more)["classes"] == CLASSES
    assert len(travelled) == 2


@pytest.fixture
def lowering(tmp_path):
    """The folder of a model that reads no capitals, in the arguments' words."""
    given = public()
    given.processor.lower_case = True
    given.save(tmp_path / "model")
    return ("--model", str(tmp_path / "model"))


def test_names_that_the_model_reads_as_one_are_refused_or_merged(made, lowering, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("cat\tCat\ndog\nfox\tcAT\n")
    more = (*lowering, "--classes", str(tmp_path / "classes.txt"))
    error = refusal(made, tmp_path / "out", capsys, *more)
    assert "classes.txt: expected names that the model can tell apart" in error
    assert "several places of the list: {'Cat / cAT': [1, 3]}" in error
    result = run(made, tmp_path / "out", *more, "--same-names", "merge")
    assert (result["classes"], result["classes_merged"]) == (["Cat", "dog"], 1)
    figures = run(made, tmp_path / "apart", *more[2:])["metrics"]  # by a model that reads capitals
    assert figures["classes"] == 3


def test_classes_of_rows_that_the_model_reads_as_one_are_refused_or_merged(
    made, lowering, tmp_path, capsys
):
    data = write_rows(made, ["cat", "dog", "Cat", "fox"], "capitals")
    more = (*lowering, "--data", str(data))
    error = refusal(made, tmp_path / "out", capsys, *more)
    assert "several places of the list: {'Cat / cat': [1, 2]}" in error
    result = run(made, tmp_path / "out", *more, "--same-names", "merge")
    assert (result["classes"], result["classes_merged"]) == (["Cat", "dog", "fox"], 1)
    assert result["metrics"]["n"] == 4


def test_names_of_which_the_model_reads_nothing_are_refused(made, tmp_path, capsys):
    """SigLIP's tokenizer leaves punctuation out."""
    tiny_siglip.write_folder(tmp_path / "siglip")
    (tmp_path / "classes.txt").write_text("a cat\n!?\n")
    error = refusal(
        made, tmp_path / "out", capsys,
        "--model", str(tmp_path / "siglip"), "--classes", str(tmp_path / "classes.txt"),
    )  # fmt: skip
    assert "classes.txt: expected labels of which the text tokenizer leaves something" in error
    assert "['!?']" in error
