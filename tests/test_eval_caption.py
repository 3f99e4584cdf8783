import json
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image

import vlm
from tests import tiny, training
from tests.results import read_result
from tests.runs import on_two_processes
from vlm import adaptors, tokenizers
from vlm.config import to_dict
from vlm.data.example import caption_example
from vlm.data.sources import ListSource
from vlm.evaluation import main
from vlm.evaluation.caption import read_questions
from vlm.evaluation.nearest_caption import nearest_rows, views_of
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly
from vlm.pixels import BadImage
from vlm.pixels.image_ref import ImageRef

ROOT = Path(__file__).parents[1]

VIT = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 16}
CAPTIONS = ("a cat", "a dog", "a red cat", "two dogs", "a big house", "a cat on a house", "a fox")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A saved tiny model, a pretrained backbone's folder, and rows of images in two files: of
    seven held-out ones the last shows the first's image again."""
    folder = tmp_path_factory.mktemp("eval")
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **VIT)
    backbone.pretrained_cfg["input_size"] = (3, 32, 32)
    timm.models.save_for_hf(
        backbone, folder / "vit", model_args=VIT | {"img_size": 32}, safe_serialization=True
    )
    tokenizer = tokenizers.build(
        {
            "kind": "timm", "name": "vit_tiny_patch16_224", "level": -1, "prefix": "drop",
            "model_args": VIT | {"img_size": [32, 48]}, "norm": True, "pooled": False,
            "pixel_spec": to_dict(tiny.Patches(size_hw=(32, 48)).pixel_spec),
        }
    )  # fmt: skip
    adaptor = adaptors.build(
        {"kind": "mlp", "in_width": 24, "out_width": 32, "depth": 2, "hidden_width": 32}
    )
    module = DecoderOnly(tokenizer, adaptor, tiny.text_model()).eval()
    processor = tiny.processor(module)
    ends = (processor.end_id,)
    DecoderOnlyModel(module=module, processor=processor, stop_ids=ends).save(folder / "model")
    for name, first in (("held", 0), ("known", 20)):
        lines = []
        for number, text in enumerate(CAPTIONS):
            seed = first + number % (6 if name == "held" else 9)
            tiny.image(seed, (20, 30)).save(folder / f"{name}{seed}.png")
            lines.append(json.dumps({"image": f"{name}{seed}.png", "caption": text}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arguments(made, out):
    return [
        "--model", str(made / "model"), "--data", str(made / "held.jsonl"),
        "--baseline", str(made / "known.jsonl"), "--baseline-vision", f"timm:local-dir:{made}/vit",
        "--out", str(out), "--batch", "2", "--max-new-tokens", "5", "--threads", "1",
    ]  # fmt: skip


def read(out):
    result = read_result(out)
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    return result, lines


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(made, tmp_path, capsys):
    """Six images in batches of two do not divide over the two; every caption and neighbour
    is the same, and none comes twice."""
    main("caption", arguments(made, tmp_path / "one"))
    on_two_processes(ROOT / "eval/caption.py", *arguments(made, tmp_path / "two"))
    (one, lines), (two, lines_2) = read(tmp_path / "one"), read(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert lines == lines_2
    assert one["metrics"] == two["metrics"]
    assert one["baselines"] == two["baselines"]
    assert [line["references"] for line in lines] == [
        ["a cat", "a fox"],
        *[[text] for text in CAPTIONS[1:6]],
    ]
    assert one["rows"] == 7
    assert one["metrics"]["n"] == 6
    assert "6 images" in capsys.readouterr().out
    assert Image.open(tmp_path / "one/captions.png").width > 300


def test_result_says_what_was_asked_and_how(made, tmp_path):
    main("caption", [*arguments(made, tmp_path), "--rows", "3", "--prompt", "Name it."])
    result, lines = read(tmp_path)
    assert result["rows"] == 3
    assert len(lines) == 3
    assert result["prompt"] == "Name it."
    assert result["decoding"] == {"do_sample": False, "num_beams": 1, "max_new_tokens": 5}
    assert result["preprocessing"]["size_hw"] == [32, 48]
    assert result["baselines"]["nearest_neighbour"]["preprocessing"]["size_hw"] == [32, 32]
    assert (result["task"], result["precision"]) == ("caption", "float32")
    assert result["options"]["max_new_tokens"] == 5
    for name in ("torch", "vlm", "sacrebleu", "pycocoevalcap"):
        assert name in result["versions"]
    for name in ("n", "exact_match", "exact_match_ci", "cider", "bleu4_ci"):
        assert name in result["metrics"]
        assert name in result["baselines"]["nearest_neighbour"]["metrics"]


def test_captions_equal_those_of_the_public_model(made, tmp_path):
    import vlm

    main("caption", arguments(made, tmp_path))
    _, lines = read(tmp_path)
    images = [made / f"held{i}.png" for i in range(6)]
    assert [line["caption"] for line in lines] == vlm.load(made / "model", device="cpu").caption(
        images, max_new_tokens=5
    )


def test_nearest_neighbour_of_a_known_image_is_itself(made):
    """And of two equally near ones the first."""
    from vlm.data.sources import open_source

    source = open_source(str(made / "held.jsonl"))
    known = ListSource([source[row] for row in (5, 4, 3, 2, 1, 0, 4)], "known")
    asked, _ = read_questions(source, range(7), "raise", False)
    tokenizer = training.model().module.tokenizer
    accelerator = Accelerator(cpu=True)
    rows, skipped = nearest_rows(
        tokenizer, source, [item.row for item in asked], known, accelerator, batch=3
    )
    assert rows == [5, 4, 3, 2, 1, 0]
    assert skipped == []


def unusable(tmp_path):
    """Two good rows, text alone, and an image that is none."""
    tiny.image(1).save(tmp_path / "good.png")
    tiny.image(2).save(tmp_path / "other.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [
        {"image": "good.png", "caption": "a cat"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
        {"image": "bad.png", "caption": "a dog"},
        {"image": "other.png", "caption": "a fox"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_rows_left_out_are_counted_and_named(made, tmp_path, capsys):
    data = unusable(tmp_path)
    options = ["--model", str(made / "model"), "--data", str(data), "--out", str(tmp_path / "out")]
    options += ["--max-new-tokens", "2", "--threads", "1"]
    with pytest.raises(SystemExit):
        main("caption", options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.strip().startswith("error: rows.jsonl:3: ")
    assert "bad.png" in error
    main("caption", [*options, "--bad-rows", "skip"])
    result, lines = read(tmp_path / "out")
    assert result["skipped"] == 2
    assert any("no image" in line for line in result["examples_skipped"])
    assert any("bad.png" in line for line in result["examples_skipped"])
    assert [line["references"] for line in lines] == [["a cat"], ["a fox"]]
    assert "2 of 4 rows skipped" in capsys.readouterr().out


def test_bad_arguments_are_one_line(made, tmp_path, capsys):
    for more, message in (
        (["--data", "nothing"], "--data nothing: expected a source"),
        (["--model", str(tmp_path)], "expected config.json here or in model/"),
        (["--batch", "0"], "--batch must be at least 1, found 0"),
        (
            ["--baseline-vision", "siglip"],
            "vision 'siglip': expected 'demo', the folder of a model or run, or 'kind:id'",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            main("caption", [*arguments(made, tmp_path / "out"), *more])
        assert stopped.value.code == 1
        found = capsys.readouterr().err
        assert message in found
        assert "Traceback" not in found


def test_options_are_checked_before_the_model_is_opened(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlm, "load", lambda *_, **__: pytest.fail("the model was opened"))
    for more, message in (
        (["--data", "nothing"], "--data nothing: expected a source"),
        (["--baseline", "nothing"], "--baseline nothing: expected a source"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, found 0"),
        (["--rows", "0"], "--rows must be at least 1, found 0"),
        (["--baseline-vision", "siglip"], "--baseline-vision: vision 'siglip': expected 'demo'"),
        (["--baseline-px", "0", "32"], "--baseline-px must be at least 1, found 0"),
        (["--baseline", "None"], "--baseline-vision: expected --baseline SOURCE too, found none"),
    ):
        with pytest.raises(SystemExit):
            main("caption", [*arguments(made, tmp_path / "out"), *more])
        assert message in capsys.readouterr().err


def test_images_in_bytes_are_told_apart_by_their_bytes():
    import io

    def example(seed, text):
        file = io.BytesIO()
        tiny.image(seed).save(file, "PNG")
        return caption_example(f"{seed} {text}", ImageRef(file.getvalue(), "x"), text, "what?")

    source = ListSource([example(0, "a"), example(1, "b"), example(0, "c")])
    asked, skipped = read_questions(source, range(3), "raise", False)
    assert [one.references for one in asked] == [["a", "c"], ["b"]]
    assert not skipped
    broken = ListSource([caption_example("x", ImageRef(b"no", "x"), "a", "")])
    with pytest.raises(BadImage):
        views_of(training.model().module.tokenizer, broken[0])
