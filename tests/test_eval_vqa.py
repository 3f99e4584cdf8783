import json
from pathlib import Path

import pytest
from PIL import Image

import vlm
from tests import tiny, training
from tests.reference import tiny_paligemma
from tests.results import read_result
from tests.runs import on_two_processes
from vlm.data.sources import open_source
from vlm.evaluation import main
from vlm.metrics.vqa import vqa_metrics

ROOT = Path(__file__).parents[1]
QUESTIONS = ("how many", "what colour", "is it", "who", "where")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Five questions about images; the first has ten answers, the last is a conversation."""
    folder = tmp_path_factory.mktemp("vqa")
    rows = []
    for i, question in enumerate(QUESTIONS):
        tiny.image(i, (20, 30)).save(folder / f"{i}.png")
        answers = ["two"] * 6 + ["three"] * 4 if i == 0 else ["a cat", "cat"][: 1 + i % 2]
        rows.append({"image": f"{i}.png", "question": question, "answers": answers})
    talk = [{"role": "user", "content": "<image>where"}, {"role": "assistant", "content": "here"}]
    rows[-1] = {"image": "4.png", "messages": talk}
    write(folder / "rows.jsonl", rows)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(made, out, *more):
    return ["--model", "tiny", "--data", str(made / "rows.jsonl"), "--out", str(out),
            "--batch", "2", "--max-new-tokens", "4", "--threads", "1", *more]  # fmt: skip


@pytest.fixture
def model(monkeypatch):
    made = training.model()
    monkeypatch.setattr(vlm, "load", lambda *_, **__: made)
    return made


def read(out):
    result = read_result(out)
    return result, [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def test_answers_are_those_of_the_public_model_and_scored_by_the_metrics(
    made, model, tmp_path, capsys
):
    main("vqa", arguments(made, tmp_path))
    result, lines = read(tmp_path)
    source = open_source(str(made / "rows.jsonl"))
    expected = model.answer(
        [made / f"{i}.png" for i in range(5)], list(QUESTIONS), max_new_tokens=4
    )
    assert [line["answer"] for line in lines] == [text.strip() for text in expected]
    references = [source[i].references or (source[i].answer,) for i in range(5)]
    assert references[4] == ("here",)
    assert [tuple(line["references"]) for line in lines] == references
    metrics = vqa_metrics(list(zip([line["answer"] for line in lines], references)))
    assert result["metrics"] == json.loads(json.dumps(metrics))
    assert result["metrics"]["n_ten_references"] == 1
    assert (result["task"], result["rows"], result["skipped"]) == ("vqa", 5, 0)
    assert result["prompt"] == "{question}"
    assert "5 questions of rows.jsonl" in capsys.readouterr().out
    assert Image.open(tmp_path / "answers.png").width > 300


def test_a_model_that_knows_has_every_question_right(made, model, tmp_path, monkeypatch):
    """Answers that most annotators gave, in capitals and with an article."""
    said = iter(["The TWO.", "cat", "a cat", "Cat", "HERE"])
    monkeypatch.setattr(model.processor, "decode", lambda ids: next(said))
    main("vqa", arguments(made, tmp_path, "--batch", "1"))
    metrics = read(tmp_path)[0]["metrics"]
    assert metrics["vqa_accuracy"] == 1.0
    assert 0.5 < metrics["anls"] < 1.0


def test_questions_are_put_into_the_prompt(made, model, tmp_path):
    main("vqa", arguments(made, tmp_path, "--prompt", "{question}? short", "--rows", "2"))
    result, lines = read(tmp_path)
    assert result["prompt"] == "{question}? short"
    assert [line["question"] for line in lines] == ["how many? short", "is it? short"]
    model.answer_prompt = "answer en {question}"
    main("vqa", arguments(made, tmp_path, "--rows", "1"))
    assert read(tmp_path)[1][0]["question"] == "answer en how many"


def conversation(made):
    """Two questions about an image, after a system message, in a file."""
    said = [("system", "Be brief."), ("user", "<image>where"), ("assistant", "here"),
            ("user", "who"), ("assistant", "a cat")]  # fmt: skip
    messages = [{"role": role, "content": text} for role, text in said]
    return write(made / "talk.jsonl", [{"image": "0.png", "messages": messages}])


@pytest.mark.parametrize("given", [True, False])
def test_last_question_of_a_conversation_is_put_into_the_prompt(made, model, tmp_path, given):
    """What comes before it is read as it stands, as in a chat."""
    prompt = "answer en {question}"
    options = ["--data", str(conversation(made)), *(["--prompt", prompt] if given else [])]
    if not given:
        model.answer_prompt = prompt
    main("vqa", arguments(made, tmp_path, *options))
    _, [line] = read(tmp_path)
    assert (line["question"], line["references"]) == ("answer en who", ["a cat"])
    image = {"type": "image", "image": made / "0.png"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "where"}]},
        {"role": "assistant", "content": "here"},
        {"role": "user", "content": "answer en who"},
    ]
    assert line["answer"] == model.chat(messages, max_new_tokens=4).strip()


def test_conversation_is_refused_by_name_where_the_model_reads_none(
    made, tmp_path, monkeypatch, capsys
):
    tiny_paligemma.write_folder(tmp_path / "model", "gemma")
    published = vlm.load(tmp_path / "model", "cpu")
    monkeypatch.setattr(vlm, "load", lambda *_, **__: published)
    with pytest.raises(SystemExit):
        main("vqa", arguments(made, tmp_path / "out", "--data", str(conversation(made))))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: talk.jsonl:1: the chat template refuses this conversation")
    assert "expected one user's prompt" in error


def test_rows_that_cannot_be_asked_are_named_or_skipped_and_counted(made, model, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    tiny.image(0).save(tmp_path / "good.png")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [
        {"image": "good.png", "question": "who", "answers": ["a"]},
        {"image": "bad.png", "question": "who", "answers": ["a"]},
        {"image": "good.png", "question": "who", "answers": []},
        {"messages": talk},
    ]
    options = arguments(made, tmp_path, "--data", str(write(tmp_path / "rows.jsonl", rows)))
    with pytest.raises(SystemExit):
        main("vqa", options)
    assert "bad.png" in capsys.readouterr().err.splitlines()[-1]
    main("vqa", [*options, "--bad-rows", "skip"])
    result, lines = read(tmp_path)
    assert (result["rows"], result["skipped"], len(lines)) == (4, 3, 1)
    names = [line.split(": ")[0] for line in result["examples_skipped"]]
    assert names == [f"rows.jsonl:{i}" for i in (2, 3, 4)]
    assert "expected answers to be a list of texts" in result["examples_skipped"][1]
    assert result["examples_skipped"][2].endswith("no image")
    assert "3 of 4 rows skipped" in capsys.readouterr().out


def test_options_are_checked_before_the_model_is_opened(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlm, "load", lambda *_, **__: pytest.fail("the model was opened"))
    for more, message in (
        (["--data", "nothing"], "--data nothing: expected a source"),
        (["--rows", "0"], "--rows must be at least 1, found 0"),
        (["--batch", "0"], "--batch must be at least 1, found 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, found 0"),
        (["--prompt", "short"], "--prompt: expected {question} where it goes, found 'short'"),
        (["--prompt", "{question} {x}"], "--prompt: prompt: expected no fields but {question}"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main("vqa", arguments(made, tmp_path, *more))
        assert stopped.value.code == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_model_that_answers_nothing_is_named(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlm, "load", lambda *_, **__: training.contrastive_model())
    with pytest.raises(SystemExit):
        main("vqa", arguments(made, tmp_path))
    error = capsys.readouterr().err
    assert "--model tiny: expected a model of the family decoder_only" in error
    assert "to evaluate vqa; found a contrastive one" in error


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(made, model, tmp_path):
    """Five questions in batches of two do not divide over the two."""
    main("vqa", arguments(made, tmp_path / "one"))
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}]\n"
        "import vlm\nfrom tests import training\nfrom vlm.evaluation import main\n"
        "vlm.load = lambda *_, **__: training.model()\nmain('vqa')\n"
    )
    on_two_processes(script, *arguments(made, tmp_path / "two"))
    (one, lines), (two, lines_2) = read(tmp_path / "one"), read(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["metrics"] == two["metrics"]
    assert lines == lines_2
