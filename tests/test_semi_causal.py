"""Docked text encoders: spans that are read in both directions inside a causal stream (MetaLM)."""

import dataclasses
import shutil
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

import vlm
from tests import docked, tiny, towers, training
from tests.contrastive_models import backbone
from tests.contrastive_runs import assert_close
from tests.runs import launch, lines, stage_of
from vlm.commands.inspect_batch import show_rows
from vlm.data.example import BadRow, Example, NonCausal, Turn
from vlm.data.spans import DrawSpans, InOrder
from vlm.families.decoder_only.batch import IMAGE, collate, collate_packed
from vlm.families.decoder_only.docked_text import require_both_directions
from vlm.losses.token import token_losses
from vlm.text.encoders import TextEncoder
from vlm.training.flop_cost import flop_cost_of
from vlm.training.memory.simulate import SimulatedStep
from vlm.training.objectives.next_token import NextToken
from vlm.training.runs.decoder_only import require_docked
from vlm.weights import same_bits

EVERY = dataclasses.replace(training.STAGE, rates=(("*", 1e-2),))


def rows_of(model, examples=None):
    return [model.processor.encode(example) for example in examples or docked.examples()]


def parts_of(example):
    """A tiny chat's stream in parts, by its own template: (what, part, whether it is scored)."""
    user, assistant = example.turns
    said = [(part, False) for part in ("<|im_start|>user\n", *user.content)]
    said += [("<|im_end|>\n<|im_start|>assistant\n", False)]
    said += [(part, True) for part in (*assistant.content, "<|im_end|>")]
    return said


def stream_of(model, parts, images):
    """Vectors float[T, D] from the equations, and the id to learn at each position or None.

    h(span) = W BERT(span) + b at the span's own tokens; the stream is the embeddings of tokens
    outside of spans, with h(span) and image tokens in their places.
    """
    module, images = model.module, iter(images)
    vectors, targets = [], []
    for part, learned in parts:
        if part is None:
            pixels = torch.stack(model.processor.pixel_spec(next(images)))
            found = module.adaptor(module.tokenizer(pixels)).tokens[0]
            ids = [None] * len(found)
        elif isinstance(part, NonCausal):
            inputs = model.processor.docked.text_tokenizer(part, return_tensors="pt")
            states = module.docked.encoder.backbone(**inputs).last_hidden_state[0, 1:-1]
            connector = module.docked.connector
            found = states @ connector.weight.T + connector.bias
            ids = [None] * len(found)
        else:
            ids = model.processor.text_tokenizer(part)["input_ids"]
            found = module.text.get_input_embeddings()(torch.tensor(ids))
            ids = ids if learned else [None] * len(ids)
        vectors.append(found)
        targets += ids
    return torch.cat(vectors), targets


def slow_twin(model, example):
    """-log p(x_t | all before) at each learned token outside of spans, an example at a time."""
    vectors, targets = stream_of(model, parts_of(example), example.images)
    logits = model.module.text(inputs_embeds=vectors[None]).logits[0]
    losses = [
        F.cross_entropy(logits[t - 1], torch.tensor(id))
        for t, id in enumerate(targets)
        if id is not None
    ]
    return torch.stack(losses)


def ways(rows, pad_id):
    return {
        "alone": [collate([row], pad_id) for row in rows],
        "padded": [collate(rows, pad_id)],
        "packed": [collate_packed(rows)],
    }


@pytest.mark.parametrize("way", ["alone", "padded", "packed"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_loss_and_gradients_are_those_of_the_equations(kind, way):
    model = docked.model(kind=kind)
    twin = torch.cat([slow_twin(model, example) for example in docked.examples()]).mean()
    twin.backward()
    expected = {name: p.grad.clone() for name, p in model.module.named_parameters()}
    model.module.zero_grad()
    batches = ways(rows_of(model), model.processor.pad_id)[way]
    losses = torch.cat([token_losses(model.module(b), b.targets) for b in batches])
    losses.mean().backward()
    torch.testing.assert_close(losses.mean(), twin, rtol=0, atol=1e-5)
    for name, parameter in model.module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-4)
        assert parameter.grad.abs().max() > 0, name


def test_spans_are_never_scored_and_what_follows_them_is():
    model = docked.model()
    both, ends, plain, asked = rows_of(model)
    decode = model.processor.text_tokenizer.decode
    said = [decode(row.ids[row.scored].tolist()) for row in (both, ends, plain, asked)]
    assert said == [
        "a cat mat<|im_end|>",
        " ran over there <|im_end|>",
        "yes<|im_end|>",
        "a horse<|im_end|>",
    ]
    assert [len(row.texts) for row in (both, ends, plain, asked)] == [2, 2, 0, 2]
    assert [len(row.views) for row in (both, ends, plain, asked)] == [1, 1, 0, 1]
    spans = [span for span in both.layout.spans if span.text is not None]
    assert [(span.text, span.length) for span in spans] == [(" in it", 4), (" sat on", 5)]
    for row in (both, ends, plain, asked):
        assert not row.scored[row.ids == IMAGE].any()
        assert int((row.ids == IMAGE).sum()) == sum(span.length for span in row.layout.spans)


@torch.no_grad()
def test_a_span_is_seen_as_a_whole_by_what_follows_it_and_by_nothing_before_it():
    model = docked.model()

    def states(last):
        span = NonCausal(f" sat {last}")
        row = model.processor.encode(docked.example("r", ("what?",), ("a cat", span, " mat")))
        batch = collate([row], model.processor.pad_id)
        images = model.module.encode(batch.groups)
        stream = model.module.embed(batch.ids, images, batch.names)
        return stream[0], model.module.read(stream, batch)[0], row

    one, read_one, row = states("on")
    other, read_other, _ = states("in")
    first = int((row.ids == IMAGE).nonzero()[0])
    assert torch.equal(one[:first], other[:first])
    assert torch.equal(read_one[:first], read_other[:first])
    assert (one[first] - other[first]).abs().max() > 1e-3  # "s" knows how the span ends
    after = int((row.ids == IMAGE).nonzero()[-1]) + 1
    assert torch.equal(one[after:], other[after:])
    assert (read_one[first:] - read_other[first:]).abs().amax(1).min() > 1e-4


def test_documents_have_spans_too():
    model = docked.model()
    text = ("once upon", NonCausal(" a time there"), " was a cat")
    row = model.processor.encode(Example("doc", (Turn("text", text),)))
    whole = model.processor.encode(Example("doc", (Turn("text", ("once upon was a cat",)),)))
    assert torch.equal(row.ids[row.ids != IMAGE], whole.ids)
    assert torch.equal(row.scored, row.ids != IMAGE)
    assert len(row.texts) == 1


@pytest.mark.parametrize("limit", range(60, 108, 4))
def test_rows_are_cut_to_the_context_with_every_span_whole(limit):
    model = docked.model()
    model.processor.overflow = "shrink"
    answer = ("one two", NonCausal(" three"), " four", NonCausal(" five six"), " seven", None)
    given = docked.example("r", (None, "count"), answer[:-1])
    full = model.processor.encode(given)
    model.processor.max_tokens = limit
    row = model.processor.encode(given)
    if not hasattr(row, "ids"):
        assert "no answer is left" in row.reason
        return
    assert len(row.ids) <= limit
    placed = sum(span.length for span in row.layout.spans)
    assert int((row.ids == IMAGE).sum()) == placed
    assert len(row.texts) == sum(span.text is not None for span in row.layout.spans)
    model.module(collate([row], model.processor.pad_id))
    assert torch.equal(row.ids, full.ids[: len(row.ids)])


@pytest.mark.parametrize(("share", "longest"), [(0.1, 5), (0.4, 5), (0.8, 64)])
def test_drawn_spans_are_whole_words_of_a_share_of_what_is_learned(share, longest):
    text = " ".join(f"w{i}" for i in range(40)) + "\n"
    turns = (Turn("user", (None, "w w w")), Turn("assistant", ("no no no",), scored=False),
             Turn("user", ("w w",)), Turn("assistant", (text,)))  # fmt: skip
    example = Example("r", turns, (tiny.image(),))
    draw, drawn_words, lengths = DrawSpans(share=share, longest=longest), 0, set()
    for seed in range(60):
        drawn = draw(example, seed)
        assert drawn == draw(example, seed)
        assert [t.text for t in drawn.turns] == [t.text for t in example.turns]
        assert [t.content for t in drawn.turns[:3]] == [t.content for t in turns[:3]]
        assert drawn.images == example.images
        content = drawn.turns[3].content
        spans = [isinstance(part, NonCausal) for part in content]
        assert not any(a and b for a, b in pairwise(spans))
        words = [len(part.split()) for part, span in zip(content, spans) if span]
        assert all("".join(content).split() == text.split() and w <= longest for w in words)
        assert sum(words) < 40
        drawn_words += sum(words)
        lengths |= set(words)
    assert drawn_words / (60 * 40) == pytest.approx(share, abs=0.03)
    assert lengths >= set(range(1, 6 if share == 0.4 else 4))
    assert len({draw(example, seed).turns[3].content for seed in range(8)}) > 1


def test_short_answers_keep_a_word_and_spans_that_are_there_stay():
    draw = DrawSpans(share=0.9)
    for seed in range(20):
        one = draw(docked.example("r", ("what?",), ("yes",)), seed).turns[1].content
        two = draw(docked.example("r", ("what?",), ("a cat",)), seed).turns[1].content
        assert one == ("yes",)
        assert any(not isinstance(part, NonCausal) for part in two)
        given = (NonCausal("two dogs"), " and a cat")
        kept = draw(docked.example("r", ("what?",), given), seed).turns[1].content
        assert isinstance(kept[0], NonCausal)
        assert kept[0] == "two dogs"
    with pytest.raises(ValueError, match="above 0 and below 1, found 1"):
        DrawSpans(share=1.0)
    document = Example("d", (Turn("text", ("one two three four",)),))
    assert any(isinstance(p, NonCausal) for p in draw(document, 0).turns[0].content)
    both = InOrder((draw, draw))
    assert both(document, 3).turns[0].text == "one two three four"


@torch.no_grad()
def test_answers_after_spans_are_those_of_the_equations_alone_and_in_a_batch():
    model = docked.model()
    together = model.answer_examples(docked.examples(), max_new_tokens=8)
    for example, answer in zip(docked.examples(), together):
        prompt = [part for part in parts_of(example) if not part[1]]
        stream, _ = stream_of(model, prompt, example.images)
        written = []
        while len(written) < 8 and written[-1:] != [model.processor.end_id]:
            logits = model.module.text(inputs_embeds=stream[None]).logits[0, -1]
            written.append(int(logits.argmax()))
            table = model.module.text.get_input_embeddings()
            stream = torch.cat([stream, table(torch.tensor(written[-1:]))])
        assert model.processor.decode(written) == answer
        assert model.answer_examples([example], max_new_tokens=8) == [answer]
    assert len(set(together)) > 1


def test_own_layout_returns_the_model_with_its_docked_encoder(tmp_path):
    model = docked.model(towers.composed(towers.timm_vit()))
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    assert again.processor.docked.max_tokens == docked.LONGEST
    for ours, its in zip(rows_of(model), rows_of(again)):
        assert torch.equal(ours.ids, its.ids)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(ours.texts, its.texts))
    batch = collate(rows_of(again), again.processor.pad_id)
    assert torch.equal(again.module(batch), model.module(batch))


def bert_folder(folder):
    docked.bert().save_pretrained(folder)
    docked.text_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_model_is_composed_with_a_docked_encoder_and_inspected(tmp_path, capsys):
    source = bert_folder(tmp_path / "bert")
    model = vlm.build(dtype="float32", docked=source, text_layers=1)
    assert same_bits(
        model.module.docked.encoder.backbone.state_dict(),
        {k: v for k, v in docked.bert().state_dict().items() if "pooler" not in k},
    )
    assert list(model.module.parts()) == ["tokenizer", "adaptor", "text", "docked"]
    rows = [model.processor.encode(docked.examples()[0])]
    show_rows(rows, model, Console(no_color=True, force_terminal=False, width=300))
    shown = capsys.readouterr().out
    assert "[docked ' in it' × 4]" in shown
    assert "[[a cat]][docked ' sat on' × 5][[ mat<|im_end|>]]" in shown
    assert "9 docked text" in shown
    assert "ids of 2 docked texts: 2 × 16" in shown
    with pytest.raises(ValueError, match="docked needs mask 'causal', found 'prefix'"):
        vlm.build(docked=source, mask="prefix")


def test_stages_say_what_of_a_docked_encoder_learns():
    module, rates = docked.model().module, {}
    for name in ("stage1_adaptor", "stage2_joint", "stage3_sft"):
        recipe = stage_of(name)
        start = {} if name == "stage1_adaptor" else {"previous": "x"}
        for share in (0.0, 0.3):
            settings = recipe.Settings(span_share=share, **start)
            given = dict(recipe.stage(settings, module, 1).rates)
            rates[name, share] = {k: v for k, v in given.items() if k.startswith("docked")}
    frozen = {"docked.*": None}
    assert rates == {
        ("stage1_adaptor", 0.0): frozen,
        ("stage1_adaptor", 0.3): {"docked.connector.*": 3e-3, "docked.encoder.*": None},
        ("stage2_joint", 0.0): frozen,
        ("stage2_joint", 0.3): {"docked.connector.*": 1e-3, "docked.encoder.*": 5e-4},
        ("stage3_sft", 0.0): frozen,
        ("stage3_sft", 0.3): {"docked.connector.*": 6e-4, "docked.encoder.*": 4e-4},
    }


def test_what_cannot_be_docked_or_read_is_named():
    model = docked.model()
    rows = model.processor
    with pytest.raises(BadRow, match=r"long: a non-causal text has 52 tokens, .* takes 48"):
        rows.encode(docked.example("long", ("what?",), (NonCausal("a" * 50), " b")))
    with pytest.raises(BadRow, match=r"none: expected a non-causal text, found '  '"):
        rows.encode(docked.example("none", ("what?",), (NonCausal("  "), "b")))
    undocked = training.model().processor
    with pytest.raises(BadRow, match="both: the row holds a non-causal text, ' in it'"):
        undocked.encode(docked.examples()[0])
    causal = TextEncoder(backbone("llama"), "mean", masked=True)
    with pytest.raises(ValueError, match=r"x: expected .* both directions, .* found LlamaModel"):
        require_both_directions(causal, "x")
    settings = stage_of("stage1_adaptor").Settings
    with pytest.raises(ValueError, match=r"span_share 0\.3: expected a model with a docked"):
        require_docked(settings(span_share=0.3), training.model())
    with pytest.raises(ValueError, match="docked 'x' reads the spans of --span-share, which is 0"):
        require_docked(settings(docked="x"), model)


@pytest.mark.parametrize("pack", [None, 400])
def test_training_is_resumed_with_the_same_spans(tmp_path, pack):
    """Every weight learns, the encoder's too; a run that goes on ends with the same bits."""
    options = dict(stage=EVERY, pack=pack, save_every=3)
    whole, _, history = training.train(
        tmp_path / "whole", chosen=docked.model(), data=docked.split_by_kind(), **options
    )
    before = docked.model().module.state_dict()
    after = training.weights(whole)
    assert all(not torch.equal(after[name], before[name]) for name in after)
    step = "checkpoints/step_00000003"
    shutil.copytree(tmp_path / "whole" / step, tmp_path / "resumed" / step)
    resumed, _, again = training.train(
        tmp_path / "resumed", chosen=docked.model(), data=docked.split_by_kind(), resume=True,
        **options,
    )  # fmt: skip
    assert [line["loss"] for line in again] == [line["loss"] for line in history][3:]
    assert same_bits(training.weights(resumed), after)


def test_losses_do_not_depend_on_the_split(tmp_path):
    history = {}
    for micro_batch in (4, 1):
        stage = dataclasses.replace(EVERY, micro_batch=micro_batch)
        _, _, history[micro_batch] = training.train(
            tmp_path / str(micro_batch), stage, chosen=docked.model(), data=docked.split_by_kind()
        )
    for one, other in zip(history[4], history[1], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["scored"] == one["scored"]


@pytest.mark.slow
@pytest.mark.parametrize("second", ["plain", "spans"])
def test_two_sharded_processes_follow_one_though_the_second_sees_no_image(tmp_path, second):
    """Nor a span, or spans alone: all call the image tokenizer before the docked encoder."""
    whole, _, history = training.train(
        tmp_path / "one", EVERY, chosen=docked.model(), data=docked.split_by_kind(second)
    )
    stage = {"rates": [["*", 1e-2]], "micro_batch": 2}
    done = launch(tmp_path / "two", 2, docked=second, stage=stage, shard="all")
    assert done.returncode == 0, done.stderr[-3000:]
    found = lines(tmp_path / "two")
    for a, b in zip(history, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert_close(torch.load(tmp_path / "two/weights.pt"), training.weights(whole))


def test_spans_count_in_the_cost_of_rows_and_batches():
    model = docked.model()
    cost = flop_cost_of(model.module, (("*", 1e-3),))
    row, plain = rows_of(model)[0], rows_of(model)[2]
    encoder = model.module.docked
    table = encoder.encoder.backbone.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in encoder.parameters()) - table
    without = dataclasses.replace(row, texts=())
    assert cost.of_row(row) - cost.of_row(without) == 2 * 16 * 6 * weights
    assert cost.of_batch(collate_packed([row, plain])) == cost.of_row(row) + cost.of_row(plain)


def test_a_step_with_spans_is_simulated_without_values():
    model = docked.model()
    objective = NextToken(model.processor.pad_id)
    simulated = SimulatedStep(model.module, EVERY, objective, torch.float32, gpu=False)
    rows = rows_of(model)
    spans = simulated.run([rows], count=True)
    none = simulated.run([rows[2:3] * 4], count=True)
    assert spans.flops > none.flops
    assert spans.peak.activations > none.peak.activations


def test_a_cache_of_image_tokens_changes_nothing_beside_spans(tmp_path):
    rates = (("tokenizer.*", None), ("adaptor.*", 1e-2), ("text.*", None), ("docked.*", 1e-2))
    stage, losses = dataclasses.replace(EVERY, rates=rates), []
    for name, folder in (("plain", None), ("cached", tmp_path / "tokens")):
        torch.manual_seed(0)
        chosen = docked.model(towers.composed(towers.timm_vit()))
        _, _, history = training.train(
            tmp_path / name, stage, chosen=chosen, data=docked.split_by_kind(), token_cache=folder
        )
        losses.append([line["loss"] for line in history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert any((tmp_path / "tokens").iterdir())
