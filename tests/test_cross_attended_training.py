"""Cross-attention towers composed, trained, sharded, resumed and opened again."""

import dataclasses
import json

import pytest
import torch

import vlm
from tests import tiny, training
from tests.contrastive_runs import assert_close
from tests.folders import write_parts
from tests.runs import launch, lines, stage_of, weights
from vlm.families.decoder_only.batch import collate
from vlm.lora import Lora, add_lora
from vlm.training.runs import decoder_only as recipe
from vlm.training.stages import FROZEN
from vlm.weights import same_bits

WHOLE = dataclasses.replace(training.STAGE, rates=(("*", 1e-2),))
BLOCKS = (("cross.*", 1e-2), ("adaptor.*", 1e-2), ("*", FROZEN))
SCENES = "scenes:40:seed=1:size=64x96:task=mixed"


@pytest.fixture
def composed(tmp_path):
    def build(text="llama", adaptor="resampler", **more):
        vision, language = write_parts(tmp_path, "siglip", text)
        options = dict(queries=5, system="", cross_every=2) | more
        return vlm.build(vision=vision, text=language, adaptor=adaptor, **options)

    return build


def stir(module):
    """Opens the gates."""
    with torch.no_grad():
        for block in module.cross.blocks:
            block.attention_gate.fill_(0.8)
            block.mlp_gate.fill_(-0.6)


@pytest.mark.parametrize(
    ("text", "adaptor"), [("llama", "perceiver"), ("qwen2", "mlp"), ("gemma2", "resampler")]
)
def test_any_pairing_composes_saves_and_reopens(composed, tmp_path, text, adaptor):
    model = composed(text, adaptor, cross_every=1)
    assert model.module.cross.config.before == (0, 1)
    stir(model.module)
    images = [tiny.image(1, (30, 71)), tiny.image(2, (90, 20))]
    captions = model.caption(images, max_new_tokens=6)
    model.save(tmp_path / "saved")
    again = vlm.load(tmp_path / "saved", device="cpu")
    assert again.module.cross.config == model.module.cross.config
    assert same_bits(model.module.state_dict(), again.module.state_dict())
    assert again.caption(images, max_new_tokens=6) == captions


@torch.no_grad()
def test_composed_logits_are_the_language_models_at_the_start(composed):
    """Gates begin at 0: of text alone, and of text with marks at its images."""
    model = composed()
    assert model.module.cross.config.before == (0,)
    rows = [
        model.processor.encode(tiny.example("text", ("say it",), "long answer")),
        model.processor.encode(tiny.example("image", ("what is", None, "?"), "a cat")),
    ]
    for row in rows:
        batch = collate([row], model.processor.pad_id)
        vectors = model.module.embed(batch.ids)
        expected = tiny.text_model()(inputs_embeds=vectors).logits[:, :-1][batch.scored[:, 1:]]
        torch.testing.assert_close(model.module(batch), expected)


def test_what_does_not_fit_is_refused(composed):
    with pytest.raises(ValueError, match="cross_every must be at least 1, found 0"):
        composed(cross_every=0)
    with pytest.raises(ValueError, match="cross_every needs mask 'causal', found 'prefix'"):
        composed(cross_every=1, mask="prefix")


def test_a_folder_of_unknown_blocks_is_named(composed, tmp_path):
    composed().save(tmp_path / "saved")
    path = tmp_path / "saved/config.json"
    values = json.loads(path.read_text())
    values["cross"]["block"]["windows"] = 3
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json\.cross.*unknown keys \['windows'\]"):
        vlm.load(tmp_path / "saved")


@pytest.mark.parametrize("pack", [None, 120])
def test_blocks_learn_beside_a_frozen_language_model(tmp_path, pack):
    """The loss falls, what is frozen keeps its bits, and the split changes nothing."""
    stage = dataclasses.replace(training.STAGE, rates=BLOCKS)
    runs = []
    for micro_batch in (4, 1):
        chosen = training.cross_attended_model(gates=0.0)
        before = {n: p.clone() for n, p in chosen.module.named_parameters()}
        plan = dataclasses.replace(stage, micro_batch=micro_batch)
        _, _, history = training.train(tmp_path / str(micro_batch), plan, chosen=chosen, pack=pack)
        runs.append([line["loss"] for line in history])
        for name, parameter in chosen.module.named_parameters():
            frozen = name.split(".")[0] in ("text", "tokenizer")
            assert torch.equal(parameter, before[name]) == frozen, name
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert runs[0][-1] < runs[0][0]


def test_lora_on_blocks_and_language_model_is_merged_and_kept(composed, tmp_path):
    model = composed()
    stir(model.module)
    add_lora(model.module, {"cross": Lora(rank=2), "text": Lora(rank=2)})
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    row = model.processor.encode(tiny.example())
    batch = collate([row], model.processor.pad_id)
    expected = model.module(batch)
    for merge in (True, False):
        model.save(tmp_path / str(merge), merge=merge)
        again = vlm.load(tmp_path / str(merge), dtype="float32")
        assert any("lora_" in name for name in again.module.state_dict()) != merge
        torch.testing.assert_close(again.module(batch), expected, atol=1e-4, rtol=1e-4)


def test_a_run_goes_on_exactly(tmp_path):
    """Killed or stopped, the rest of a run is that of one which was not."""
    whole = training.cross_attended_model()
    _, _, history = training.train(tmp_path / "one", WHOLE, chosen=whole, save_every=3, keep=9)
    checkpoints = tmp_path / "two/checkpoints"
    checkpoints.mkdir(parents=True)
    (tmp_path / "one/checkpoints/step_00000003").rename(checkpoints / "step_00000003")
    chosen, _, rest = training.train(
        tmp_path / "two", WHOLE, chosen=training.cross_attended_model(), resume=True
    )
    assert [line["loss"] for line in rest] == [line["loss"] for line in history[3:]]
    assert same_bits(training.weights(whole), training.weights(chosen))


@pytest.mark.slow
def test_two_sharded_processes_follow_one_though_one_of_them_sees_no_image(tmp_path):
    """All weights learn, and the blocks alone with adaptor: ranks make the same calls."""
    runs = {}
    for name, rates in (("whole", WHOLE.rates), ("blocks", BLOCKS)):
        shared = {"shard": "all", "split_by_kind": True, "family": "cross_attended"}
        stage = {"rates": rates, "micro_batch": 2}
        runs[name] = {"stage": stage, **shared}
        runs[f"{name} packed"] = {"stage": stage, "pack": 120, **shared}
    done = launch(tmp_path / "two", 2, runs=runs)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, options in runs.items():
        stage = dataclasses.replace(training.STAGE, rates=tuple(options["stage"]["rates"]))
        chosen, _, history = training.train(
            tmp_path / name, stage, chosen=training.cross_attended_model(),
            data=training.in_order(training.split_by_kind()),
        )  # fmt: skip
        for a, b in zip(history, lines(tmp_path / "two" / name), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        if "pack" not in options:
            saved = torch.load(tmp_path / "two" / name / "weights.pt")
            assert_close(saved, training.weights(chosen))


@pytest.mark.slow
def test_stages_train_blocks_as_the_adaptor(tmp_path):
    """By recipes alone: blocks with the adaptor first, then beside a language model with LoRA."""
    vision, language = write_parts(tmp_path, "siglip", "llama")
    short = dict(
        batch=2, steps=2, held_out="scenes:4:seed=9", held_out_rows=2, workers=0, eval_every=0,
        save_every=0, threads=1, precision="fp32", train=(SCENES,),
    )  # fmt: skip
    module = stage_of("stage1_adaptor")
    settings = module.Settings(
        **short, out=tmp_path / "s1", vision=vision, text=language, adaptor="perceiver", queries=4,
        cross_every=1, pack=400,
    )  # fmt: skip
    start = settings.build().module.state_dict()
    recipe.run(settings, module.stage, module.objective)
    first = weights(tmp_path / "s1")
    assert changed(start, first) == {"adaptor", "cross"}
    module = stage_of("stage2_joint")
    settings = module.Settings(
        **short, out=tmp_path / "s2", previous=str(tmp_path / "s1"), language="lora", lora_rank=2,
        text_held_out_rows=2,
    )  # fmt: skip
    recipe.run(settings, module.stage, module.objective)
    assert changed(first, weights(tmp_path / "s2")) == {"adaptor", "cross", "text"}
    assert vlm.load(tmp_path / "s2").caption([tiny.image()], max_new_tokens=2)


def changed(before, after):
    return {n.split(".")[0] for n in before.keys() & after.keys()
            if not torch.equal(before[n], after[n])}  # fmt: skip


@pytest.mark.parametrize(
    "block", [{}, dict(norm="layer", qk_norm=False, gate="vector", mlp="gelu")], ids=str
)
def test_blocks_compute_in_16_bits(tmp_path, block):
    """fp32 masters of blocks beside a language model in bf16, and a whole model in bf16."""
    stage = dataclasses.replace(training.STAGE, rates=BLOCKS, steps=2)
    losses = []
    for precision in ("fp32", "bf16"):
        chosen = training.cross_attended_model(block=block)
        _, _, history = training.train(
            tmp_path / precision, stage, chosen=chosen, precision=precision
        )
        losses.append([line["loss"] for line in history])
    assert {p.dtype for p in chosen.module.cross.parameters()} == {torch.float32}
    assert {p.dtype for p in chosen.module.text.parameters()} == {torch.bfloat16}
    assert losses[1] == pytest.approx(losses[0], rel=3e-2)
    chosen.module.to(torch.bfloat16).eval()
    rows = [chosen.processor.encode(example) for example in training.examples()[8:12]]
    batch = collate(rows, chosen.processor.pad_id).to("cpu", torch.bfloat16)
    logits = chosen.module(batch)
    assert logits.dtype == torch.bfloat16
    wide = chosen.module.float()(batch.to("cpu", torch.float32))
    assert torch.nn.functional.cosine_similarity(logits.float(), wide).min() > 0.99
