"""Runs that teach reading: the step is the same however it is split; a run leaves what it says."""

import contextlib
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

import vlm
from recipes.line_reader import stage
from recipes.trocr import stage as trocr_stage
from tests import encoder_decoders as law
from tests import line_readers
from tests.contrastive_runs import assert_close, assert_follows
from tests.line_readers import LINES, settings
from tests.runs import lines
from vlm.data.example import BadRow
from vlm.families.encoder_decoder import swap_text_tokenizer as swap
from vlm.families.line_reader.model import LineReaderModel
from vlm.systems import compose_encoder_decoder
from vlm.systems.compose_encoder_decoder import DecoderSizes
from vlm.training.objectives.base import sum_totals
from vlm.training.objectives.ctc import Transcribe
from vlm.training.objectives.next_token import NextToken
from vlm.training.runs.encoder_decoder import TranscriberSettings
from vlm.training.runs.line_reader import LineReaderSettings
from vlm.training.runs.reading import run
from vlm.vocabulary import character_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_lines")]


def trained(folder, **changes):
    return run(settings(folder, **changes), stage, lambda settings, model, stage: Transcribe())


def test_a_step_is_the_same_for_every_split_into_micro_batches():
    """Lines of unequal lengths, whole, in twos, one by one."""
    rows = [
        line_readers.parts().processor.encode(
            line_readers.line("ab " * (1 + i % 3), width=90 + 40 * (i % 3), seed=i)
        )
        for i in range(6)
    ]
    found = []
    for size in (6, 2, 1):
        module, objective = line_readers.parts().module, Transcribe()
        parts = [rows[i : i + size] for i in range(0, 6, size)]
        batches = [batch for part in parts for batch in objective.collate(part)]
        totals = sum_totals(objective.totals, [objective.count(batch) for batch in batches])
        loss = objective.backward(module, batches, totals, contextlib.nullcontext)
        grads = torch.cat([p.grad.flatten() for p in module.parameters()])
        found.append((loss, grads, totals))
    for loss, grads, totals in found[1:]:
        assert totals == found[0][2]
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(grads, found[0][1], rtol=1e-4, atol=1e-6)


def test_a_run_leaves_its_model_its_figures_and_its_worst_lines(tmp_path):
    result = trained(tmp_path / "run")
    assert result["lines"] == 8
    assert 0 <= result["cer"] <= 2
    assert {"line", "token"} == set(result["temperatures"])
    for name in ("worst_lines.png", "loss.png", "result.json", "metrics.jsonl"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    again = vlm.load(tmp_path / "run", device="cpu")
    assert again.processor.characters == settings(tmp_path).characters()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["cer"] == result["cer"]


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    whole = trained(tmp_path / "whole", steps=4)
    trained(tmp_path / "parts", steps=4, save_every=2)
    for path in sorted((tmp_path / "parts" / "checkpoints").iterdir()):
        if "4" in path.name:
            shutil.rmtree(path)
    resumed = trained(tmp_path / "parts", steps=4, save_every=2, resume=True)
    assert resumed["cer"] == whole["cer"]
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    losses = [[line["loss"] for line in run if "loss" in line] for run in lines]
    assert losses[0] == losses[1]


def test_another_alphabet_keeps_the_strokes_of_the_reader_that_it_starts_from(tmp_path):
    trained(tmp_path / "english", held_out_rows=0)
    started = settings(
        tmp_path / "greek", start=str(tmp_path / "english"), alphabet="greek"
    ).build()
    english = vlm.load(tmp_path / "english", device="cpu", dtype="float32")
    before = settings(tmp_path).characters()
    assert started.processor.characters.startswith(before)  # nothing that it reads is lost
    assert "Ω" in started.processor.characters
    for name, weight in english.module.tokenizer.state_dict().items():
        assert torch.equal(weight, started.module.tokenizer.state_dict()[name])


def line_table(folder, texts):
    """A table of blank images of unequal widths with texts."""
    rows = ["image\ttext"]
    for i, text in enumerate(texts):
        Image.new("RGB", (60 + i, 20), "white").save(folder / f"{i}.png")
        rows.append(f"{i}.png\t{text}")
    (folder / "lines.tsv").write_text("\n".join(rows) + "\n")
    return str(folder / "lines.tsv")


def test_a_table_of_lines_is_trained_on(tmp_path):
    table = line_table(tmp_path, [f"line {i}" for i in range(6)])
    result = trained(tmp_path / "run", train=(table,), held_out=table, held_out_rows=6)
    assert result["held_out"].endswith("lines.tsv")


def test_characters_outside_the_alphabet_stop_the_run_and_are_named(tmp_path):
    table = line_table(tmp_path, ["жук"])
    with pytest.raises(ValueError, match=r"lines\.tsv:2.*'ж' \(U\+0436, 1 times\)"):
        trained(tmp_path / "run", train=(table,), held_out_rows=0)


def test_bad_alphabets_and_starts_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"alphabet 'klingon': expected english, latin"):
        settings(tmp_path, alphabet="klingon").characters()
    with pytest.raises(ValueError, match=r"augment .light.: .* cut characters off a line"):
        settings(tmp_path, augment="light").data()
    (tmp_path / "own.txt").write_text("ab\ncé")
    assert settings(tmp_path, alphabet=str(tmp_path / "own.txt")).characters() == " abcé"


SIZES = dict(decoder_width=64, decoder_depth=1, length=32)
"""Of a new decoder."""


def transcribed(folder, **changes):
    values = dict(
        out=folder,
        steps=2,
        batch=4,
        precision="fp32",
        workers=0,
        held_out_rows=4,
        eval_every=0,
        save_every=0,
        threads=1,
        train=(f"lines:1000:seed=1{LINES}",),
        held_out=f"lines:4:seed=2{LINES}:split=validation",
    )
    sizes = {} if "start" in changes else SIZES
    settings = TranscriberSettings(**values | sizes | changes)
    objective = lambda settings, model, stage: NextToken(model.processor.pad_id)  # noqa: E731
    return run(settings, trocr_stage, objective)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            LineReaderSettings(start="x", depth=2, width=64),
            r"start 'x' does not read \['width', 'd",
        ),
        (LineReaderSettings(start="x", height_px=16), r"start 'x' does not read \['height_px'\]"),
        (TranscriberSettings(start="x", vision="y"), r"start 'x' does not read \['vision'\]"),
        (TranscriberSettings(start="x", decoder="y"), r"start 'x' does not read \['decoder'\]"),
        (
            TranscriberSettings(start="x", **SIZES),
            r"start 'x' does not read \['decoder_width', 'decoder_depth', 'length'\]",
        ),
        (TranscriberSettings(decoder="y", length=32), r"decoder 'y' does not read \['length'\]"),
    ],
)
def test_settings_that_a_way_of_building_does_not_read_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        settings.build()


def test_an_encoder_decoder_reader_is_trained_saved_and_given_another_script(tmp_path):
    """The ids that a text begins and ends with are the new tokenizer's."""
    trained_once = transcribed(tmp_path / "english")
    assert trained_once["lines"] == 4
    model = vlm.load(tmp_path / "english", device="cpu")
    assert asdict(model.temperatures) == trained_once["temperatures"]
    assert model.read_lines([Image.new("RGB", (90, 20), "white")])[0].confidence <= 1
    transcribed(
        tmp_path / "greek",
        start=str(tmp_path / "english"),
        text_tokenizer="characters",
        alphabet="greek",
        train=(f"lines:1000:seed=1{LINES}:alphabet=greek",),
        held_out=f"lines:4:seed=2{LINES}:alphabet=greek:split=validation",
    )
    greek = vlm.load(tmp_path / "greek", device="cpu")
    tokenizer = greek.processor.text_tokenizer
    assert greek.processor.start_ids == (tokenizer.bos_token_id,)
    assert greek.end_ids == (tokenizer.eos_token_id,)
    assert greek.processor.text_ids("Ωa") == tokenizer.convert_tokens_to_ids(["Ω", "a"])
    assert greek.module.text.get_input_embeddings().num_embeddings == len(tokenizer)


def test_a_line_readers_columns_are_the_image_tokens_of_an_encoder_decoder(tmp_path):
    trained(tmp_path / "reader", held_out_rows=0)
    transcribed(tmp_path / "trocr", vision=str(tmp_path / "reader"), steps=1, held_out_rows=0)
    model = vlm.load(tmp_path / "trocr", device="cpu")
    assert model.module.tokenizer.config.width == 64


def test_lines_keep_their_shape_before_an_encoder_of_squares(tmp_path):
    """Views of one height and several widths, in whole patches."""
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2)
    config = ViTConfig(**sizes, image_size=32, patch_size=8)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    vision = f"transformers:{tmp_path / 'vit'}"
    asked = dict(decoder_width=64, decoder_depth=1, length=32, line_px=(16, 128))
    model = TranscriberSettings(vision=vision, **asked).build()
    processor = model.processor
    for size, wanted in (((40, 20), (16, 32)), ((300, 30), (16, 128)), ((96, 16), (16, 88))):
        ((view, _),) = processor.encode_image(Image.new("RGB", size, "white")).views
        assert tuple(view.shape[1:]) == wanted
    assert model.module.tokenizer.pixel_spec == processor.pixel_spec


def test_a_decoder_that_counts_from_its_pad_id_refuses_a_tokenizer_with_another():
    """RoBERTa's positions would all move by what the pad ids differ."""
    model = TranscriberSettings(**SIZES).build()
    model.module.text = law.model("roberta").text
    with pytest.raises(ValueError, match=r"counts positions from its pad id.* 256 too, found 1"):
        swap.with_tokenizer(model, character_tokenizer("ab "))


def test_another_tokenizer_keeps_the_rows_of_the_tokens_that_both_have():
    settings = TranscriberSettings(**SIZES)
    model = settings.build()
    before = model.processor.text_tokenizer.get_vocab()
    table = model.module.text.get_input_embeddings().weight.detach().clone()
    new = character_tokenizer("zaΩ ")
    swapped = swap.with_tokenizer(model, new)
    rows = swapped.module.text.get_input_embeddings().weight
    for token in ("a", "z", " ", "</s>", "<pad>"):
        assert torch.equal(rows[new.get_vocab()[token]], table[before[token]])
    assert swapped.module.text.config.decoder_start_token_id == new.bos_token_id
    assert len(rows) == len(new)


def test_another_tokenizer_keeps_the_biases_of_berts_head():
    model = TranscriberSettings(**SIZES).build()
    text = model.module.text = law.model("bert").text
    before = model.processor.text_tokenizer.get_vocab()
    with torch.no_grad():
        text.get_output_embeddings().bias.copy_(torch.arange(300.0))
    new = character_tokenizer("zaΩ ")
    biases = swap.with_tokenizer(model, new).module.text.get_output_embeddings().bias
    for token in ("a", "z", " ", "</s>", "<pad>"):
        assert biases[new.get_vocab()[token]] == before[token]
    assert len(biases) == len(new)


def test_the_recipe_runs_on_two_processes(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("\n".join(f"word {i} of many" for i in range(200)))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "recipes/line_reader.py", "--out", str(tmp_path / "two")),
        *("--height-px", "16", "--width", "64", "--depth", "1", "--steps", "2", "--batch", "4"),
        *("--precision", "fp32", "--workers", "0", "--held-out-rows", "5", "--eval-every", "0"),
        *("--train", f"lines:1000:seed=1{LINES}:text={words}"),
        *("--held-out", f"lines:5:seed=2{LINES}:text={words}:split=validation"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "two" / "result.json").read_text())
    reader = vlm.load(tmp_path / "two", device="cpu", dtype="float32")
    assert isinstance(reader, LineReaderModel)
    assert found["lines"] == 5


def test_two_processes_train_an_encoder_decoder_as_one_does(tmp_path):
    """The loop of trocr.py by gloo, on lines of unequal lengths; without dropout, which each
    process draws for itself."""
    sizes = DecoderSizes(width=64, depth=1, heads=2, mlp_width=64, length=32, dropout=0.0)
    started = compose_encoder_decoder.build(
        vision=line_readers.parts().module.tokenizer,
        text=sizes,
        text_tokenizer=character_tokenizer(LineReaderSettings().characters()),
    )
    started.save(tmp_path / "start")
    table = line_table(tmp_path, [f"line {10**i}" for i in range(6)])
    transcribed(tmp_path / "one", start=str(tmp_path / "start"), train=(table,), held_out_rows=0)
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--main_process_port", "0"),
        *("recipes/trocr.py", "--out", str(tmp_path / "two"), "--start", str(tmp_path / "start")),
        *("--steps", "2", "--batch", "4", "--precision", "fp32", "--workers", "0"),
        *("--threads", "1", "--held-out-rows", "0", "--eval-every", "0", "--save-every", "0"),
        *("--train", table),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes" in done.stderr
    one, two = (lines(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 2
    assert_follows(two, one)
    one, two = (vlm.load(tmp_path / name, "cpu", "float32") for name in ("one", "two"))
    assert_close(two.module.state_dict(), one.module.state_dict())


@pytest.mark.parametrize("mark", ["</s>", "<pad>", "<s>"])
def test_a_text_that_spells_the_tokenizers_own_marks_is_named(mark):
    """It would end, or not be learned, in its middle."""
    model = TranscriberSettings(**SIZES).build()
    example = line_readers.line(f"a{mark}b")
    with pytest.raises(BadRow, match=rf"line 0.*own start, end and padding marks.*'{mark}'"):
        model.processor.encode(example)
