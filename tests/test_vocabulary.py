import pytest
import torch

from tests import tiny, towers, training
from vlm import load, vocabulary
from vlm.lora import Lora, add_lora
from vlm.training import stages
from vlm.training.stages import FROZEN, Stage
from vlm.weights import read_weights, same_bits

LOCATIONS = [f"<loc{i:04}>" for i in range(1024)]


def before_and_after(text, tokenizer, tokens):
    """The tables before, the ids, and the language model after."""
    old = {n: p.detach().clone() for n, p in text.named_parameters()}
    return old, vocabulary.grow(text, tokenizer, tokens)


def test_location_tokens_are_one_id_each_and_survive_decoding():
    text, tokenizer = tiny.text_model(), tiny.text_tokenizer()
    ids = vocabulary.grow(text, tokenizer, LOCATIONS)
    assert len(set(ids)) == 1024
    for token, id in zip(LOCATIONS, ids):
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [id]
        assert tokenizer.decode([id], skip_special_tokens=True) == token
    line = "a cat <loc0003><loc1023>, <loc0512>.<|im_end|>"
    found = tokenizer(line, add_special_tokens=False)["input_ids"]
    assert [id for id in found if id in ids] == [ids[3], ids[1023], ids[512]]
    assert tokenizer.decode(found, skip_special_tokens=True) == line.removesuffix("<|im_end|>")


def test_location_tokens_survive_saving_of_the_text_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    text, tokenizer = tiny.text_model(), tiny.text_tokenizer()
    ids = vocabulary.grow(text, tokenizer, LOCATIONS)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.convert_tokens_to_ids(LOCATIONS) == list(ids)
    assert again.decode(ids[:2], skip_special_tokens=True) == "<loc0000><loc0001>"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
def test_tables_grow_and_old_rows_keep_their_bits(kind):
    text, tokenizer = tiny.text_model(kind), tiny.text_tokenizer()
    tied = text.config.tie_word_embeddings
    old, ids = before_and_after(text, tokenizer, LOCATIONS)
    assert ids == tuple(range(259, 259 + 1024))
    inputs, outputs = text.get_input_embeddings().weight, text.get_output_embeddings().weight
    assert (inputs is outputs) == tied
    assert inputs.shape[0] == outputs.shape[0] == text.config.vocab_size == 259 + 1024
    now = dict(text.named_parameters())
    assert all(torch.equal(now[name][:259], table[:259]) for name, table in old.items())


def test_spare_rows_of_a_padded_vocabulary_are_used_first():
    text, tokenizer = tiny.text_model(vocab=300), tiny.text_tokenizer()
    old, ids = before_and_after(text, tokenizer, LOCATIONS[:4])
    table = text.get_input_embeddings().weight
    assert (ids, table.shape[0]) == ((259, 260, 261, 262), 300)
    spare = old["model.embed_tokens.weight"][263:]
    assert torch.equal(table[263:], spare)
    assert not torch.equal(table[259:263], old["model.embed_tokens.weight"][259:263])


def test_new_rows_lie_near_the_mean_of_the_known_and_differ():
    text, tokenizer = tiny.text_model("qwen2"), tiny.text_tokenizer()
    ids = vocabulary.grow(text, tokenizer, LOCATIONS[:64])
    for table in (text.get_input_embeddings().weight, text.get_output_embeddings().weight):
        known, new = table[:259], table[list(ids)]
        distance = (new - known.mean(0)) / known.std(0)
        assert 0.5 < distance.std() / vocabulary.NOISE < 1.5
        assert len(new.unique(dim=0)) == 64


def test_growing_twice_changes_nothing():
    text, tokenizer = tiny.text_model(), tiny.text_tokenizer()
    first = vocabulary.grow(text, tokenizer, LOCATIONS[:8])
    old, again = before_and_after(text, tokenizer, LOCATIONS[:8])
    assert again == first
    assert all(torch.equal(p, old[n]) for n, p in text.named_parameters())
    more = vocabulary.grow(text, tokenizer, LOCATIONS[:9])
    assert more == (*first, first[-1] + 1)
    assert torch.equal(
        text.get_input_embeddings().weight[list(first)],
        old["model.embed_tokens.weight"][list(first)],
    )


def test_growing_leaves_the_global_generator_alone_and_repeats_by_seed():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    tables = []
    for seed in (0, 0, 1):
        text, tokenizer = tiny.text_model(), tiny.text_tokenizer()
        torch.set_rng_state(state)
        vocabulary.grow(text, tokenizer, LOCATIONS[:64], seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        tables.append(text.get_input_embeddings().weight)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_growing_keeps_the_dtype_and_frozen_tables_frozen():
    text, tokenizer = tiny.text_model("qwen2").to(torch.bfloat16), tiny.text_tokenizer()
    text.requires_grad_(False)
    vocabulary.grow(text, tokenizer, LOCATIONS[:64])
    assert {p.dtype for p in text.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in text.parameters())


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (["<a>", ""], "'': empty"),
        (["<a> "], "'<a> ': empty, or blank at an end"),
        (["<a>", "<a>"], "'<a>': given twice"),
        (["<|im_end|>"], "'<|im_end|>': a special token already"),
        (["<é>"], "'<é>': expected id 259 there and back"),
    ],
)
def test_growing_raises_and_changes_nothing_where_a_token_cannot_be(tokens, reason):
    text, tokenizer = tiny.text_model(), tiny.text_tokenizer()
    with pytest.raises(ValueError, match="cannot be new tokens") as caught:
        vocabulary.grow(text, tokenizer, tokens)
    assert reason in str(caught.value)
    assert len(tokenizer) == 259
    assert text.get_input_embeddings().weight.shape[0] == 300


KINDS = ["llama", "qwen2", "gemma3_text", "granite", "cohere"]
NEW = list(range(257, 263))
RATES = (("text.*.new", 1e-1), ("*", FROZEN))


def stage(*rates, **more):
    return Stage(
        **dict(name="t", rates=rates, steps=4, batch=4, micro_batch=4, warmup_steps=0, **more)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_split_rows_give_the_same_outputs_and_generated_ids(kind):
    chosen = training.model(kind=kind)
    batch = towers.batch_for(chosen.module)
    asked = [[tiny.image()]], ["<image> what?"]
    logits, written = chosen.module(batch), chosen.generate(*asked, max_new_tokens=6)
    vocabulary.train_rows(chosen.module.text, NEW)
    torch.testing.assert_close(chosen.module(batch), logits, atol=1e-5, rtol=1e-6)
    assert chosen.generate(*asked, max_new_tokens=6)[0].ids == written[0].ids


@pytest.mark.parametrize("rows", [NEW, [70, 3, 258, 299]], ids=["together", "apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_split_rows_is_that_of_the_whole_table(kind, rows):
    whole, sharded = tiny.decoder_only(kind), tiny.decoder_only(kind)
    vocabulary.train_rows(sharded.text, rows)
    assert not sharded.text.get_input_embeddings().old.requires_grad
    batch = towers.batch_for(whole)
    for module in (whole, sharded):
        towers.loss_of(module, batch).backward()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        expected = getattr(whole.text, get)().weight.grad[sorted(rows)]
        assert float(expected.abs().sum()) > 0
        found = getattr(sharded.text, get)().new.grad
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_training_new_rows_leaves_all_else_its_bits_under_weight_decay(tmp_path, kind, precision):
    chosen = training.model(kind=kind)
    if precision == "bf16":
        chosen.module.to(torch.bfloat16)
    vocabulary.train_rows(chosen.module.text, NEW)
    before = training.weights(chosen)
    plan = stage(*RATES, weight_decay=0.5)
    training.train(tmp_path, plan, chosen=chosen, precision=precision)
    for name, parameter in chosen.module.named_parameters():
        assert torch.equal(parameter, before[name].to(parameter.dtype)) != name.endswith(".new")
        assert parameter.dtype == (torch.float32 if name.endswith(".new") else before[name].dtype)


@pytest.mark.parametrize(("kind", "tables"), [("llama", 1), ("qwen2", 2)])
def test_optimizer_holds_the_new_rows_alone(kind, tables):
    module = tiny.decoder_only(kind)
    vocabulary.train_rows(module.text, NEW)
    plan = stage(*RATES)
    stages.prepare(module, plan, torch.float32)
    optimizer = stages.optimizer_for(module, plan)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [tuple(p.shape) for p in held] == [(len(NEW), 32)] * tables


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_new_rows_train_beside_lora_and_reload_as_ordinary_weights(tmp_path, kind):
    chosen = towers.model(towers.composed(towers.timm_vit(), kind=kind))
    plain = set(chosen.module.state_dict())
    ids = vocabulary.grow(chosen.module.text, chosen.processor.text_tokenizer, LOCATIONS[:64])
    add_lora(chosen.module, {"text": Lora(rank=4)})
    vocabulary.train_rows(chosen.module.text, ids)
    plan = stage(("text.*lora_*", 1e-2), *RATES)
    training.train(tmp_path / "run", plan, chosen=chosen)
    batch = towers.batch_for(chosen.module)
    before = {name: t.clone() for name, t in chosen.module.state_dict().items()}
    with torch.no_grad():
        expected = chosen.module(batch)
    for merge in (True, False):
        folder = tmp_path / f"merge {merge}"
        chosen.save(folder, merge=merge)
        assert same_bits(chosen.module.state_dict(), before)
        assert not any(key.endswith((".new", ".old", ".rows")) for key in read_weights(folder))
        again = load(folder, dtype="float32")
        assert (set(again.module.state_dict()) == plain) == merge
        tables = again.module.text.get_input_embeddings(), again.module.text.get_output_embeddings()
        assert (tables[0].weight is tables[1].weight) == (kind == "llama")
        with torch.no_grad():
            torch.testing.assert_close(again.module(batch), expected, atol=1e-4, rtol=1e-5)
        for token, id in zip(LOCATIONS, ids):
            assert again.processor.text_tokenizer.convert_tokens_to_ids(token) == id


@pytest.mark.slow
def test_a_run_over_new_rows_resumes_to_the_same_rows(tmp_path):
    def sharded():
        chosen = training.model()
        vocabulary.train_rows(chosen.module.text, NEW)
        return chosen

    whole, _, _ = training.train(tmp_path / "whole", stage(*RATES), chosen=sharded())
    training.train(tmp_path / "cut", stage(*RATES), chosen=sharded(), save_every=2)
    newest = tmp_path / "cut/checkpoints/step_00000004"
    newest.rename(tmp_path / "taken_away")
    resumed, progress, _ = training.train(
        tmp_path / "cut", stage(*RATES), chosen=sharded(), resume=True
    )
    assert progress.step == 4
    assert same_bits(training.weights(resumed), training.weights(whole))


def test_a_bias_of_the_head_stays_whole_and_frozen():
    text = tiny.text_model("qwen2")
    text.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 300))
    hidden = torch.randn(5, 32)
    expected = text.lm_head(hidden)
    vocabulary.train_rows(text, [3, 299])
    torch.testing.assert_close(text.get_output_embeddings()(hidden), expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "different ids in 0 to 299, found"),
        ([3, 3], "different ids in 0 to 299, found"),
        ([300], "different ids in 0 to 299, found"),
        ([-1], "different ids in 0 to 299, found"),
    ],
)
def test_rows_that_cannot_be_split_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        vocabulary.train_rows(tiny.text_model(), ids)


def test_parting_twice_and_growing_after_it_are_refused():
    text, tokenizer = tiny.text_model(), tiny.text_tokenizer()
    vocabulary.train_rows(text, [258])
    with pytest.raises(ValueError, match="apart already"):
        vocabulary.train_rows(text, [258])
    with pytest.raises(ValueError, match="add tokens before that"):
        vocabulary.grow(text, tokenizer, ["<a>"])
    assert len(tokenizer) == 259
