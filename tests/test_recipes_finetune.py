"""Fine-tuning of published systems: rows of other tools' forms, what learns, and what is saved."""

import json
import shutil

import pytest
import torch

import vlm
from tests import tiny
from tests.folders import public
from tests.reference import (
    tiny_idefics,
    tiny_idefics2,
    tiny_kosmos2,
    tiny_llava,
    tiny_mllama,
    tiny_paligemma,
    tiny_qwen2_vl,
    tiny_smolvlm,
)
from tests.reference.images_in_text import folders, reopened
from tests.runs import on_processes, stage_of, weights
from vlm import cli
from vlm.data.example import BadRow
from vlm.training.runs import decoder_only as recipe
from vlm.training.runs import launch
from vlm.training.runs.export import export
from vlm.training.stages import FROZEN
from vlm.weights import same_bits

SHORT = dict(batch=2, steps=2, workers=0, eval_every=0, save_every=0, threads=1,
             precision="fp32")  # fmt: skip
SYSTEMS = {
    "smolvlm": lambda path: tiny_smolvlm.write_folder(path, "smolvlm"),
    "llava": lambda path: tiny_llava.write_folder(path, "llava"),
    "paligemma": lambda path: tiny_paligemma.write_folder(path, "gemma"),
    "idefics2": tiny_idefics2.write_folder,
    "qwen2_5_vl": lambda path: tiny_qwen2_vl.write_folder(path, "qwen2_5_vl"),
    "kosmos-2": tiny_kosmos2.write_folder,
    "mllama": tiny_mllama.write_folder,
    "idefics without a perceiver": lambda path: tiny_idefics.write_folder(path, "plain"),
}
folder = folders(SYSTEMS, lambda path, kind: SYSTEMS[kind](path))
END = "<end_of_utterance>"
"""SmolVLM's end of a turn."""


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    path = tmp_path_factory.mktemp("smolvlm")
    SYSTEMS["smolvlm"](path)
    return path


def asked(*said):
    """Turns of LLaVA's form, ours and the model's in turn."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


def messages(*said):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


IMAGE, TWO = {"image": "a.png"}, {"images": ["a.png", "b.png"]}
PARTS = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "is it a cat?"}]
FORMS = {
    "llava": (
        IMAGE | {"conversations": asked("<image>\nwhat is it?", "a cat", "and now?", "a dog")},
        ["a cat", "a dog"],
    ),
    "messages": (
        TWO | {"messages": messages(PARTS, [{"type": "text", "text": "two dogs"}])},
        ["two dogs"],
    ),
    "sharegpt": (
        TWO | {"conversations": asked("<image>or<image>?", "a cat"), "system": "Be brief."},
        ["a cat"],
    ),
    "ms-swift": (
        {"images": ["a.png"], "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image>what?"},
            {"role": "assistant", "content": "it is", "loss": False},
            {"role": "user", "content": "what is it?"},
            {"role": "assistant", "content": "a cat"},
        ]},
        ["a cat"],
    ),
    "text alone": ({"messages": messages("what is a cat?", "it is a cat")}, ["it is a cat"]),
}  # fmt: skip
"""Form -> a row as its tool writes it, and the answers that are learned."""


@pytest.fixture
def rows(tmp_path):
    """Writes rows beside two images of other shapes; gives their file."""

    def write(*values):
        for number, name in enumerate("ab"):
            tiny.image(number, ((75, 40), (40, 90))[number]).save(tmp_path / f"{name}.png")
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in values))
        return str(path)

    return write


def settings_of(model, train, **values):
    return stage_of("finetune").Settings(
        **{**SHORT, "model": str(model), "train": (train,), **values}
    )


def finetune(model, train, out, **values):
    """A run in this process: its result, and the loss of each step."""
    module = stage_of("finetune")
    settings = settings_of(model, train, out=out, **values)
    recipe.run(settings, module.stage, module.objective)
    return losses_of(out)


def losses_of(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line and "step" in line]


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_other_tools_are_learned_as_they_mean_it(smolvlm, rows, form):
    row, answers = FORMS[form]
    settings = settings_of(smolvlm, rows(row))
    processor = settings.build().processor
    example = settings.data()[0]
    encoded = processor.encode(example)
    said = processor.text_tokenizer.decode(encoded.ids[encoded.scored], skip_special_tokens=False)
    assert [part.strip() for part in said.split(END)] == [*answers, ""]
    assert len({image for _, (image, _) in encoded.views}) == len(example.images)
    assert (encoded.unscored is not None) == (form == "ms-swift")
    texts = processor.text_tokenizer.decode(encoded.ids[encoded.ids >= 0])
    assert ("Be brief." in texts) == ("Be brief." in json.dumps(row))


@pytest.mark.slow
def test_published_system_is_finetuned_and_opens_in_transformers(folder, rows, tmp_path):
    """By default LoRA on the language model, the whole adaptor with the cross-attention blocks of
    models that have them, and nothing of the tower."""
    train = rows(
        IMAGE | {"conversations": asked("<image>\nwhat is it?", "a cat")},
        {"image": "b.png", "conversations": asked("<image>\nand this?", "two dogs")},
        {"image": "b.png", "caption": "a dog"},
    )
    out = tmp_path / "run"
    assert len(finetune(folder, train, out, language_rate=1e-2, adaptor_rate=1e-2)) == 2
    before, after = weights(folder), weights(out)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    parts = {name.split(".")[0] for name in before}
    assert moved == parts & {"adaptor", "cross", "text"}
    assert before.keys() == after.keys()  # LoRA is merged
    asks = [vlm.load(path, "cpu").caption_prompt for path in (folder, out)]
    assert asks[0] == asks[1]
    export(out, tmp_path / "reference", layout="reference")
    reopened(tmp_path / "reference")
    again = weights(tmp_path / "reference")
    for name in after:
        torch.testing.assert_close(again[name], after[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_every_way_of_running_learns_the_same(smolvlm, rows, tmp_path):
    """Padded, packed, with the tower's tokens kept, resumed, and sharded over two processes."""
    train = rows(*(row for row, _ in FORMS.values()))
    more = dict(steps=4, save_every=2, language_rate=1e-2, adaptor_rate=1e-2)
    plain = finetune(smolvlm, train, tmp_path / "plain", **more)
    assert len(plain) == 4
    ways = {"packed": dict(pack=200), "kept": dict(token_cache=tmp_path / "kept tokens")}
    for name, way in ways.items():
        assert finetune(smolvlm, train, tmp_path / name, **more, **way) == pytest.approx(
            plain, rel=1e-5
        )
    resumed = shutil.copytree(tmp_path / "plain", tmp_path / "resumed")
    shutil.rmtree(sorted((resumed / "checkpoints").iterdir())[-1])
    assert finetune(smolvlm, train, resumed, **more, resume=True) == plain
    assert same_bits(weights(tmp_path / "plain"), weights(resumed))
    done = on_processes(
        2, "recipes/finetune.py", "--model", smolvlm, "--train", train, "--out",
        tmp_path / "sharded", "--steps", 4, "--batch", 2, "--language-rate", 1e-2,
        "--adaptor-rate", 1e-2, "--workers", 0, "--eval-every", 0, "--precision", "fp32",
        "--shard", "all", "--pack", 200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(tmp_path / "sharded") == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_rows_of_boxes_are_learned_in_tokens_that_the_system_has_or_is_given(rows, tmp_path):
    box = {"ref": ["cat"], "bbox": [[4, 8, 30, 60]]}
    train = rows(
        {"images": ["a.png"], "objects": box,
         "messages": messages("<image>find <ref-object>", "<bbox>")},
    )  # fmt: skip
    SYSTEMS["smolvlm"](tmp_path / "smolvlm")
    with pytest.raises(ValueError, match=r"rows.jsonl: its answers hold boxes.*--loc-bins 1024"):
        finetune(tmp_path / "smolvlm", train, tmp_path / "none")
    finetune(tmp_path / "smolvlm", train, tmp_path / "run", loc_bins=16)
    model = vlm.load(tmp_path / "run", "cpu")
    row = model.processor.encode(settings_of(tmp_path / "run", train).data()[0])
    said = model.processor.text_tokenizer.decode(row.ids[row.scored])
    assert said.count("<loc") == 4


def test_rates_are_those_of_how_a_component_learns(smolvlm):
    module = stage_of("finetune")

    def rates(**values):
        settings = settings_of(smolvlm, "sample:train", **values)
        return dict(module.stage(settings, settings.build().module, 2).rates)

    assert rates() == {
        "tokenizer.*": FROZEN, "adaptor.*": 2e-5, "text.*lora_*": 2e-4, "text.*": FROZEN,
    }  # fmt: skip
    assert rates(vision="full", language="full") == {
        "tokenizer.*": 2e-6, "adaptor.*": 2e-5, "text.*": 2e-5,
    }  # fmt: skip
    low = rates(vision="lora", language="frozen", vision_rate=1e-5, adaptor="lora")
    assert (low["tokenizer.*lora_*"], low["adaptor.*lora_*"]) == (1e-5, 2e-4)


def test_model_of_another_family_is_refused_with_its_recipe(tmp_path):
    public().save(tmp_path)
    with pytest.raises(ValueError, match=r"found one of the family contrastive .*contrastive\.py"):
        settings_of(tmp_path, "sample:train").build()


def test_model_and_data_must_be_named(capsys):
    settings = stage_of("finetune").Settings
    with pytest.raises(SystemExit):
        launch.read_settings(settings, [], "about")
    said = capsys.readouterr().err
    assert "--model" in said
    assert "--train" in said
    with pytest.raises(ValueError, match=r"--vision-rate 1e-05: .*vision is frozen"):
        launch.read_settings(
            settings, ["--model", "x", "--train", "y", "--vision-rate", "1e-5"], "about"
        )


def test_rows_of_a_published_system_are_shown_as_they_are_learned(smolvlm, rows, capsys):
    (messages_row, _), (swift, _) = FORMS["messages"], FORMS["ms-swift"]
    cli.main([
        "inspect-batch", "recipes/finetune.py", "--rows", "2", "--plain", "--model", str(smolvlm),
        "--train", rows(messages_row, swift),
    ])  # fmt: skip
    said = "".join(capsys.readouterr().out.split())  # lines are broken anywhere
    assert "<fake_token_around_image><row_1_col_1>[image×4]<fake_token_around_image>" in said
    assert "<global-img>[image×4]<fake_token_around_image>" in said
    assert f"[[twodogs{END}]]" in said
    assert "[unscored:itis" in said


def test_system_message_that_a_template_leaves_out_is_named(rows, tmp_path):
    """Mistral's, as LLaVA-NeXT has it, writes users' and assistants' messages alone."""
    tiny_llava.write_folder(tmp_path / "llava_next", "llava_next")
    settings = settings_of(tmp_path / "llava_next", rows(FORMS["sharegpt"][0]))
    processor = settings.build().processor
    with pytest.raises(BadRow, match=r"rows.jsonl:1: .* no system message, .* 'Be brief.'"):
        processor.encode(settings.data()[0])
