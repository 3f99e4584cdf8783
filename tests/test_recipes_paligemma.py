"""Transfer to one task, from COCO's JSON to mAP: settings, rows, a few steps, the evaluation."""

import json
from pathlib import Path

import pytest
import torch

import vlm
from tests import tiny
from tests.folders import write_parts
from tests.reference.tiny_paligemma import write_folder
from tests.runs import stage_of
from vlm.data.example import BadRow, Box, Example, Turn, caption_example
from vlm.data.sources import BadSource, CocoSource, ListSource, open_source
from vlm.data.sources.transfer import Detect, Prompted, detection
from vlm.data.write_coco import main as write_coco_main
from vlm.data.write_coco import write_coco
from vlm.evaluation import base
from vlm.evaluation.grounding import GroundingEvaluation, Settings
from vlm.families.prefix_decoder.module import PrefixDecoder
from vlm.pixels import open_image
from vlm.training.runs import decoder_only as recipe
from vlm.training.runs import launch
from vlm.training.stages import FROZEN
from vlm.weights import same_bits

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SCENES = "scenes:6:seed=1:size=mixed:shapes=2-3"
SHORT = dict(batch=2, steps=2, held_out_rows=2, workers=0, eval_every=0, save_every=0, threads=1,
             precision="fp32")  # fmt: skip


def settings_of(**values):
    return stage_of("paligemma").Settings(**{**SHORT, **values})


def run(**values):
    module = stage_of("paligemma")
    return recipe.run(module.Settings(**{**SHORT, **values}), module.stage, module.objective)


@pytest.fixture
def coco(tmp_path):
    path = write_coco(open_source(SCENES), tmp_path / "coco")
    return f"coco:{path}?root={path.parent / 'images'}"


def test_scenes_return_from_cocos_files(coco, tmp_path):
    """Images of any size, every box in its own pixels; pycocotools opens the file too."""
    from pycocotools.coco import COCO

    scenes, again = open_source(SCENES), open_source(coco)
    assert isinstance(again, CocoSource)
    assert len(again) == len(scenes)
    for row in range(len(scenes)):
        true, read = scenes[row], again[row]
        images = [open_image(example.images[0]) for example in (true, read)]
        assert images[0].size == images[1].size
        assert images[0].tobytes() == images[1].tobytes()
        assert list(read.boxes) == [Box(0, b.xyxy_px, b.label) for b in true.boxes]
    records = COCO(str(tmp_path / "coco/instances.json"))
    assert len(records.getAnnIds()) == sum(len(scenes[row].boxes) for row in range(len(scenes)))
    with pytest.raises(ValueError, match="expected no such file yet"):
        write_coco(scenes, tmp_path / "coco")


def test_scenes_are_written_by_a_command(tmp_path, capsys):
    write_coco_main("scenes:2", tmp_path / "out")
    spec = capsys.readouterr().out.strip()
    assert len(open_source(spec)) == 2


def boxed(labels=("cup", "cat", "cup")):
    boxes = tuple(Box(0, (i, 4 - i, i + 3, 9 - i), label) for i, label in enumerate(labels))
    return Example("row", (Turn("user", (None,)),), (tiny.image(),), boxes)


def test_detection_writes_each_box_with_its_label():
    asked, answer = detection(boxed(), ["cat", "cup"], "detect {phrase}").turns
    assert asked.content == (None, "detect cat ; cup")
    assert answer.content == (1, " cat", " ; ", 2, " cup", " ; ", 0, " cup")
    with pytest.raises(BadRow, match="row: expected a box of 'dog', found none"):
        detection(boxed(), ["dog"], "detect {phrase}")
    with pytest.raises(BadRow, match="row: expected boxes to ask for, found none"):
        detection(boxed(()), [], "detect {phrase}")
    two = Example("two", (Turn("user", (None, None)),), (tiny.image(), tiny.image()))
    with pytest.raises(BadRow, match=r"two: expected one image, .* found 2"):
        detection(two, ["cat"], "detect {phrase}")


def test_detect_asks_for_some_labels_the_same_ones_again(coco):
    source = Detect(open_source(coco), "detect {phrase}", seed=3)
    again = Detect(open_source(coco), "detect {phrase}", seed=3)
    counts = set()
    for row in range(len(source)):
        example = source[row]
        assert example.turns == again[row].turns
        labels = {box.label for box in example.boxes}
        asked = example.turns[0].text.removeprefix("detect ").split(" ; ")
        assert len(set(asked)) == len(asked)
        assert set(asked) <= labels
        written = [example.boxes[n].label for n in example.turns[1].box_numbers]
        assert written == sorted(written, key=asked.index)
        assert len(written) == sum(box.label in asked for box in example.boxes)
        counts.add(len(asked) == len(labels))
    assert counts == {True, False}


def test_prompted_puts_the_question_in_its_place():
    image = tiny.image()
    rows = [tiny.example("q", ("See ", None, "\nwhat?"), "a cat", (image,)),
            caption_example("c", image, "a dog", "Describe it.")]  # fmt: skip
    source = Prompted(ListSource(rows), "answer en {question}")
    assert source[0].turns[0].content == (None, "answer en See \nwhat?")
    assert source[0].answer == "a cat"
    assert Prompted(ListSource(rows), "caption en")[1].turns[0].content == (None, "caption en")
    several = Example("s", rows[0].turns * 2, (image, image))
    with pytest.raises(BadRow, match="one question and its answer, found turns of user, assist"):
        Prompted(ListSource([several]), "ocr")[0]


@pytest.mark.parametrize(
    ("task", "prompt", "message"),
    [
        ("detect", "find it", "expected {phrase} where labels go"),
        ("detect", "find {thing}", "expected no fields but {phrase}"),
        ("caption", "say {phrase}", "expected no fields but {question}"),
        ("caption", "say {", "expected fields in braces"),
    ],
)
def test_prompt_with_other_braces_is_refused(task, prompt, message):
    settings = settings_of(task=task, prompt=prompt)
    with pytest.raises(BadSource, match=message):
        settings.source("scenes:2")


def test_transfer_of_a_paligemma_folder_to_detection(coco, tmp_path):
    """Everything learns at the rates that are set; the result opens in transformers' layout."""
    write_folder(tmp_path / "start", "gemma2")
    out = tmp_path / "run"
    run(task="detect", start=str(tmp_path / "start"), train=(coco,), held_out=coco, out=out,
        vision_rate=1e-3, adaptor_rate=2e-3, language_rate=3e-3,
        checkpoint_activations=True)  # fmt: skip
    before, after = (vlm.load(tmp_path / n, "cpu", "stored") for n in ("start", "run"))
    moved = {
        name.split(".")[0]
        for name, weight in after.module.named_parameters()
        if not torch.equal(weight, before.module.get_parameter(name))
    }
    assert moved == {"tokenizer", "adaptor", "text"}
    assert after.ground_prompt == "detect {phrase}"
    after.save(tmp_path / "reference", layout="reference")
    again = vlm.load(tmp_path / "reference", "cpu", "stored")
    assert same_bits(again.module.state_dict(), after.module.state_dict())
    result = json.loads((out / "result.json").read_text())
    assert result["captions"] == 2
    assert result["unscored"] == 0


def test_new_model_learns_detection_and_is_evaluated(coco, tmp_path):
    """From parts to mAP, in a few steps."""
    vision, text = write_parts(tmp_path, "siglip", "llama")
    run(task="detect", vision=vision, text=text, adaptor="mlp", train=(coco,), held_out=coco,
        out=tmp_path / "run", loc_bins=16, augment="light")  # fmt: skip
    model = vlm.load(tmp_path / "run", "cpu")
    assert isinstance(model.module, PrefixDecoder)
    assert model.processor.box_codec.bins == 16
    assert model.ground_prompt == "detect {phrase}"
    assert model.caption_prompt == "caption en"
    settings = Settings(model=str(tmp_path / "run"), data=coco, max_new_tokens=6, images=2)
    result = base.run(GroundingEvaluation(settings))
    assert result["prompt"] == "detect {phrase}"
    assert 0 <= result["metrics"]["ap"] <= 1
    assert result["metrics"]["images"] == 6
    assert (tmp_path / "run/grounding/images.png").is_file()


@pytest.mark.parametrize(
    ("task", "prompt", "said"),
    [
        ("caption", None, "caption en"),
        ("caption", "caption es", "caption es"),
        ("answer", None, "answer en What colour"),
        ("ocr", None, "ocr"),
    ],
)
def test_tasks_are_put_in_their_words(tmp_path, task, prompt, said):
    """Training rows and the trained model ask alike."""
    vision, text = write_parts(tmp_path, "siglip", "llama")
    kind = "question" if task == "answer" else "caption"
    data = f"scenes:8:seed=1:size=64x96:task={kind}"
    settings = settings_of(task=task, prompt=prompt, vision=vision, text=text, adaptor="mlp",
                           train=(data,), out=tmp_path / "run")  # fmt: skip
    rows = [settings.data()[number] for number in range(8)]
    assert any(row.turns[0].text.startswith(said) for row in rows)
    model = settings.build()
    kept = getattr(model, stage_of("paligemma").ASKED_BY[task])
    assert kept == settings.asked
    assert said.startswith(kept.partition("{")[0])


def test_frozen_parts_keep_their_bits_and_new_rows_learn(tmp_path, coco):
    vision, text = write_parts(tmp_path, "siglip", "llama")
    module = stage_of("paligemma")
    settings = settings_of(task="detect", vision=vision, text=text, adaptor="mlp", loc_bins=16,
                           frozen=("tokenizer", "text"), train=(coco,), held_out_rows=0,
                           out=tmp_path / "run")  # fmt: skip
    model = settings.build()
    rates = dict(module.stage(settings, model.module, 2).rates)
    assert rates == {
        "tokenizer.*": FROZEN, "adaptor.*": 1e-5, "text.*.new": 1e-5, "text.*": FROZEN,
    }  # fmt: skip


def test_start_that_is_no_prefix_model_is_refused(tmp_path):
    vision, text = write_parts(tmp_path, "siglip", "llama")
    vlm.build(vision=vision, text=text, adaptor="mlp").save(tmp_path / "causal")
    with pytest.raises(ValueError, match="expected a prefix model, found a decoder_only one"):
        settings_of(start=str(tmp_path / "causal")).build()
    with pytest.raises(ValueError, match=r"start .* does not read \['adaptor'\]"):
        settings_of(start=str(tmp_path / "causal"), adaptor="mlp").build()


def test_data_without_boxes_or_model_without_their_tokens_says_so(coco, tmp_path):
    vision, text = write_parts(tmp_path, "siglip", "llama")
    parts = dict(task="detect", vision=vision, text=text, adaptor="mlp", out=tmp_path / "run",
                 held_out=coco)  # fmt: skip
    with pytest.raises(ValueError, match="this model writes none; give it <loc> tokens"):
        run(**parts, train=(coco,))
    with pytest.raises(BadRow, match="expected boxes to ask for, found none"):
        run(**parts, train=("sample:train",), loc_bins=16)


def test_published_settings_are_the_defaults():
    """Those of VQAv2 in arXiv 2407.07726."""
    settings = launch.read_settings(stage_of("paligemma").Settings, [], None)
    assert (settings.batch, settings.warmup_ratio, settings.min_lr_ratio) == (256, 0.05, 0.0)
    assert {settings.vision_rate, settings.adaptor_rate, settings.language_rate} == {1e-5}
    assert settings.frozen == ()
