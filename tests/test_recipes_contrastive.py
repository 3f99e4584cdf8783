"""The contrastive recipe: what it can be told, what it leaves, and its data."""

import json

import pytest
import torch
import transformers
from PIL import Image

import vlm
from tests import training
from tests.contrastive_runs import (
    TINY,
    assert_close,
    assert_follows,
    run,
    run_from_scratch,
    write_bert,
    write_decoder,
    write_rows,
)
from tests.folders import write_parts
from tests.reference import tiny_clip
from tests.runs import lines, weights
from vlm import cli
from vlm.data.example import BadRow
from vlm.pixels import BadImage
from vlm.training.runs.contrastive import Settings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(pool="class"), r"a new model does not read \['pool'\]"),
        (dict(lock_image=True), r"a new model does not read \['lock_image'\]"),
        (
            dict(start="x", width=64, vision="demo"),
            r"start 'x' does not read \['vision', 'width'\]",
        ),
        (dict(start="x", length=8), r"start 'x' does not read \['length'\]"),
        (dict(vision="demo", text="demo", depth=2), r"pretrained towers does not read \['depth'\]"),
        (dict(vision="demo"), "vision 'demo' and text 'new': expected both to be new"),
        (dict(text="demo"), "vision 'new' and text 'demo': expected both to be new"),
        (dict(start="x", lock_image=True, image_rate=1e-5), r"locked .* read \['image_rate'\]"),
        (dict(start="x", lock_text=True, text_rate=1e-5), r"locked .* read \['text_rate'\]"),
        (
            dict(start="x", lock_image=True, lock_text=True, layer_decay=0.5),
            r"locked towers does not read \['layer_decay'\]",
        ),
        (dict(start="runs/none", loss="softmax"), "runs/none: no such folder"),
        (dict(image_px=20), "image_px must be a multiple of patch_px, found 20 and 8"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(settings, message):
    with pytest.raises((ValueError, OSError), match=message):
        Settings(**settings).build()


def test_start_of_another_kind_is_named(tmp_path):
    write_decoder(tmp_path / "decoder")
    with pytest.raises(ValueError, match="expected a contrastive model, found a decoder_only one"):
        Settings(start=str(tmp_path / "decoder")).build()
    training.contrastive_model("softmax").save(tmp_path / "softmax")
    with pytest.raises(ValueError, match="trained with the softmax loss, found --loss sigmoid"):
        Settings(start=str(tmp_path / "softmax")).build()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(warmup_ratio=2.0), "warmup_ratio is a share of the steps, 0 to 1, found 2.0"),
        (dict(weights=(1.0, 2.0)), "2 weights .* for 1 sources"),
    ],
)
def test_data_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings).data()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return run_from_scratch(tmp_path_factory.mktemp("scratch") / "run")


def test_run_draws_its_loss_and_states_its_recalls(scratch):
    out, result = scratch
    assert Image.open(out / "loss.png").size[0] > 300
    assert json.loads((out / "result.json").read_text()) == result
    assert result["pairs"] == 6
    assert 0 <= result["image_to_text_r1"] <= result["image_to_text_r5"] <= 1
    assert result["text_to_image_r10"] == 1
    assert result["scale"] == pytest.approx(10, rel=0.05)
    assert (result["held_out"], result["held_out_skipped"]) == ("sample:transfer", 0)
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval"]["pairs"] for line in history if "eval" in line] == [6, 6]
    assert json.loads((out / "settings.json").read_text())["stage"] == "contrastive"
    model = vlm.load(out)
    assert model.embed_texts(["a cat"]).shape == (1, 16)


def test_run_goes_on_from_another(scratch, tmp_path):
    """Computing activations again, in micro-batches, changes nothing that is learned."""
    before = weights(scratch[0])
    run(tmp_path / "plain", start=str(scratch[0]))
    run(tmp_path / "lean", start=str(scratch[0]), micro_batch=2, checkpoint_activations=True)
    expected, found = (
        [line for line in lines(tmp_path / name) if "loss" in line] for name in ("plain", "lean")
    )
    assert_follows(found, expected)
    after = weights(tmp_path / "lean")
    assert_close(after, weights(tmp_path / "plain"))
    assert all(not torch.equal(before[name], after[name]) for name in before if "weight" in name)


def test_published_clip_is_tuned_with_rates_that_fall(tmp_path):
    tiny_clip.write_folder(tmp_path / "clip")
    run(tmp_path / "run", start=str(tmp_path / "clip"), loss="softmax", layer_decay=0.7)
    rates = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    top = rates["lr tokenizer.*"]
    assert rates["lr tokenizer.backbone.encoder.layers.0.*"] == pytest.approx(0.7 * top)
    model = vlm.load(tmp_path / "run")
    model.save(tmp_path / "reference", layout="reference")
    transformers.CLIPModel.from_pretrained(tmp_path / "reference")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("vision", ["kind:id", "run"])
def test_locked_image_tower_stays_as_it_was(scratch, tmp_path, vision, precision):
    """LiT: a pretrained image's tower, from a library's folder or from a run of ours; kept in the
    precision of the run."""
    if vision == "run":
        vision, pool = str(scratch[0]), "own"
    else:
        (vision, _), pool = write_parts(tmp_path, "dinov2", "llama"), "class"
    text = write_bert(tmp_path / "bert")
    settings = dict(vision=vision, text=text, pool=pool, text_pooling="class", embed_width=12,
                    length=16, loss="softmax", lock_image=True)  # fmt: skip
    start = Settings(**settings).build().module.state_dict()
    run(tmp_path / "run", **settings, precision=precision)
    end = vlm.load(tmp_path / "run", dtype="stored").module.state_dict()
    changed = {
        name.split(".")[0]
        for name in start
        if not torch.equal(start[name].to(end[name].dtype), end[name])
    }
    assert changed == {"image_head", "text", "text_head", "log_scale"}
    opened = {p.dtype for p in vlm.load(tmp_path / "run").module.parameters()}
    assert opened == {torch.float32}  # what the other tower learned is not rounded


def test_run_with_a_locked_text_tower_opens_in_the_precision_of_what_it_trained(scratch, tmp_path):
    run(tmp_path, start=str(scratch[0]), lock_text=True, precision="bf16")
    stored = vlm.load(tmp_path, dtype="stored").module
    assert next(stored.text.parameters()).dtype == torch.bfloat16
    assert {p.dtype for p in vlm.load(tmp_path).module.parameters()} == {torch.float32}


BAD = {
    "empty caption": ({"caption": " "}, r"rows\.jsonl:4: expected a caption, found an empty text"),
    "no image": ({"image": "gone.png"}, r"rows\.jsonl:4: .*gone\.png"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("where", ["train", "held_out"])
def test_bad_row_is_named(tmp_path, kind, where):
    """Before any training, of either data."""
    changed, message = BAD[kind]
    path = write_rows(tmp_path, row3=changed)
    rows = {"train": path} if where == "train" else {"held_out": path, "held_out_rows": 8}
    settings = {"train": (path,)} if where == "train" else rows
    with pytest.raises((BadRow, BadImage), match=message):
        run(tmp_path / "run", **TINY, **settings, steps=4)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_skipped_rows_and_cut_texts_are_counted_and_said(tmp_path, capsys):
    long = {"caption": "a cat and a dog and a tree and a bird and a house"}
    path = write_rows(tmp_path, row3=BAD["empty caption"][0], row5=BAD["no image"][0], row6=long)
    result = run(
        tmp_path / "run", **TINY, train=(path,), held_out=path, held_out_rows=8, bad_rows="skip"
    )
    assert result["pairs"] == 6
    assert result["held_out_skipped"] == result["skipped"] == 2  # 8 draws are one epoch
    assert result["cut_tokens"] == result["held_out_cut_tokens"] == 16 - 12
    said = capsys.readouterr().err
    assert "2 of 8 held-out rows skipped, such as:" in said
    assert "2 rows skipped, such as:" in said
    assert "4 text tokens cut to fit 12" in said
    assert "4 text tokens of the held-out rows cut to fit the context" in said
    for message in ("found an empty text", "gone.png"):
        assert said.count(message) >= 2


def test_batch_larger_than_the_data_is_said(tmp_path, capsys):
    path = write_rows(tmp_path)
    run(tmp_path / "run", **TINY | {"held_out_rows": 0}, train=(path,), batch=16)
    assert "a batch of 16 holds rows more than once, as the data have 8" in capsys.readouterr().err


def test_inspected_batch_shows_captions_padding_and_images(tmp_path, capsys):
    path = write_rows(tmp_path, row0={"caption": "a cat and a dog and a tree and a bird"},
                      row1={"caption": " "})  # fmt: skip
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    options = ["--rows", "8", "--plain", f"--train={path}", "--bad-rows=skip", "--augment=none"]
    cli.main(["inspect-batch", "recipes/contrastive.py", *options, *sizes])
    out = capsys.readouterr().out
    assert "rows.jsonl:1  12 text tokens; 0 padding; 1 text tokens cut" in out
    assert "<|startoftext|>cat 7 <|endoftext|>[padding × 8]" in out
    assert out.count("image: 3 × 16 × 16") == 7
    assert "skipped rows.jsonl:2: " in out
