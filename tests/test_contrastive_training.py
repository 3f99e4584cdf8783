"""Contrastive runs: the loop with a contrastive objective, and the recipe as a whole."""

import dataclasses
import json
import math

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

import vlm
from tests import tiny, towers, training
from tests.reference import test_clip
from tests.test_composed import write_parts
from tests.test_fit import launch, learned, lines
from tests.test_stages_chain import stage_of, weights
from vlm import cli
from vlm.data.example import BadRow
from vlm.data.sources import ListSource
from vlm.metrics.retrieval import retrieval
from vlm.pixels import BadImage
from vlm.systems.composed import load_vision
from vlm.text_encoders import TextEncoder, build_backbone
from vlm.training import contrastive, recipe
from vlm.training.contrastive import Settings, layer_rates, retrieval_on
from vlm.training.objectives import Contrast
from vlm.training.run import Run
from vlm.training.stages import StageError, assign_rates, optimizer_for, prepare
from vlm.weights import same_bits

LOSSES = ("softmax", "sigmoid")
TINY = dict(image_px=16, patch_px=8, width=64, depth=1, text_width=64, text_depth=1, embed_width=16,
            length=12)  # fmt: skip
SHORT = dict(batch=4, steps=2, workers=0, eval_every=1, save_every=0, threads=1, precision="fp32",
             held_out_rows=6)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one state for a process, whichever test made it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(out, loss, **options):
    stage = dataclasses.replace(training.CONTRAST, **options.pop("stage", {}))
    return training.train(out, stage, loss=loss, **options)


def run(out, **settings):
    """The recipe, as its command runs it; what it gives."""
    values = {**SHORT, "out": out, **settings}
    return contrastive.run(Settings(**values), stage_of("contrastive").stage)


def assert_follows(found, expected):
    """Lines of metrics.jsonl of the same run, computed in another way."""
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert [b[key] for key in ("batch", "scored", "samples")] == [
            a[key] for key in ("batch", "scored", "samples")
        ]


def assert_close(found, expected):
    """Weights, but for the biases of attention's keys: these change nothing, so that their gradient
    is rounding alone, of which Adam makes whole steps."""
    keys = ("k_proj.bias", "qkv.bias", "key_value.bias")
    for name, weight in expected.items():
        if not name.endswith(keys):
            torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=1e-3, msg=name)


# The loop.


@pytest.mark.parametrize("loss", LOSSES)
def test_run_is_the_same_for_every_split_into_micro_batches(tmp_path, loss):
    """T9."""
    whole, _, expected = train(tmp_path / "8", loss)
    for micro_batch in (4, 2):
        split = {"micro_batch": micro_batch}
        parts, _, found = train(tmp_path / str(micro_batch), loss, stage=split)
        assert_follows(found, expected)
        assert_close(training.weights(parts), training.weights(whole))
    assert expected[-1]["loss"] < expected[0]["loss"]


@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_run_begins_as_fp32_does_and_learns_in_one_pass_and_in_two(tmp_path, loss):
    """The recipe's own precision: weights cast once a step, gradients added up in fp32. Later steps
    drift apart, as Adam makes whole steps of small gradients."""
    _, _, expected = train(tmp_path / "fp32", loss)
    for micro_batch in (8, 2):
        split = {"micro_batch": micro_batch}
        chosen, _, found = train(tmp_path / str(micro_batch), loss, stage=split, precision="bf16")
        assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=2e-2)
        assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=5e-2)
        assert found[-1]["loss"] < 0.8 * found[0]["loss"]
        assert {p.dtype for p in chosen.module.parameters()} == {torch.float32}


def test_cost_of_a_step_goes_by_pairs_not_by_the_length_of_its_texts(tmp_path):
    """Of one batch of short texts and one of long ones."""
    chosen, rows = training.contrastive_model(), training.pairs(8)
    objective = Contrast("sigmoid")
    counts = []
    for words in (1, 3):
        long = [tiny.example(row.name, (None,), "ab " * words, images=row.images) for row in rows]
        (batch,) = objective.collate([chosen.processor.encode(row) for row in long])
        counts.append(objective.count(batch))
    assert counts[0].positions < counts[1].positions
    assert counts[0].work == counts[1].work == 8


def test_two_processes_follow_one_where_a_row_is_left_out(tmp_path):
    """T9, T11, T19: in micro-batches, 4 pairs on one rank and 3 on the other; 7 held-out rows."""
    data = training.in_order(training.pairs(8, unread=[5]))
    data.on_bad_row = "skip"
    one, progress, expected = train(tmp_path / "one", "sigmoid", data=data)
    assert progress.skipped == 6
    assert progress.examples_skipped[0].endswith("p5: expected a caption, found an empty text")
    done = launch(tmp_path / "two", 2, loss="sigmoid", unread=[5], stage={"micro_batch": 2})
    assert done.returncode == 0, done.stderr[-2000:]
    assert_follows(lines(tmp_path / "two"), expected)
    assert {line["samples"] for line in expected} == {7}
    two = torch.load(tmp_path / "two/weights.pt")
    assert_close(two, training.weights(one))
    held_out = [json.loads((tmp_path / f"two/held_out{rank}.json").read_text()) for rank in (0, 1)]
    assert held_out == [recalls(one, training.pairs(7))] * 2


def test_rank_without_a_pair_stops_every_rank(tmp_path):
    """Within the time that `launch` grants."""
    done = launch(tmp_path, 2, loss="softmax", unread=[4, 5, 6, 7], stage={"micro_batch": 2})
    assert done.returncode != 0
    said = "StageError: every row of step 1 on 1 of 2 ranks was left out; this loss needs"
    assert done.stderr.count(said) == 2


def test_killed_run_resumes_to_the_same_batches_and_losses(tmp_path, monkeypatch):
    """T13: with dropout, in micro-batches."""

    def attempt(out, **options):
        chosen = training.contrastive_model("sigmoid", "bert, class")
        return train(tmp_path / out, "sigmoid", chosen=chosen, stage={"micro_batch": 4}, **options)

    whole, _, expected = attempt("whole", save_every=2)
    log = Run.log

    def log_and_die(self, step, figures):
        log(self, step, figures)
        if step == 5:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_die)
        with pytest.raises(RuntimeError, match="killed"):
            attempt("cut", save_every=2)
    resumed, progress, found = attempt("cut", resume=True)
    assert learned(expected) == learned(found)
    assert same_bits(training.weights(whole), training.weights(resumed))
    assert progress.samples == 48


def test_scale_of_a_run_never_passes_100(tmp_path):
    chosen, seen = training.contrastive_model("softmax"), []
    log_scale = chosen.module.log_scale
    log_scale.register_hook(lambda gradient: -gradient.abs())  # each step raises it
    chosen.module.register_forward_pre_hook(lambda *_: seen.append(log_scale.item()))
    rates = (("log_scale", 1.0), ("*", 1e-3))
    train(tmp_path, "softmax", chosen=chosen, stage={"rates": rates, "warmup": 0})
    assert seen[0] == pytest.approx(math.log(10))
    assert seen[-1] == max(seen) == pytest.approx(math.log(100), abs=1e-6)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_retrieval_of_rows_is_the_metric_of_the_public_models_vectors(batch_size):
    chosen, rows = training.contrastive_model(), training.pairs(7)
    chosen.module.train()
    found = retrieval_on(chosen, ListSource(rows, "rows"), range(7), accelerator(), batch_size)
    assert chosen.module.training
    assert found == recalls(chosen, rows)


def accelerator():
    return Accelerator(cpu=True, mixed_precision="no")


def recalls(model, rows):
    """By the metric itself, on the vectors that the public model gives."""
    images = model.embed_images([row.images[0] for row in rows])
    texts = model.embed_texts([row.answer for row in rows])
    found = retrieval(images, texts, torch.arange(len(rows)))
    figures = {"pairs": len(rows)}
    for name in ("image_to_text", "text_to_image"):
        for k, recall in getattr(found, name).recall.items():
            figures |= {f"{name}_r{k}": recall.share, f"{name}_r{k}_95": [recall.low, recall.high]}
    return figures


# Rates that fall from layer to layer.


def clip_text():
    return TextEncoder(
        build_backbone(
            dict(model_type="clip_text_model", vocab_size=60, max_position_embeddings=8,
                 hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                 bos_token_id=0, eos_token_id=1)
        ),
        "end", masked=False, end_id=1,
    )  # fmt: skip


def bert():
    return TextEncoder(
        build_backbone(
            dict(model_type="bert", vocab_size=60, max_position_embeddings=8, hidden_size=16,
                 intermediate_size=16, num_hidden_layers=12, num_attention_heads=2)
        ),
        "class", masked=True,
    )  # fmt: skip


LAYERS = {
    "siglip": (lambda: towers.transformers_tower("siglip_vision_model"), 2, "encoder.layers"),
    "clip": (lambda: towers.transformers_tower("clip_vision_model"), 2, "encoder.layers"),
    "timm": (lambda: towers.timm_vit(depth=11), 11, "blocks"),
    "clip text": (clip_text, 3, "encoder.layers"),
    "bert": (bert, 12, "encoder.layer"),
    "convnext": (lambda: towers.timm_net("convnext_atto"), 4, "stages"),
}
FIRST = ("embed", "cls_token", "pos_embed", "pre_layrnorm", "patch", "stem")


@pytest.mark.parametrize("kind", LAYERS)
def test_rates_fall_from_layer_to_layer(kind):
    """T22: of every parameter, read back from the live optimizer; each decided by one pattern."""
    build, depth, path = LAYERS[kind]
    module = torch.nn.Module()
    module.tower = build()
    rates = tuple(layer_rates(module, "tower", 1.0, 0.5))
    stage = dataclasses.replace(training.CONTRAST, rates=rates)
    prepare(module, stage, torch.float32)
    live = {id(p): g["lr"] for g in optimizer_for(module, stage).param_groups for p in g["params"]}
    decided = assign_rates(module, rates)
    assert {pattern for pattern, _ in decided.values()} == {pattern for pattern, _ in rates}
    seen = set()
    for name, parameter in module.named_parameters():
        inner = name.removeprefix("tower.backbone.")
        if inner.startswith(f"{path}."):
            expected = 0.5 ** (depth - 1 - int(inner.removeprefix(f"{path}.").split(".")[0]))
        elif any(word in inner for word in FIRST):
            expected = 0.5**depth
        else:
            expected = 1.0
        assert live[id(parameter)] == expected, name
        seen.add(expected)
    assert seen == {0.5**i for i in range(depth + 1)}


def test_rates_follow_computation_not_registration():
    """A projection behind the layers that open_clip registers before them."""
    from vlm.tokenizers import open_clip

    cfg = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
    module = torch.nn.Module()
    module.tokenizer = open_clip.build(
        open_clip.OpenClipConfig(
            vision_cfg=cfg, embed_dim=16, quick_gelu=False, layer=-1, prefix="drop", norm=True,
            pooled=True, pixel_spec=towers.timm_vit(size_hw=(32, 32)).pixel_spec,
        )
    )  # fmt: skip
    decided = assign_rates(module, tuple(layer_rates(module, "tokenizer", 1.0, 0.5)))
    assert decided["tokenizer.visual.proj"][1] == 1.0
    assert decided["tokenizer.visual.positional_embedding"][1] == 0.25


def test_rates_that_cannot_fall_are_named():
    module = torch.nn.Module()
    module.tower = tiny.Patches()
    assert layer_rates(module, "tower", 0.1, 1.0) == [("tower.*", 0.1)]
    with pytest.raises(StageError, match=r"layer_decay 0.5: expected a row .* in tower"):
        layer_rates(module, "tower", 0.1, 0.5)
    module.tower = towers.timm_net("resnet10t")
    with pytest.raises(StageError, match=r"expected one row of layers in tower, found \['tower\."):
        layer_rates(module, "tower", 0.1, 0.5)
    for decay in (0.0, 1.5):
        with pytest.raises(StageError, match="above 0 and at most 1, found"):
            layer_rates(module, "tower", 0.1, decay)


# Settings.


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


def write_decoder(folder):
    towers.model(towers.composed(towers.timm_vit())).save(folder)


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
        (dict(warmup=2.0), "warmup is a share of the steps, 0 to 1, found 2.0"),
        (dict(weights=(1.0, 2.0)), "2 weights .* for 1 sources"),
    ],
)
def test_data_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings).data()


# The recipe.


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A run from scratch: its folder and what it gave."""
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path_factory.mktemp("scratch") / "run"
    return out, run(out, **TINY)


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
    test_clip.write_folder(tmp_path / "clip")
    run(tmp_path / "run", start=str(tmp_path / "clip"), loss="softmax", layer_decay=0.7)
    rates = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    top = rates["lr tokenizer.*"]
    assert rates["lr tokenizer.backbone.encoder.layers.0.*"] == pytest.approx(0.7 * top)
    model = vlm.load(tmp_path / "run")
    model.save(tmp_path / "reference", layout="reference")
    transformers.CLIPModel.from_pretrained(tmp_path / "reference")


def write_bert(folder):
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tiny.text_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("vision", ["kind:id", "run"])
def test_locked_picture_tower_stays_as_it_was(scratch, tmp_path, vision, precision):
    """LiT: a pretrained picture's tower, from a library's folder or from a run of ours; kept in the
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


def test_folder_without_a_pooling_has_no_pooled_vector(tmp_path):
    write_decoder(tmp_path / "decoder")
    text = write_bert(tmp_path / "bert")
    settings = Settings(vision=str(tmp_path / "decoder"), text=text, pool="own")
    with pytest.raises(ValueError, match=r"pooled vector is asked of .* saved without one"):
        settings.build()


# Data.


def write_rows(folder, **changed):
    """Rows of drawings with captions in a JSON file, some of them changed."""
    rows = []
    for i in range(8):
        tiny.picture(i).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"cat {i}"} | changed.get(f"row{i}", {}))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


BAD = {
    "empty caption": ({"caption": " "}, r"rows\.jsonl:4: expected a caption, found an empty text"),
    "no picture": ({"image": "gone.png"}, r"rows\.jsonl:4: .*gone\.png"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("where", ["train", "held_out"])
def test_bad_row_is_named(tmp_path, kind, where):
    """Of the held-out rows before any training."""
    changed, message = BAD[kind]
    path = write_rows(tmp_path, row3=changed)
    rows = {"train": path} if where == "train" else {"held_out": path, "held_out_rows": 8}
    settings = {"train": (path,)} if where == "train" else rows
    with pytest.raises((BadRow, BadImage), match=message):
        run(tmp_path / "run", **TINY, **settings, steps=4)
    assert (tmp_path / "run/metrics.jsonl").exists() == (where == "train")


def test_left_out_rows_and_cut_texts_are_counted_and_said(tmp_path, capsys):
    long = {"caption": "a cat and a dog and a tree and a bird and a house"}
    path = write_rows(tmp_path, row3=BAD["empty caption"][0], row5=BAD["no picture"][0], row6=long)
    result = run(
        tmp_path / "run", **TINY, train=(path,), held_out=path, held_out_rows=8, bad_rows="skip"
    )
    assert result["pairs"] == 6
    assert result["held_out_skipped"] == result["skipped"] == 2  # 8 draws are one epoch
    assert result["cut_tokens"] == result["held_out_cut_tokens"] == 16 - 12
    said = capsys.readouterr().err
    assert "2 of 8 held-out rows left out, such as:" in said
    assert "2 rows skipped, such as:" in said
    assert "4 text tokens cut to fit 12" in said
    assert "4 text tokens of the held-out rows cut to fit the context" in said
    for message in ("found an empty text", "gone.png"):
        assert said.count(message) >= 2


def test_batch_larger_than_the_data_is_said(tmp_path, capsys):
    path = write_rows(tmp_path)
    run(tmp_path / "run", **TINY | {"held_out_rows": 0}, train=(path,), batch=16)
    assert "a batch of 16 holds rows more than once, as the data have 8" in capsys.readouterr().err


def test_inspected_batch_shows_captions_padding_and_pictures(tmp_path, capsys):
    path = write_rows(tmp_path, row0={"caption": "a cat and a dog and a tree and a bird"},
                      row1={"caption": " "})  # fmt: skip
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    options = ["--rows", "8", "--plain", f"--train={path}", "--bad-rows=skip", "--augment=none"]
    cli.main(["inspect-batch", "recipes/contrastive.py", *options, *sizes])
    out = capsys.readouterr().out
    assert "rows.jsonl:1  12 text tokens; 0 padding; 1 text tokens cut" in out
    assert "<|startoftext|>cat 7 <|endoftext|>[padding × 8]" in out
    assert out.count("picture: 3 × 16 × 16") == 7
    assert "skipped rows.jsonl:2: " in out


# The bridge.


def assert_same_tower(tokenizer, trained):
    """Bit for bit, but for what pools."""
    before, after = trained.state_dict(), tokenizer.state_dict()
    assert same_bits({name: before[name] for name in after}, after)
    return {name for name in before if name not in after}


@pytest.mark.parametrize("image_px", [None, (32, 48)])
def test_trained_tokenizer_begins_stage_1(scratch, tmp_path, image_px):
    """Of a model with a head that pools, at the size that it was trained for and at another."""
    _, language = write_parts(tmp_path, "siglip", "llama")
    stage1 = stage_of("stage1_adaptor")
    settings = stage1.Settings(
        **SHORT | {"held_out_rows": 2, "batch": 2}, out=tmp_path / "s1", vision=str(scratch[0]),
        text=language, adaptor="mlp", image_px=image_px,
    )  # fmt: skip
    recipe.run(settings, stage1.stage)
    model = vlm.load(tmp_path / "s1", dtype="stored")
    trained = vlm.load(scratch[0], dtype="stored").module.tokenizer
    gone = assert_same_tower(model.module.tokenizer, trained)
    assert gone
    assert all(name.startswith("backbone.head.") for name in gone)
    assert model.processor.pixel_spec.size_hw == (image_px or (16, 16))
    assert model.module.tokenizer(torch.zeros(1, 3, 32, 48)).grid_hw == (4, 6)


@pytest.mark.parametrize("size_hw", [None, (64, 32)])
@pytest.mark.parametrize("image", ["mean", "class", "own", "net, mean"])
def test_timm_tower_crosses_the_bridge(tmp_path, image, size_hw):
    """T16: patch tokens alone, whatever the pooling read; positions resized."""
    from tests.test_contrastive import model
    from vlm.inference.embed import ContrastiveModel
    from vlm.systems.pairing import Pairing

    trained = model(image)
    processor = training.contrastive_model().processor
    processor.pixel_spec = trained.tokenizer.pixel_spec
    ContrastiveModel(Pairing(module=trained, processor=processor)).save(tmp_path)
    tokenizer = load_vision(str(tmp_path), size_hw)
    sizes = size_hw or trained.tokenizer.pixel_spec.size_hw
    pixels = torch.randn(2, 3, *sizes)
    with torch.no_grad():
        images = tokenizer(pixels)
    assert images.tokens.shape[1] == tokenizer.tokens_for(sizes)
    assert images.tokens.shape[1] == images.grid_hw[0] * images.grid_hw[1]
    assert images.pooled is None
    if size_hw is None or image == "net, mean":
        assert not assert_same_tower(tokenizer, trained.tokenizer)
        expected = trained.tokenizer(pixels)
        patches = expected.tokens[:, expected.shape.prefix :]
        torch.testing.assert_close(images.tokens, patches.detach())
    else:
        before, after = trained.tokenizer.state_dict(), tokenizer.state_dict()
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert changed == {"backbone.pos_embed"}
