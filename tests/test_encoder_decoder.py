import dataclasses
from contextlib import nullcontext

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch.nn import functional as F

from tests import tiny
from tests.encoder_decoders import SHAPES, model, processor, rows, wide
from tests.tiny import image
from vlm import adaptors
from vlm.data.example import BadRow, Example, Skipped, Turn
from vlm.families.decoder_only.batch import collate
from vlm.families.encoder_decoder.module import EncoderDecoder
from vlm.losses.token import token_losses
from vlm.training.objectives.base import sum_totals
from vlm.training.objectives.next_token import NextToken


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_loss_equals_cross_entropy_on_the_unshifted_labels(kind):
    """Id t is predicted from the positions before it, start id first; computed by hand."""
    module = model(kind)
    batch = collate(rows(processor(module), "ab", "a longer one"), 256)
    found = token_losses(module(batch), batch.targets)
    memory = module.encode(batch.groups)
    expected = []
    for row, text in enumerate(["ab", "a longer one"]):
        labels = [*tiny.text_tokenizer()(text)["input_ids"], 258]
        assert batch.ids[row, batch.valid[row]].tolist() == [257, *labels]
        own = memory.rows(torch.tensor([row]))
        for position, label in enumerate(labels):
            logits = module.text(
                input_ids=torch.tensor([[257, *labels[:position]]]),
                encoder_hidden_states=own.tokens, use_cache=False,
            ).logits[0, -1]  # fmt: skip
            expected.append(F.cross_entropy(logits, torch.tensor(label)))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_are_the_same_for_every_split(kind):
    """Texts and images of unequal lengths, whole, in twos, one by one, dealt to two ranks,
    beside autograd on the plain mean over all scored tokens."""
    module = model(kind)
    normal, broad = processor(module), wide(module, (8, 40))
    examples = [*rows(normal, "ab", "a longer one than the others"), *rows(broad, "third", "c")]
    names = [name for name, _ in module.named_parameters()]
    batch = collate(examples, 256)
    expected = token_losses(module(batch), batch.targets).mean()
    grads = torch.autograd.grad(expected, list(module.parameters()), materialize_grads=True)
    objective = NextToken(256)
    for numbers in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]]):
        module.zero_grad()
        parts = [objective.collate([examples[i] for i in part]) for part in numbers]
        counts = [objective.count(batch) for part in parts for batch in part]
        totals = sum_totals(objective.totals, counts)
        loss = sum(objective.backward(module, part, totals, nullcontext) for part in parts)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        for name, grad in zip(names, grads, strict=True):
            found = module.get_parameter(name).grad
            found = torch.zeros_like(grad) if found is None else found
            torch.testing.assert_close(found, grad, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_padding_and_batch_change_no_logit_of_a_row(kind):
    """Right pads, of texts and of memories, change nothing; each row alone is the same."""
    module = model(kind)
    normal, broad = processor(module), wide(module, (8, 40))
    pairs = [*rows(normal, "ab"), *rows(broad, "a longer one"), *rows(normal, "third")]
    batch = collate(pairs, 256)
    assert len(batch.groups) == 2
    assert module.encode(batch.groups).valid.sum(1).tolist() == [6, 20, 6]
    alone = torch.cat([module(collate([row], 256)) for row in pairs])
    torch.testing.assert_close(module(batch), alone, atol=1e-4, rtol=1e-4)
    other = dataclasses.replace(batch, ids=batch.ids.masked_fill(~batch.valid, 7))
    torch.testing.assert_close(module(other), alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_memories_keep_the_order_of_examples_and_views():
    """Groups of several pixel sizes, views of one example after each other."""
    module = model()
    normal, broad = processor(module), wide(module, (4, 8))
    one, two = normal.encode_image(image(1)), broad.encode_image(image(2))
    both = dataclasses.replace(one, views=(*two.views, (one.views[0][0], (1, 0))))
    memory = module.encode(collate([one, both, two], 256).groups)
    assert memory.valid.sum(1).tolist() == [6, 8, 2]
    first, second = (module.encode(collate([row], 256).groups).tokens[0] for row in (one, two))
    torch.testing.assert_close(memory.tokens[0, :6], first)
    torch.testing.assert_close(memory.tokens[1], torch.cat([second, first]))
    torch.testing.assert_close(memory.tokens[2, :2], second)


@pytest.mark.parametrize("kind", ["trocr", "mbart", "bert"])
@torch.no_grad()
def test_later_ids_change_no_earlier_logit_and_images_change_all(kind):
    module = model(kind)
    batch = collate(rows(processor(module), "a cat sat"), 256)
    memory = module.encode(batch.groups)
    plain = module.logits(module.read(batch.ids, memory))
    ids = batch.ids.clone()
    ids[0, 4] += 1
    later = module.logits(module.read(ids, memory))
    torch.testing.assert_close(later[:, :4], plain[:, :4], atol=1e-6, rtol=0)
    assert not torch.allclose(later[:, 4:], plain[:, 4:])
    shown = module.logits(module.read(batch.ids, memory._replace(tokens=memory.tokens.flip(-1))))
    assert ((shown - plain).abs().amax(-1) > 1e-4).all()


def test_every_part_gets_a_gradient_through_a_padded_memory():
    module = model().train()
    batch = collate([*rows(processor(module), "ab"), *rows(wide(module, (8, 40)), "cd")], 256)
    NextToken(256).backward(module, [batch], {"tokens": 6}, nullcontext)
    assert [n for n, p in module.named_parameters() if p.grad is None] == []


def test_end_is_scored_where_pad_and_end_ids_coincide():
    """Positions are told apart by where they stand, never by their id."""
    module = model()
    same = processor(module, pad_id=258)
    batch = collate(rows(same, "ab", "longer"), same.pad_id)
    assert batch.scored.sum(1).tolist() == [3, 7]
    assert batch.targets[2] == 258
    alone = [module(collate([row], 258)) for row in rows(same, "ab", "longer")]
    torch.testing.assert_close(module(batch), torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_text_that_is_too_long_is_dropped_or_cut_and_counted():
    module = model()
    (row,) = rows(processor(module, max_tokens=8), "0123456789")
    assert isinstance(row, Skipped)
    assert row.reason == "12 tokens, the decoder takes 8"
    (row,) = rows(processor(module, max_tokens=8, overflow="shrink"), "0123456789")
    assert (len(row.ids), row.cut) == (8, 4)
    assert row.ids[-1] != 258  # a text that was cut has no end
    assert row.scored.tolist() == [False] + [True] * 7


def characters(text):
    """A tokenizer that knows the characters of `text` alone."""
    names = ["<unk>", "<pad>", "<s>", "</s>", *sorted(set(text))]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", bos_token="<s>",
        eos_token="</s>",
    )  # fmt: skip


def test_characters_outside_the_vocabulary_are_counted_and_named():
    module = model()
    chosen = processor(module, text_tokenizer=characters("abc "))
    assert len(rows(chosen, "ab c")[0].ids) == 6
    with pytest.raises(BadRow, match=r"^r0: the vocabulary lacks 3 .*: '漢', 'é'$"):
        rows(chosen, "a漢bé漢")


def test_pieces_of_ids_join_to_their_text():
    chosen = processor(model())
    ids = [257, *tiny.text_tokenizer()(" né 漢!")["input_ids"], 258]
    assert "".join(chosen.pieces(ids)) == chosen.decode(ids) == "né 漢!"
    assert chosen.pieces(ids) == ("", "", "n", "", "é", " ", "", "", "漢", "!", "")
    assert chosen.pieces([]) == ()


def test_row_needs_a_image_and_a_text():
    chosen = processor(model())
    with pytest.raises(BadRow, match="r: expected an image of the text, found none"):
        chosen.encode(tiny.example("r", ("say",), "it"))
    module = model()
    text_only = dataclasses.replace(rows(chosen, "ab")[0], views=())
    with pytest.raises(ValueError, match=r"an image in every row, found none in 1: \['r0'\]"):
        module(collate([text_only], 256))
    with pytest.raises(ValueError, match="padded on the right"):
        module(collate(rows(chosen, "ab", "longer"), 256, "left"))


ASKED, WRITTEN = Turn("user", (None, "q1")), Turn("assistant", ("a1",))
AGAIN, UNSCORED = Turn("user", ("q2",)), Turn("assistant", ("a1",), scored=False)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            (ASKED, WRITTEN, Turn("user", ("q2",)), Turn("assistant", ("a2",))),
            "one text .* found 2",
        ),
        ((ASKED, UNSCORED, Turn("user", ("q2",)), WRITTEN), "at most one question.* found 2"),
        ((ASKED, UNSCORED), "one text to write, found 0, and 1 that are not scored"),
        ((ASKED,), "one text to write, found 0$"),
    ],
)
def test_row_of_an_encoder_decoder_is_one_question_and_one_text(turns, message):
    with pytest.raises(BadRow, match=f"^r: expected {message}"):
        processor(model()).encode(Example("r", turns, (image(),)))


def test_system_message_is_no_part_of_a_prompt():
    chosen = processor(model())
    told = Example("r", (Turn("system", ("Be brief.",)), ASKED, WRITTEN), (image(),))
    row, plain = chosen.encode(told), chosen.encode(Example("r", (ASKED, WRITTEN), (image(),)))
    assert row.ids.tolist() == plain.ids.tolist()
    assert row.scored.tolist() == plain.scored.tolist()
    assert chosen.decode(row.ids) == "q1a1"


def test_parts_that_do_not_fit_are_refused():
    good = model()
    with pytest.raises(ValueError, match=r"adaptor: expected 12 to 32 wide.*found 10 to 32"):
        EncoderDecoder(
            good.tokenizer,
            adaptors.build(dict(kind="mlp", in_width=10, out_width=32, depth=1, hidden_width=1)),
            good.text,
        )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no cross-attention"):
        EncoderDecoder(good.tokenizer, good.adaptor, tiny.text_model())
    with pytest.raises(ValueError, match="expected BertLMHeadModel with cross-attention"):
        model("bert", add_cross_attention=False)
