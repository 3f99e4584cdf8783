"""Packed rows: examples end to end, none of which sees another."""

import copy
import dataclasses
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from transformers import CONFIG_MAPPING as CONFIGS
from transformers import AutoModelForCausalLM

from tests import tiny, training
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import IMAGE, Row, collate, collate_packed, pack_rows
from vlm.kernels.packed_attention import (
    NAME,
    Segments,
    read_segments,
    require_segments,
    segment_attention,
)
from vlm.training.activation_checkpointing import checkpoint_activations
from vlm.training.base_settings import deciding
from vlm.training.memory.simulate import SimulatedStep
from vlm.training.objectives.next_token import NextToken
from vlm.training.runs.decoder_only_settings import FromRun, training_data

SHAPES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},  # sliding and full layers by turns, capped scores
    "gemma3_text": {},
    "mistral": dict(sliding_window=8),
    "granite": {},
    "cohere": {},
    "gpt_oss": dict(head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(  # its masks slide, but its attention is not told
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, max_window_layers=0,
        shared_expert_intermediate_size=16, use_sliding_window=True, sliding_window=8,
    ),
    "gpt2": {},  # learned positions
}  # fmt: skip
KINDS = list(SHAPES)
MUCH = 10_000


def model_of(kind, make=tiny.decoder_only):
    if kind == "gpt2":
        made = make()
        none = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        config = CONFIGS[kind](
            vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=512, **none
        )
        torch.manual_seed(0)
        made.text = AutoModelForCausalLM.from_config(config).eval()
        return made
    return make(kind, **SHAPES[kind])


def examples():
    """Two images, text alone, one image, a short row and a long one."""
    return [
        tiny.example("two", (None, "and ", None, "differ how?"), "in colour"),
        tiny.example("text", ("What is the capital of France?",), "Paris"),
        tiny.example("one", (None, "?"), "a dog on a hill"),
        tiny.example("short", ("?",), "a"),
        tiny.example("long", (None, "tell me all of it"), "once upon a time " * 4),
    ]


def rows_for(model):
    made = tiny.processor(model)
    return [made.encode(example) for example in examples()]


def states_of(model, batch):
    """The states of every position, [1, T, D] or [B, T, D]."""
    vectors = model.embed(batch.ids, model.encode(batch.groups), batch.names, batch.bounds)
    return model.read(vectors, batch)


def gradients(model, batches):
    """The loss of batches and its gradients."""
    model.zero_grad()
    totals = {"tokens": sum(int(batch.scored.sum()) for batch in batches)}
    loss = NextToken(256).backward(model, batches, totals, nullcontext)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_packed_losses_and_gradients_are_those_of_padded_rows_and_of_each_alone(kind):
    """Whatever the budget, all gradients, to fp32's rounding."""
    model = model_of(kind).train()
    rows = rows_for(model)
    alone = gradients(model, [collate([row], 256) for row in rows])
    assert_same_gradients(gradients(model, [collate(rows, 256)]), alone)
    for pack in (MUCH, 100):
        batches = NextToken(256, pack).collate(rows)
        assert (len(batches) > 1) == (pack == 100)
        assert_same_gradients(gradients(model, batches), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_no_packed_example_sees_another(kind):
    """Both ways: an example's states have no gradient by another's vectors, and another id
    there changes nothing of them."""
    model = model_of(kind).train()
    batch = collate_packed(rows_for(model)[:3])
    with torch.no_grad():
        vectors = model.embed(batch.ids, model.encode(batch.groups), batch.names, batch.bounds)
    bounds = batch.bounds.tolist()
    for start, stop in pairwise(bounds):
        given = vectors.clone().requires_grad_()
        states = model.read(given, batch)
        chosen = states[:, start:stop]
        (grad,) = torch.autograd.grad((chosen * torch.randn_like(chosen)).sum(), given)
        assert grad[:, start].any()
        assert not grad[:, :start].any()
        assert not grad[:, stop:].any()
        with torch.no_grad():
            given[:, :start] += 1.0
            given[:, stop:] -= 1.0
            again = model.read(given, batch)
        torch.testing.assert_close(again[:, start:stop], chosen, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt_oss"])
@torch.no_grad()
def test_packed_states_are_those_of_transformers_own_mask(kind):
    """The slow twin is a mask of all pairs of positions, which transformers makes by itself where
    positions begin again (for gpt-oss it does not)."""
    model = model_of(kind)
    batch = collate_packed(rows_for(model))
    vectors = model.embed(batch.ids, model.encode(batch.groups), batch.names, batch.bounds)
    decoder = model.text.get_decoder()
    twin = decoder(inputs_embeds=vectors, position_ids=batch.positions, use_cache=False)
    torch.testing.assert_close(
        model.read(vectors, batch), twin.last_hidden_state, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_positions_begin_again_with_each_packed_example():
    """Rotary positions hardly show where they begin: what the model is given is looked at."""
    model = tiny.decoder_only()
    rows = rows_for(model)
    batch = collate_packed(rows)
    given = []
    model.text.get_decoder().register_forward_pre_hook(
        lambda _, args, options: given.append(options["position_ids"]), with_kwargs=True
    )
    states_of(model, batch)
    expected = torch.cat([torch.arange(len(row.ids)) for row in rows])
    assert torch.equal(given[0], expected[None])


def test_packed_batch_says_of_each_position_whose_it_is():
    model = tiny.decoder_only()
    rows = rows_for(model)
    padded, packed = collate(rows, 256), collate_packed(rows)
    assert packed.ids.shape == (1, sum(len(row.ids) for row in rows))
    assert packed.bounds.dtype == torch.int32
    assert packed.names == padded.names
    for field in ("ids", "scored", "prefix", "positions", "example"):
        expected = getattr(padded, field)[padded.valid]
        assert torch.equal(getattr(packed, field)[0], expected), field
    assert torch.equal(packed.targets, padded.targets)
    assert torch.equal(packed.target_rows, padded.target_rows)
    assert torch.equal(packed.to("cpu").bounds, packed.bounds)


def test_first_position_of_a_packed_example_is_no_target():
    """Documents are scored from their first id on, which alone they cannot predict either."""
    rows = [row_of(4), row_of(3)]
    packed = collate_packed(rows)
    assert packed.scored.int().tolist() == [[0, 1, 1, 1, 0, 1, 1]]
    assert rows[1].scored.all()
    objective = NextToken(256)
    for batch in (packed, collate(rows, 256)):
        assert objective.count(batch).totals == {"tokens": 5}


def row_of(length, name="row", scored=True):
    mask = torch.full((length,), scored)
    return Row(name=name, ids=torch.arange(length), scored=mask, views=())


def test_rows_are_packed_into_few_parts_and_none_is_lost():
    """First fit decreasing, the same every time; a row that is longer than the budget is alone."""
    lengths = [3, 9, 4, 12, 7, 5, 6, 1, 10]
    rows = [row_of(length, str(n)) for n, length in enumerate(lengths)]
    parts = pack_rows(rows, 10)
    assert [[len(row.ids) for row in part] for part in parts] == [
        [12], [10], [9, 1], [3, 7], [4, 6], [5]
    ]  # fmt: skip
    assert sorted(row.name for part in parts for row in part) == sorted(row.name for row in rows)
    for part in parts:
        assert [int(row.name) for row in part] == sorted(int(row.name) for row in part)


def test_order_of_packed_rows_changes_no_loss():
    model = tiny.decoder_only().train()
    rows = rows_for(model)
    expected = gradients(model, NextToken(256, 100).collate(rows))
    assert_same_gradients(gradients(model, NextToken(256, 100).collate(rows[::-1])), expected)


def test_count_says_what_a_packed_row_holds():
    model = tiny.decoder_only()
    rows = [*rows_for(model), row_of(9, "mute", scored=False)]
    objective = NextToken(256)
    packed, padded = objective.count(collate_packed(rows)), objective.count(collate(rows, 256))
    assert packed.tokens == packed.positions == padded.tokens < padded.positions
    for field in ("totals", "samples", "images", "unscored"):
        assert getattr(packed, field) == getattr(padded, field), field
    assert packed.unscored == 1


def test_count_mismatch_in_a_packed_row_names_the_example():
    model = tiny.decoder_only()
    rows = rows_for(model)
    short = dataclasses.replace(rows[0], ids=rows[0].ids[rows[0].ids != IMAGE],
                                scored=rows[0].scored[rows[0].ids != IMAGE])  # fmt: skip
    with pytest.raises(ValueError, match="1 rows: two: 0 image positions in the text, 12 image"):
        model(collate_packed([rows[1], short, rows[2]]))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_packed_gradients_are_the_same_where_activations_are_computed_again(kind):
    """The backward pass calls blocks anew, long after the packed row was read."""
    model = model_of(kind).train()
    rows = rows_for(model)
    expected = gradients(model, [collate(rows, 256)])
    checkpoint_activations(model, ("text",))
    assert_same_gradients(gradients(model, [collate_packed(rows)]), expected)
    again = model_of(kind).train()
    again.text.activation_checkpointing_enable()
    assert_same_gradients(gradients(again, [collate_packed(rows)]), expected)
    assert_own_attention(model, kind)


def assert_own_attention(model, kind):
    own = model_of(kind).text.config
    assert model.text.config._attn_implementation == own._attn_implementation != NAME
    assert model.text.config.to_dict() == own.to_dict()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@torch.no_grad()
def test_all_but_packed_rows_keeps_its_own_attention(kind, monkeypatch):
    model = model_of(kind)
    rows = rows_for(model)
    batch = collate(rows, 256)
    prompt = collate(rows, 256, "left")
    before = model(batch), engine.generate(model, prompt, (), 0, max_new_tokens=4)
    twin = copy.deepcopy(model)
    for chosen in (model, twin, copy.deepcopy(model)):
        chosen(collate_packed(rows))
        assert_own_attention(chosen, kind)
        assert torch.equal(chosen(batch), before[0])
        assert engine.generate(chosen, prompt, (), 0, max_new_tokens=4) == before[1]
    norm = model.text.get_decoder().layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(collate_packed(rows))
    assert_own_attention(model, kind)


def test_attention_that_knows_no_examples_fails_and_shows_nothing(monkeypatch):
    """Were ours not put in place again, the model's own could not read what it is given."""
    monkeypatch.setattr("vlm.kernels.packed_attention._enter", lambda *_: None)
    model = tiny.decoder_only().train()
    checkpoint_activations(model, ("text",))
    with pytest.raises(TypeError, match="Segments"):
        gradients(model, [collate_packed(rows_for(model))])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "qwen3"])
def test_prefixes_of_packed_examples_see_themselves_alone(kind):
    """Prompts are read at once, at any distance, and gradients are those of padded rows."""
    model = tiny.prefix_decoder(kind).train()
    made = tiny.processor(model, prefix=True)
    rows = [made.encode(example) for example in examples()]
    alone = gradients(model, [collate([row], 256) for row in rows])
    for pack in (MUCH, 100):
        assert_same_gradients(gradients(model, NextToken(256, pack).collate(rows)), alone)


def test_flash_attention_reads_no_prefix():
    model = tiny.decoder_only()
    model.text.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r'flash attention cannot read a prefix.*"sdpa"'):
        read_segments(
            model.text, torch.zeros(1, 2, 32), torch.tensor([[0, 1]]), torch.tensor([0, 2]),
            torch.tensor([1]),
        )  # fmt: skip


@torch.no_grad()
def test_flash_attention_is_given_the_bounds_and_kept():
    """What flash attention reads, by the names under which transformers hands it on."""
    model = tiny.decoder_only()
    model.text.config._attn_implementation_internal = "flash_attention_2"
    given = {}

    def look(_, args, options):
        given.update(options)
        raise InterruptedError

    model.text.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    batch = collate_packed([row_of(4), row_of(3)])
    with pytest.raises(InterruptedError):
        model(batch)
    assert given.get("attention_mask") is None
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert given[name].tolist() == [0, 4, 7]
    assert given["max_length_q"] == given["max_length_k"] == 4


REFUSED = {
    "falcon": (
        dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
        "does not take its attention from transformers",
    ),
    "lfm2": (
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             layer_types=["conv", "full_attention"]),
        r"mixes positions by more than attention \(conv\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_mix_positions_by_other_means_are_refused(kind):
    options, message = REFUSED[kind]
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(CONFIGS[kind](vocab_size=64, **options))
    with pytest.raises(ValueError, match=f"{message}.*leave --pack out"):
        require_segments(text)
    with pytest.raises(ValueError, match=message):
        read_segments(text, torch.zeros(1, 2, 32), torch.tensor([[0, 1]]), torch.tensor([0, 2]))


def test_rows_of_their_own_are_asked_for_where_they_are_needed():
    model = tiny.decoder_only()
    with pytest.raises(ValueError, match="pad the batch on the left"):
        engine.generate(model, collate_packed(rows_for(model)), (), 0)
    with pytest.raises(ValueError, match="pack must be at least 1, found 0"):
        NextToken(256, 0)


@torch.no_grad()
def test_losses_by_example_are_read_from_a_packed_row():
    model = tiny.decoder_only()
    rows = rows_for(model)
    expected = engine.answer_losses(model, collate(rows, 256))
    found = engine.answer_losses(model, collate_packed(rows))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_packed_states_in_16_bits_are_near_those_in_32():
    model = tiny.decoder_only("qwen3")
    batch = collate_packed(rows_for(model))
    expected = states_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = states_of(model, batch)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.slow
def test_plans_simulate_packed_steps():
    """`vlm plan` knows what packing saves."""
    rows = [*rows_for(tiny.decoder_only()), row_of(300, "text")]
    flops = {}
    for pack in (None, MUCH):
        module = tiny.decoder_only()
        stage = dataclasses.replace(training.STAGE, rates=(("*", 1e-3),))
        simulated = SimulatedStep(module, stage, NextToken(256, pack), torch.bfloat16, gpu=False)
        step = simulated.run([rows], count=True)
        assert step.peak.activations > 0
        flops[pack] = step.flops
    assert flops[MUCH] < flops[None]


def test_packing_is_a_setting_that_decides_nothing_that_is_learned(tmp_path):
    settings = FromRun(previous="none", out=tmp_path, steps=1, batch=1, pack=0)
    assert "pack" not in deciding(settings)
    with pytest.raises(ValueError, match="pack must be at least 1, found 0"):
        training_data(settings)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_run_learns_as_a_padded_one_does_at_full_utilisation(tmp_path, precision):
    _, _, padded = training.train(tmp_path / "padded", precision=precision)
    _, _, packed = training.train(tmp_path / "packed", precision=precision, pack=200)
    assert [line["batch"] for line in packed] == [line["batch"] for line in padded]
    close = 1e-5 if precision == "fp32" else 2e-2
    for ours, theirs in zip(packed, padded):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=close)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5 * close)
        assert ours["scored"] == theirs["scored"]
        assert ours["utilisation"] == 1.0
    assert min(line["utilisation"] for line in padded) < 1.0


@pytest.mark.slow
def test_packed_run_resumes_to_the_same_metrics(tmp_path, monkeypatch):
    """To the bit; and to rounding where it was padded before, since packing is no part of what
    is learned."""
    _, _, expected = training.train(tmp_path / "whole", pack=200)
    for name, before in (("packed", 200), ("padded", None)):
        with monkeypatch.context() as patch:
            patch.setattr(training.Run, "log", dying_at(4, training.Run.log))
            with pytest.raises(InterruptedError):
                training.train(tmp_path / name, pack=before, save_every=2)
        _, progress, found = training.train(tmp_path / name, pack=200, resume=True)
        assert progress.step == training.STAGE.steps
        close = 0 if before else 1e-5
        assert losses(found) == pytest.approx(losses(expected), rel=close, abs=0)


def dying_at(last, log):
    def log_and_die(self, step, figures):
        log(self, step, figures)
        if step == last:
            raise InterruptedError

    return log_and_die


def losses(history):
    return [line["loss"] for line in history]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torchs_varlen_attention_on_a_gpu_is_that_of_each_example():
    torch.manual_seed(0)
    shapes = ((1, 4, 30, 16), (1, 2, 30, 16), (1, 2, 30, 16))
    given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    bounds = torch.tensor([0, 7, 19, 30], device="cuda", dtype=torch.int32)
    row = Segments(bounds=bounds, lengths=(7, 12, 11), prefix=(0, 0, 0), masks=(None, None, None))
    found, _ = segment_attention(torch.nn.Identity(), *given, row)
    expected, _ = segment_attention(torch.nn.Identity(), *(x.float() for x in given), row)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
