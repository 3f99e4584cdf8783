"""The three stages in a row, by settings alone, for any pairing of image encoder and text model."""

import json
import re
from pathlib import Path

import pytest
import torch

import vlm
from tests import tiny
from tests.folders import write_parts
from tests.runs import stage_of, weights
from vlm.training.run_folder import RunError
from vlm.training.runs import decoder_only as recipe
from vlm.training.runs import launch
from vlm.training.runs.decoder_only_settings import training_data
from vlm.weights import same_bits

pytestmark = pytest.mark.slow

SCENES = "scenes:40:seed=1:size=64x96:task=mixed"
SHORT = dict(batch=2, steps=2, held_out="scenes:4:seed=9", held_out_rows=2, workers=0, eval_every=0,
             save_every=0, threads=1, precision="fp32")  # fmt: skip


def changed_parts(before, after):
    return {n.split(".")[0] for n in before if not same_bits({n: before[n]}, {n: after[n]})}


@pytest.fixture
def stage1(tmp_path):
    def run(encoder="siglip", text="llama", **more):
        vision, language = write_parts(tmp_path, encoder, text)
        module = stage_of("stage1_adaptor")
        settings = module.Settings(
            **SHORT, out=tmp_path / "s1", vision=vision, text=language, adaptor="mlp",
            train=(SCENES,), **more,
        )  # fmt: skip
        recipe.run(settings, module.stage, module.objective)
        return tmp_path / "s1"

    return run


def continued(name, previous, out, **more):
    module = stage_of(name)
    values = {**SHORT, "previous": str(previous), "out": out, "train": (SCENES,),
              "text_held_out_rows": 2, **more}  # fmt: skip
    settings = module.Settings(**values)
    recipe.run(settings, module.stage, module.objective)
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize(
    ("encoder", "text"),
    [("siglip", "qwen2"), ("dinov2", "llama")],
    ids=["siglip-qwen", "dino-llama"],
)
def test_three_stages_train_what_they_say(stage1, tmp_path, encoder, text):
    first = stage1(encoder, text)
    start = weights(first)
    result = continued("stage2_joint", first, tmp_path / "s2")
    joint = weights(tmp_path / "s2")
    assert changed_parts(start, joint) == {"adaptor", "text"}
    assert result["text_loss"] != result["text_loss_before"] > 0
    continued(
        "stage3_sft", tmp_path / "s2", tmp_path / "s3", loc_bins=16,
        train=("scenes:9:size=64x96:task=ground", SCENES), weights=(1.0, 1.0),
    )  # fmt: skip
    last = json.loads((tmp_path / "s3/result.json").read_text())
    assert last["text_loss_first"] == result["text_loss_before"]
    # New <loc> tokens take a little of the probability of all others.
    assert last["text_loss_before"] == pytest.approx(result["text_loss"], rel=0.02)
    tuned = weights(tmp_path / "s3")
    assert changed_parts(joint, {n: tuned[n][: len(w)] for n, w in joint.items()}) == {
        "tokenizer", "adaptor", "text",
    }  # fmt: skip
    assert vlm.load(tmp_path / "s3").processor.box_codec.bins == 16


@pytest.mark.parametrize("language", ["lora", "frozen"])
def test_new_rows_alone_learn_where_the_language_model_does_not(stage1, tmp_path, language):
    """The rows of old tokens keep their bits; the folder holds one ordinary table."""
    first = stage1()
    before = weights(first)
    continued(
        "stage2_joint", first, tmp_path / "s2", language=language, loc_bins=16,
        train=("scenes:9:size=64x96:task=ground",), text_train=(), text_share=0.0,
        modality_warmup=0.0, weight_decay=0.1,
    )  # fmt: skip
    after = weights(tmp_path / "s2")
    table = "text.model.embed_tokens.weight"
    assert len(after[table]) == 259 + 16 or len(after[table]) == 300
    assert torch.equal(after[table][:259], before[table][:259])
    assert not torch.equal(after[table][259:275], before[table][259:275])
    changed = changed_parts(
        {n: w for n, w in before.items() if n != table}, {n: after[n] for n in before}
    )
    assert changed == ({"adaptor", "text"} if language == "lora" else {"adaptor"})


def test_lora_on_the_image_tokenizer_kept_as_layers(stage1, tmp_path):
    first = stage1()
    more = dict(vision="lora", language="frozen", lora_rank=2, checkpoint_activations=True)
    continued("stage2_joint", first, tmp_path / "kept", merge=False, **more)
    kept = weights(tmp_path / "kept")
    assert any("lora_B" in name and w.abs().sum() > 0 for name, w in kept.items())
    continued("stage2_joint", first, tmp_path / "merged", **more)
    merged = weights(tmp_path / "merged")
    assert set(merged) == set(weights(first))
    assert changed_parts(weights(first), merged) == {"tokenizer", "adaptor"}


def test_wrong_previous_stage_is_named_before_any_compute(stage1, tmp_path):
    with pytest.raises(RunError, match=r"holds 'stage 1: adaptor'; expected .*'stage 2: joint'"):
        continued("stage3_sft", stage1(), tmp_path / "s3")
    assert not (tmp_path / "s3").exists()


def test_run_starts_from_a_models_folder(stage1, tmp_path):
    model = stage1() / "model"
    continued("stage3_sft", model, tmp_path / "s3", text_train=(), text_share=0.0)
    module = stage_of("stage1_adaptor")
    settings = module.Settings(
        **SHORT, out=tmp_path / "again", start=str(model), train=(SCENES,), prompt="Say it."
    )
    recipe.run(settings, module.stage, module.objective)
    assert vlm.load(tmp_path / "again").caption_prompt == "Say it."


def test_prompt_of_the_previous_stage_is_kept(stage1, tmp_path):
    first = stage1(prompt="What is this?")
    continued("stage2_joint", first, tmp_path / "s2", text_train=(), text_share=0.0,
              modality_warmup=0.0, train=("scenes:9:size=64x96",))  # fmt: skip
    assert vlm.load(tmp_path / "s2").caption_prompt == "What is this?"


def test_prompt_of_a_models_folder_is_kept(tmp_path):
    """Whether the run or the model in it is named."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"caption_prompt": "What is this?"}')
    module = stage_of("stage2_joint")
    for previous in (tmp_path, tmp_path / "model"):
        assert module.Settings(previous=str(previous)).caption_prompt == "What is this?"


def test_settings_of_parts_beside_a_model_are_named():
    settings = stage_of("stage1_adaptor").Settings(start="folder", adaptor="mlp", queries=8)
    with pytest.raises(ValueError, match=r"start 'folder' does not read \['adaptor', 'queries'\]"):
        settings.build()


def test_longest_row_is_that_of_the_settings_or_of_the_folder(tmp_path):
    vision, text = write_parts(tmp_path, "siglip", "llama")
    vlm.build(vision=vision, text=text, adaptor="mlp", max_tokens=300).save(tmp_path)
    stage1, stage2 = stage_of("stage1_adaptor"), stage_of("stage2_joint")
    for asked, expected in ((None, 300), (40, 40)):
        settings = stage1.Settings(start=str(tmp_path), max_tokens=asked)
        assert settings.build().processor.max_tokens == expected
        settings = stage2.Settings(previous=str(tmp_path), max_tokens=asked)
        assert settings.build().processor.max_tokens == expected


def test_lora_of_another_rank_is_named():
    module = tiny.decoder_only()
    more = dict(previous="folder", language="lora")
    stage2 = stage_of("stage2_joint")
    stage2.Settings(**more, lora_rank=2).add_lora(module)
    names = [name for name, _ in module.named_parameters()]
    stage2.Settings(**more, lora_rank=2).add_lora(module)
    assert names == [name for name, _ in module.named_parameters()]
    with pytest.raises(ValueError, match=r"text of folder has LoRA .*'rank': 2.*expected .*16"):
        stage2.Settings(**more).add_lora(module)


def test_modality_warmup_begins_with_text_alone():
    module = stage_of("stage2_joint")
    settings = module.Settings(
        train=(SCENES,), text_train=("python:train",), text_share=0.25, modality_warmup=0.5,
        steps=100, batch=8,
    )  # fmt: skip
    data = training_data(settings)
    documents = [data[i].is_document for i in range(800)]
    assert all(documents[:14])  # the expected number of rows with images is under a half
    assert abs(sum(documents[:400]) - (200 + 50)) <= 5  # half of the warm-up, and a quarter of it
    assert abs(sum(documents[400:]) - 100) <= 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(text_share=0.5), "text_train .* text_share 0.5: expected both or neither"),
        (dict(text_train=("python:val",), text_share=1.0), "text_share must be in 0 to 1"),
        (dict(modality_warmup=0.5), "begins with text alone: it needs text_train"),
        (dict(weights=(1.0, 2.0)), "2 weights .* for 1 sources"),
        (dict(weights=(-1.0,)), r"at least 0, found \[-1.0\]"),
        (
            dict(weights=(0.0,), text_train=("python:val",), text_share=0.5),
            r"one weight is above 0, found \[0.0\]",
        ),
    ],
)
def test_data_that_do_not_fit_are_named(options, message):
    settings = stage_of("stage1_adaptor").Settings(train=(SCENES,), **options)
    with pytest.raises(ValueError, match=message):
        training_data(settings)


def test_settings_come_from_a_file_and_options_win(tmp_path):
    module = stage_of("stage2_joint")
    (tmp_path / "run.yaml").write_text("steps: 7\nbatch: 12\nout: there\ntrain: [a.jsonl]\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--batch", "24"]
    settings = launch.read_settings(module.Settings, arguments, "about")
    assert (settings.steps, settings.batch, settings.train) == (7, 24, ("a.jsonl",))
    (tmp_path / "run.yaml").write_text("stepz: 7\n")
    with pytest.raises(ValueError, match=r"run\.yaml: \['stepz'\] are no settings"):
        launch.read_settings(module.Settings, arguments, "about")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("language_rate: 1e-3", 1e-3),
        ("merge: false", False),
        ("weights: [1, 2]", (1.0, 2.0)),
        ("text_train: []", ()),
        ("micro_batch: null", None),
        ("prompt: null", None),
        ("out: there", Path("there")),
    ],
)
def test_settings_of_a_file_are_of_their_own_kind(tmp_path, line, expected):
    (tmp_path / "run.yaml").write_text(f"{line}\n")
    arguments = ["--config", str(tmp_path / "run.yaml")]
    settings = launch.read_settings(stage_of("stage2_joint").Settings, arguments, "about")
    found = getattr(settings, line.partition(":")[0])
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("resume: 'no'", "resume: expected true or false, found 'no'"),
        ("resume: 1", "resume: expected true or false, found 1"),
        ("steps:", "steps: expected a value, found none"),
        ("micro-batch: 0", "micro_batch must be at least 1, found 0"),
    ],
)
def test_values_that_a_file_cannot_give_are_named(tmp_path, line, message):
    (tmp_path / "run.yaml").write_text(f"{line}\n")
    arguments = ["--config", str(tmp_path / "run.yaml")]
    with pytest.raises(ValueError, match=re.escape(message)):
        launch.read_settings(stage_of("stage2_joint").Settings, arguments, "about")
    with pytest.raises(ValueError, match=r"--config .*: cannot be read \(Is a directory\)"):
        launch.read_settings(stage_of("stage2_joint").Settings, ["--config", str(tmp_path)], "")


@pytest.mark.parametrize("line", ["vision: lore", "steps: seven", "steps: true"])
def test_settings_of_another_kind_in_a_file_are_refused(tmp_path, capsys, line):
    (tmp_path / "run.yaml").write_text(f"{line}\n")
    arguments = ["--config", str(tmp_path / "run.yaml")]
    with pytest.raises(SystemExit):
        launch.read_settings(stage_of("stage2_joint").Settings, arguments, "about")
    assert "run.yaml" in "".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("size", ["1.3b", "7b"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_published_settings_are_those_of_the_recipes(size, stage):
    name = {1: "stage1_adaptor", 2: "stage2_joint", 3: "stage3_sft"}[stage]
    module = stage_of(name)
    path = f"recipes/configs/deepseek_vl_{size}_stage{stage}.yaml"
    settings = launch.read_settings(module.Settings, ["--config", path], "about")
    published = {
        1: (1e-3, 256, 15_000),
        2: (3e-5, 1024, 96_000) if size == "1.3b" else (4.2e-5, 2304, 42_000),
        3: (2e-5, 256, 10_000),
    }
    rate = settings.rate if stage == 1 else settings.language_rate
    assert (rate, settings.batch, settings.steps) == published[stage]
    assert settings.text_share == (0.7 if stage == 2 else 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", r"run\.yaml: not YAML \(while parsing"),
        ("train: {a: 1}", r"run\.yaml: \['train'\] hold keys of their own"),
    ],
)
def test_broken_settings_file_is_named(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        launch.read_settings(
            stage_of("stage2_joint").Settings, [f"--config={tmp_path / 'run.yaml'}"], "about"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lora_rank=8), r"\['lora_rank'\] are settings of LoRA"),
        (dict(merge=False), r"\['merge'\] are settings of LoRA"),
        (dict(modality_warmup=2.0), "modality_warmup is a share of the steps, 0 to 1, found 2.0"),
        (dict(train=("scenes:9:task=ground",)), r"scenes:9.* hold boxes.*--loc-bins"),
        (dict(text_train=("sample:val",)), r"val\.jsonl:1: expected text alone, found 1 images"),
    ],
)
def test_settings_that_cannot_be_meant_stop_before_training(stage1, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        continued("stage2_joint", stage1(), tmp_path / "s2", **options)
    assert not (tmp_path / "s2/metrics.jsonl").exists()


def test_missing_previous_run_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = stage_of("stage3_sft").Settings()
    with pytest.raises(
        RunError, match="runs/stage2: no such run; expected one of 'stage 2: joint'"
    ):
        settings.build()


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        ("stage2_joint", "--vision-rate 1e-4", "--vision-rate 0.0001.*vision is frozen"),
        ("stage2_joint", "--vision-rate 2e-5", "--vision-rate 2e-05.*vision is frozen"),  # as usual
        ("stage2_joint", "--vision full --vision-rate 1e-4", None),
        ("stage2_joint", "--adaptor frozen", None),
        ("stage2_joint", "--adaptor frozen --adaptor-rate 1e-3", "adaptor is frozen"),
        ("stage2_joint", "--language frozen --language-rate 1e-3", "language is frozen"),
        ("stage2_joint", "--language frozen --language-rate 1e-3 --loc-bins 8", None),
        ("stage2_joint", "--language lora --language-rate 1e-3", None),
        ("stage3_sft", "--vision frozen", None),
        ("stage3_sft", "--vision frozen --vision-rate 3e-4", "vision is frozen"),
        ("paligemma", "--frozen tokenizer --vision-rate 1e-5", "tokenizer is frozen"),
        ("paligemma", "--frozen text --language-rate 1e-5 --loc-bins 8", None),
        ("contrastive", "--start x --lock-image --image-rate 1e-3", "--lock-image locks it"),
        ("contrastive", "--start x --lock-image --text-rate 1e-3", None),
        ("contrastive", "--start x --lock-text --text-rate 1e-3", "--lock-text locks it"),
    ],
)
def test_rate_of_a_part_that_does_not_learn_is_refused_where_it_is_given(
    tmp_path, recipe, options, said
):
    settings = stage_of(recipe).Settings
    arguments = options.split()
    if recipe.startswith("stage"):
        (tmp_path / "config.json").write_text(json.dumps({"format": "vlm", "loc": None}))
        arguments += ["--previous", str(tmp_path)]
    if said is None:
        launch.read_settings(settings, arguments, "about")
        return
    with pytest.raises(ValueError, match=said):
        launch.read_settings(settings, arguments, "about")


def test_rate_of_a_frozen_part_in_a_file_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("vision_rate: 3e-4\nvision: frozen\n")
    with pytest.raises(ValueError, match="vision is frozen"):
        launch.read_settings(
            stage_of("stage3_sft").Settings, ["--config", str(tmp_path / "run.yaml")], "about"
        )
